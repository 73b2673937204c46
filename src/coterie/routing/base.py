"""What a router is, whatever it does: the contract outside, one value inside, a name to be asked for by.

Outside is transformers' contract, so that a router can stand in any MoE block:

    router(hidden [T, H]) -> (logits [T, N], weights [T, K], index [T, K])        index == num_experts: no expert

Inside, `route` gives a `Routing`: everything that losses, observers and analyses may want to know. It is kept in the
record of the model call (see `record`), from which a router that looks elsewhere (at the layer before, at token ids,
at attention) also gets what it needs.

A router is a file with a class, its settings (typed, bounded, documented) and one decorator line:

    @router("top-k", paper="arXiv:1701.06538")
    class TopK(Router):
        class Settings(RouterSettings): ...
        def route(self, x_TH, here): ...

Routers compute in float32 whatever the model's dtype, and do not know which model they are part of. What changes while
a model is trained (how many experts, a temperature) is a setting too: `dial` sets it, and a saved model remembers it.
"""

# T tokens, H hidden, E experts, N router outputs (E, and null experts behind them), K slots per token

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from coterie.errors import UsageError
from coterie.routing.capacity import Capacity
from coterie.routing.record import Here, current

Combine = Literal["raw", "renormalised", "straight-through", "unit"]


@dataclass
class Routing:
    """Where the tokens of one layer go, in one model call.

    Attributes
    ----------
    logits_TN : what the choice was made from, before any function of it; float32.
    probability_TN : dense, before anything was selected, rows sum to one; float32. For sigmoid routers the scores
        divided by their sum.
    index_TK : outputs that were picked, 0 .. N - 1; N is "none". Outputs from E on are null experts.
    weight_TK : what their experts' outputs are multiplied with; 0 where there is no expert. float32.
    experts : E.
    combine : how the weights follow from the probabilities.
    mask_T : which tokens are no padding; None: all.
    kept_TK : which slots have a place under a capacity; None: all.
    terms : the router's own auxiliary terms, name -> scalar, not yet weighted; means over tokens.
    """

    logits_TN: Tensor
    probability_TN: Tensor
    index_TK: Tensor
    weight_TK: Tensor
    experts: int
    combine: Combine
    mask_T: Tensor | None = None
    kept_TK: Tensor | None = None
    terms: dict[str, Tensor] = field(default_factory=dict)

    @property
    def expert_TK(self) -> Tensor:
        """Experts that run: null experts, empty slots and dropped ones are all "no expert", E."""
        none_TK = self.index_TK >= self.experts
        if self.kept_TK is not None:
            none_TK = none_TK | ~self.kept_TK
        return self.index_TK.masked_fill(none_TK, self.experts)

    @property
    def outputs(self) -> int:
        return self.probability_TN.shape[-1]

    def mean(self, value_T: Tensor) -> Tensor:
        """Mean over the tokens that are no padding."""
        if self.mask_T is None:
            return value_T.mean(0)
        weight_T = self.mask_T.to(value_T.dtype)
        shape = (-1, *[1] * (value_T.dim() - 1))
        return (value_T * weight_T.view(shape)).sum(0) / weight_T.sum().clamp(min=1)

    def chosen_TN(self) -> Tensor:
        """1 where an output was picked, before any was dropped. float32, no gradient."""
        chosen = torch.zeros(*self.index_TK.shape[:-1], self.outputs + 1, device=self.index_TK.device)
        return chosen.scatter_(-1, self.index_TK, 1.0)[..., :-1]

    def load_N(self) -> Tensor:
        """How many tokens picked each output, padding apart. int64."""
        index_TK = self.index_TK if self.mask_T is None else self.index_TK[self.mask_T]
        return torch.bincount(index_TK.flatten(), minlength=self.outputs + 1)[: self.outputs]


