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


import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

from .base import FlowModel


class Flux2FlowModel(FlowModel):
    """
    FLUX.2 dev, with guidance embedded in the network.

    The VAE's latents are taken in patches of 2 x 2 and normalised as by a batch norm, with the statistics of its training;
    a token is one such patch. The conditioning holds `prompt_embeds` `(B, L, D)` of three layers of Mistral 3: all L
    tokens, since the network attends to the padding too.

    Attributes:
        max_sequence_length (`int`):
            L, 512 as in the pipeline.
    """

    pipeline_class = Flux2Pipeline
    default_guidance_scale = 4.0
    max_sequence_length = 512

    def __init__(self, pipeline: Flux2Pipeline):
        super().__init__(pipeline)
        # One layer of a single block makes queries, keys, values and the MLP. Its `to_out` is a layer, that of a double
        # block is a list of two, so the name alone would not do.
        single_blocks = range(self.transformer_config.num_single_layers)
        self.lora_target_modules = [
            *self.lora_target_modules,
            "to_qkv_mlp_proj",
            *(f"single_transformer_blocks.{index}.attn.to_out" for index in single_blocks),
        ]

    def encode(self, prompts: list[str], device: torch.device) -> list[dict[str, torch.Tensor]]:
        prompt_embeds, _ = self.pipeline.encode_prompt(
            prompts, device=device, max_sequence_length=self.max_sequence_length
        )
        return [{"prompt_embeds": embeds} for embeds in prompt_embeds]

    def forward(
        self,
        denoiser: torch.nn.Module,
        latents: torch.Tensor,
        sigma: torch.Tensor,
        conditioning: dict[str, torch.Tensor],
        guidance_scale: float,
    ) -> torch.Tensor:
        prompt_embeds = conditioning["prompt_embeds"]
        text_ids = self.pipeline._prepare_text_ids(prompt_embeds[:1]).expand(len(latents), -1, -1)
        velocity = denoiser(
            hidden_states=self.pipeline._pack_latents(latents),
            timestep=sigma,
            guidance=torch.full_like(sigma, guidance_scale) if self.transformer_config.guidance_embeds else None,
            encoder_hidden_states=prompt_embeds,
            txt_ids=text_ids.to(latents.device),
            img_ids=self.pipeline._prepare_latent_ids(latents).to(latents.device),
            return_dict=False,
        )[0]
        return velocity.mT.unflatten(2, latents.shape[-2:])

    def schedule_shift(self, num_tokens: int, num_inference_steps: int) -> float:
        return compute_empirical_mu(num_tokens, num_inference_steps)

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        return (self.transformer_config.in_channels, height // self.latent_downsample, width // self.latent_downsample)

    def latent_statistics(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, variance = (
            buffer.view(1, -1, 1, 1).to(like) for buffer in (self.vae.bn.running_mean, self.vae.bn.running_var)
        )
        return mean, (variance + self.vae.config.batch_norm_eps).rsqrt()

    def patchify(self, z: torch.Tensor) -> torch.Tensor:
        return self.pipeline._patchify_latents(z)

    def unpatchify(self, z: torch.Tensor) -> torch.Tensor:
        return self.pipeline._unpatchify_latents(z)


class Flux2KleinFlowModel(Flux2FlowModel):
    """
    FLUX.2 klein: base, with true guidance away from the empty prompt, and distilled, without guidance. `prompt_embeds` are
    of Qwen3.
    """

    pipeline_class = Flux2KleinPipeline
    true_guidance = True

    def __init__(self, pipeline: Flux2KleinPipeline):
        super().__init__(pipeline)
        size = "4B" if self.transformer_config.num_layers == 5 else "9B"
        if pipeline.config.is_distilled:
            self.set_distilled(f"black-forest-labs/FLUX.2-klein-base-{size}")
        else:
            self.distilled_model = f"black-forest-labs/FLUX.2-klein-{size}"

    @classmethod
    def check_negative_prompt(cls, negative_prompt: str | None) -> None:
        if negative_prompt is not None:
            raise ValueError(
                f"negative_prompt={negative_prompt!r} has no effect with a {cls.pipeline_class.__name__}, which always "
                "leads away from the empty prompt. Leave negative_prompt unset."
            )
