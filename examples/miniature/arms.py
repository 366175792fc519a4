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

"""What is compared: the arms with their settings, and the questions with the claims that they answer."""

from dataclasses import dataclass, field
from typing import Any


# What the protocol fixes for every arm.
TUNING_SEEDS = (100, 101)
SEEDS = tuple(range(8))
STEPS = 7  # T: six transitions to be cut into chunks
NUM_IMAGES = 512  # of held-out prompts, at the end of a run
NUM_CURVE_IMAGES = 128  # the first of them, during a run
CURVE_POINTS = 4

# The layout that chunk_sizes="temporal" finds on the base model with three chunks, so that every seed has the same.
LAYOUT = [2, 3, 1]


@dataclass(frozen=True)
class Arm:
    """
    One way to train.

    Args:
        method (`str`): `"chunk_grpo"`, `"srpo"`, or `"steps"`: step-level GRPO whose steps weigh as in chunks of `LAYOUT`.
        rows (`int`): budget, in rows that go through the network, of rollouts and of updates.
        learning_rates (`tuple[float, ...]`): those that are tried.
        settings (`dict`): of the trainer's configuration, on top of those of all arms of the method.
        reward (`str`): `"attribute_share"` (the judge, a black box) or `"shapes-clip"` (differentiable).
        measure (`str`): held-out measure by which the learning rate is chosen, and arms are compared.
        fractions (`tuple[float, ...]`): hybrids that are measured at the end besides the trained model.
    """

    method: str
    rows: int
    learning_rates: tuple[float, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    reward: str = "attribute_share"
    measure: str = "attribute_share"
    fractions: tuple[float, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """`arm` minus `against`, on `measure`, and the claim that it is above 0."""

    arm: str
    against: str
    claim: str
    measure: str | None = None


@dataclass(frozen=True)
class Question:
    """
    Args:
        number (`int`), title (`str`), comparisons (`tuple[Comparison, ...]`): what is asked.
        note (`str`, *optional*): what is said before the table of the arms.
        same_reward_as (`str`, *optional*): all arms train the reward of this one; what compute they need to its score is
            told, and the figure shows the reward.
        shown_beside (`tuple[str, ...]`, *optional*): arms of other questions in that figure.
    """

    number: int
    title: str
    comparisons: tuple[Comparison, ...]
    note: str = ""
    same_reward_as: str | None = None
    shown_beside: tuple[str, ...] = ()

    @property
    def arms(self) -> list[str]:
        """Each once, those that others are compared with first."""
        names = [c.against for c in self.comparisons] + [c.arm for c in self.comparisons]
        return list(dict.fromkeys(name.split("@")[0] for name in names))


GRPO_ROWS = 24_000
DIRECT_ROWS = 12_000


def grpo(
    method: str = "chunk_grpo",
    reward: str = "attribute_share",
    fractions: tuple[float, ...] = (),
    **settings: Any,
) -> Arm:
    """Off-policy arms have as many images an update."""
    return Arm(method, GRPO_ROWS, (5e-4, 1e-3, 2e-3), settings, reward, fractions=fractions)


def style(**settings: Any) -> Arm:
    """SRPO towards sharp pictures, by words that the generator never sees."""
    settings = {"sigma_range": [0.6, 0.95], "delta_sigma": 0.05, **settings}
    return Arm("srpo", DIRECT_ROWS, (1e-4, 2e-4, 4e-4), settings, reward="shapes-clip", measure="style")


def plain(**settings: Any) -> Arm:
    """Long training through the gradient of what `shapes-clip` makes of the plain prompt; the judge tells what comes of it."""
    settings = {"preference": "absolute", **settings}
    return Arm("srpo", GRPO_ROWS, (2.5e-4, 5e-4, 1e-3), settings, reward="shapes-clip")


STEP = {"chunk_sizes": "equal:1"}
# The noisier half of the steps in every generation: what moves the model within the budget
NOISY_STEP = {**STEP, "chunk_sampling": [0, 1, 2]}
NOISY_CHUNK = {"chunk_sizes": "equal:3", "chunk_sampling": [0]}
UNIFORM = {"chunk_sizes": LAYOUT}
TEMPORAL = {"chunk_sizes": LAYOUT, "chunk_sampling": "temporal"}
HYBRIDS = (0.4, 0.6, 0.8)

ARMS: dict[str, Arm] = {
    # On-policy
    "step": grpo(**STEP, fractions=HYBRIDS),
    "temporal": grpo(**TEMPORAL, fractions=HYBRIDS),
    "temporal-uniform": grpo(**UNIFORM),
    "equal-2": grpo(chunk_sizes="equal:2"),
    "one-chunk": grpo(chunk_sizes="equal:6"),
    "weighted-steps": grpo(method="steps", **STEP),
    # Added when the first three arms were run: the noisier half of the steps alone, in every generation
    "noisy-steps": grpo(**NOISY_STEP),
    "noisy-chunk": grpo(**NOISY_CHUNK),
    # Several updates a generation, of the same steps with the same weights: what differs is the ratio that is bounded.
    # The bounds are such that each acts (docs/miniature.md, Protocol).
    **{
        f"{layout}-{bound}-{updates}": grpo(steps_per_generation=updates, **chunks, **bounds)
        for updates in (2, 4)
        for bound, bounds in (
            ("clip", {"epsilon": 2e-5}),
            ("kl", {"trust_region": "kl", "kl_threshold": 5e-7}),
            ("guard", {"trust_region": "guard", "epsilon": 1e-5}),
        )
        for layout, chunks in (("step", NOISY_STEP), ("chunk", NOISY_CHUNK))
    },
    # Which steps are noisy
    "trained-noise": grpo(**UNIFORM, stochastic_steps="trained"),
    "sliding-window": grpo(stochastic_steps="trained", train_window=4, window_interval=5),
    "random-window": grpo(stochastic_steps="trained", train_window=4, window_schedule="random"),
    # Through the reward's gradient: style
    "relative": style(),
    "difference": style(preference="difference"),
    "interpolated": style(preference="interpolated"),
    "denoise-only": style(branches=["denoise"]),
    "inversion-only": style(branches=["inversion"]),
    "low-noise": style(sigma_range=[0.1, 0.45]),
    # Through the reward's gradient: the plain prompt
    "direct-align": plain(sigma_range=[0.75, 0.964]),
    "refl": plain(estimator="refl", sigma_range=[0.1, 0.6]),
    "draft": plain(estimator="draft"),
    # GRPO as it learns best here: the noisier half of the steps
    "grpo-on-clip": grpo(reward="shapes-clip", **NOISY_CHUNK),
}


def versus_step(bound: str, updates: int) -> Comparison:
    return Comparison(
        f"chunk-{bound}-{updates}", f"step-{bound}-{updates}",
        f"chunks help with {updates} updates a generation, bounded by {bound}",
    )  # fmt: skip


QUESTIONS = (
    Question(
        1,
        "Chunk against step level, on-policy, at equal compute",
        (
            Comparison("temporal", "step", "temporal layout and sampling beat step level (HPSv3 +0.293 over DanceGRPO)"),
            Comparison("temporal-uniform", "step", "the temporal layout beats step level (+0.156)"),
            Comparison("equal-2", "step", "chunks of 2 beat step level (+0.035)"),
            Comparison("one-chunk", "step", "one chunk of all steps beats step level (+0.062)"),
        ),
    ),
    Question(
        2,
        "Is it more than a weighting?",
        (
            Comparison("noisy-chunk", "noisy-steps", "one chunk of three steps beats the same three steps singly"),
            Comparison("temporal-uniform", "weighted-steps", "chunks beat steps of the same weights that are drawn singly"),
            Comparison("weighted-steps", "step", "the weights of chunks alone beat step level"),
        ),
        "On-policy, chunks and steps of the same weights and the same draws have one gradient: that is mathematics, and "
        "`noisy-chunk` and `noisy-steps`, which differ in nothing else, show it.",
    ),
    Question(
        3,
        "Which layout, which sampling",
        (
            Comparison("temporal-uniform", "equal-2", "the temporal layout beats equal chunks (+0.121)"),
            Comparison("temporal", "temporal-uniform", "weighted sampling beats uniform sampling (+0.137)"),
        ),
    ),
    Question(
        4,
        "Several updates a generation",
        tuple(versus_step(bound, updates) for updates in (2, 4) for bound in ("clip", "kl", "guard")),
        "The arms of a pair train the noisier three steps of every generation with the same weights: one ratio of all three is "
        "bounded, or one of each.",
    ),
    Question(
        5,
        "What SRPO's parts do",
        (
            Comparison("relative", "difference", "the discount helps"),
            Comparison("relative", "interpolated", "relative beats interpolated"),
            Comparison("relative", "denoise-only", "two branches beat denoising alone"),
            Comparison("relative", "inversion-only", "two branches beat inversion alone"),
            Comparison("relative", "low-noise", "high noise beats low noise"),
            Comparison("relative", "low-noise", "high noise costs fewer right attributes", measure="attribute_share"),
            # Asked when the first was answered
            Comparison(
                "relative", "difference", "the discount keeps right attributes (asked afterwards)", measure="attribute_share"
            ),
        ),
    ),
    Question(
        6,
        "The reward's gradient against GRPO, on one reward",
        (
            Comparison("direct-align", "grpo-on-clip", "the gradient through one forward beats GRPO at equal compute"),
            Comparison("direct-align", "refl", "Direct-Align beats ReFL"),
            Comparison("direct-align", "draft", "Direct-Align beats DRaFT"),
        ),
        "The judge beside the line: points above the straight line from the base to freshly drawn pictures, at the reward that a "
        "run ends with; below 0, a run has more of the reward than of what it stands for.",
        same_reward_as="grpo-on-clip",
        shown_beside=("relative",),
    ),
    Question(
        7,
        "Hybrid inference: the adapter for a part of the steps",
        tuple(
            Comparison(f"{arm}@{fraction}", arm, f"the adapter of {arm} for {100 * fraction:.0f} % of the steps beats all")
            for arm in ("temporal", "step")
            for fraction in HYBRIDS
        ),
    ),
    Question(
        8,
        "Which steps train, and which are noisy",
        (
            Comparison("noisy-steps", "step", "training the noisier half of the steps beats drawing of all"),
            Comparison("trained-noise", "temporal-uniform", "noise on the trained chunks alone beats noise on all"),
            Comparison("sliding-window", "step", "a sliding window of 4 (MixGRPO) beats step level"),
            Comparison("random-window", "step", "a window drawn anew beats step level"),
        ),
    ),
)  # fmt: skip
