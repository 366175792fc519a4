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

"""The model card of a trained adapter or transformer."""

import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..data.videos import FRAMES_PER_SECOND
from ..version import __version__
from .adapter import DIFFUSERS_WEIGHTS_NAME


# The papers that a card can cite: key -> (arXiv number, title, BibTeX entry).
PAPERS = {
    "chunk_grpo": (
        "2510.21583",
        "Sample By Step, Optimize By Chunk: Chunk-Level GRPO For Text-to-Image Generation",
        """@article{luo2025chunkgrpo,
    title   = {{Sample By Step, Optimize By Chunk: Chunk-Level GRPO For Text-to-Image Generation}},
    author  = {Yifu Luo and Penghui Du and Bo Li and Sinan Du and Tiantian Zhang and Yongzhe Chang and Kai Wu and Kun Gai and Xueqian Wang},
    year    = {2025},
    journal = {arXiv preprint arXiv:2510.21583}
}""",
    ),
    "dance_grpo": (
        "2505.07818",
        "DanceGRPO: Unleashing GRPO on Visual Generation",
        """@article{xue2025dancegrpo,
    title   = {{DanceGRPO: Unleashing GRPO on Visual Generation}},
    author  = {Zeyue Xue and Jie Wu and Yu Gao and Fangyuan Kong and Lingting Zhu and Mengzhao Chen and Zhiheng Liu and Wei Liu and Qiushan Guo and Weilin Huang and Ping Luo},
    year    = {2025},
    journal = {arXiv preprint arXiv:2505.07818}
}""",
    ),
    "flow_grpo": (
        "2505.05470",
        "Flow-GRPO: Training Flow Matching Models via Online RL",
        """@article{liu2025flowgrpo,
    title   = {{Flow-GRPO: Training Flow Matching Models via Online RL}},
    author  = {Jie Liu and Gongye Liu and Jiajun Liang and Yangguang Li and Jiaheng Liu and Xintao Wang and Pengfei Wan and Di Zhang and Wanli Ouyang},
    year    = {2025},
    journal = {arXiv preprint arXiv:2505.05470}
}""",
    ),
    "mix_grpo": (
        "2507.21802",
        "MixGRPO: Unlocking Flow-based GRPO Efficiency with Mixed ODE-SDE",
        """@article{li2025mixgrpo,
    title   = {{MixGRPO: Unlocking Flow-based GRPO Efficiency with Mixed ODE-SDE}},
    author  = {Junzhe Li and Yutao Cui and Tao Huang and Yinping Ma and Chun Fan and Miles Yang and Zhao Zhong},
    year    = {2025},
    journal = {arXiv preprint arXiv:2507.21802}
}""",
    ),
    "grpo_guard": (
        "2510.22319",
        "GRPO-Guard: Mitigating Implicit Over-Optimization in Flow Matching via Regulated Clipping",
        """@article{wang2025grpoguard,
    title   = {{GRPO-Guard: Mitigating Implicit Over-Optimization in Flow Matching via Regulated Clipping}},
    author  = {Jing Wang and Jiajun Liang and Jie Liu and Henglin Liu and Gongye Liu and Jun Zheng and Wanyuan Pang and Ao Ma and Zhenyu Xie and Xintao Wang and Meng Wang and Pengfei Wan and Xiaodan Liang},
    year    = {2025},
    journal = {arXiv preprint arXiv:2510.22319}
}""",
    ),
    "flow_dppo": (
        "2606.11025",
        "Flow-DPPO: Divergence Proximal Policy Optimization for Flow Matching Models",
        """@article{ping2026flowdppo,
    title   = {{Flow-DPPO: Divergence Proximal Policy Optimization for Flow Matching Models}},
    author  = {Bowen Ping and Xiangxin Zhou and Penghui Qi and Minnan Luo and Liefeng Bo and Tianyu Pang},
    year    = {2026},
    journal = {arXiv preprint arXiv:2606.11025}
}""",
    ),
    "diffusion_nft": (
        "2509.16117",
        "DiffusionNFT: Online Diffusion Reinforcement with Forward Process",
        """@article{zheng2025diffusionnft,
    title   = {{DiffusionNFT: Online Diffusion Reinforcement with Forward Process}},
    author  = {Kaiwen Zheng and Huayu Chen and Haotian Ye and Haoxiang Wang and Qinsheng Zhang and Kai Jiang and Hang Su and Stefano Ermon and Jun Zhu and Ming-Yu Liu},
    year    = {2025},
    journal = {arXiv preprint arXiv:2509.16117}
}""",
    ),
    "srpo": (
        "2509.06942",
        "Directly Aligning the Full Diffusion Trajectory with Fine-Grained Human Preference",
        """@article{shen2025srpo,
    title   = {{Directly Aligning the Full Diffusion Trajectory with Fine-Grained Human Preference}},
    author  = {Xiangwei Shen and Zhimin Li and Zhantao Yang and Shiyi Zhang and Yingfang Zhang and Donghao Li and Chunyu Wang and Qinglin Lu and Yansong Tang},
    year    = {2025},
    journal = {arXiv preprint arXiv:2509.06942}
}""",
    ),
    "refl": (
        "2304.05977",
        "ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation",
        """@article{xu2023imagereward,
    title   = {{ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation}},
    author  = {Jiazheng Xu and Xiao Liu and Yuchen Wu and Yuxuan Tong and Qinkai Li and Ming Ding and Jie Tang and Yuxiao Dong},
    year    = {2023},
    journal = {arXiv preprint arXiv:2304.05977}
}""",
    ),
    "draft": (
        "2309.17400",
        "Directly Fine-Tuning Diffusion Models on Differentiable Rewards",
        """@article{clark2023draft,
    title   = {{Directly Fine-Tuning Diffusion Models on Differentiable Rewards}},
    author  = {Kevin Clark and Paul Vicol and Kevin Swersky and David J Fleet},
    year    = {2023},
    journal = {arXiv preprint arXiv:2309.17400}
}""",
    ),
}

