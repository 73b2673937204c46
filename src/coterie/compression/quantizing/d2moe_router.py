"""D2MoE, second half: learn, token by token, at how many bits each expert computes (arXiv:2504.15299).

Beside the router that picks experts, every expert e of a layer has a bit router R_e that looks at the same token x and
chooses among the widths b_1 < ... < b_K that `d2moe` stored:

    p(x) = softmax(R_e x),   y = E^(k*)(x),   k* = argmax_k p_k(x)
    L = mean_x [ CE(student(x), teacher(x)) + (alpha / layers) sum_l sum_k p_k^l(x) b_k ]
    or, where a mean of b bits is asked for,  CE + mu (mean bits - b)^2: alpha = 2 mu (mean bits - b), step by step

with p^l averaged over a token's experts and all means over real tokens. In training, of an expert's tokens at most
floor(c_k T) take width k; the others, drawn at random, do without that expert. The teacher is the 16-bit model; only
R learns, on the planes that are served. The forward pass is in `experts.levels`, the training in `training.widths`.

The paper says neither how gradients reach R nor what alpha is. Of two ways that keep the value of y, `gradient`, the
default is a mixture of all widths, for y p_k* / stopgrad(p_k*) can only tell whether an expert is of use, not whether
another width would be better. Mean bits are those of k*, with the gradient of p. CE is over the teacher's `top` tokens
and one bucket for all others.
"""

# K widths

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field, field_validator
from torch import Tensor

from coterie.anatomy import MoELayer
from coterie.anatomy.forms import NestedBits, empty_bit_router, form_of
from coterie.compression.methods import OwnJob, method
from coterie.errors import ModelError, UsageError
from coterie.experts.levels import NAME, Gradient

V1 = (0.3, 0.4, 0.3)  # capacities of the paper for three widths; for others it has equal ones


@method("d2moe-router", kind="quantizing", paper="arXiv:2504.15299")
class D2MoeRouter(OwnJob):
    """Let small trained routers choose, for every token and expert, at how many of d2moe's bits it computes."""

    how_much: ClassVar[str] = "how many bits run is a parameter, e.g. --set mean_bits=3"
    on_the_fly: ClassVar[str] = "it trains"

    teacher: str | None = Field(None, description="The 16-bit checkpoint that d2moe began with; must be named.")
    mean_bits: float | None = Field(
        None, gt=0, le=8, description="Mean bits of what runs to aim at; by default alpha decides."
    )
    alpha: float = Field(0.02, ge=0, description="Weight of the expected bits, without mean_bits.")
    hold: float = Field(0.5, gt=0, description="Mu: weight of the squared distance to mean_bits.")
    gradient: Gradient = Field(
        "mixture",
        description="What routers learn from: mixture, outputs at all widths; chosen, those at the chosen one alone.",
    )
    capacity: tuple[Annotated[float, Field(gt=0, le=1)], ...] | None = Field(
        None,
        description="c_k, one for each width, summing to one; by default 0.3, 0.4, 0.3 for three, equal for others.",
    )
    of_expert: bool = Field(
        False, description="Capacities are shares of the tokens routed to an expert, not of those of the batch."
    )
    steps: int = Field(300, ge=1, description="Training steps.")
    rate: float = Field(1e-2, gt=0, description="Highest learning rate.")
    batch_size: int = Field(8, ge=1, description="Sequences per step.")
    top_start: float = Field(0.5, gt=0, lt=1, description="Probability of the highest width, before training.")
    top: int = Field(64, ge=1, description="How many of the teacher's tokens count one by one.")
    temperature: float = Field(1.0, gt=0, description="Of the distillation.")

    @field_validator("capacity")
    @classmethod
    def _all_tokens(cls, value: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if value is not None and abs(sum(value) - 1) > 1e-6:
            raise ValueError(f"capacities sum to {sum(value):g}, not to 1")
        return value

    def check(self) -> None:
        if self.teacher is None:
            raise UsageError(
                "bit routers learn from the 16-bit model, and none is named", "Say --set teacher=CHECKPOINT."
            )

    def capacities(self, widths: int) -> tuple[float, ...]:
        """c_k of so many widths. Raises UsageError if others are given."""
        if self.capacity is None:
            return V1 if widths == len(V1) else (1 / widths,) * widths
        if len(self.capacity) != widths:
            raise UsageError(f"capacity has {len(self.capacity)} shares, and the experts have {widths} widths")
        return self.capacity

    def check_model(self, moe: Mapping[int, MoELayer]) -> None:
        for index, layer in moe.items():
            grid = form_of(layer).nested
            if grid is None or grid.planes == 0:
                raise ModelError(
                    f"the experts of layer {index} have one width only", "Start from what --method d2moe wrote."
                )
            if grid.options is not None:
                raise ModelError(
                    f"layer {index} has a bit router already", "Start from the checkpoint it was made from."
                )
            self.capacities(grid.planes + 1)
            highest = grid.base + grid.planes
            if self.mean_bits is not None and not grid.base <= self.mean_bits <= highest:
                raise UsageError(f"a mean of {self.mean_bits:g} bits is not within {grid.base} to {highest}")

    def reform(self, moe: MoELayer) -> dict[str, Any]:
        grid = _nested(moe)
        return {"nested": {**grid.model_dump(), "options": grid.planes + 1}}

    def added(self, moe: MoELayer) -> dict[str, Tensor]:
        """Room for the bit router; its values are what training finds."""
        grid = _nested(moe)
        router = empty_bit_router(moe, grid.base, grid.planes + 1)
        return {f"{NAME}.{name}": tensor for name, tensor in router.state_dict().items()}

    def notes(self) -> list[str]:
        return ["how many bits run depends on the text; all planes have to be at hand"]


def _nested(moe: MoELayer) -> NestedBits:
    grid = form_of(moe).nested
    assert grid is not None
    return grid
