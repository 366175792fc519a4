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
One step of the sampler, deterministic or stochastic, and the log-probability of that step.

Flow matching: $x_s = (1-s)\,x_0 + s\,e$, and the network predicts the velocity $v = e - x_0$. Every kind of step here
is linear in the latents and the velocity, and adds Gaussian noise:

$$ x_{\text{next}} = \underbrace{a\,x + b\,v}_{\text{mean}} + \text{std}\cdot z, \qquad z \sim \mathcal N(0, I) $$

so a schedule is turned once into a table of (a, b, std) per transition ([`transition_coefficients`]), and rollout and
training take their step from the same table with the same function ([`step`]).
"""

import math
from collections.abc import Collection
from typing import Literal, NamedTuple

import torch


SDEType = Literal["flow", "dance", "cps"]

# Default of `eta` per kind, the values of the papers.
DEFAULT_ETA = {"flow": 0.7, "dance": 0.3, "cps": 0.8}


class TransitionCoefficients(NamedTuple):
    """
    The T transitions of a schedule, as `mean = latents_scale * latents + velocity_scale * velocity`.

    Attributes:
        latents_scale (`torch.Tensor` of shape `(T,)`): factor a of the latents.
        velocity_scale (`torch.Tensor` of shape `(T,)`): factor b of the velocity.
        std (`torch.Tensor` of shape `(T,)`): standard deviation of the noise, 0 where the step is deterministic.
    """

    latents_scale: torch.Tensor
    velocity_scale: torch.Tensor
    std: torch.Tensor

    def to(self, device: torch.device, dtype: torch.dtype) -> "TransitionCoefficients":
        """The table on another device, in another dtype."""
        return TransitionCoefficients(*(table.to(device=device, dtype=dtype) for table in self))

    def rows(self, index: torch.Tensor, ndim: int) -> "TransitionCoefficients":
        """The coefficients of the transitions `index` `(B,)`, shaped `(B, 1, ...)` to broadcast over `ndim` axes."""
        return TransitionCoefficients(*(table[index].view((-1,) + (1,) * (ndim - 1)) for table in self))


def transition_coefficients(
    sigmas: torch.Tensor,
    sde_type: SDEType | None,
    eta: float | None = None,
    stochastic: Collection[int] | None = None,
) -> TransitionCoefficients:
    r"""
    The transitions of a schedule under one of three stochastic samplers, or under the Euler solver.

    With $dt = \sigma_{i+1} - \sigma_i < 0$, $s = \sigma_i$ and $s' = \sigma_{i+1}$:

    - `"flow"` ([Flow-GRPO](https://huggingface.co/papers/2505.05470)) and `"dance"`
      ([DanceGRPO](https://huggingface.co/papers/2505.07818)):
      mean $= x\,(1 + g^2 dt/2s) + v\,(1 + g^2 (1-s)/2s)\,dt$ and std $= g\sqrt{-dt}$, with
      $g = \eta\sqrt{s/(1-s)}$ for flow (where $s = 1$, the $s$ of the denominator is $\sigma_1$) and $g = \eta$ for
      dance.
    - `"cps"` (coefficients-preserving sampling): std $= s' \sin(\eta\pi/2)$ and mean
      $= \hat x_0 (1-s') + (x + (1-s)\,v)\sqrt{s'^2 - \text{std}^2}$, $\hat x_0 = x - s\,v$.
    - `None`: Euler, mean $= x + dt\,v$, std = 0.

    The last transition is always the Euler step; where it ends at sigma 0 this is $\hat x_0$. It is never trained.

    Args:
        sigmas (`torch.Tensor` of shape `(T + 1,)`):
            Decreasing schedule. Computed in float64, whatever its dtype.
        sde_type (`str` or `None`):
            One of `"flow"`, `"dance"`, `"cps"`, or `None` for the deterministic solver.
        eta (`float`, *optional*):
            Noise level; `None` takes the paper's value for the kind (0.7, 0.3, 0.8).
        stochastic (`Collection[int]`, *optional*):
            The transitions that get noise, all but the last by default; the others are Euler steps
            ([MixGRPO](https://huggingface.co/papers/2507.21802)).

    Returns:
        [`TransitionCoefficients`] in float64. `eta = 0` gives the Euler table whatever the kind.

    Example: by hand for one `dance` transition from s = 1 to 0.75 with eta = 0.3: dt = -0.25, so the latents' factor
    is 1 + 0.09·(-0.25)/2 = 0.98875, the velocity's -0.25, std 0.3·0.5 = 0.15.

    ```python
    >>> transition_coefficients(torch.tensor([1.0, 0.75, 0.0]), "dance", 0.3).std
    tensor([0.1500, 0.0000], dtype=torch.float64)
    ```
    """
    sigmas = sigmas.double()
    sigma, sigma_next = sigmas[:-1], sigmas[1:]
    dt = sigma_next - sigma
    if not bool((dt < 0).all()):
        raise ValueError(f"sigmas must decrease strictly, got {sigmas.tolist()}.")
    if sde_type is None:
        return TransitionCoefficients(torch.ones_like(dt), dt, torch.zeros_like(dt))
    if sde_type not in DEFAULT_ETA:
        raise ValueError(f"sde_type must be one of {sorted(DEFAULT_ETA)} or None, got {sde_type!r}.")
    eta = DEFAULT_ETA[sde_type] if eta is None else eta
    if sde_type == "cps":
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must lie in [0, 1] for sde_type='cps', got {eta}.")
        std = sigma_next * math.sin(eta * math.pi / 2)
        noise_scale = sigma_next * math.cos(eta * math.pi / 2)  # sqrt(s'^2 - std^2)
        latents_scale = (1 - sigma_next) + noise_scale
        velocity_scale = -sigma * (1 - sigma_next) + (1 - sigma) * noise_scale
    else:
        if eta < 0:
            raise ValueError(f"eta must not be negative, got {eta}.")
        if sde_type == "flow":
            # A given schedule can miss 1 by rounding, and the noise rate would then be huge or NaN.
            denominator = torch.where(sigma > 1 - 1e-6, sigma_next, sigma)
            g_squared = eta**2 * sigma / (1 - denominator)
        else:
            g_squared = torch.full_like(sigma, eta**2)
        latents_scale = 1 + g_squared * dt / (2 * sigma)
        velocity_scale = (1 + g_squared * (1 - sigma) / (2 * sigma)) * dt
        std = (g_squared * -dt).sqrt()
    last = len(dt) - 1
    euler = [i for i in range(len(dt)) if i == last or (stochastic is not None and i not in stochastic)]
    latents_scale[euler], velocity_scale[euler], std[euler] = 1, dt[euler], 0
    return TransitionCoefficients(latents_scale, velocity_scale, std)


def transition_mean(
    latents: torch.Tensor, velocity: torch.Tensor, coefficients: TransitionCoefficients
) -> torch.Tensor:
    """
    Mean of a transition, `latents_scale * latents + velocity_scale * velocity`.

    Args:
        latents (`torch.Tensor` of shape `(B, ...)`): latents before the step.
        velocity (`torch.Tensor` of shape `(B, ...)`): the network's output at these latents.
        coefficients ([`TransitionCoefficients`]): broadcastable to the latents, see `TransitionCoefficients.rows`.
    """
    return coefficients.latents_scale * latents + coefficients.velocity_scale * velocity


def log_prob(next_latents: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    r"""
    Gaussian log-probability of a transition, averaged over the D latent elements of a sample.

    $$ \frac1D\sum_d -\frac{(x'_d - \mu_d)^2}{2\,\text{std}^2} - \log\text{std} - \log\sqrt{2\pi} $$

    The mean, not the sum: the ratio of two policies is then the true ratio to the power 1/D, which is why clip ranges
    are about 1e-4. Source: [DanceGRPO](https://huggingface.co/papers/2505.07818).

    Args:
        next_latents (`torch.Tensor` of shape `(B, ...)`): the transition's end, a constant.
        mean (`torch.Tensor` of shape `(B, ...)`): from [`transition_mean`].
        std (`torch.Tensor`, broadcastable to `(B, ...)`): above 0.

    Returns:
        `torch.Tensor` of shape `(B,)`.
    """
    element = -((next_latents.detach() - mean) ** 2) / (2 * std**2) - std.log() - math.log(math.sqrt(2 * math.pi))
    return element.flatten(1).mean(1)


def step(
    latents: torch.Tensor, velocity: torch.Tensor, coefficients: TransitionCoefficients, noise: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    One sampling step.

    Args:
        latents (`torch.Tensor` of shape `(B, ...)`): float32 or better; in bfloat16 the ratio is biased.
        velocity (`torch.Tensor` of shape `(B, ...)`): the network's output at these latents, cast to their dtype here.
        coefficients ([`TransitionCoefficients`]): broadcastable to the latents.
        noise (`torch.Tensor` of shape `(B, ...)` or `None`): standard normal; `None` takes the mean.

    Returns:
        `tuple`: the next latents, and their log-probability `(B,)` or `None` for a step without noise.
    """
    mean = transition_mean(latents, velocity.to(latents.dtype), coefficients)
    if noise is None:
        return mean, None
    next_latents = mean + coefficients.std * noise
    return next_latents, log_prob(next_latents, mean, coefficients.std)
