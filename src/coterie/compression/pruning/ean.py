"""EAN: keep the experts whose outputs are largest (expert activation norm, arXiv:2504.05586).

    s_e = sum_{t routed to e} ||f_e(x_t)||_2          ("sum", the paper's)
    s_e = mean_{t routed to e} ||f_e(x_t)||_2         ("mean": rare experts are not punished)

f_e is the expert's output before the gate weight.
"""

# E experts

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from coterie.compression.methods import Method, method
from coterie.profiling.observers import Observer, OutputNorm, SelectionCount
from coterie.profiling.profile import LayerProfile


@method("ean", kind="pruning", paper="arXiv:2504.05586")
class Ean(Method):
    """Keep the experts with the largest output norms."""

    reduce: Literal["sum", "mean"] = Field("sum", description="Sum over routed tokens, or mean.")

    def observes(self) -> tuple[type[Observer], ...]:
        return (SelectionCount, OutputNorm)

    def score(self, layer: LayerProfile) -> Tensor:
        if self.reduce == "sum":
            return layer.output_norm_E.float()
        return (layer.output_norm_E / layer.count_E.clamp(min=1)).float()
