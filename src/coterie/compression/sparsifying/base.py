"""What a method that zeroes single weights is: how much, in which pattern, and which weights matter least.

Every output row of a weight matrix loses the same share of its entries. The engine (`compression.sparsify`) runs the
text, asks for the importance of one matrix at a time and writes; it is not known here.
"""

# O outputs, I inputs of a matrix

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor

from coterie.compression.methods import OwnJob, Pick
from coterie.errors import UsageError


class Sparsifier(OwnJob):
    """Base of all methods that zero weights instead of removing experts."""

    how_much: ClassVar[str] = "how much to zero is a parameter, e.g. --set sparsity=0.5"
    without_text: ClassVar[str] = "Name some with --data, or use --method magnitude."
    on_the_fly: ClassVar[str] = "it zeroes weights layer after layer on its own text"
    needs_ratios: ClassVar[bool] = False  # a sweep over the original comes first (`outlier_ratio`)

    sparsity: float | None = Field(
        None, ge=0, lt=1, description="Share of the weights in decoder layers to zero; routers are no part of it."
    )
    total: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Instead: share that is gone in the end, experts removed by earlier steps counted in.",
    )
    pattern: str = Field(
        "row",
        description="row: the share of each output row. n:m, as 2:4: n of every m neighbouring inputs stay.",
    )

    @field_validator("pattern", mode="before")
    @classmethod
    def _not_base_60(cls, value: Any) -> Any:
        """YAML, which reads --set and recipes, takes 2:4 for a number with the base 60."""
        return f"{value // 60}:{value % 60}" if type(value) is int and value >= 60 else value

    @field_validator("pattern")
    @classmethod
    def _known(cls, value: str) -> str:
        if value == "row":
            return value
        n, colon, m = value.partition(":")
        if not (colon and n.isdecimal() and m.isdecimal() and 0 < int(n) < int(m)):
            raise ValueError("write row, or n:m where n of every m neighbouring inputs stay, as 2:4")
        return value

    @property
    def blocks(self) -> tuple[int, int] | None:
        """(n, m) of a pattern n:m."""
        if self.pattern == "row":
            return None
        n, _, m = self.pattern.partition(":")
        return int(n), int(m)

    def check(self) -> None:
        """Raise UsageError unless it is said once how much is to be zeroed."""
        given = {name: value for name in ("sparsity", "total") if (value := getattr(self, name)) is not None}
        if self.blocks is None:
            if len(given) != 1:
                said = "two things say" if given else "nothing says"
                raise UsageError(
                    f"{said} how many weights to zero",
                    "Give one of --set sparsity=0.5 and --set total=0.5 (experts removed before counted in).",
                )
        elif "total" in given or given.get("sparsity", self._pattern_share) != self._pattern_share:
            name = min(given, key=lambda n: n != "total")
            raise UsageError(
                f"the pattern {self.pattern} zeroes {self._pattern_share:g} of the weights, and {name}={given[name]:g}"
                " asks for another share",
                "Leave one of them out.",
            )

    @property
    def _pattern_share(self) -> float:
        n, m = self.blocks or (1, 1)
        return 1 - n / m

    def share(self, weights: int, removed: int) -> float:
        """The share s of the present weights to zero.

        weights : present in the decoder layers. removed : gone with experts of earlier steps. With the total S of all
        weights there ever were, s = (S - e) / (1 - e) for the removed share e.
        """
        if self.blocks is not None:
            return self._pattern_share
        if self.sparsity is not None:
            return self.sparsity
        assert self.total is not None
        everything = weights + removed
        if self.total * everything < removed:
            raise UsageError(
                f"total={self.total:g} is less than the {removed / everything:.3f} of the weights that went with"
                " the experts removed before",
                f"Ask for more than {removed / everything:.3f}, or remove fewer experts first.",
            )
        return (self.total * everything - removed) / weights

    def layer_shares(
        self, share: float, weights: Mapping[int, int], ratios: Mapping[int, float] | None
    ) -> dict[int, float]:
        """The share of each decoder layer, with the mean `share` over weights. ratios : see `needs_ratios`."""
        return dict.fromkeys(weights, share)

    def importance(self, weight_OI: Tensor, norm_I: Tensor | None) -> Tensor:
        """How much each weight matters within its row. Shape [O, I], float32.

        norm_I : root mean square of each input over the tokens that reached the matrix; None if none did.
        """
        raise NotImplementedError

    def dropped(self, importance_OI: Tensor, share: float) -> Tensor:
        """True where a weight is zeroed: in each row the least important ones, ties from the left. Shape [O, I]."""
        O, I = importance_OI.shape  # noqa: E741
        if self.blocks is not None:
            n, m = self.blocks
            ranked = importance_OI.view(O, I // m, m)
            count = m - n
        else:
            ranked = importance_OI.view(O, 1, I)
            count = math.floor(share * I + 1e-9)  # 0.29 * 100 is 28.999... in floating point
        order = torch.argsort(ranked, dim=-1, stable=True)[..., :count]
        return torch.zeros_like(ranked, dtype=torch.bool).scatter_(-1, order, True).view(O, I)

    def pick(self, *given: Any) -> Pick:
        raise UsageError(
            f"{type(self).__name__.lower()} zeroes weights inside experts and removes none",
            "Use it with `coterie compress MODEL OUT --method ... --set sparsity=0.5`.",
        )

    def pick_all(self, *given: Any) -> dict[int, Pick]:
        self.pick()
        raise AssertionError
