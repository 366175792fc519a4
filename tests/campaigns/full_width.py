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
One step of each trainer at the full width of FLUX.1-dev and Qwen-Image, with random weights: one block of each kind, one layer
of each text encoder, the whole VAE and, for SRPO, a tower of HPSv2.1's size.

```bash
PYTHONPATH=tests python tests/campaigns/full_width.py                        # every size, dtype, family and trainer
PYTHONPATH=tests python tests/campaigns/full_width.py --all                  # all 16 combinations of them
PYTHONPATH=tests python tests/campaigns/full_width.py --sizes 64x96 --dtypes float32 --families qwen_image
```

Each case runs in a process of its own. The loss is finite, the LoRA changes and nothing else does, the reward sees pictures
of the size, and the ratio of Chunk-GRPO is exactly 1.

A CPU without bfloat16 instructions multiplies bfloat16 a hundred times more slowly than float32. There, products and
convolutions of bfloat16 values are accumulated in float32 and rounded to bfloat16, as a GPU does; all else, what is kept and
what is handed on stays in bfloat16.
"""

import argparse
import contextlib
import itertools
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
import zlib

import diffusers
import torch
from campaigns.tiny_runs import Warmth
from datasets import Dataset
from diffusers import DiffusionPipeline
from peft import LoraConfig
from tiny_models import clip_tokenizer, t5_tokenizer, tiny_flux_pipeline, tiny_qwen_image_pipeline
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import (
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    T5Config,
    T5EncoderModel,
)

from trl_diffusion import ChunkGRPOConfig, ChunkGRPOTrainer, SRPOConfig, SRPOTrainer
from trl_diffusion.planning.published import PUBLISHED
from trl_diffusion.rewards import TwoTowerReward
from trl_diffusion.rewards.hpsv2 import OFFICIAL_SIZES, HPSv2Reward, clip_config


FAMILIES = {"flux": "black-forest-labs/FLUX.1-dev", "qwen_image": "Qwen/Qwen-Image"}
TINY = {"flux": tiny_flux_pipeline, "qwen_image": tiny_qwen_image_pipeline}
TRAINERS = ("chunk_grpo", "srpo")
SIZES = ("720x720", "512x768")
DTYPES = ("float32", "bfloat16")
PROMPTS = ["a cat", "a red house on a hill, and two trees"]
GIB = 2**30


def full_width(family: str) -> DiffusionPipeline:
    """A pipeline of the published sizes with one block of each kind, in the default dtype, with the tokenizers of the tiny one."""
    components = dict(TINY[family](seed=0).components)
    published = PUBLISHED[FAMILIES[family]]["parts"]
    (transformer, config), (vae, vae_config) = published["transformer"], published["vae"]
    layers = {"num_layers": 1, **({"num_single_layers": 1} if family == "flux" else {})}
    torch.manual_seed(0)
    components["transformer"] = getattr(diffusers, transformer)(**{**config, **layers})
    components["vae"] = getattr(diffusers, vae)(**vae_config)
    if family == "flux":
        clip, t5 = clip_tokenizer(77), t5_tokenizer(512)
        components |= {"tokenizer": clip, "tokenizer_2": t5}
        components["text_encoder"] = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(clip), hidden_size=768, intermediate_size=3072, num_hidden_layers=1,
                num_attention_heads=12, projection_dim=768, eos_token_id=clip.eos_token_id, bos_token_id=clip.bos_token_id,
                pad_token_id=clip.pad_token_id,
            )
        )  # fmt: skip
        components["text_encoder_2"] = T5EncoderModel(
            T5Config(
                vocab_size=len(t5), d_model=4096, d_kv=64, d_ff=10240, num_layers=1, num_heads=64,
                feed_forward_proj="gated-gelu",
            )
        )  # fmt: skip
    else:
        tiny = components["text_encoder"].config.to_dict()
        text = {
            **tiny["text_config"], "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 1,
            "num_attention_heads": 28, "num_key_value_heads": 4, "layer_types": ["full_attention"],
            "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
        }  # fmt: skip
        vision = {**tiny["vision_config"], "out_hidden_size": 3584}
        tokens = {name: tiny[name] for name in tiny if name.endswith("_token_id")}
        components["text_encoder"] = Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens)
        )
    pipeline = getattr(diffusers, PUBLISHED[FAMILIES[family]]["pipeline_class"])(
        **{name: part for name, part in components.items() if part is not None}
    )
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    return pipeline


class SizedWarmth(Warmth):
    """Keeps the sizes of what it was shown."""

    def __init__(self):
        super().__init__()
        self.sizes: set[tuple[int, int]] = set()

    def score(self, images, prompts):
        self.sizes.add(tuple(images.shape[-2:]))
        return super().score(images, prompts)


class RandomTower(HPSv2Reward):
    """A network of HPSv2.1's size, or a small one, with random weights; keeps the sizes of what it was shown."""

    def __init__(self, dtype: torch.dtype, small: bool):
        TwoTowerReward.__init__(self, dtype)
        self.sizes: set[tuple[int, int]] = set()
        self.tokenizer = clip_tokenizer(77)
        fewer = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64} if small else {}
        text = {**OFFICIAL_SIZES["text"], **fewer, "eos_token_id": self.tokenizer.eos_token_id}
        sizes = {**OFFICIAL_SIZES, "vision": {**OFFICIAL_SIZES["vision"], **fewer}, "text": text}
        self.model = CLIPModel(clip_config(sizes)).to(self.dtype)
        self.freeze()

    def image_features(self, images):
        self.sizes.add(tuple(images.shape[-2:]))
        return super().image_features(images)