class RouterSettings(BaseModel):
    """What every router can be told.

    Parameters
    ----------
    top_k : int, >= 1
        Slots per token: the most experts it runs.
    combine : str
        How experts' outputs are weighted: "raw" by the router's probability, "renormalised" so that a token's weights
        sum to one, "straight-through" by one with the gradient of the probability, "unit" by one.
    capacity : Capacity, optional
        How many tokens an expert takes; None: all that come.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    top_k: int = Field(default=2, ge=1)
    combine: Combine = "raw"
    capacity: Capacity | None = None


class Router(nn.Module):
    """Base of all routers.

    Parameters
    ----------
    hidden, experts : H and E. layer : the decoder layer it stands in. settings : what it was told.
    device, dtype : of its parameters.

    `route` is what a router is. `num_outputs` : N, more than E with null experts.
    """

    Settings: ClassVar[type[RouterSettings]] = RouterSettings
    kind: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    # why experts cannot be removed from a model with this router; "" if its tensors have one row per expert
    unsliceable: ClassVar[str] = ""
    # a token's route depends on later tokens or on other sequences: such a model cannot generate as it was trained
    looks_ahead: ClassVar[bool] = False
    needs_attention: ClassVar[bool] = False  # the attention probabilities of its block, see `record`
    # tensors, by their names in the router, without a row per expert, although their shapes may look so
    rowless: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        hidden: int,
        experts: int,
        settings: RouterSettings,
        *,
        layer: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.hidden_dim, self.num_experts, self.layer = hidden, experts, layer
        self.settings: Any = settings
        self.how: dict[str, Any] = {"device": device, "dtype": dtype}
        self.watch: Callable[[Routing], None] | None = None
        if settings.top_k > self.num_outputs:
            raise UsageError(
                f"router {self.kind!r} of layer {layer} is to pick {settings.top_k} of {self.num_outputs} experts",
                f"Set top_k to at most {self.num_outputs}, or give the layer more experts.",
            )

    # -- for subclasses ------------------------------------------------------------------------------------------------

    def route(self, x_TH: Tensor, here: Here) -> Routing:
        """Where these tokens go. x_TH has the model's dtype; `here` knows the call, see `record.Here`."""
        raise NotImplementedError

    @property
    def num_outputs(self) -> int:
        """N."""
        return self.num_experts

    @property
    def carries_state(self) -> bool:
        """It hands something on to later layers: their routes cannot be known from hidden states alone."""
        return False

    @classmethod
    def shared_module(cls, hidden: int, settings: Any, **how: Any) -> nn.Module | None:
        """What all routers of this kind in a model share, as `here.shared`; None: nothing."""
        return None

    @torch.no_grad()
    def reset(self, std: float = 0.02) -> None:
        """Fresh weights, from torch's global generator. Buffers take their starting values."""
        for parameter in self.parameters():
            parameter.normal_(0.0, std)

    @torch.no_grad()
    def adopt(self, weight_EH: Tensor) -> bool:
        """Start from the weights of a trained linear router, one row per expert; False: this kind cannot."""
        return False

    def at(self, step: int, steps: int) -> None:
        """Told before every training step which one it is of how many; most routers do not care."""

    # -- the contract --------------------------------------------------------------------------------------------------

    @property
    def top_k(self) -> int:
        """Slots per token."""
        return int(self.settings.top_k)

    def forward(self, hidden_states: Tensor, *unused: Any, **more: Any) -> tuple[Tensor, Tensor, Tensor]:
        """(logits [T, N], weights [T, K], index [T, K]); whatever else a block hands its own router is not used."""
        x_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        here = Here(current(), self.layer, self.kind)
        with torch.autocast(x_TH.device.type, enabled=False):
            routing = self.route(x_TH, here)
            routing.mask_T = here.mask_T
            if self.settings.capacity is not None:
                routing.kept_TK = self.settings.capacity.kept(routing, training=self.training)
        here.keep(routing)
        if self.watch is not None:
            self.watch(routing)
        index_TK = routing.expert_TK
        weight_TK = routing.weight_TK.masked_fill(index_TK >= self.num_experts, 0.0)
        return routing.logits_TN, weight_TK, index_TK

    def dial(self, **values: Any) -> None:
        """Change settings of a router that is in use. Raises UsageError for a value that cannot be."""
        self.settings = checked(self.kind, type(self.settings), {**self.settings.model_dump(), **values})
        if self.settings.top_k > self.num_outputs:
            raise UsageError(f"router {self.kind!r} cannot pick {self.settings.top_k} of {self.num_outputs} experts")

    def extra_repr(self) -> str:
        return f"{self.kind}, {self.hidden_dim} -> {self.num_outputs}, {self.settings!r}"


