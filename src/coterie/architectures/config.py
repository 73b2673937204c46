"""The config of Coterie's own decoder: which attention, router, experts and residual rule each layer has.

    CoterieConfig(hidden_size=256, num_hidden_layers=8, num_experts=16, moe_intermediate_size=256,
                  router={"kind": "top-k", "top_k": 2}, balancing=[{"name": "switch", "weight": 0.01}],
                  layers={"0": {"dense": True}, "3": {"router": {"kind": "rmoe"}, "attention": "sliding"}})

What is said at the top holds for all layers; `layers` says what is different in one. Everything is checked when the
config is made, except what only a router knows (that it can pick so many experts), which is checked when the model is
built. Nothing here is per architecture: it is one decoder, and its parts are those of the toolkit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from coterie.errors import UsageError
from coterie.routing.base import RouterSettings, checked, router_class
from coterie.routing.residual import Residual

ATTENTIONS = ("full", "sliding")
_LAYER = ("attention", "router", "residual", "num_experts", "moe_intermediate_size", "num_shared_experts", "dense")


@dataclass(frozen=True)
class LayerSettings:
    """One layer, as it is built. kind, router : of its router; None for a dense layer."""

    attention: str
    dense: bool
    kind: str
    router: RouterSettings
    residual: Residual | None
    experts: int
    width: int
    shared: int


class CoterieConfig(PreTrainedConfig):  # type: ignore[misc]
    """Everything a Coterie decoder is built from.

    Parameters
    ----------
    vocab_size, hidden_size, num_hidden_layers : int
    num_attention_heads, num_key_value_heads, head_dim : int
        Query heads, key-value heads (None: as many), and the size of each (None: hidden_size over heads).
    attention : str
        "full", or "sliding" over the last `sliding_window` tokens.
    qk_norm : bool
        Queries and keys are normalised, head by head.
    rope_theta : float
        Base of the rotary positions.
    num_experts, moe_intermediate_size : int
        Routed experts of a layer and the width of each.
    num_shared_experts : int
        Experts every token runs beside the routed ones, with weight 1: one MLP of so many widths.
    intermediate_size : int
        Width of dense layers.
    first_dense : int
        So many layers from the first on are dense.
    router : dict
        `kind`, a router's name, and its settings.
    residual : dict, optional
        How an MoE layer's output is added, see `routing.residual`; None: as usual.
    balancing : list of dict
        Terms that are added to the loss in training, each with its `name` and settings.
    layers : dict
        {layer: {attention, router, residual, num_experts, moe_intermediate_size, num_shared_experts, dense}}.

    Raises UsageError for what cannot be built.
    """

    model_type = "coterie"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        vocab_size: int = 4096,
        hidden_size: int = 256,
        num_hidden_layers: int = 6,
        num_attention_heads: int = 8,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        attention: str = "full",
        sliding_window: int | None = None,
        qk_norm: bool = False,
        rope_theta: float = 10000.0,
        num_experts: int = 8,
        moe_intermediate_size: int = 256,
        num_shared_experts: int = 0,
        intermediate_size: int = 1024,
        first_dense: int = 0,
        router: Mapping[str, Any] | None = None,
        residual: Mapping[str, Any] | None = None,
        balancing: list[dict[str, Any]] | None = None,
        layers: Mapping[str, Mapping[str, Any]] | None = None,
        hidden_act: str = "silu",
        max_position_embeddings: int = 2048,
        rms_norm_eps: float = 1e-6,
        initializer_range: float = 0.02,
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
        tie_word_embeddings: bool = True,
        use_cache: bool = True,
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        **more: Any,
    ) -> None:
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.attention, self.sliding_window, self.qk_norm, self.rope_theta = (
            attention,
            sliding_window,
            qk_norm,
            rope_theta,
        )
        self.num_experts, self.moe_intermediate_size = num_experts, moe_intermediate_size
        self.num_shared_experts, self.intermediate_size = num_shared_experts, intermediate_size
        self.first_dense = first_dense
        self.router = dict(router or {"kind": "top-k", "top_k": 2})
        self.residual = dict(residual) if residual else None
        self.balancing = [dict(entry) for entry in balancing or []]
        self.layers = {str(key): dict(entry) for key, entry in (layers or {}).items()}
        self.hidden_act, self.max_position_embeddings = hidden_act, max_position_embeddings
        self.rms_norm_eps, self.initializer_range = rms_norm_eps, initializer_range
        self.attention_dropout, self.dropout, self.use_cache = attention_dropout, dropout, use_cache
        self._check()
        self.layer_types = [f"{self.settings_of(index).attention}_attention" for index in range(num_hidden_layers)]
        more.pop("layer_types", None)
        self.pad_token_id, self.bos_token_id, self.eos_token_id = pad_token_id, bos_token_id, eos_token_id
        super().__init__(tie_word_embeddings=tie_word_embeddings, **more)

    def settings_of(self, index: int) -> LayerSettings:
        """What layer `index` is built from."""
        own = self.layers.get(str(index), {})
        told = dict(own.get("router", self.router))
        kind = str(told.pop("kind", "top-k"))
        residual = own.get("residual", self.residual)
        return LayerSettings(
            attention=str(own.get("attention", self.attention)),
            dense=bool(own.get("dense", index < self.first_dense)),
            kind=kind,
            router=checked(kind, router_class(kind).Settings, told),
            residual=checked("residual", Residual, dict(residual)) if residual else None,
            experts=int(own.get("num_experts", self.num_experts)),
            width=int(own.get("moe_intermediate_size", self.moe_intermediate_size)),
            shared=int(own.get("num_shared_experts", self.num_shared_experts)),
        )

    def remember(self, routers: Mapping[int, dict[str, Any]], residuals: Mapping[int, dict[str, Any]]) -> None:
        """Take over settings as they are now in a model: what most layers have stands at the top."""
        for name, found in (("router", routers), ("residual", residuals)):
            common = _commonest(found)
            if common is None:
                continue
            setattr(self, name, common)
            for index, told in found.items():
                own = self.layers.setdefault(str(index), {})
                own.pop(name, None)
                if told != common:
                    own[name] = told
        self.layers = {key: own for key, own in self.layers.items() if own}

    def _check(self) -> None:
        sizes = (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "num_experts",
            "moe_intermediate_size",
            "intermediate_size",
            "max_position_embeddings",
        )
        for name in sizes:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UsageError(f"{name} must be a number of at least 1, not {value!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise UsageError(
                f"{self.num_attention_heads} query heads cannot share {self.num_key_value_heads} key-value heads"
            )
        if self.head_dim % 2:
            raise UsageError(f"head_dim={self.head_dim} is odd: rotary positions turn pairs", "Make it even.")
        for key, entry in self.layers.items():
            if not key.isdigit() or int(key) >= self.num_hidden_layers:
                raise UsageError(f"layers: there is no layer {key!r}: there are {self.num_hidden_layers}, from 0 on")
            if unknown := sorted(set(entry) - set(_LAYER)):
                raise UsageError(f"layers.{key}: {', '.join(unknown)} is unknown", f"It takes: {', '.join(_LAYER)}.")
        for index in range(self.num_hidden_layers):
            layer = self.settings_of(index)
            if layer.attention not in ATTENTIONS:
                raise UsageError(f"attention {layer.attention!r} is unknown", f"There are: {', '.join(ATTENTIONS)}.")
            if layer.attention == "sliding" and not self.sliding_window:
                raise UsageError("sliding attention needs a sliding_window", "Say how many tokens it sees.")


def _commonest(found: Mapping[int, dict[str, Any]]) -> dict[str, Any] | None:
    counts = [(sum(told == other for other in found.values()), -index) for index, told in found.items()]
    return dict(found[-max(counts)[1]]) if counts else None
