"""REAP: keep the experts whose weighted outputs move the layer most (arXiv:2510.13999).

A token t that the router sends to expert e with applied weight g_te adds g_te * f_e(x_t) to the residual stream.
REAP scores e by the mean size of what it adds, over the tokens it really received:

    s_e = (1 / |X_e|) * sum_{t in X_e} g_te * ||f_e(x_t)||_2

A mean over the expert's own tokens, so rare specialists are not punished. Budgets, protected experts and checkpoints
are not its business: the selector and the applier take the scores from here.

Differs from the authors' code: gates are what the model applied, not a softmax re-derived from logits, so routers with
sigmoids, biases or groups are scored as they run; experts that received no token score 0.
"""

# E experts

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from coterie.compression.methods import Method, method
from coterie.profiling.observers import Observer, SelectionCount, WeightedOutputNorm
from coterie.profiling.profile import LayerProfile


@method("reap", kind="pruning", paper="arXiv:2510.13999")
class Reap(Method):
    """Router-weighted expert activation pruning."""

    renormalise: bool = Field(
        True,
        description="Use weights that sum to one over a token's experts, as the paper does since its 2026 revision,"
        " even where the model applies raw probabilities (OLMoE, Qwen2-MoE).",
    )

    def observes(self) -> tuple[type[Observer], ...]:
        return (SelectionCount, WeightedOutputNorm)

    def score(self, layer: LayerProfile) -> Tensor:
        mass_E = layer.shared_norm_E if self.renormalise else layer.weighted_norm_E
        return (mass_E / layer.count_E.clamp(min=1)).float()
