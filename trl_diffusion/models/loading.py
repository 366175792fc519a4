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

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import patch_environment
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from huggingface_hub import try_to_load_from_cache
from transformers.integrations import deepspeed

from .. import shapes
from ..paths import check_exists, not_found
from .base import FlowModel, check_multiple
from .chroma import ChromaFlowModel
from .flux import FluxFlowModel
from .flux2 import Flux2FlowModel, Flux2KleinFlowModel
from .flux_kontext import FluxKontextFlowModel
from .krea2 import Krea2FlowModel
from .passed import make_plain
from .qwen_image import QwenImageFlowModel
from .qwen_image_edit import QwenImageEditFlowModel, QwenImageEditPlusFlowModel
from .sana import SanaFlowModel
from .sd3 import SD3FlowModel
from .wan import WanFlowModel
from .z_image import ZImageFlowModel


FLOW_MODELS: dict[str, type[FlowModel]] = {
    model_class.pipeline_class.__name__: model_class
    for model_class in (
        FluxFlowModel,
        SD3FlowModel,
        QwenImageFlowModel,
        ChromaFlowModel,
        SanaFlowModel,
        Krea2FlowModel,
        Flux2FlowModel,
        Flux2KleinFlowModel,
        ZImageFlowModel,
        FluxKontextFlowModel,
        QwenImageEditPlusFlowModel,
        QwenImageEditFlowModel,
        WanFlowModel,
    )
}
"""The supported families: pipeline class name to [`FlowModel`]."""


@contextlib.contextmanager
def whole_weights() -> Iterator[None]:
    """
    Load models whole on every process, whatever the training is sharded with.

    Once training arguments with DeepSpeed ZeRO-3 exist, `from_pretrained` of transformers partitions every model it
    loads: a frozen one is then left with weights of shape `(0,)`. With FSDP's CPU-efficient loading, only the first
    process of a machine initialises all of a model. Both switches are off inside this context and restored after it.
    """
    # transformers has a public setter and no public getter for the configuration object.
    reference = deepspeed._hf_deepspeed_config_weak_ref
    config = None if reference is None else reference()
    deepspeed.unset_hf_deepspeed_config()
    try:
        with patch_environment(FSDP_CPU_RAM_EFFICIENT_LOADING="false"):
            yield
    finally:
        if config is not None:
            deepspeed.set_hf_deepspeed_config(config)


def euler_of(scheduler: SchedulerMixin) -> SchedulerMixin:
    """
    The Euler scheduler of a flow with the shift of one that solves it by several steps at once, in which a step is no
    transition with a probability; any other scheduler as it is.

    The sigmas are those of the published scheduler but for its smallest unshifted one, 1 / 1000, which Euler's has not:
    before the shift, with T steps, Euler's k-th is 1 - k / T, that of DPM-Solver++ 0.999 (1 - k / T), and that of UniPC
    1 - 0.999 k / T. Nor are times rounded to integers. (Where a pipeline passes no sigmas to its scheduler, as Wan's, Euler's
    own go from 1 to its smallest in equal steps.)
    """
    config = scheduler.config
    if not isinstance(scheduler, DPMSolverMultistepScheduler | UniPCMultistepScheduler):
        return scheduler
    if config.prediction_type != "flow_prediction" or not config.use_flow_sigmas or config.use_dynamic_shifting:
        return scheduler
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=config.num_train_timesteps, shift=config.flow_shift)


