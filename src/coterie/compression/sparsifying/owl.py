"""OWL: Wanda with a share of its own for every decoder layer, by its outliers (arXiv:2310.05175).

    D_l = 100 * share of layer l's importances above M times their mean   (all its matrices pooled, original model)
    r_l = (D_l - min D) * 2 lambda / (max D - min D)
    r_l <- r_l - mean(r) + (1 - s),   s_l = 1 - r_l

The mean is weighted with the layers' numbers of weights, so that exactly s of all weights goes; layers with equal
numbers give the paper's plain mean. lambda = 0 is Wanda. Shares stay within [0.01, 0.99] (or s, if that is further
out); what a bound takes from one layer goes to the others.

M and lambda are STUN's (arXiv:2409.06211); the paper's own M is 5. The importances of experts that no token reached
are not defined and not pooled. Needs one more sweep than Wanda.
"""

# O outputs, I inputs of a matrix

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from coterie.compression.methods import method
from coterie.compression.sparsifying.wanda import Wanda
from coterie.errors import UsageError

LEAST, MOST = 0.01, 0.99


@method("owl", kind="sparsifying", paper="arXiv:2310.05175")
class Owl(Wanda):
    """Wanda, with fewer zeros in layers that have more outliers."""

    needs_ratios: ClassVar[bool] = True

    multiple: float = Field(3.0, gt=0, description="M: an importance above this many times the mean is an outlier.")
    lam: float = Field(0.08, ge=0, le=0.5, description="lambda: shares of layers differ by at most twice this.")

    def check(self) -> None:
        super().check()
        if self.blocks is not None:
            raise UsageError(
                f"owl gives every layer its own share, and the pattern {self.pattern} the same to all",
                "Use --method wanda with this pattern.",
            )

    def outlier_ratio(self, importances: Callable[[], Iterable[Tensor]]) -> float:
        """D_l in percent. importances : called twice, gives [O, I] of every matrix of a layer."""
        total, count = 0.0, 0
        for part_OI in importances():
            total += float(part_OI.double().sum())
            count += part_OI.numel()
        limit = self.multiple * total / max(count, 1)
        above = sum(int((part_OI > limit).sum()) for part_OI in importances())
        return 100.0 * above / max(count, 1)

    def layer_shares(
        self, share: float, weights: Mapping[int, int], ratios: Mapping[int, float] | None
    ) -> dict[int, float]:
        assert ratios is not None
        low, high = min(ratios.values()), max(ratios.values())
        if high == low or self.lam == 0 or share == 0:
            return dict.fromkeys(weights, share)
        total = sum(weights.values())
        r = {layer: (ratios[layer] - low) * 2 * self.lam / (high - low) for layer in weights}
        mean = sum(weights[layer] * r[layer] for layer in weights) / total
        wanted = {layer: share - (r[layer] - mean) for layer in weights}
        least, most = min(LEAST, share), max(MOST, share)

        def bounded(shift: float) -> dict[int, float]:
            return {layer: min(max(s + shift, least), most) for layer, s in wanted.items()}

        below, above = -1.0, 1.0  # the weighted mean grows with the shift: halve
        if all(least <= s <= most for s in wanted.values()):
            return wanted
        for _ in range(100):
            middle = (below + above) / 2
            found = bounded(middle)
            if sum(weights[layer] * found[layer] for layer in weights) < share * total:
                below = middle
            else:
                above = middle
        return bounded((below + above) / 2)
