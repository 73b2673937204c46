"""Controllers: what balances experts without a loss, by changing routers between steps.

`Bias` is auxiliary-loss-free balancing (arXiv:2408.15664; DeepSeek-V3, arXiv:2412.19437): each expert has a bias that
is added to its score when experts are picked, and to no weight. After every optimizer step it is raised for experts
with less than their share of the tokens of that step, all micro-batches and processes together, and lowered for those
with more (`balancing.bias` has the rules). The tokens that were counted were routed with the old bias: the new one acts
from the next step on, so that no token's route depends on a later token.

Only calls in training are counted, each once, also under gradient checkpointing.
"""

# E experts

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from coterie.balancing.bias import step
from coterie.errors import UsageError
from coterie.routing.base import Router
from coterie.routing.record import Record

BIAS = "e_score_correction_bias"


class BiasSettings(BaseModel):
    """How the bias learns.

    Parameters
    ----------
    name : str
        "bias".
    rule : str
        "sign", "centred" (the same with mean 0), "proportional" or "multiplicative".
    u : float
        Step, in units of the scores: 1e-3 for sigmoid scores; more in runs of a few hundred steps.
    schedule : str
        Step sizes: "constant" u, "1/n" u/n, "1/sqrt(n)" u/sqrt(n) at step n.
    freeze : float
        Share of the training, at its end, in which the bias stays.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["bias"] = "bias"
    rule: Literal["sign", "centred", "proportional", "multiplicative"] = "sign"
    u: float = Field(default=1e-3, gt=0)
    schedule: Literal["constant", "1/n", "1/sqrt(n)"] = "constant"
    freeze: float = Field(default=0.0, ge=0, le=1)


class Bias:
    """The controller of all routers in a model that have a bias. Raises UsageError if none has."""

    def __init__(self, settings: BiasSettings, model: nn.Module) -> None:
        self.settings = settings
        found = [m for m in model.modules() if isinstance(m, Router) and hasattr(m, BIAS)]
        if not found:
            raise UsageError(
                "no router of this model has a bias to balance with",
                "Choose one that has: router sigmoid, or top-k with bias: true.",
            )
        times = settings.rule == "multiplicative"
        if wrong := [router.layer for router in found if router.settings.bias_times != times]:
            raise UsageError(
                f"rule {settings.rule!r} of the bias does not go with the routers of layers {wrong}",
                f"Set bias_times: {str(times).lower()} in the router.",
            )
        self.routers: dict[int, Any] = {router.layer: router for router in found}
        self.load: dict[int, Tensor] = {}

    def observe(self, record: Record) -> None:
        """Count the tokens of one model call in training."""
        if not record.grad:
            return
        for layer, routing in record.routings.items():
            if layer in self.routers and self.routers[layer].training:
                load_E = routing.load_N()
                self.load[layer] = self.load[layer] + load_E if layer in self.load else load_E

    @torch.no_grad()
    def update(
        self, iteration: int, iterations: int, reduce: Callable[[Tensor], Tensor] = lambda load_E: load_E
    ) -> None:
        """Change the biases after an optimizer step, the `iteration`-th from 1 on. reduce : sums over processes."""
        load, self.load = self.load, {}
        if iteration > iterations * (1 - self.settings.freeze):
            return
        for layer, load_E in sorted(load.items()):
            bias_E = getattr(self.routers[layer], BIAS)
            how = self.settings
            bias_E.copy_(
                step(bias_E, reduce(load_E), rule=how.rule, u=how.u, schedule=how.schedule, iteration=iteration)
            )
