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

r"""
Direct-Align ([SRPO](https://huggingface.co/papers/2509.06942)): a clean image is noised with a known noise, the
network takes one small step, and the known noise gives the clean image back.

With $u = e - x_0$ the true velocity, $v$ the network's and $\delta = |\sigma_{in} - \sigma_{out}|$, a pass recovers

$$ \hat x_0 = x_0 \pm \frac{\delta}{1 - \sigma_{out}}\,(u - v) $$

with + in the `"denoise"` branch ($\sigma_{in} = \sigma_{out} + \delta$) and - in the `"inversion"` branch
($\sigma_{in} = \sigma_{out} - \delta$). So a right velocity returns the image exactly at any noise level, $\delta$
only scales the gradient, and inversion turns the gradient around.
"""

from collections.abc import Callable
from typing import Literal

import torch


Branch = Literal["denoise", "inversion"]


def interpolate(clean: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    r"""
    Latents at noise level sigma on the straight line from clean to noise, $x_\sigma = (1-\sigma)\,x_0 + \sigma\,e$.

    Args:
        clean (`torch.Tensor` of shape `(B, ...)`): latents $x_0$ at sigma 0.
        noise (`torch.Tensor` of shape `(B, ...)`): latents $e$ at sigma 1.
        sigma (`torch.Tensor` of shape `(B,)` or `()`): noise level in [0, 1], of each sample or of all.

    Returns:
        `torch.Tensor` of shape `(B, ...)`.

    Example: by hand, a quarter of the way from 4 to 8 is 5.

    ```python
    >>> interpolate(torch.tensor([[4.0]]), torch.tensor([[8.0]]), torch.tensor(0.25))
    tensor([[5.]])
    ```
    """
    sigma = _broadcast(sigma, clean)
    return sigma * noise + (1 - sigma) * clean


def recover(
    latents_in: torch.Tensor,
    velocity: torch.Tensor,
    noise: torch.Tensor,
    sigma_in: torch.Tensor,
    sigma_out: torch.Tensor,
) -> torch.Tensor:
    r"""
    The clean latents after one step from `sigma_in` to `sigma_out`, by taking the known noise off.

    $$ x_{out} = x_{in} + (\sigma_{out} - \sigma_{in})\,v, \qquad
       \hat x_0 = \frac{x_{out} - \sigma_{out}\,e}{1 - \sigma_{out}} $$

    Source: [SRPO](https://huggingface.co/papers/2509.06942), Direct-Align.

    Args:
        latents_in (`torch.Tensor` of shape `(B, ...)`): latents at `sigma_in`, from [`interpolate`].
        velocity (`torch.Tensor` of shape `(B, ...)`): the network's output there, cast to their dtype here.
        noise (`torch.Tensor` of shape `(B, ...)`): the noise that `latents_in` was made with.
        sigma_in, sigma_out (`torch.Tensor` of shape `(B,)` or `()`): noise levels; `sigma_out` is below 1.

    Returns:
        `torch.Tensor` of shape `(B, ...)`; it carries the gradient of `velocity`, scaled by
        `(sigma_out - sigma_in) / (1 - sigma_out)`.

    Example: by hand, x = 6 halfway between 4 and 8. The velocity is 8 - 4 = 4, so the step to sigma 0.25 leads to
    6 - 0.25·4 = 5, and (5 - 0.25·8) / 0.75 = 4.

    ```python
    >>> x, v, e = (torch.tensor([[value]]) for value in (6.0, 4.0, 8.0))
    >>> recover(x, v, e, torch.tensor(0.5), torch.tensor(0.25))
    tensor([[4.]])
    ```
    """
    sigma_in, sigma_out = _broadcast(sigma_in, latents_in), _broadcast(sigma_out, latents_in)
    latents_out = latents_in + (sigma_out - sigma_in) * velocity.to(latents_in.dtype)
    return (latents_out - sigma_out * noise) / (1 - sigma_out)


def direct_align_pass(
    velocity: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    clean: torch.Tensor,
    noise: torch.Tensor,
    sigma: torch.Tensor,
    delta: float,
    branch: Branch,
) -> torch.Tensor:
    """
    One pass of Direct-Align: noise the clean latents, step once to `sigma`, take the noise off.

    Args:
        velocity (`Callable`):
            `velocity(latents, sigma_in)`, with latents `(B, ...)` and sigma `(B,)`; the only part with a gradient.
        clean (`torch.Tensor` of shape `(B, ...)`):
            Clean latents, float32 or better, a constant.
        noise (`torch.Tensor` of shape `(B, ...)`):
            Noise prior, the noise that the rollout of `clean` started from, or fresh noise.
        sigma (`torch.Tensor` of shape `(B,)` or `()`):
            Noise level where the step lands, in both branches; below 1.
        delta (`float`):
            Length of the step, above 0.
        branch (`str`):
            `"denoise"` steps down from `sigma + delta`, `"inversion"` steps up from `sigma - delta`.

    Returns:
        `torch.Tensor` of shape `(B, ...)`: the recovered clean latents.

    Raises:
        `ValueError`: where `branch` is neither of the two.
    """
    if branch not in ("denoise", "inversion"):
        raise ValueError(f"branch must be 'denoise' or 'inversion', got {branch!r}.")
    # The algebra and the network see the very same numbers.
    sigma = sigma.to(clean).expand(len(clean))
    sigma_in = sigma + delta if branch == "denoise" else sigma - delta
    with torch.no_grad():
        latents_in = interpolate(clean, noise, sigma_in)
    return recover(latents_in, velocity(latents_in, sigma_in), noise, sigma_in, sigma)


def _broadcast(sigma: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """Sigmas `(B,)` or `()` as `(B, 1, ...)`, in the latents' dtype lest a float64 schedule promotes the latents."""
    return sigma.to(latents).view((-1,) + (1,) * (latents.ndim - 1))
