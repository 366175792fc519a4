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

"""Gradients through VAEs that diffusers does not recompute, or that clamp what they decode."""

from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint


def recomputed(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The forward of a block of a causal VAE, recomputed in the backward pass."""

    def recomputed_forward(
        x: torch.Tensor, feat_cache: list | None = None, feat_idx: list[int] | None = None, **kwargs: bool
    ) -> torch.Tensor:
        if not torch.is_grad_enabled() or feat_cache is None:
            return forward(x, feat_cache, feat_idx, **kwargs)
        # A block takes from the cache the last frames of the chunk before and leaves its own there, at a place that it
        # counts on. Each run begins with the cache as it was.
        cache_before, index_before = list(feat_cache), list(feat_idx)

        def run(x: torch.Tensor) -> torch.Tensor:
            feat_cache[:], feat_idx[:] = cache_before, index_before
            return forward(x, feat_cache, feat_idx, **kwargs)

        return checkpoint(run, x, use_reentrant=False)

    return recomputed_forward


class _ClampWithInwardGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, low, high):
        ctx.save_for_backward(x)
        ctx.bounds = low, high
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx, gradient):
        (x,), (low, high) = ctx.saved_tensors, ctx.bounds
        # Descent moves against the gradient.
        outward = ((x > high) & (gradient < 0)) | ((x < low) & (gradient > 0))
        return gradient.masked_fill(outward, 0), None, None


def clamp_with_inward_gradient(x: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """
    `x.clamp(low, high)` with a gradient also where x lies outside, if a step against the gradient moves it back towards
    the inside. The gradient of `clamp` is zero there, so that no loss could ever bring such an element back.
    """
    return _ClampWithInwardGradient.apply(x, low, high)