# The embedded world is addressed by this word instead of a Hub id.
EMBEDDED_MODEL = "shapes"

# Control characters other than white space, and marks that change the direction of the text that follows.
_UNSEEN = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u202a-\u202e\u2066-\u2069]")

# What the usage example of an editing model loads.
IMAGE_PLACEHOLDER = "path/or/url/of/an/image"

_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "datasets")


def hub_id(name: str | None) -> str | None:
    """
    Returns `name` if it is the id of a repository on the Hub (`"owner/name"`), and `None` if it is anything else, such
    as a local path: local paths tell nobody anything, and may hold the name of the user.

    The Hub is not asked, so a well-formed id of a repository that does not exist is returned as well.
    """
    if name is None or name.count("/") != 1 or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def escape(text: str) -> str:
    """Escapes text of unknown origin so that it is shown as it is, on one line, in Markdown, HTML and tables."""
    text = html.escape(" ".join(_UNSEEN.sub("", str(text)).split()), quote=True)
    return re.sub(r"([\\`*_{}\[\]|#~$])", r"\\\1", text)


def _literal(value: Any) -> str:
    if isinstance(value, str):
        # A JSON string is a Python string, but for the escapes of characters beyond the first plane, so those that can be
        # shown stay as they are. A back-quote could end the code block of the card.
        text = json.dumps(" ".join(value.split()), ensure_ascii=False).replace("`", "\\u0060")
        return "".join(letter if letter.isprintable() else f"\\U{ord(letter):08x}" for letter in text)
    return repr(value)


def _number(value: float) -> str:
    return f"{value:.4g}"