class AccumulateInFloat32(TorchDispatchMode):
    """Products of bfloat16 on the CPU are computed in float32 and rounded: what a GPU's bfloat16 units do."""

    PRODUCTS = {
        "mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "convolution", "convolution_backward", "conv2d", "conv3d",
        "scaled_dot_product_attention", "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention_for_cpu_backward",
    }  # fmt: skip

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.overloadpacket.__name__ not in self.PRODUCTS:
            return function(*args, **kwargs)
        bfloat16 = False

        def widened(tensor):
            nonlocal bfloat16
            if tensor.dtype != torch.bfloat16 or tensor.device.type != "cpu":
                return tensor
            bfloat16 = True
            return tensor.float()

        args, kwargs = tree_map_only(torch.Tensor, widened, (args, kwargs))
        found = function(*args, **kwargs)
        if not bfloat16:
            return found
        if function.overloadpacket.__name__ == "_scaled_dot_product_flash_attention_for_cpu":
            output, logsumexp = found  # the second is float32 whatever the input is
            return output.bfloat16(), logsumexp
        return tree_map_only(torch.Tensor, lambda tensor: tensor.bfloat16(), found)


def arithmetic(dtype: str) -> contextlib.AbstractContextManager:
    """What the CPU needs to multiply `dtype` in bearable time."""
    if dtype == "bfloat16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return AccumulateInFloat32()
    return contextlib.nullcontext()


def checksums(module: torch.nn.Module) -> dict[str, int]:
    """Of the frozen weights, bit for bit."""
    return {
        name: zlib.crc32(parameter.detach().contiguous().flatten().view(torch.uint8).numpy())
        for name, parameter in module.named_parameters()
        if not parameter.requires_grad
    }


