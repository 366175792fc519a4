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

"""
`trl-diffusion reward-server`: any reward behind HTTP, for training runs on other processes or machines.

```bash
trl-diffusion reward-server --reward hpsv3 --port 8000
trl-diffusion chunk_grpo --reward_funcs remote:http://127.0.0.1:8000 ...
```
"""

import base64
import binascii
import hmac
import io
import ipaddress
import json
import logging
import os
import socket
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import nn

from ..rewards import Reward, check_scores_apart, load_reward, reward_name, score_pictures
from ..rewards.base import RewardOutOfMemoryError
from ..rewards.remote import PNG, TOKEN_VARIABLE
from .errors import OneLineErrors


logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class BadRequest(ValueError):
    """A request that will not get better by being sent again."""


def read_request(body: bytes, max_pixels: int) -> tuple[list[Image.Image], list[str], dict[str, list[Any]]]:
    """
    The images, prompts and columns of a request.

    Args:
        body (`bytes`): JSON, see [`~rewards.RemoteReward`].
        max_pixels (`int`): of all images together; a small file can hold a huge picture.

    Raises:
        [`BadRequest`]: anything else than what is asked for.
    """
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"The request is not JSON: {error}") from error
    if not isinstance(request, dict):
        raise BadRequest('The request must be an object with "images", "prompts" and, if need be, "columns".')
    images, prompts, columns = request.get("images"), request.get("prompts"), request.get("columns", {})
    if not isinstance(images, list) or not images or not all(isinstance(image, str) for image in images):
        raise BadRequest('"images" must be a list of PNG files in base64, at least one.')
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise BadRequest('"prompts" must be a list of texts.')
    if not isinstance(columns, dict) or not all(isinstance(values, list) for values in columns.values()):
        raise BadRequest('"columns" must be an object of lists.')
    for name, values in {"prompts": prompts, **columns}.items():
        if len(values) != len(images):
            raise BadRequest(f"Got {len(values)} {name} for {len(images)} images; give one an image.")
    pixels = 0

    def read_picture(text: str, name: str) -> Image.Image:
        nonlocal pixels
        try:
            # PNG only: one decoder, not the dozens of PIL, reads what comes from outside.
            picture = Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"])
            pixels += picture.width * picture.height
            if pixels > max_pixels:
                raise BadRequest(f"The images of a request may have {max_pixels} pixels together. Send fewer at once.")
            picture.load()
        except (OSError, SyntaxError, binascii.Error, Image.DecompressionBombError) as error:
            raise BadRequest(f"{name} is no PNG in base64: {error}") from error
        return picture

    def read_value(value: Any, name: str) -> Any:
        is_picture = isinstance(value, dict) and value.keys() == {PNG} and isinstance(value[PNG], str)
        return read_picture(value[PNG], name) if is_picture else value

    pictures = [read_picture(text, f"Image {index}") for index, text in enumerate(images)]
    columns = {
        name: [read_value(value, f"Value {index} of column {name!r}") for index, value in enumerate(values)]
        for name, values in columns.items()
    }
    return pictures, prompts, columns