def _usage(
    pipeline_class: str,
    base_model: str | None,
    repository: str,
    transformer_class: str | None,
    prompt: str,
    call_arguments: Mapping[str, Any],
    fused_loras: Sequence[str],
    takes_image: bool,
) -> str:
    lines = ["import torch"]
    imported = [] if "num_frames" not in call_arguments else ["from diffusers.utils import export_to_video"]
    base = _literal(base_model or "path/to/the/base/model")
    if transformer_class is not None:
        lines += [
            f"from diffusers import {', '.join(sorted([pipeline_class, transformer_class]))}",
            *imported,
            "",
            f"transformer = {transformer_class}.from_pretrained(",
            f'    {_literal(repository)}, subfolder="transformer", torch_dtype=torch.bfloat16',
            ")",
            f"pipe = {pipeline_class}.from_pretrained({base}, transformer=transformer, torch_dtype=torch.bfloat16)",
        ]
    elif base_model == EMBEDDED_MODEL:
        lines = ["from trl_diffusion import shapes", "", "pipe = shapes.load_pipeline()"]
    else:
        lines += [
            f"from diffusers import {pipeline_class}",
            *imported,
            "",
            f"pipe = {pipeline_class}.from_pretrained({base}, torch_dtype=torch.bfloat16)",
        ]
    if transformer_class is None and fused_loras:
        lines += [
            "# The adapter goes on top of the base model with these fused into it, in the strength of the training."
        ]
        for name in fused_loras:
            lines += [f"pipe.load_lora_weights({_literal(f'path/to/{name}')}, adapter_name={_literal(name)})"]
        lines += ["pipe.fuse_lora()", "pipe.unload_lora_weights()"]
    if transformer_class is None:
        lines += [f"pipe.load_lora_weights({_literal(repository)}, weight_name={_literal(DIFFUSERS_WEIGHTS_NAME)})"]
    if base_model != EMBEDDED_MODEL:
        lines += ['pipe.to("cuda")']
    if takes_image:
        lines.insert(lines.index(""), "from diffusers.utils import load_image")
        lines += [f"source = load_image({_literal(IMAGE_PLACEHOLDER)})"]
    return "\n".join([*lines, *_call(prompt, call_arguments, *_source(takes_image))])


def _source(takes_image: bool) -> list[str]:
    """The argument of the image that a pipeline edits."""
    return ["image=source"] if takes_image else []


def _call(prompt: str, call_arguments: Mapping[str, Any], *more: str) -> list[str]:
    # By name: the first argument of some pipelines is an image.
    arguments = [
        f"prompt={_literal(prompt)}",
        *(f"{name}={_literal(value)}" for name, value in call_arguments.items()),
        *more,
    ]
    lines = [f"    {argument}," for argument in arguments]
    if "num_frames" in call_arguments:
        return [
            "video = pipe(",
            *lines,
            ").frames[0]",
            f'export_to_video(video, "video.mp4", fps={FRAMES_PER_SECOND})',
        ]
    return ["image = pipe(", *lines, ").images[0]"]


def _hybrid(prompt: str, call_arguments: Mapping[str, Any], takes_image: bool) -> str:
    """The steps of `generate(adapter_fraction=0.6)`, in the pipeline of the usage example."""
    return "\n".join(
        [
            "def adapter_for_60_percent(pipe, step, timestep, tensors):",
            "    if step + 1 == round(0.6 * pipe.num_timesteps):",
            "        pipe.disable_lora()",
            "    if step + 1 == pipe.num_timesteps:",
            f"        pipe.enable_lora()  # for the next {'video' if 'num_frames' in call_arguments else 'image'}",
            "    return tensors",
            "",
            "",
            *_call(prompt, call_arguments, *_source(takes_image), "callback_on_step_end=adapter_for_60_percent"),
        ]
    )