def load_flow_model(
    model: str | os.PathLike | DiffusionPipeline,
    torch_dtype: torch.dtype | None = None,
    size: tuple[int | None, int | None] = (None, None),
    negative_prompt: str | None = None,
    has_condition_image: bool | None = None,
    num_frames: int | None = None,
    **kwargs: Any,
) -> FlowModel:
    """
    Make a [`FlowModel`] of a pipeline.

    An unsupported family, a wrong path or an impossible size or number of frames is refused before any weights load.

    Args:
        model (`str`, `os.PathLike` or [`~diffusers.DiffusionPipeline`]):
            Id of a pipeline on the Hub, path of one saved with `save_pretrained`, `"shapes"` for the embedded world,
            or a loaded pipeline, which [`~trl_diffusion.models.passed.make_plain`] changes in place.
        torch_dtype (`torch.dtype`, *optional*):
            Dtype of all weights. By default float32, whatever they were saved in. Not for a loaded pipeline.
        size (`tuple`, *optional*):
            Height and width in pixels that the model will be used at, to be checked; `None` is the model's default.
        negative_prompt (`str`, *optional*):
            What true guidance leads away from; the empty prompt if `None`.
        has_condition_image (`bool`, *optional*):
            Whether prompts come with images to edit, to be checked; `None` is not known yet.
        num_frames (`int`, *optional*):
            Frames of the videos that the model will be used for, to be checked; `None` is the model's default.
        **kwargs:
            Passed to the pipeline's `from_pretrained`, as `revision`, `variant` or `quantization_config`. Not for a
            loaded pipeline.

    Returns:
        [`FlowModel`]: everything frozen and in eval mode, on the device where it was loaded.

    Raises:
        `ValueError`: if there is no pipeline at `model`, its family is not supported or has no use for a negative prompt
        or an image, or needs one, or loading arguments are given for a loaded pipeline.
    """
    if isinstance(model, DiffusionPipeline):
        if torch_dtype is not None or kwargs:
            given = sorted(kwargs) + (["torch_dtype"] if torch_dtype is not None else [])
            raise ValueError(f"{given} only apply to a model that is still to be loaded, not to a loaded pipeline.")
        flow_model_class = _family_of(type(model).__name__, model)
        if has_condition_image is not None:
            flow_model_class.check_condition_image(has_condition_image)
        flow_model_class.check_num_frames(num_frames)
        make_plain(model)
        model.scheduler = euler_of(model.scheduler)
        flow_model = flow_model_class(model)
        if negative_prompt is not None:
            flow_model.negative_prompt = negative_prompt
        return flow_model
    if model == "shapes":
        # FluxPipeline takes 128 latents a side for its default whatever it loads; this one draws smaller pictures.
        flow_model = load_flow_model(
            shapes.pipeline_path(),
            torch_dtype,
            negative_prompt=negative_prompt,
            has_condition_image=has_condition_image,
            num_frames=num_frames,
            **kwargs,
        )
        flow_model.pipeline.default_sample_size = shapes.IMAGE_SIZE // flow_model.pipeline.vae_scale_factor
        return flow_model
    hub_arguments = {"revision", "token", "cache_dir", "local_files_only", "force_download", "proxies"}
    hub_kwargs = {name: value for name, value in kwargs.items() if name in hub_arguments}
    check_exists(model)
    if os.path.isfile(model):
        raise ValueError(
            f"{str(model)!r} is a file; a pipeline is a folder with a model_index.json, or an id on the Hub."
        )
    try:
        config = DiffusionPipeline.load_config(model, **hub_kwargs)
    except OSError as error:
        reason = str(error) if os.path.isdir(model) else not_found(model, error)
        raise ValueError(
            f"No pipeline could be read from {str(model)!r}: {reason} Pass the id of a pipeline on the Hub, the path "
            f'of a folder with a model_index.json, a loaded pipeline, or "shapes". '
            f"Supported: {', '.join(FLOW_MODELS)}."
        ) from error
    flow_model_class = _family_of(config.get("_class_name"), model)
    flow_model_class.check_pipeline(config)
    if has_condition_image is not None:
        flow_model_class.check_condition_image(has_condition_image)
    flow_model_class.check_num_frames(num_frames)
    if size != (None, None):
        vae_config = AutoencoderKL.load_config(model, subfolder="vae", **hub_kwargs)
        multiple = flow_model_class.vae_downsample(vae_config) * flow_model_class.patch_size
        check_multiple(size[0] or multiple, size[1] or multiple, multiple, flow_model_class.pipeline_class.__name__)
    flow_model_class.check_negative_prompt(negative_prompt)
    # Those that are not given.
    names = [name for name in config if name.startswith("text_encoder") and name not in kwargs]
    # Of a part [library, class]; of one that the pipeline is without, twice None. Krea 2 has a list of layers too.
    names = [name for name in names if isinstance(config[name][0], str)]

    def load(**components: None) -> DiffusionPipeline:
        with whole_weights():
            return flow_model_class.pipeline_class.from_pretrained(
                model, torch_dtype=torch_dtype, **components, **kwargs
            )

    def load_text_encoders() -> dict[str, torch.nn.Module]:
        others = {name: None for name in pipeline.components if name not in names and name not in kwargs}
        loaded = load(**others).components
        return {name: loaded[name] for name in names}

    pipeline = load(**dict.fromkeys(names))
    flow_model = load_flow_model(pipeline, negative_prompt=negative_prompt)
    flow_model.source = f"{_source(model, flow_model_class.takes_image, **hub_kwargs)} in {torch_dtype}"
    if names:
        flow_model.load_text_encoders = load_text_encoders
    return flow_model


def _source(model: str | os.PathLike, takes_image: bool, **hub_kwargs: Any) -> str:
    """
    What the text encoders and tokenizers of a pipeline are, and the VAE where it encodes images, without reading their
    weights: repository and commit, or names, sizes and times of files.
    """
    if not Path(model).is_dir():
        # The cache's folder of a snapshot has the commit's name.
        arguments = {name: value for name, value in hub_kwargs.items() if name in ("revision", "cache_dir")}
        return f"{model}@{Path(try_to_load_from_cache(str(model), 'model_index.json', **arguments)).parent.name}"
    parts = ("text_encoder", "tokenizer", "processor", *(["vae"] if takes_image else []))
    files = [
        (path.relative_to(model).as_posix(), path.stat().st_size, path.stat().st_mtime_ns)
        for part in sorted(Path(model).iterdir())
        if part.is_dir() and part.name.startswith(parts)
        for path in sorted(part.rglob("*"))
        if path.is_file()
    ]
    return json.dumps([str(Path(model).resolve()), files])


def _family_of(pipeline_class_name: str | None, model: object) -> type[FlowModel]:
    if pipeline_class_name not in FLOW_MODELS:
        origin = "" if isinstance(model, DiffusionPipeline) else f" of {str(model)!r}"
        raise ValueError(
            f"The pipeline class {pipeline_class_name}{origin} is not supported. Supported: {', '.join(FLOW_MODELS)}."
        )
    return FLOW_MODELS[pipeline_class_name]