# -- the register ------------------------------------------------------------------------------------------------------

ROUTERS: dict[str, type[Router]] = {}
R = TypeVar("R", bound=type[Router])


def router(name: str, *, paper: str = "") -> Callable[[R], R]:
    """Register a router under the name that users ask for."""

    def register(cls: R) -> R:
        if ROUTERS.get(name, cls).__qualname__ != cls.__qualname__:
            raise ValueError(f"two routers are called {name!r}")
        cls.kind, cls.paper = name, paper
        ROUTERS[name] = cls
        return cls

    return register


def routers() -> dict[str, type[Router]]:
    """All routers there are, by name."""
    package = importlib.import_module("coterie.routing")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"coterie.routing.{module.name}")
    return dict(sorted(ROUTERS.items()))


def router_class(name: str) -> type[Router]:
    """Raises UsageError for a name that no router has."""
    found = ROUTERS.get(name) or routers().get(name)
    if found is None:
        raise UsageError(f"there is no router {name!r}", f"There are: {', '.join(routers())}.")
    return found


S = TypeVar("S", bound=BaseModel)


def checked(name: str, model: type[S], values: dict[str, Any]) -> S:
    """Settings from plain values. Raises UsageError that names the first one that is wrong."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        known = ", ".join(model.model_fields)
        hint = f"It takes: {known}." if first["type"] == "extra_forbidden" else ""
        raise UsageError(f"{name}: {where}: {first['msg']} (given: {first['input']!r})", hint) from error


# -- what many routers do ----------------------------------------------------------------------------------------------


def linear(x_TH: Tensor, weight_NH: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """Float32 product, [T, N], whatever the dtypes are."""
    return F.linear(x_TH.float(), weight_NH.float(), None if bias_N is None else bias_N.float())


def combined(probability_TK: Tensor, how: Combine, real_TK: Tensor | None = None) -> Tensor:
    """Weights of picked outputs from their probabilities; real_TK : slots that hold an expert, others weigh 0.

    A token that picked no expert at all has weights 0.
    """
    if real_TK is not None:
        probability_TK = probability_TK.masked_fill(~real_TK, 0.0)
    if how == "raw":
        return probability_TK
    if how == "renormalised":
        total_T1 = probability_TK.sum(-1, keepdim=True)
        return probability_TK / torch.where(total_T1 > 0, total_T1, 1.0)
    one_TK = torch.ones_like(probability_TK) if real_TK is None else real_TK.to(probability_TK.dtype)
    return one_TK if how == "unit" else one_TK + (probability_TK - probability_TK.detach())


def grouped(score_TE: Tensor, groups: int, used: int, best: int) -> Tensor:
    """Scores with -inf outside of each token's `used` best of `groups` equal groups; a group counts by the sum of its
    `best` highest scores (device-limited routing of DeepSeek-V2: best=1, of V3: best=2)."""
    T, E = score_TE.shape
    group_TG = score_TE.view(T, groups, E // groups).topk(min(best, E // groups), dim=-1).values.sum(-1)
    chosen_TG = torch.zeros_like(group_TG, dtype=torch.bool)
    chosen_TG.scatter_(1, group_TG.topk(used, dim=-1).indices, True)
    return score_TE.masked_fill(~chosen_TG.repeat_interleave(E // groups, 1), -torch.inf)


def entropy(probability: Tensor) -> Tensor:
    """-sum p log p over the last dimension, in nats; it and its gradient are finite where some p are 0."""
    tiny = torch.finfo(probability.dtype).tiny
    return -(probability * probability.clamp(min=tiny).log()).sum(-1)
