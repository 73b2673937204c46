"""MC-SMoE's compression: experts as low rank plus a few whole rows, found while training (arXiv:2310.01334).

The C behind the merging of `m-smoe`; works on any checkpoint, and where experts share router outputs they go on to.
Every matrix W of every stored expert becomes U V + S:

    W = A diag(s) B,  U = A_r sqrt(s_r),  V = sqrt(s_r) B_r,  S = W - U V            exact before the first step
    I_t = mean over a row of | S o dL/dS |,   Ibar_t = beta Ibar_(t-1) + (1 - beta) I_t      each output neuron's row
    after step t the rows below one threshold over all S of all experts and layers are set to zero, a share p(t) stays:
    p = 1 until T_i;   p_T + (1 - p_T) (1 - (t - T_i) / (T - T_i - T_f))^3;   p_T for the last T_f steps

L = CE + alpha KL to the teacher (temperature 2), routers frozen, all else learns. At the end zero rows are dropped:
what is stored and computed is U, V and the rows that stayed. steps=0 is the paper's zero-shot variant: nothing learns,
rows are scored on the text by the gradient of CE alone.

Differs from the paper: the printed schedule also subtracts T_f in the numerator, which would start above 1 (the code
does not); KL is a mean over tokens, where the code's sum over a sequence grows with its length; T is the number of
steps asked for, of which T_i and T_f are shares. The paper trains for 10000 steps.
"""

# K stored experts, O output rows of a projection, N rows that stay

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from coterie.anatomy import MoELayer
from coterie.anatomy.forms import projection_shapes
from coterie.compression.merging.operators import ranks_of
from coterie.compression.methods import OwnJob, method
from coterie.errors import ModelError


@method("mc-smoe", kind="factorizing", paper="arXiv:2310.01334")
class McSmoe(OwnJob):
    """Store experts as low rank plus the rows training finds to matter, distilled from the original."""

    how_much: ClassVar[str] = "what stays is a parameter, e.g. --set rank=32"
    on_the_fly: ClassVar[str] = "it trains"

    rank: int = Field(32, ge=1, description="Rank r of U V; at most the full rank.")
    rows: float = Field(0.1, ge=0, le=1, description="p_T: share of the rows of S that stay in the end.")
    steps: int = Field(400, ge=0, description="T: training steps; 0 scores rows on the text and trains nothing.")
    initial: float = Field(0.04, ge=0, lt=1, description="T_i / T: share of the steps before rows go.")
    final: float = Field(0.16, ge=0, lt=1, description="T_f / T: share of the steps after the last row went.")
    beta: float = Field(0.85, ge=0, lt=1, description="What stays of the smoothed sensitivity at each step.")
    alpha: float = Field(0.2, ge=0, description="Weight of the distillation beside the usual loss.")
    temperature: float = Field(2.0, gt=0, description="Of the distillation.")
    rate: float = Field(1e-4, gt=0, description="Highest learning rate.")
    batch_size: int = Field(8, ge=1, description="Sequences per step.")
    teacher: str | None = Field(
        None, description="Checkpoint to learn from: a path, or original in a recipe. None: the checkpoint itself."
    )

    @model_validator(mode="after")
    def _there_is_a_middle(self) -> McSmoe:
        if self.initial + self.final >= 1:
            raise ValueError(f"initial {self.initial:g} and final {self.final:g} leave no steps in which rows could go")
        return self

    def ranks(self, moe: MoELayer) -> dict[str, int]:
        return ranks_of(projection_shapes(moe.bank), self.rank, None, moe.index)

    def share(self, step: int) -> float:
        """p(t): the share of rows that stays after `step` of the `steps`."""
        first, last = self.initial * self.steps, self.steps - self.final * self.steps
        if step >= last or self.steps == 0:
            return self.rows
        if step < first:
            return 1.0
        return self.rows + (1 - self.rows) * (1 - (step - first) / (last - first)) ** 3


def staying(scores: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """Which rows of every S stay: a `share` of all of them together, those of the largest scores. {name: bool [O K]}.

    Exactly round(share * rows) stay; of equal scores the first ones.
    """
    every_N = torch.cat([score_N.flatten().double() for score_N in scores.values()])
    if not bool(torch.isfinite(every_N).all()):
        raise ModelError("the sensitivity of a row of an expert is no number", "Lower the rate.")
    kept_N = torch.zeros(len(every_N), dtype=torch.bool)
    kept_N[every_N.argsort(descending=True, stable=True)[: round(share * len(every_N))]] = True
    parts = torch.split(kept_N, [score_N.numel() for score_N in scores.values()])
    return dict(zip(scores, parts, strict=True))
