"""RMoE: a recurrent cell, shared by all layers, carries what a token's routers decided from layer to layer.

"Layerwise Recurrent Router for Mixture-of-Experts" (arXiv:2408.06793). For whom trains a model: the gain is in
training, from the state and from the gradient that goes back through it to the routers of earlier layers. At MoE layer
i, per token, with h = 0 before the first MoE layer:

    x' = P_i x                  P_i [p, H], of each layer
    h  = GRU(x', h)             one cell for all layers; torch's own, with six matrices and two biases
    z  = G_i h                  G_i [E, p], of each layer

The rest is any softmax (or sigmoid) router; experts receive x, never h. Nothing recurs over positions: tokens stay
independent, and a key-value cache holds nothing more. Layers without experts pass h on untouched.

Switches for comparisons. `passing`: "off", every layer starts from h = 0; "detach", the state goes on, its gradient
does not. `shared_projection`: one P. `residual` a: z_i + a z_{i-1}, of logits, as they were used in the layer before
(the paper's r-a; it says scores). `dim`: the cosine head of X-MoE on h.
"""

# T tokens, H hidden, P size of the state, E experts

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from coterie.errors import ModelError
from coterie.routing.base import Router, RouterSettings, Routing, linear, router
from coterie.routing.cosine import Cosine
from coterie.routing.record import Here
from coterie.routing.scored import Scored, ScoredSettings

Cell = Literal["gru", "rnn", "lstm"]
CELLS: dict[Cell, type[nn.RNNCellBase]] = {"gru": nn.GRUCell, "rnn": nn.RNNCell, "lstm": nn.LSTMCell}
State = tuple[Tensor, ...]  # (h,), of an LSTM (h, c); each [T, P], float32


class Recurrence(nn.Module):
    """What the routers of a model share: the cell, and the projection where there is one for all layers."""

    def __init__(self, hidden: int, size: int, kind: Cell, *, projection: bool, **how: Any) -> None:
        super().__init__()
        self.kind, self.size = kind, size
        self.cell = CELLS[kind](size, size, **how)
        self.projection = nn.Parameter(torch.empty(size, hidden, **how)) if projection else None

    def forward(self, x_TP: Tensor, before: State | None) -> State:
        """The state after this layer, in float32."""
        if before is None:
            before = (torch.zeros_like(x_TP),) * (2 if self.kind == "lstm" else 1)
        cell = self.cell
        weights = [w.float() for w in (cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh)]
        if self.kind == "lstm":
            return tuple(torch.lstm_cell(x_TP, before, *weights))
        step = torch.gru_cell if self.kind == "gru" else torch.rnn_tanh_cell
        return (step(x_TP, before[0], *weights),)


@router("rmoe", paper="arXiv:2408.06793")
class RMoE(Scored):
    """A recurrent state goes from layer to layer and decides."""

    class Settings(ScoredSettings):
        """Parameters of the layerwise recurrent router.

        Parameters
        ----------
        size : int, >= 1
            Size p of the state. All layers of a model have the same.
        cell : str
            "gru", "rnn" or "lstm".
        passing : str
            "on", "off" (no state from the layer before) or "detach" (the state, without its gradient).
        shared_projection : bool
            One projection for all layers instead of one each.
        residual : float, >= 0
            Times the logits of the layer before, added to those of this one.
        residual_detach : bool
            Without their gradient.
        dim : int, optional
            Dimensions of a cosine head; None: a linear one.
        temperature : float, > 0
            Where the temperature of the cosine head starts.
        """

        size: int = Field(default=128, ge=1)
        cell: Cell = "gru"
        passing: Literal["on", "off", "detach"] = "on"
        shared_projection: bool = False
        residual: float = Field(default=0.0, ge=0)
        residual_detach: bool = False
        dim: int | None = Field(default=None, ge=1)
        temperature: float = Field(default=0.3, gt=0)

    rowless = ("projection", "cosine.down", "cosine.log_temperature")
    adopt = Router.adopt

    def __init__(self, hidden: int, experts: int, settings: RouterSettings, **more: Any) -> None:
        super().__init__(hidden, experts, settings, **more)
        told = self.settings
        if not told.shared_projection:
            self.projection = nn.Parameter(torch.empty(told.size, hidden, **self.how))
        if told.dim is not None:
            self.cosine = Cosine(told.size, told.dim, told.temperature, self.how)

    @classmethod
    def shared_module(cls, hidden: int, settings: Any, **how: Any) -> nn.Module:
        return Recurrence(hidden, settings.size, settings.cell, projection=settings.shared_projection, **how)

    @property
    def columns(self) -> int:
        return int(self.settings.dim or self.settings.size)

    @property
    def carries_state(self) -> bool:
        return bool(self.settings.passing != "off" or self.settings.residual > 0)

    def route(self, x_TH: Tensor, here: Here) -> Routing:
        told, shared = self.settings, here.shared
        x_TP = linear(x_TH, shared.projection if told.shared_projection else self.projection)
        before: State | None = here.previous() if told.passing != "off" else None
        if before is not None and told.passing == "detach":
            before = tuple(part.detach() for part in before)
        state = shared(x_TP, before)
        here.leave(state)
        logits_TE = linear(state[0], self.weight) if told.dim is None else self.cosine(state[0], self.weight)
        if told.residual:
            logits_TE = self._with_residual(logits_TE, here)
        return self.decide(logits_TE, self.score(logits_TE))

    def _with_residual(self, logits_TE: Tensor, here: Here) -> Tensor:
        earlier_TE: Tensor | None = here.previous("rmoe.logits")
        if earlier_TE is not None:
            if earlier_TE.shape != logits_TE.shape:
                raise ModelError(
                    f"layer {self.layer} has {logits_TE.shape[-1]} experts, the MoE layer before it"
                    f" {earlier_TE.shape[-1]}: their logits cannot be added",
                    "Use residual=0.",
                )
            logits_TE = logits_TE + self.settings.residual * (
                earlier_TE.detach() if self.settings.residual_detach else earlier_TE
            )
        here.leave(logits_TE, "rmoe.logits")
        return logits_TE

    @torch.no_grad()
    def reset(self, std: float = 0.02) -> None:
        super().reset(std)
        if self.settings.dim is not None:
            self.cosine.log_temperature.fill_(self.cosine.start)
