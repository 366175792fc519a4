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

"""Noise schedules: decreasing sequences of sigma from 1 (noise) to 0 (clean)."""

import torch


def shifted_schedule(num_inference_steps: int, shift: float = 3.0) -> torch.Tensor:
    r"""
    Uniform times, pushed towards the noisy end by a static shift.

    $$ t_i = 1 - i/T, \qquad \sigma_i = \frac{\text{shift} \cdot t_i}{1 + (\text{shift} - 1) \cdot t_i} $$

    Source: the schedule of [DanceGRPO](https://huggingface.co/papers/2505.07818) and
    [SRPO](https://huggingface.co/papers/2509.06942), with shift 3. It does not depend on the resolution, unlike the
    schedule of the FLUX pipeline.

    Args:
        num_inference_steps (`int`):
            Number of sampling steps T, at least 1.
        shift (`float`, *optional*, defaults to `3.0`):
            Static shift, above 0. 1 leaves the times uniform.

    Returns:
        `torch.Tensor` of shape `(T + 1,)`, float64: `sigma[0] = 1 > ... > sigma[T] = 0`.

    Example: by hand for T = 2 and shift 3, t = (1, 1/2, 0), so sigma = (1, 1.5/2, 0).

    ```python
    >>> shifted_schedule(2, 3.0)
    tensor([1.0000, 0.7500, 0.0000], dtype=torch.float64)
    ```
    """
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}.")
    if shift <= 0:
        raise ValueError(f"shift must be above 0, got {shift}.")
    t = torch.linspace(1.0, 0.0, num_inference_steps + 1, dtype=torch.float64)
    # The same quotient over shift * t: here rounding cannot move its ends off 1 and 0.
    return t / (t + (1 - t) / shift)
