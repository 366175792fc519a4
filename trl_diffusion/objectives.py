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

"""What is maximised: group-relative advantages, the chunk surrogate within its trust region, the relative preference."""

from typing import Literal

import torch


Preference = Literal["relative", "difference", "absolute", "interpolated"]


def group_advantages(
    rewards: torch.Tensor,
    num_generations: int,
    scale_rewards: Literal["group", "batch", "none"] = "group",
    advantage_clip: float | None = 5.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    Group-relative advantages, $A = (r - \text{mean}) / (\text{std} + 10^{-8})$ with the unbiased std.

    Source: [GRPO](https://huggingface.co/papers/2402.03300), with TRL's options of the scale.

    Args:
        rewards (`torch.Tensor` of shape `(B,)`):
            Rewards in the order of the groups: `num_generations` consecutive samples share a prompt. NaN means "not
            applicable": the sample leaves its group's statistics and gets the advantage 0.
        num_generations (`int`):
            Samples per prompt G.
        scale_rewards (`str`, *optional*, defaults to `"group"`):
            Divide by the std of the group (`"group"`), of the whole batch (`"batch"`), or not at all (`"none"`).
        advantage_clip (`float`, *optional*, defaults to `5.0`):
            Clamp to plus or minus this; `None` does not clamp.

    Returns:
        `tuple`: advantages `(B,)`, and the std of each group's rewards `(B / num_generations,)` (0 where fewer than
        two rewards apply). A group whose rewards are all equal gets advantages of exactly 0.

    Example: by hand for the rewards 1 and 3: mean 2, unbiased std 1.4142, so -0.7071 and 0.7071.

    ```python
    >>> group_advantages(torch.tensor([1.0, 3.0]), 2)[0]
    tensor([-0.7071,  0.7071])
    ```
    """
    groups = rewards.view(-1, num_generations)
    valid = ~groups.isnan()
    count = valid.sum(1, keepdim=True)
    mean = groups.nan_to_num().sum(1, keepdim=True) / count.clamp(min=1)
    centered = torch.where(valid, groups - mean, 0.0)
    # Rounding leaves a speck in the mean of equal rewards, which a division by a speck of std would make a signal.
    filled = torch.where(valid, groups, torch.inf).amin(1, keepdim=True)
    varied = (torch.where(valid, groups, filled) != filled).any(1, keepdim=True)
    centered = torch.where(varied, centered, 0.0)
    std = ((centered**2).sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    if scale_rewards == "group":
        advantages = centered / (std + 1e-8)
    elif scale_rewards == "batch":
        applicable = rewards[~rewards.isnan()]
        scale = applicable.std() if len(applicable) > 1 else rewards.new_zeros(())
        advantages = centered / (scale + 1e-8)
    elif scale_rewards == "none":
        advantages = centered
    else:
        raise ValueError(f"scale_rewards must be 'group', 'batch' or 'none', got {scale_rewards!r}.")
    if advantage_clip is not None:
        advantages = advantages.clamp(-advantage_clip, advantage_clip)
    return advantages.flatten(), std.flatten()


def aggregate_advantages(
    rewards: torch.Tensor,
    weights: torch.Tensor,
    num_generations: int,
    aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize",
    scale_rewards: Literal["group", "batch", "none"] = "group",
    advantage_clip: float | None = 5.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Advantages of several rewards.

    Args:
        rewards (`torch.Tensor` of shape `(B, R)`):
            One column a reward function, NaN where it does not apply.
        weights (`torch.Tensor` of shape `(R,)`):
            Weight of each reward function.
        num_generations (`int`):
            Samples per prompt G.
        aggregation (`str`, *optional*, defaults to `"sum_then_normalize"`):
            Normalise the weighted sum of the rewards, or sum the normalised rewards of each function, weighted
            ([GDPO](https://huggingface.co/papers/2601.05242)).
        scale_rewards, advantage_clip:
            See [`group_advantages`].

    Returns:
        `tuple`: advantages `(B,)`; the weighted sum of the rewards `(B,)`, NaN where none applies; its std in each
        group `(B / num_generations,)`.

    Example: with one reward both aggregations are [`group_advantages`]; with weights (1, 1), rewards (0, 1) and
    (0, 100) of a pair, the sum is (0, 101) and both aggregations agree on the sign, while the second counts both
    functions alike.
    """
    total = (rewards * weights).nansum(1)
    total = torch.where(rewards.isnan().all(1), torch.nan, total)
    advantages, std = group_advantages(total, num_generations, scale_rewards, advantage_clip)
    if aggregation == "normalize_then_sum":
        columns = [group_advantages(column, num_generations, scale_rewards, None)[0] for column in rewards.unbind(1)]
        advantages = torch.stack(columns, 1) @ weights.to(rewards.dtype)
        if advantage_clip is not None:
            advantages = advantages.clamp(-advantage_clip, advantage_clip)
    elif aggregation != "sum_then_normalize":
        raise ValueError(
            f"multi_objective_aggregation must be 'sum_then_normalize' or 'normalize_then_sum', got {aggregation!r}."
        )
    return advantages, total, std


def chunk_ratio(log_probs: torch.Tensor, old_log_probs: torch.Tensor) -> torch.Tensor:
    r"""
    Likelihood ratio of a chunk, the geometric mean over its steps:
    $\exp\big(\tfrac1{cs}\sum_t (\log p_t - \log p_t^{old})\big)$.

    Source: [Chunk-GRPO](https://huggingface.co/papers/2510.21583), equation of the chunk-level importance ratio.

    Args:
        log_probs, old_log_probs (`torch.Tensor` of shape `(B, cs)`): per step of the chunk.

    Returns:
        `torch.Tensor` of shape `(B,)`; exactly 1 where the two are equal.
    """
    return (log_probs - old_log_probs).mean(1).exp()


def clipped_surrogate(
    ratio: torch.Tensor, advantages: torch.Tensor, epsilon: float, epsilon_high: float
) -> torch.Tensor:
    r"""
    Clipped policy loss per sample, $\max(-A\,\rho,\ -A\,\text{clip}(\rho, 1-\epsilon, 1+\epsilon_{high}))$.

    Source: [PPO](https://huggingface.co/papers/1707.06347). Average it over samples and trained chunks.

    Args:
        ratio (`torch.Tensor` of shape `(B,)`): from [`chunk_ratio`].
        advantages (`torch.Tensor` of shape `(B,)`): of the samples.
        epsilon, epsilon_high (`float`): clip range below and above 1.

    Example: by hand for ratio 1.1, A = 1 and epsilon 0.05: max(-1.1, -1.05) = -1.05, and the gradient is 0.
    """
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon_high)
    return torch.maximum(-advantages * ratio, -advantages * clipped)


