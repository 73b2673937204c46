"""The same bits for every expert: what all other allocations are compared with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

from pydantic import Field

from coterie.compression.bits import Allocation, total_bytes
from coterie.compression.methods import method
from coterie.compression.quantizing.base import Bits, Quantizer, everywhere, too_small
from coterie.experts.packed import PLAIN
from coterie.experts.packing import WIDTHS
from coterie.profiling.profile import LayerProfile
from coterie.streaming.model import StreamedModel


@method("quantize", kind="quantizing", paper="arXiv:2210.17323")
class Uniform(Quantizer):
    """The same bits everywhere, rounded by GPTQ, HQQ or to the nearest; other bits for attention or shared experts."""

    bits: Bits = Field(4, description="Bits of routed experts, and of all that is not said otherwise.")

    def allocate(self, streamed: StreamedModel, layers: Mapping[int, LayerProfile]) -> Allocation:
        return Allocation(everywhere(streamed, self.bits), self.linears(streamed))

    def fitted(self, streamed: StreamedModel, target: int) -> Self:
        for bits in (16, *reversed(WIDTHS)):
            chosen = self.model_copy(update={"bits": bits})
            made = chosen.allocate(streamed, {})
            experts = {} if bits == PLAIN else made.experts
            size = total_bytes(streamed, experts, made.linears, self.grids)
            if size <= target:
                return chosen
        raise too_small(target, size, "one bit everywhere")
