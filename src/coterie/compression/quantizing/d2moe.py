"""D2MoE, first half: every expert stored once, to be read at several widths (MWQ of arXiv:2504.15299).

A matrix is a base of b_1 bits and planes of signs above it; with X the inputs it receives on text,

    W_hat_1 = (Q_1 - z_1) s_1 minimises ||W X - W_hat_1 X||,   W_hat_k = W_hat_(k-1) + s_k sign(W - W_hat_(k-1))

so that b_1 + k bits are the first k planes of one file. How planes are found stands in `quantizers.mwq`, how they are
stored in `experts.nested`; the second half, which chooses a width for every token, is `d2moe-router`. All experts have
the same base and the same planes; linear layers outside of experts have one width, rounded as `quantizer` says.

Deviates: a compensated base is kept only where it does not spoil the planes above it (`compensate`, see there). Text
goes on through the experts at their full width. An expert that few tokens reached is rounded without looking at them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field, model_validator
from torch import Tensor

from coterie.compression.bits import Allocation, Grids
from coterie.compression.methods import method
from coterie.compression.quantizers import Report, Spec, mwq, report, too_few
from coterie.compression.quantizers.mwq import Compensate
from coterie.compression.quantizing.base import Quantizer, everywhere
from coterie.experts.nested import NestedCodes
from coterie.profiling.profile import LayerProfile
from coterie.streaming.model import StreamedModel


@method("d2moe", kind="quantizing", paper="arXiv:2504.15299")
class D2Moe(Quantizer):
    """Experts stored once as a base of few bits and planes above it, to be read at any of these widths."""

    how_much: ClassVar[str] = "how many bits is a parameter, e.g. --set base_bits=2 --set planes=2"
    takes: ClassVar[frozenset[str]] = frozenset({"plan"})
    others = 16

    base_bits: int = Field(2, ge=1, le=8, description="Bits of the base, the narrowest width.")
    planes: int = Field(2, ge=0, le=7, description="Planes above it, one bit each: 2 on a base of 2 give 2, 3, 4 bits.")
    compensate: Compensate = Field(
        "best",
        description="Does a later block make up for what an earlier one lost: paper (yes), never, or best: whichever"
        " chain of widths is better.",
    )
    search: bool = Field(
        False, description="Try 101 ranges for every group of the base and take the best: better, several times slower."
    )

    @model_validator(mode="after")
    def _at_most_a_byte(self) -> D2Moe:
        if self.base_bits + self.planes > 8:
            raise ValueError(f"base_bits {self.base_bits} and planes {self.planes} are more than 8 bits")
        return self

    @property
    def grids(self) -> Grids:
        return super().grids.model_copy(update={"planes": self.planes})

    def allocate(self, streamed: StreamedModel, layers: Mapping[int, LayerProfile]) -> Allocation:
        return Allocation(everywhere(streamed, self.base_bits), self.linears(streamed))

    def round_expert(
        self,
        w_OI: Tensor,
        spec: Spec,
        grids: Grids,
        gram_II: Tensor | None,
        *,
        tokens: int,
        calibration_tokens: int,
    ) -> tuple[NestedCodes, list[Report]]:
        """Base and planes of one matrix, and what each width costs."""
        few = gram_II is None or too_few(tokens, calibration_tokens, share=self.least_share, rows=self.least_tokens)
        nested = mwq(
            w_OI,
            None if few else gram_II,
            base_bits=spec.bits,
            planes=grids.planes or 0,
            spec=spec,
            damp=self.damp,
            compensate=self.compensate,
        )
        fallback = few and grids.quantizer == "gptq"
        levels = range(len(nested.planes) + 1)
        return nested, [report(w_OI, nested.dense(k), gram_II, fallback=fallback, tokens=tokens) for k in levels]
