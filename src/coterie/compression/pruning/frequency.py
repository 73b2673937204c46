"""Frequency: keep the experts that are selected most often.

    s_e = |X_e|, the number of tokens routed to e

Cheap, and blind to what the experts say: an expert that is rare but decisive goes first. A control.
"""

# E experts

from __future__ import annotations

from torch import Tensor

from coterie.compression.methods import Method, method
from coterie.profiling.observers import Observer, SelectionCount
from coterie.profiling.profile import LayerProfile


@method("frequency", kind="pruning", paper="folklore")
class Frequency(Method):
    """Keep the experts selected most often (control)."""

    def observes(self) -> tuple[type[Observer], ...]:
        return (SelectionCount,)

    def score(self, layer: LayerProfile) -> Tensor:
        return layer.count_E.float()
