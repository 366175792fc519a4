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

"""What a trainer makes at its construction, from its settings: the model, what samples, and the first conditioning."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from accelerate.logging import get_logger
from datasets import Dataset
from diffusers import DiffusionPipeline
from peft import PeftConfig

from ..data.prompt_images import Prompt, prompt_of, prompts_in
from ..data.sampler import GroupStream
from ..evaluation import evaluation_share
from ..models import Conditioning, FlowModel, Sampler, load_flow_model, open_prompt_store
from ..models.quantization import quantization_config
from ..planning.configurations import configurations_of
from ..planning.plan import Planner
from ..rewards import Reward
from .base_config import DiffusionConfig


logger = get_logger(__name__)

# Weights of a network whose run is planned at its start: smaller ones fit, and a plan takes seconds.
PLANNED_FROM = 100_000_000


def load_model(
    args: DiffusionConfig, model: str | DiffusionPipeline, full_fine_tuning: bool, has_condition_image: bool
) -> FlowModel:
    """The model of a pipeline, or of its id or path, in the dtype that it is trained in."""
    if isinstance(model, DiffusionPipeline):
        flow = load_flow_model(
            model,
            negative_prompt=args.negative_prompt,
            has_condition_image=has_condition_image,
            num_frames=args.num_frames,
        )
    else:
        quantization = None if args.quantization is None else quantization_config(args.quantization)
        flow = load_flow_model(
            model,
            # Full fine-tuning needs float32 master weights; a frozen base does not.
            torch_dtype=torch.bfloat16 if args.bf16 and not full_fine_tuning else torch.float32,
            size=(args.height, args.width),
            negative_prompt=args.negative_prompt,
            has_condition_image=has_condition_image,
            num_frames=args.num_frames,
            **({} if quantization is None else {"quantization_config": quantization}),
        )
    fused_loras = sorted(flow.pipeline.fused_loras)
    if fused_loras:
        logger.warning(
            f"The pipeline has {fused_loras} fused into its weights. What is trained goes on top of that, and the model "
            "card says so: whoever loads the new LoRA loads and fuses them first."
        )
    if flow.undistilled_model is not None:
        logger.warning(
            "The pipeline is distilled, to draw in few steps without guidance, and a training can undo that. Better train "
            f"{flow.undistilled_model}, which it is distilled from, and run the adapter on the distilled model."
        )
    return flow


def make_sampler(
    flow: FlowModel, args: DiffusionConfig, upcoming: Callable[[], Iterable[Prompt]], **options: Any
) -> Sampler:
    """
    What samples by the settings.

    Args:
        flow ([`FlowModel`]): the model.
        args ([`DiffusionConfig`]): settings.
        upcoming (`Callable`): gives the prompts that this process will train.
        **options: passed to [`Sampler.from_settings`].
    """
    store = open_prompt_store(flow, args.prompt_cache_gib) if args.cache_prompt_embeds else None
    encoder_device = torch.device("cpu") if args.encode_on_cpu else args.device
    conditioning = Conditioning(
        flow, args.device, -(-args.prompt_window // args.world_size), store, encoder_device=encoder_device
    )
    conditioning.upcoming = upcoming
    return Sampler.from_settings(
        flow,
        args.num_inference_steps,
        args.height,
        args.width,
        args.guidance_scale,
        args.sigma_shift,
        conditioning,
        args.num_frames,
        batch_size=args.rollout_batch_size or args.per_device_train_batch_size,
        generator_device=args.device,
        **options,
    )


def begin_conditioning(
    conditioning: Conditioning,
    args: DiffusionConfig,
    train_dataset: Dataset | GroupStream,
    eval_dataset: Dataset | None,
) -> None:
    """Encode all prompts where they fit into one window, else those of the evaluations, where these do."""
    if isinstance(train_dataset, Dataset):
        datasets = [train_dataset] if eval_dataset is None else [eval_dataset, train_dataset]
        prompts: dict[Prompt, None] = {}
        for prompt in itertools.chain.from_iterable(map(prompts_in, datasets)):
            prompts[prompt] = None
            if len(prompts) > args.prompt_window:
                break
        else:
            conditioning.keep_all(prompts)
            return
    if eval_dataset is not None:
        share = evaluation_share(args.num_eval_images, args.process_index, args.world_size)
        prompts = dict.fromkeys(prompt_of(eval_dataset[index % len(eval_dataset)]) for index in share)
        if len(prompts) <= conditioning.window:
            conditioning.keep(prompts)


def announce_plan(
    flow: FlowModel,
    args: DiffusionConfig,
    rewards: Sequence[str | dict[str, Any] | Reward],
    peft_config: PeftConfig | Literal[False],
) -> None:
    """
    Print what a run of a large network will need of an accelerator, on the first process.

    Args:
        flow ([`FlowModel`]): the model, not yet prepared for the training.
        args ([`DiffusionConfig`]): settings, likewise.
        rewards (`Sequence`): the rewards or their specifications, those that are watched as well.
        peft_config ([`~peft.PeftConfig`] or `False`): what is trained.
    """
    if args.process_index > 0 or args.workload() is None or flow.denoiser.num_parameters() < PLANNED_FROM:
        return
    if flow.denoiser.config.get("quantization_config") is not None and args.quantization is None:
        return  # quantised by its owner, in a way that is not known here
    try:
        planner = Planner(configurations_of(flow.pipeline), args, rewards, peft_config, args.sharding, args.world_size)
        plan = planner.plan(_memory_of(args.device), with_remedies=False)
    except Exception as error:  # a network may do what only real tensors can: no reason not to train it
        logger.warning(f"What the run needs could not be planned: {type(error).__name__}: {error}")
        return
    # As transformers prints its logs: whatever the level of logging.
    print(f"{plan.summary} `trl-diffusion plan` says of what, and what would lower it.", flush=True)  # noqa: T201


def _memory_of(device: torch.device) -> int | None:
    """Bytes of an accelerator, where it has a memory of its own that PyTorch knows the size of."""
    if device.type in ("cuda", "xpu"):
        return torch.get_device_module(device).mem_get_info(device)[1]
    return None