def build_model_card(
    model_name: str,
    pipeline_class: str,
    base_model: str | None = None,
    hub_model_id: str | None = None,
    dataset_name: str | None = None,
    trainer_name: str = "ChunkGRPOTrainer",
    papers: Sequence[str] = ("chunk_grpo",),
    rewards: Mapping[str, float] | None = None,
    watched_rewards: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
    call_arguments: Mapping[str, Any] | None = None,
    prompt: str = "a photo of a cat",
    metrics: Mapping[str, Mapping[str, tuple[float, float, float]]] | None = None,
    metrics_note: str | None = None,
    images: Mapping[str, str] | None = None,
    samples: Mapping[str, str] | None = None,
    license: Mapping[str, str] | None = None,
    transformer_class: str | None = None,
    fused_loras: Sequence[str] = (),
    undistilled_model: str | None = None,
    distilled_model: str | None = None,
    takes_image: bool = False,
    tags: Sequence[str] = (),
) -> ModelCard:
    """
    Builds the model card of a model that a trainer of this package has trained. Needs no network.

    Names and prompts may hold any characters: they are escaped where they are shown, and quoted in the metadata.

    Args:
        model_name (`str`):
            Name of the model, the card's title.
        pipeline_class (`str`):
            Name of the pipeline's class, e.g. `"FluxPipeline"`.
        base_model (`str`, *optional*):
            What the training started from. Named on the card if it is a Hub id or `"shapes"`; a local path is not.
        hub_model_id (`str`, *optional*):
            Repository of the model, `"owner/name"`. `None` shows a placeholder in the usage example.
        dataset_name (`str`, *optional*):
            Dataset of the prompts. Named on the card if it is a Hub id or `"shapes"`.
        trainer_name (`str`, *optional*, defaults to `"ChunkGRPOTrainer"`):
            Class of the trainer.
        papers (`Sequence[str]`, *optional*, defaults to `("chunk_grpo",)`):
            Keys of `PAPERS`: the method first, then what it is built on.
        rewards (`Mapping[str, float]`, *optional*):
            Name and weight of each reward that was trained.
        watched_rewards (`Sequence[str]`, *optional*):
            Names of the rewards that were measured but not trained.
        settings (`Mapping[str, Any]`, *optional*):
            Settings of the training that the card lists. Pass what a reader needs to repeat the training, and no paths.
        call_arguments (`Mapping[str, Any]`, *optional*):
            Arguments of the pipeline's call in the usage example, e.g. `{"height": 720, "guidance_scale": 3.5}`. With
            `num_frames` among them the model makes videos.
        prompt (`str`, *optional*):
            Prompt of the usage example.
        metrics (`Mapping`, *optional*):
            Results, `{"base": {measure: (mean, low, high)}, "aligned": {...}}`, with the same measures in both; low and
            high are NaN where there is no interval.
        metrics_note (`str`, *optional*):
            One sentence below the results: what was measured and how.
        images (`Mapping[str, str]`, *optional*):
            Pictures to show: file name, relative to the card, and caption.
        samples (`Mapping[str, str]`, *optional*):
            Pictures of the model for the gallery: file name, relative to the card, and prompt.
        license (`Mapping[str, str]`, *optional*):
            `license` and, for one that the Hub does not know, `license_name` and `license_link`; see
            [`~trl_diffusion.hub.inherited_license`].
        transformer_class (`str`, *optional*):
            Name of the transformer's class if the whole transformer was trained; `None` for a LoRA.
        fused_loras (`Sequence[str]`, *optional*):
            Names of the adapters that were fused into the base model before the training.
        undistilled_model (`str`, *optional*):
            Hub id of the model that the base model is distilled from.
        distilled_model (`str`, *optional*):
            Hub id of the model that is distilled from the base model.
        takes_image (`bool`, *optional*, defaults to `False`):
            Whether the pipeline edits an image.
        tags (`Sequence[str]`, *optional*):
            More tags for the metadata.

    Returns:
        [`~huggingface_hub.ModelCard`]: the card, to be written with its `save` method.

    Raises:
        `ValueError`: for an unknown paper, or a picture that is not named by a relative path.
    """
    unknown = [paper for paper in papers if paper not in PAPERS]
    if unknown:
        raise ValueError(f"papers has {unknown}, which are not known. Choose from {list(PAPERS)}.")
    for argument, names in (("images", images), ("samples", samples)):
        for name in names or {}:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name or ":" in name:
                raise ValueError(f"{argument} has {name!r}, which is no path relative to the card. Pass a file name.")

    base_id = hub_id(base_model)
    if base_model == EMBEDDED_MODEL:
        base_text = "the small FLUX model that is part of trl_diffusion"
    elif base_id is not None:
        base_text = f"[{escape(base_id)}](https://huggingface.co/{base_id})"
    else:
        base_text = f"a local {escape(pipeline_class)} model"
    if fused_loras:
        base_text += f" with {', '.join(map(escape, fused_loras))} fused into its weights"
    dataset_id = hub_id(dataset_name)
    if dataset_name == EMBEDDED_MODEL:
        dataset_text = "the prompts of the small world that is part of trl_diffusion"
    elif dataset_id is not None:
        dataset_text = f"the prompts of [{escape(dataset_id)}](https://huggingface.co/datasets/{dataset_id})"
    else:
        dataset_text = None

    is_lora = transformer_class is None
    is_video = "num_frames" in (call_arguments or {})
    task = "image-to-image" if takes_image else "text-to-video" if is_video else "text-to-image"
    card_data = ModelCardData(
        base_model=base_id,
        base_model_relation=None if base_id is None else ("adapter" if is_lora else "finetune"),
        datasets=None if dataset_id is None else [dataset_id],
        library_name="diffusers",
        **(license or {}),
        pipeline_tag=task,
        tags=list(
            dict.fromkeys(
                [
                    task,
                    "diffusers",
                    *(["lora", "template:sd-lora"] if is_lora else ["diffusers-training"]),
                    "trl",
                    "trl_diffusion",
                    *[paper.replace("_", "-") for paper in papers[:1]],
                    *tags,
                ]
            )
        ),
        # The Hub shows these in place of `<Gallery />`.
        widget=[{"text": prompt, "output": {"url": name}} for name, prompt in (samples or {}).items()] or None,
    )

    rows = []
    if metrics is not None:
        for measure, base in metrics["base"].items():
            cells = [escape(measure)]
            for mean, low, high in (base, metrics["aligned"][measure]):
                interval = "" if math.isnan(low) else f" ({_number(low)} to {_number(high)})"
                cells.append(_number(mean) + interval)
            rows.append(cells)

    return ModelCard.from_template(
        card_data,
        template_str=(files(__package__) / "model_card_template.md").read_text(encoding="utf-8"),
        title=escape(model_name),
        kind="LoRA adapter" if is_lora else "fine-tuned transformer",
        base_text=base_text,
        dataset_text=dataset_text,
        trainer_name=escape(trainer_name),
        papers=[PAPERS[paper] for paper in papers],
        usage=_usage(
            pipeline_class=pipeline_class,
            base_model=base_model if base_model == EMBEDDED_MODEL else base_id,
            repository=hub_id(hub_model_id) or "path/to/this/folder",
            transformer_class=transformer_class,
            prompt=prompt,
            call_arguments=call_arguments or {},
            fused_loras=fused_loras,
            takes_image=takes_image,
        ),
        undistilled_model=undistilled_model,
        distilled_model=distilled_model if is_lora else None,
        things="videos" if is_video else "images",
        hybrid=_hybrid(prompt, call_arguments or {}, takes_image) if is_lora and "chunk_grpo" in papers else None,
        gallery=bool(samples),
        images={name.replace(" ", "%20"): escape(caption) for name, caption in (images or {}).items()},
        metrics=rows,
        metrics_note=None if metrics_note is None else escape(metrics_note),
        rewards={escape(name): _number(weight) for name, weight in (rewards or {}).items()},
        watched_rewards=[escape(name) for name in watched_rewards],
        settings={escape(name): escape(value) for name, value in (settings or {}).items()},
        versions={"trl_diffusion": __version__, **{name: version(name) for name in _PACKAGES}},
    )