def create_app(
    reward: Reward,
    token: str | None = None,
    device: torch.device | str = "cpu",
    max_request_bytes: int = 256 * 2**20,
    max_pixels: int = 2**28,
):
    """
    The server as an ASGI application.

    `POST /score` answers a request of [`~rewards.RemoteReward`]: 200 with `{"scores": [...]}`, 400 for a malformed
    request, 401 for a wrong token, 413 for one that is too large, 422 where the reward refuses its input, 507 where it
    runs out of memory and 500 where it fails otherwise, all with `{"error": "..."}`. `GET /health` answers 200 without a token.

    Requests are scored one at a time, in the order in which they came; the others wait.

    Args:
        reward (`RewardModel` or `Callable`): what scores; a model on `device`.
        token (`str`, *optional*): what clients must show, as `Authorization: Bearer TOKEN`.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`): where the reward model is.
        max_request_bytes (`int`, *optional*): of the body of a request.
        max_pixels (`int`, *optional*): of all images of a request together.

    Returns:
        `starlette.applications.Starlette`
    """
    import anyio
    from starlette.applications import Starlette
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    # One model on one device: a second thread would only compete for it.
    one_at_a_time = anyio.CapacityLimiter(1)

    def answer(body: bytes) -> list[float | None]:
        pictures, prompts, columns = read_request(body, max_pixels)
        return score_pictures(reward, pictures, prompts, columns, device)

    def failure(status: int, message: str) -> JSONResponse:
        return JSONResponse({"error": message}, status_code=status)

    async def score(request: Request) -> Response:
        shown = request.headers.get("authorization", "")
        if token is not None and not hmac.compare_digest(shown.encode(), f"Bearer {token}".encode()):
            return failure(401, "Wrong or missing token.")
        body = bytearray()
        try:
            async for part in request.stream():
                body += part
                if len(body) > max_request_bytes:
                    return failure(413, f"The request is larger than {max_request_bytes} bytes.")
        except ClientDisconnect:
            return Response(status_code=400)  # nobody reads it
        try:
            scores = await anyio.to_thread.run_sync(answer, bytes(body), limiter=one_at_a_time)
        except BadRequest as error:
            return failure(400, str(error))
        except RewardOutOfMemoryError as error:
            logger.exception("The reward ran out of memory on a request of %d bytes.", len(body))
            return failure(507, str(error))
        except (RuntimeError, TypeError, ValueError) as error:
            logger.exception("A request of %d bytes failed.", len(body))
            # `score_images` wraps what the reward raised. Input that it refuses will be refused again.
            refused = isinstance(error.__cause__ or error, TypeError | ValueError)
            return failure(422 if refused else 500, str(error))
        return JSONResponse({"scores": scores})

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    return Starlette(
        routes=[Route("/score", score, methods=["POST"]), Route("/health", health, methods=["GET"])],
    )


def make_parser() -> OneLineErrors:
    parser = OneLineErrors(
        prog="trl-diffusion reward-server",
        description="Serve a reward over HTTP; training runs use it as --reward_funcs remote:http://HOST:PORT.",
        allow_abbrev=False,
    )
    parser.add_argument("--reward", required=True, help="a reward, as in --reward_funcs, with options too")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; others than loopback need a token")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on; 0 takes a free one")
    parser.add_argument(
        "--token",
        default=os.environ.get(TOKEN_VARIABLE),
        help=f"what clients must show; by default the environment variable {TOKEN_VARIABLE}, which other users of the "
        "machine cannot see in the list of processes",
    )
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where a reward model runs"
    )
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="what a reward model computes in")
    parser.add_argument("--reward-batch-size", type=int, help="images that a reward model scores together")
    parser.add_argument("--max-request-mb", type=int, default=256, help="larger requests are refused")
    return parser


def main(arguments: Sequence[str]) -> int:
    parser = make_parser()
    parsed = parser.parse_args(arguments)
    if parsed.token is not None and not parsed.token.strip():
        parser.error("The token is empty. Give one, or none at all.")
    if parsed.token is None and not _is_loopback(parsed.host):
        parser.error(
            f"--host {parsed.host} can be reached from other machines. Give a --token (or {TOKEN_VARIABLE}), or "
            "listen on 127.0.0.1."
        )
    try:
        import uvicorn
    except ImportError:
        parser.error("The server needs starlette and uvicorn: pip install 'trl_diffusion[reward-server]'")
    options = {
        "dtype": DTYPES.get(parsed.dtype),
        "reward_batch_size": parsed.reward_batch_size,
    }
    with parser.user_errors():
        check_scores_apart(parsed.reward)
        # Before the weights load: a port that is taken should not cost minutes.
        listener = socket.create_server((parsed.host, parsed.port), family=_family(parsed.host))
        reward = load_reward(parsed.reward, **{name: value for name, value in options.items() if value is not None})
    if isinstance(reward, nn.Module):
        reward.to(parsed.device)
    app = create_app(reward, parsed.token, parsed.device, parsed.max_request_mb * 2**20)
    host, port = listener.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    print(f"Serving {reward_name(reward)} at {url} (--reward_funcs remote:{url})", flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])
    return 0


def _family(host: str) -> socket.AddressFamily:
    return socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
