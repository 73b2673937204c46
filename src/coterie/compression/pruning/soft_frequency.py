"""Soft frequency: keep the experts that receive the most gate weight (SEER-MoE, arXiv:2404.05089).

    s_e = (1 / T) * sum_{t routed to e} g_te

with the weight g that really multiplies the expert's output. DERN's first stage uses the same score.
"""

# E experts

from __future__ import annotations

from torch import Tensor

from coterie.compression.methods import Method, method
from coterie.profiling.observers import GateMass, Observer
from coterie.profiling.profile import LayerProfile


@method("soft-frequency", kind="pruning", paper="arXiv:2404.05089")
class SoftFrequency(Method):
    """Keep the experts with the largest mean gate weight."""

    def observes(self) -> tuple[type[Observer], ...]:
        return (GateMass,)

    def score(self, layer: LayerProfile) -> Tensor:
        return (layer.gate_mass_E / layer.tokens).float()