def check(family: str, kind: str, size: str, dtype: str, small: bool = False) -> dict[str, float]:
    """
    One step.

    Returns:
        `dict[str, float]`: seconds in all and of each phase, and the peak of the process's memory in GiB.

    Raises:
        `AssertionError`: the step is not what it should be.
    """
    height, width = map(int, size.split("x"))
    start = time.perf_counter()
    torch.set_default_dtype(getattr(torch, dtype))  # so that nothing is in float32 first
    try:
        pipeline = TINY[family](seed=0) if small else full_width(family)
        reward = RandomTower(getattr(torch, dtype), small) if kind == "srpo" else SizedWarmth()
    finally:
        torch.set_default_dtype(torch.float32)
    with tempfile.TemporaryDirectory() as folder, arithmetic(dtype):
        settings = {
            "output_dir": folder, "height": height, "width": width, "num_inference_steps": 2, "max_steps": 1,
            "per_device_train_batch_size": 1 + (kind == "chunk_grpo" or small), "learning_rate": 1e-2, "bf16": dtype == "bfloat16", "use_cpu": True,
            "log_samples": False, "save_strategy": "no", "disable_tqdm": True, "prompt_window": 2, "sigma_shift": None,
        }  # fmt: skip
        if kind == "chunk_grpo":
            # Two images of a prompt; in small two prompts of different length. A row of 720 x 720 takes minutes.
            settings |= {
                "num_generations": 2,
                "gradient_accumulation_steps": 2 if small else 1,
                "chunk_sizes": [1],
                "chunk_fraction": 1.0,
            }
            config, trainer_class = ChunkGRPOConfig(**settings), ChunkGRPOTrainer
        else:
            words = {"positive_words": ["Realistic photo"], "negative_words": ["CG render"], "num_landings": 1}
            words["branches"] = ["denoise", "inversion"] if small else ["denoise"]
            config = SRPOConfig(**settings, **words, reward_gradient_checkpointing=True)
            trainer_class = SRPOTrainer
        lora = LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
        trainer = trainer_class(pipeline, reward, config, Dataset.from_dict({"prompt": PROMPTS}), peft_config=lora)
        before = checksums(trainer.model)
        adapter = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
        reward.sizes.clear()  # the trainer has tried it
        built = time.perf_counter()
        trainer.train()
    (log,) = [log for log in trainer.state.log_history if "loss" in log]
    assert math.isfinite(log["loss"]) and math.isfinite(log["grad_norm"]) and log["skipped_steps"] == 0, log
    assert log["grad_norm"] > 0, log
    assert checksums(trainer.model) == before
    changed = [not torch.equal(p, adapter[name]) for name, p in trainer.model.named_parameters() if name in adapter]
    assert any(changed), "The step left the LoRA as it was."
    assert reward.sizes == {(height, width)}, reward.sizes
    if kind == "chunk_grpo":
        assert log["ratio/mean"] == 1 and log["log_ratio/abs_max"] == 0 and log["frac_off_policy"] == 0, log
    phases = {name.removeprefix("time/"): value for name, value in log.items() if name.startswith("time/")}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10 / GIB
    return {"build": built - start, **phases, "total": time.perf_counter() - start, "peak_gib": peak}


def cases(families, trainers, sizes, dtypes, every: bool) -> list[tuple[str, str, str, str]]:
    """All combinations; or half of them, in which each two values of different settings still meet."""
    found = itertools.product(enumerate(families), enumerate(trainers), enumerate(sizes), enumerate(dtypes))
    return [tuple(v for _, v in case) for case in found if every or sum(i for i, _ in case) % 2 == 0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS, default=TRAINERS)
    parser.add_argument("--sizes", nargs="+", default=SIZES, help="height x width")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--all", action="store_true", help="all combinations instead of half of them")
    parser.add_argument("--case", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case is not None:
        print(json.dumps(check(*arguments.case)))
        return 0
    failed = 0
    chosen = arguments.families, arguments.trainers, arguments.sizes, arguments.dtypes
    for case in cases(*chosen, arguments.all or 1 in map(len, chosen)):
        command = [sys.executable, __file__, "--case", *case]
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if run.returncode != 0:
            failed += 1
            print(f"{' '.join(case)}: failed, status {run.returncode}; its error is above", flush=True)
            continue
        found = json.loads(run.stdout.splitlines()[-1])
        peak = found.pop("peak_gib")
        seconds = ", ".join(f"{name} {value:.0f}" for name, value in found.items())
        print(f"{' '.join(case)}: passed; peak {peak:.1f} GiB; seconds: {seconds}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
