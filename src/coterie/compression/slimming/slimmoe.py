"""SlimMoE: keep every expert, but fewer neurons of each (arXiv:2506.18349).

An expert is y = W2 (act(W1 x) * (W3 x)), W1, W3 in R^{f x d}, W2 in R^{d x f}; neuron j owns a row of W1, a row of W3
and a column of W2. Every expert keeps f' of its f neurons, in their order; which ones is decided for each expert:

    s_j = sum over the neuron's 3d weights of |w * dL/dw|,    L = - sum_{v in top 8 of the teacher} q_v log p_v

with the original model as teacher in every stage, q its probabilities of its 8 likeliest tokens made to sum to 1 and p
the model's softmax. Optionally whole groups of attention heads go too (a key and value head with its query heads), by
the same sums. One call is one stage; the paper prunes and distils two or three times (`stage_widths`), because the
first-order scores hold near the model they were measured on.

Differs from the paper, of which only summaries could be read: how scores of weights add up to a neuron's, the loss at
stage one (a full KL to the model itself has no gradient) and the taking of |.| per sequence are readings of it.
"""

# I neurons of an expert

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

from pydantic import Field

from coterie.compression.methods import OwnJob, Pick, method
from coterie.errors import UsageError

STEP = 64  # what kernels, tensor parallelism and quantization groups like expert widths to be a multiple of
GRADIENTS = ("kd_top8", "lm", "fisher")


@method("slimmoe", kind="slimming", paper="arXiv:2506.18349")
class SlimMoE(OwnJob):
    """Keep every expert, with its most sensitive neurons."""

    how_much: ClassVar[str] = "how much of each stays is a parameter, e.g. --set width=0.5"
    without_text: ClassVar[str] = "Name some with --data, or use --set criterion=magnitude."
    on_the_fly: ClassVar[str] = "it measures gradients of the whole model"

    width: float | None = Field(None, gt=0, le=1, description="Share of each expert's neurons that stays.")
    neurons: int | None = Field(None, description="Instead: number of neurons of each expert that stay.")
    multiple_of: int | None = Field(
        None, ge=1, description="Make the width a multiple of this. By default 64, or less where experts are narrow."
    )
    kv_heads: int | None = Field(
        None, description="Key and value heads that stay, with their query heads; all if none."
    )
    criterion: Literal["kd_top8", "lm", "fisher", "activation", "magnitude", "random"] = Field(
        "kd_top8",
        description="What neurons are judged by. kd_top8, lm, fisher: gradients, model whole in memory. activation:"
        " size of what it passes on. magnitude: size of its weights, no text. random: nothing, to compare with.",
    )
    teacher: str | None = Field(
        None,
        description="Checkpoint whose likeliest tokens kd_top8 asks for: the original model. By default the model"
        " itself; in a recipe, `original` is the model the recipe began with.",
    )

    @property
    def needs_text(self) -> bool:
        return self.criterion not in ("magnitude", "random")

    @property
    def needs_gradients(self) -> bool:
        return self.criterion in GRADIENTS

    def check(self) -> None:
        """Raise UsageError unless it is said once how much stays."""
        if self.width is not None and self.neurons is not None:
            raise UsageError("width and neurons both say how many neurons stay", "Give one of them.")
        if self.width is None and self.neurons is None and self.kv_heads is None:
            raise UsageError(
                "nothing says how much of an expert stays",
                "Give --set width=0.5 (a share) or --set neurons=960 (a number).",
            )
        if self.teacher is not None and self.criterion != "kd_top8":
            raise UsageError(
                f"criterion={self.criterion} asks no teacher, and teacher={self.teacher} would be ignored",
                "Leave it out, or use criterion=kd_top8.",
            )

    def neurons_of(self, width: int) -> int:
        """How many of an expert's `width` neurons stay. Raises UsageError for a number that cannot be kept."""
        wanted = width if self.width is None and self.neurons is None else self.neurons
        step = self.step(width)
        if wanted is None:
            assert self.width is not None
            if self.width * width < 1:
                raise UsageError(f"width={self.width:g} of {width} neurons is less than one", "Ask for more.")
            wanted = width if self.width == 1 else min(width, math.floor(self.width * width / step + 0.5) * step)
            if not wanted:
                raise UsageError(
                    f"width={self.width:g} of {width} neurons is {self.width * width:g}, less than half of a step of"
                    f" {step}",
                    f"Ask for at least {step / width:.3g}, or for finer steps (--set multiple_of=8).",
                )
        if not 1 <= wanted <= width:
            raise UsageError(f"experts of {width} neurons cannot keep {wanted}", f"Ask for 1 to {width}.")
        if wanted % step and wanted != width:
            below, above = wanted // step * step, min(width, -(-wanted // step) * step)
            near = f"{below} or {above}" if below else f"{above}"
            raise UsageError(
                f"{wanted} neurons are no multiple of {step}, which fast kernels and quantization want",
                f"Ask for {near}, or say --set multiple_of={math.gcd(wanted, step)}.",
            )
        return wanted

    def step(self, width: int) -> int:
        """What the new width is a multiple of: as told, or 64, halved until experts are four steps wide."""
        if self.multiple_of is not None:
            return self.multiple_of
        step = STEP
        while step > 1 and width < 4 * step:
            step //= 2
        return step

    def notes_on(self, width: int) -> list[str]:
        """What a user of experts of `width` neurons has to know."""
        step = self.step(width)
        if self.multiple_of is not None or step == STEP:
            return []
        return [f"experts are {width} neurons wide: their new width is a multiple of {step} instead of {STEP}"]

    def pick(self, *given: Any) -> Pick:
        raise UsageError(
            "slimmoe narrows experts and removes none",
            "Use it with `coterie compress MODEL OUT --method slimmoe --set width=0.5`.",
        )

    def pick_all(self, *given: Any) -> dict[int, Pick]:
        self.pick()
        raise AssertionError


def stage_widths(full: int, target: int, stages: int, multiple_of: int = STEP) -> list[int]:
    """Expert widths after each of so many stages, from `full` down to `target`, in equal ratios.

    6400 to 960 in two stages: 2480, 960 (in multiples of 16). Raises UsageError where a stage would change nothing.
    """
    if stages < 1 or not 0 < target < full:
        raise UsageError(f"no {stages} stages lead from {full} to {target} neurons", "The width must fall.")
    means = [full * (target / full) ** (stage / stages) for stage in range(1, stages)]
    widths = [round(mean / multiple_of) * multiple_of for mean in means] + [target]
    if any(after >= before or after < target for before, after in zip([full, *widths], widths)):
        raise UsageError(
            f"{stages} stages from {full} to {target} neurons in steps of {multiple_of} are {widths}: one does nothing",
            "Use fewer stages or smaller steps.",
        )
    return widths
