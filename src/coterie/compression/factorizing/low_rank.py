"""Low-rank experts: store every matrix of every expert as two factors, W ~ U V (truncated SVD).

The baseline of all low-rank compression, and the first step of MC-SMoE (arXiv:2310.01334): W = A diag(s) B,
U = A_r sqrt(s_r), V = sqrt(s_r) B_r. Needs no text. Works on merged checkpoints too: their expert map stays.

Expert matrices of trained models are rarely of low rank: expect damage without healing. Experts really compute in the
factors, r (O + I) multiplications instead of O I for a token.
"""

# E experts, O outputs and I inputs of a matrix

from __future__ import annotations

import torch
from pydantic import Field, model_validator
from torch import Tensor

from coterie.anatomy import ExpertBank, MoELayer
from coterie.anatomy.forms import projection_shapes
from coterie.compression.merging.operators import MATRIX, factorise, ranks_of
from coterie.compression.methods import Keeper, method
from coterie.compression.plan import LayerPlan
from coterie.profiling.profile import LayerProfile


@method("low-rank", kind="factorizing", paper="folklore")
class LowRank(Keeper):
    """Store the matrices of all experts as low-rank factors (truncated SVD)."""

    rank: int | None = Field(None, ge=1, description="Rank of every matrix.")
    save: float | None = Field(
        None, gt=0, lt=1, description="Instead of a rank: share of the numbers of each matrix that its factors save."
    )

    @model_validator(mode="after")
    def _one_of_both(self) -> LowRank:
        if self.rank is not None and self.save is not None:
            raise ValueError("a rank and a share to save both decide: give one of them")
        return self

    def ranks(self, moe: MoELayer) -> dict[str, int]:
        save = 0.5 if self.rank is None and self.save is None else self.save
        return ranks_of(projection_shapes(moe.bank), self.rank, save, moe.index)

    def factor(
        self, experts: ExpertBank, plan: LayerPlan, seen: LayerProfile | None = None
    ) -> dict[str, Tensor] | None:
        """U and V of every expert. Peak memory: the factors, and see `operators.factorise`."""
        shapes = projection_shapes(experts)
        save = 0.5 if self.rank is None and self.save is None else self.save
        ranks = ranks_of(shapes, self.rank, save, plan.index)
        found: dict[str, list[Tensor]] = {f"factor_{p}_{part}": [] for p in shapes for part in "ab"}
        for expert in plan.keep:
            weights = experts.read(expert)
            for p in shapes:
                weight_OI = getattr(weights, MATRIX[p])
                for part, value in zip("ab", factorise(weight_OI, ranks[p]), strict=True):
                    found[f"factor_{p}_{part}"].append(value.to(weight_OI.dtype))
        return {name: torch.stack(tensors) for name, tensors in found.items()}
