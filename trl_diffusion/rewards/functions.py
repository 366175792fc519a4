# Copyright 2026 The trl_diffusion authors
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Black-box rewards as people write them: what of images, prompts and columns a function gets, what it may return."""

import asyncio
import functools
import inspect
import threading
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Set
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn


RESERVED = ("images", "prompts")  # what no column of a dataset may be called
_NAMED = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def check_function(reward: Callable, columns: Collection[str] | None = None) -> None:
    """
    Refuse a function that [`call_function`] could not call.

    Args:
        reward (`Callable`): see [`call_function`].
        columns (`Collection[str]`, *optional*): of the dataset, without "prompt". Where they are not known, a parameter
            that nothing else fills is taken for one of them.

    Raises:
        `TypeError`: a class, or a function that takes neither images nor prompts, or needs something else than these
        and the columns; the message has its signature.
    """
    if inspect.isclass(reward):
        raise TypeError(f"The reward {reward.__name__} is a class. Pass an instance, {reward.__name__}(...).")
    signature = signature_of(reward)
    if signature is None:
        return
    shown = f"{_function_name(reward)}{signature}"
    sources, unfilled = _sources(signature, columns or ())
    if unfilled and columns is not None:
        raise TypeError(
            f"The reward function {shown} cannot be called: {unfilled[0]!r} is neither images nor prompts nor one of the "
            f"dataset's columns {sorted(columns)}. Call its parameters images and prompts, add the column, or give the "
            "parameter a default."
        )
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    takes_more = kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    if not takes_more and not set(RESERVED) & set(sources.values()):
        raise TypeError(
            f"The reward function {shown} takes neither images nor prompts. Write it as "
            f"{_function_name(reward)}(images, prompts, **columns)."
        )


def call_function(
    reward: Callable, images: list[Image.Image], prompts: list[str], columns: Mapping[str, list[Any]]
) -> Any:
    """
    Call a black-box reward with what its signature asks for.

    A parameter called "images", "prompts" or like a column of the dataset gets that, wherever it stands. Parameters
    without a default that have other names get the images and the prompts, in this order, as far as no parameter is
    called so. `**columns` takes all that is left; without it, what the signature does not name is not passed. `*args`
    alone gets images and prompts.

    Args:
        reward (`Callable`): a function, method, partial or object with `__call__`, `async` or not.
        images (`list[PIL.Image]`): B pictures.
        prompts (`list[str]`): B prompts.
        columns (`Mapping[str, list]`): the dataset's other columns, B values each.

    Returns:
        What the reward returned. An awaitable, or a list of them, has been awaited, on one event loop for all calls.
    """
    signature = signature_of(reward)
    if signature is None:  # a built-in function that does not tell
        return _awaited(reward(images, prompts, **columns))
    values = {"images": images, "prompts": prompts, **columns}
    sources, _ = _sources(signature, columns)
    rest = {name: value for name, value in values.items() if name not in sources.values()}
    arguments = {name: values[source] for name, source in sources.items()}
    open_ended = {
        parameter.kind: name for name, parameter in signature.parameters.items() if parameter.kind not in _NAMED
    }
    if inspect.Parameter.VAR_KEYWORD in open_ended:
        arguments[open_ended[inspect.Parameter.VAR_KEYWORD]] = rest
    elif inspect.Parameter.VAR_POSITIONAL in open_ended and not sources:
        arguments[open_ended[inspect.Parameter.VAR_POSITIONAL]] = (images, prompts)
    # `args` reads them in the order of the signature.
    bound = inspect.BoundArguments(
        signature, {name: arguments[name] for name in signature.parameters if name in arguments}
    )
    return _awaited(reward(*bound.args, **bound.kwargs))


def score_list(answer: Any) -> list[Any] | None:
    """
    The scores of an answer as a list: of a tensor or an array of shape `(B,)` or `(B, 1)`, on any device, or of a list,
    tuple, generator or other ordered iterable, whose entries may be tensors or arrays of one element. None where the
    answer is nothing of these.
    """
    if isinstance(answer, torch.Tensor):
        answer = answer.detach().float().cpu().numpy()
    if isinstance(answer, np.ndarray):
        if answer.ndim == 2 and answer.shape[1] == 1:
            answer = answer[:, 0]
        return answer.tolist() if answer.ndim == 1 else None
    if isinstance(answer, str | bytes | Mapping | Set) or not isinstance(answer, Iterable):
        return None
    return [_number(score) for score in answer]


def _number(score: Any) -> Any:
    if isinstance(score, torch.Tensor):
        return score.item() if score.numel() == 1 else score.tolist()
    if isinstance(score, np.ndarray):
        return score.item() if score.size == 1 else score.tolist()
    return score


# ---- Signatures ----


def signature_of(reward: Callable) -> inspect.Signature | None:
    """Of a reward, or of what the objects of a class take; None for a built-in function that has none."""
    # That of a module's __call__ says nothing.
    if inspect.isclass(reward):
        function = reward.forward if issubclass(reward, nn.Module) else reward.__call__
    else:
        function = reward.forward if isinstance(reward, nn.Module) else reward
    try:
        return inspect.signature(function)
    except ValueError:
        return None


def _sources(signature: inspect.Signature, columns: Collection[str]) -> tuple[dict[str, str], list[str]]:
    """What each parameter gets: "images", "prompts" or a column; and the parameters that need a value and get none."""
    parameters = [parameter for parameter in signature.parameters.values() if parameter.kind in _NAMED]
    known = {*RESERVED, *columns}
    sources = {parameter.name: parameter.name for parameter in parameters if parameter.name in known}
    left = [name for name in RESERVED if name not in sources]
    unfilled = []
    for parameter in parameters:
        if parameter.name in sources or parameter.default is not parameter.empty:
            continue
        if left and parameter.kind is not parameter.KEYWORD_ONLY:
            sources[parameter.name] = left.pop(0)
        else:
            unfilled.append(parameter.name)
    return sources, unfilled


def _function_name(reward: Callable) -> str:
    if isinstance(reward, functools.partial):
        return _function_name(reward.func)
    return reward.__name__ if inspect.isroutine(reward) else type(reward).__name__


# ---- Asynchronous rewards ----


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """One for the process, in a thread: clients of services hold on to theirs, and a notebook has one already."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="rewards", daemon=True).start()
    return loop


def _awaited(result: Any) -> Any:
    async def gathered(awaitables: Iterable[Awaitable]) -> list[Any]:
        return list(await asyncio.gather(*awaitables))

    async def one(awaitable: Awaitable) -> Any:
        return await awaitable

    if inspect.isawaitable(result):
        result = asyncio.run_coroutine_threadsafe(one(result), _event_loop()).result()
    if isinstance(result, list | tuple) and result and all(map(inspect.isawaitable, result)):
        result = asyncio.run_coroutine_threadsafe(gathered(result), _event_loop()).result()
    return result
