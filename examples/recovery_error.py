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
How well Direct-Align and ReFL's one-step prediction recover a clean image at each noise level, in the embedded world.

```bash
python examples/recovery_error.py --output docs/images/recovery_error.png
```

Images are sampled, noised again with the noise they came from, and recovered by one forward of the network, from the
same noisy latents to both methods' own target. The error is that of pixels in [0, 1]. A table is printed in Markdown.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure

from trl_diffusion import shapes
from trl_diffusion.flow import direct_align_pass, interpolate
from trl_diffusion.models import Sampler, load_flow_model
from trl_diffusion.trainer.srpo_trainer import one_step_prediction


SIGMAS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95]
DELTA = 0.0214  # a tenth of the width of (0.75, 0.964)
METHODS = ("Direct-Align, denoise", "Direct-Align, inversion", "one-step prediction")
NUM_STEPS = 10


@torch.no_grad()
def recover_images(num_images: int, seed: int = 0) -> tuple[torch.Tensor, dict[str, dict[float, torch.Tensor]]]:
    """
    Sampled images, and what each method makes of them at each noise level.

    Returns:
        `tuple`: images `(N, 3, H, W)` in [0, 1], and by method and sigma the recovered images.
    """
    flow = load_flow_model("shapes")
    sampler = Sampler.from_settings(flow, NUM_STEPS, sigma_shift=3.0, batch_size=num_images)
    held_out = shapes.load_dataset("test")["prompt"]
    prompts = [held_out[i % len(held_out)] for i in range(num_images)]
    conditioning = sampler.conditioning.get(prompts)
    noise = flow.draw_noise(num_images, *sampler.size, torch.Generator().manual_seed(seed))

    def velocity(latents, sigma):
        return sampler.velocity(flow.denoiser, latents, sigma, conditioning)

    clean = sampler.rollout(prompts, noise).clean
    recovered = {method: {} for method in METHODS}
    for level in SIGMAS:
        sigma = torch.full((num_images,), level)
        latents = interpolate(clean, noise, sigma)
        for method, result in zip(
            METHODS,
            (
                direct_align_pass(velocity, clean, noise, sigma, DELTA, "denoise"),
                direct_align_pass(velocity, clean, noise, sigma, DELTA, "inversion"),
                one_step_prediction(latents, velocity(latents, sigma), sigma),
            ),
            strict=True,
        ):
            recovered[method][level] = flow.decode(result)
    return flow.decode(clean), recovered


def errors(images: torch.Tensor, recovered: dict[str, dict[float, torch.Tensor]]) -> dict[str, dict[float, float]]:
    """Mean absolute error of the pixels, by method and sigma."""
    return {
        method: {sigma: (result - images).abs().mean().item() for sigma, result in results.items()}
        for method, results in recovered.items()
    }


def plot(images: torch.Tensor, recovered: dict[str, dict[float, torch.Tensor]], path: Path) -> None:
    """Writes the errors against sigma, and below them one image as the methods recover it."""
    figure = Figure(figsize=(11, 7), layout="constrained")
    curves, pictures = figure.subfigures(2, 1, height_ratios=[3, 2])
    axes = curves.subplots()
    for method, values in errors(images, recovered).items():
        axes.plot(list(values), list(values.values()), "o-", label=method)
    axes.set_xlabel("sigma (1 is noise)")
    axes.set_ylabel("mean absolute error of pixels in [0, 1]")
    axes.set_title(f"Recovery of {len(images)} sampled images by one forward")
    axes.grid(alpha=0.3)
    axes.legend()
    methods = (METHODS[0], METHODS[2])
    for row, method in zip(pictures.subplots(2, len(SIGMAS) + 1), methods, strict=True):
        shown = [("sampled", images[0]), *((f"{sigma:g}", recovered[method][sigma][0]) for sigma in SIGMAS)]
        for panel, (title, picture) in zip(row, shown, strict=True):
            panel.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest")
            panel.set_title(title, fontsize=8)
            panel.set_xticks([])
            panel.set_yticks([])
        row[0].set_ylabel(method.replace(", ", "\n").replace(" prediction", "\nprediction"), fontsize=8)
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_images", type=int, default=144, help="images (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("recovery_error.png"), help="the plot (%(default)s)")
    parsed = parser.parse_args(arguments)
    images, recovered = recover_images(parsed.num_images)
    measured = errors(images, recovered)
    print("| sigma | " + " | ".join(METHODS) + " |")
    print("|---" * (len(METHODS) + 1) + "|")
    for sigma in SIGMAS:
        print(f"| {sigma:g} | " + " | ".join(f"{measured[method][sigma]:.4f}" for method in METHODS) + " |")
    plot(images, recovered, parsed.output)


if __name__ == "__main__":
    main()
