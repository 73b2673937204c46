"""Random: keep any experts. The control every other method has to beat.

A single draw says little; compare with the mean of at least three seeds.
"""

# E experts

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from coterie.compression.methods import Method, method
from coterie.profiling.profile import LayerProfile


@method("random", kind="pruning", paper="folklore")
class Random(Method):
    """Keep random experts (control)."""

    seed: int = Field(0, ge=0, le=2**32 - 1, description="Seed of the draw; each layer draws its own numbers.")

    def score(self, layer: LayerProfile) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + layer.index)
        return torch.rand(layer.experts, generator=generator)
