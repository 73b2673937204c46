"""PreMoe's PEP: keep the experts whose router logits are high and sure on a task's text (arXiv:2505.17639, v1).

With raw router logits z(x), C(x) the K_a experts of the largest, and p the softmax over these alone:

    z'_i(x)  = z_i(x) if i in C(x) and p_i >= r, else 0
    TCESS_i  = mean of z'_i(x) over all tokens of the task

The zeros count: a score is how often the router is sure of an expert, times its mean logit then. Router logits are all
it needs. The paper's other half, a store of task patterns from which a query picks one, is `coterie patterns`.

The released code has K_a = 1 and r = -1 (off); the paper's own values are not known here. A softmax router may add any
constant to its logits: where they are all negative, a sure choice scores below an expert that was never chosen (0).
How many scores of a layer are negative is written into the plan (`extra.negative_scores`); `shift` cures it.

Several tasks have equal say (each task's scores divided by the sum of their sizes); with `mix=sum` their tokens have.
"""

# E experts, D domains

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from coterie.compression.methods import Method, method
from coterie.compression.plan import LayerPlan
from coterie.compression.pruning.easy_ep import mixed
from coterie.profiling.contribution import Shift, tcess, tcess_name
from coterie.profiling.observers import Observer
from coterie.profiling.profile import LayerProfile


@method("premoe", kind="pruning", paper="arXiv:2505.17639")
class PreMoe(Method):
    """Keep the experts whose router logits are high and sure on the task (TCESS)."""

    candidates: int = Field(1, ge=1, description="K_a: experts of a token that may count.")
    threshold: float = Field(
        -1.0, ge=-1, allow_inf_nan=False, description="r: least probability among the candidates; -1 is off."
    )
    shift: Shift = Field(
        "none",
        description="Raw logits, less their mean over experts, or exp(z - logsumexp z), the softmax probability.",
    )
    mix: Literal["equal", "sum"] = Field("equal", description="Several domains: equal say for each, or for each token.")

    def observes(self) -> tuple[type[Observer], ...]:
        return (tcess(self.candidates, self.threshold, self.shift),)

    def score(self, layer: LayerProfile) -> Tensor:
        sum_DE: Tensor = getattr(layer, tcess_name(self.candidates, self.threshold, self.shift))
        if self.mix == "sum":
            return sum_DE.sum(0) / layer.tokens_D.sum().clamp(min=1)
        return mixed(sum_DE / layer.tokens_D.clamp(min=1)[:, None])

    def prepare(self, layer: LayerProfile, plan: LayerPlan) -> None:
        if negative := int((self.score(layer) < 0).sum()):
            plan.extra["negative_scores"] = negative