def guarded_log_probs(
    log_probs: torch.Tensor, old_log_probs: torch.Tensor, divergence: torch.Tensor, std: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    Log-probabilities whose difference $(\log p_t - \log p_t^{old} + D_t)\,\text{std}_t$ has the mean 0 over the noise
    that was drawn, however far the policy has moved: that of the plain ones is $-D_t$, so that their ratios drift below
    1, and their spread grows as the noise level falls.

    Source: [GRPO-Guard](https://huggingface.co/papers/2510.22319), RatioNorm. With the noise z of the rollout the
    difference is $\overline{(\mu - \mu_{old})\,z}$.

    Args:
        log_probs, old_log_probs (`torch.Tensor` of shape `(B, cs)`): per step of a chunk.
        divergence (`torch.Tensor` of shape `(B, cs)`): D, the [`transition_kl`] to the sampling policy, with gradient.
        std (`torch.Tensor` of shape `(cs,)`): of the steps.

    Returns:
        `tuple`: the two arguments of [`chunk_ratio`], `(B, cs)` each.
    """
    return (log_probs + divergence) * std, old_log_probs * std


def masked_surrogate(
    ratio: torch.Tensor, advantages: torch.Tensor, divergence: torch.Tensor, threshold: float
) -> torch.Tensor:
    r"""
    Policy loss per sample $-A\,\rho$ without a clip; 0 where the policy has moved by more than the threshold, and on in
    the direction of the advantage: $D > \text{threshold}$ and ($A > 0$ and $\rho > 1$, or $A < 0$ and $\rho < 1$).

    Source: [Flow-DPPO](https://huggingface.co/papers/2606.11025).

    Args:
        ratio (`torch.Tensor` of shape `(B,)`): from [`chunk_ratio`].
        advantages (`torch.Tensor` of shape `(B,)`): of the samples.
        divergence (`torch.Tensor` of shape `(B,)`): the [`transition_kl`] to the sampling policy, averaged over the
            chunk.
        threshold (`float`): of the divergence.

    Example: by hand for ratio 1.1, A = 1 and threshold 1e-5: -1.1 at a divergence of 1e-6, 0 at 1e-4. With A = -1 it is
    1.1 at both, since the step goes back.
    """
    onwards = ((advantages > 0) & (ratio > 1)) | ((advantages < 0) & (ratio < 1))
    return torch.where(onwards & (divergence > threshold), 0.0, -advantages * ratio)


def transition_kl(mean: torch.Tensor, reference_mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    r"""
    Kullback-Leibler divergence of two transitions of equal std, averaged over the latent elements:
    $\overline{(\mu - \mu_{ref})^2} / (2\,\text{std}^2)$.

    Source: [Flow-GRPO](https://huggingface.co/papers/2505.05470).

    Args:
        mean, reference_mean (`torch.Tensor` of shape `(B, ...)`): means of the two policies.
        std (`torch.Tensor`, broadcastable to `(B, ...)`): of both.

    Returns:
        `torch.Tensor` of shape `(B,)`.
    """
    return ((mean - reference_mean) ** 2 / (2 * std**2)).flatten(1).mean(1)


def discount_at(sigma: torch.Tensor, sigma_range: tuple[float, float], discount: tuple[float, float]) -> torch.Tensor:
    r"""
    Discount k of the relative preference at a noise level, linear in sigma between the ends of its range.

    Source: [SRPO](https://huggingface.co/papers/2509.06942). The paper's values with HPSv2.1 are (0.10, 0.25) in the
    denoise branch and (0.30, 0.01) in the inversion branch.

    Args:
        sigma (`torch.Tensor` of any shape): noise levels inside `sigma_range`.
        sigma_range (`tuple[float, float]`): the lowest (clean end) and the highest (noisy end) noise level.
        discount (`tuple[float, float]`): k at the clean end and at the noisy end.

    Returns:
        `torch.Tensor` of the shape of `sigma`.

    Raises:
        `ValueError`: where `sigma_range` does not ascend.

    Example: by hand, at the middle of the range the discount is the middle of its ends.

    ```python
    >>> discount_at(torch.tensor(0.75), (0.5, 1.0), (0.10, 0.30))
    tensor(0.2000)
    ```
    """
    low, high = sigma_range
    if not low < high:
        raise ValueError(f"sigma_range must ascend from the clean to the noisy end, got {tuple(sigma_range)}.")
    clean_end, noisy_end = discount
    return clean_end + (noisy_end - clean_end) * (sigma - low) / (high - low)


def preference_weights(
    discount: torch.Tensor, branch: Literal["denoise", "inversion"], preference: Preference = "relative"
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    Weights of the positive and the negative score in [`relative_preference`].

    | `preference` | denoise | inversion |
    |---|---|---|
    | `"relative"` | $(1+k, -1)$ | $(-1, 1+k)$ |
    | `"difference"` | $(1, -1)$ | $(-1, 1)$ |
    | `"absolute"` | $(1, 0)$ | $(-1, 0)$ |
    | `"interpolated"` | $(k, 1-k)$ | $(-k, k-1)$ |

    The gradient of an image reached by inversion is turned around, so inversion swaps the prompts or the sign: both
    branches push the same way. For rewards that are a dot product of an image and a text feature, the two text
    features can be combined with these weights first, so that one image forward serves both prompts.

    Source: [SRPO](https://huggingface.co/papers/2509.06942), semantic relative preference.

    Args:
        discount (`torch.Tensor` of shape `(B,)` or `()`): k, from [`discount_at`] with the branch's own ends.
        branch (`str`): `"denoise"` or `"inversion"`.
        preference (`str`, *optional*, defaults to `"relative"`): one of the forms above.

    Returns:
        `tuple`: weights of the positive and of the negative score, each of the shape of `discount`.

    Raises:
        `ValueError`: where `branch` or `preference` is none of the above.
    """
    if branch not in ("denoise", "inversion"):
        raise ValueError(f"branch must be 'denoise' or 'inversion', got {branch!r}.")
    one = torch.ones_like(discount)
    if preference == "relative":
        weights = (1 + discount, -one)
    elif preference == "difference":
        weights = (one, -one)
    elif preference == "absolute":
        weights = (one, torch.zeros_like(discount))
    elif preference == "interpolated":
        weights = (discount, 1 - discount)
    else:
        raise ValueError(
            f"preference must be 'relative', 'difference', 'absolute' or 'interpolated', got {preference!r}."
        )
    if branch == "denoise":
        return weights
    if preference in ("relative", "difference"):
        return weights[::-1]
    return -weights[0], -weights[1]


def relative_preference(
    positive: torch.Tensor,
    negative: torch.Tensor | None,
    discount: torch.Tensor,
    branch: Literal["denoise", "inversion"],
    preference: Preference = "relative",
) -> torch.Tensor:
    r"""
    The reward of one image judged under two prompts, $r = w_+\,s(I, p_+) + w_-\,s(I, p_-)$ with the weights of
    [`preference_weights`]; in the relative form $r = (1+k)\,s(I, p_+) - s(I, p_-)$ for denoise and
    $r = (1+k)\,s(I, p_-) - s(I, p_+)$ for inversion.

    Args:
        positive (`torch.Tensor` of shape `(B,)`): scores under the positive prompt; under the plain prompt for
            `"absolute"`.
        negative (`torch.Tensor` of shape `(B,)` or `None`): scores under the negative prompt; `"absolute"` needs none.
        discount, branch, preference: see [`preference_weights`].

    Returns:
        `torch.Tensor` of shape `(B,)`.

    Raises:
        `ValueError`: where `negative` is missing, or as in [`preference_weights`].

    Example: by hand for scores 0.5 and 0.2 and k = 0.1: 1.1·0.5 - 0.2 = 0.35 for denoise, and
    1.1·0.2 - 0.5 = -0.28 for inversion.
    """
    positive_weight, negative_weight = preference_weights(discount, branch, preference)
    if preference == "absolute":
        return positive_weight * positive
    if negative is None:
        raise ValueError(
            f"preference={preference!r} needs scores under a negative prompt, got None. Pass them, or choose "
            "preference='absolute'."
        )
    return positive_weight * positive + negative_weight * negative


def preference_loss(preference: torch.Tensor, threshold: float = 0.7) -> torch.Tensor:
    r"""
    Loss of a pass per sample, $\text{relu}(\text{threshold} - r)$: an image that is good enough pushes no more.

    Source: [SRPO](https://huggingface.co/papers/2509.06942). Average it over samples and passes.

    Args:
        preference (`torch.Tensor` of shape `(B,)`): r, from [`relative_preference`].
        threshold (`float`, *optional*, defaults to `0.7`): in the unit of the reward.

    Returns:
        `torch.Tensor` of shape `(B,)`.
    """
    return torch.relu(threshold - preference)
