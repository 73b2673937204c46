"""Wanda: zero the weights that contribute least, given how large their inputs are (arXiv:2306.11695).

    importance(w_oc) = |w_oc| * sqrt(mean over tokens of x_c^2)

compared within an output row. Layer after layer: a layer's statistics are taken on what the pruned layers before it
put out. An expert sees the tokens routed to it; its second projection sees its own hidden activations.

Differs from the authors' code: a true mean per token (theirs divides by hook calls or sequences, a constant per matrix
that no row notices), and padding is left out. Experts that no token reached are pruned by magnitude and counted;
STUN's code (arXiv:2409.06211) leaves them dense, which silently lowers the sparsity.
"""

# O outputs, I inputs of a matrix

from __future__ import annotations

from torch import Tensor

from coterie.compression.methods import method
from coterie.compression.sparsifying.base import Sparsifier


@method("wanda", kind="sparsifying", paper="arXiv:2306.11695")
class Wanda(Sparsifier):
    """Zero the weights of every output row with the smallest |weight| times size of its input."""

    def importance(self, weight_OI: Tensor, norm_I: Tensor | None) -> Tensor:
        size_OI = weight_OI.float().abs()
        return size_OI if norm_I is None else size_OI * norm_I
