"""Magnitude pruning: in every output row zero the weights with the smallest absolute value. Looks at no data."""

# O outputs, I inputs of a matrix

from __future__ import annotations

from torch import Tensor

from coterie.compression.methods import method
from coterie.compression.sparsifying.base import Sparsifier


@method("magnitude", kind="sparsifying", paper="folklore")
class Magnitude(Sparsifier):
    """Zero the smallest weights of every output row."""

    @property
    def needs_text(self) -> bool:
        return False

    def importance(self, weight_OI: Tensor, norm_I: Tensor | None) -> Tensor:
        return weight_OI.float().abs()
