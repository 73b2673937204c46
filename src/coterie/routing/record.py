"""One record per model call: what routers decided in it, and what they may know beside their own input.

A router sees tokens [T, H] and nothing else. One that looks at the layer before, at token ids, at padding or at
attention asks the record of the model call it runs in:

    current()                   the record of the call that is running, or None
    Here(record, layer, kind)   the same from where a router stands

`equip(model, base, layers)` makes a model keep records. A record belongs to the call, not to the model: it lives in a
context variable while the call runs, so that threads and the walkers of a streamed sweep each have their own; two calls
in a row share nothing; and a layer that gradient checkpointing runs again, long after the call, finds the record of its
first run. What a layer left there for the next one (a recurrent state) is then not written again: gradients flow
through the first one. Checkpointing must therefore be the kind that keeps the graph (`use_reentrant=False`, what
transformers does by default); the other kind is refused.

With a key-value cache, what routers must remember of earlier tokens is kept on the cache object itself and follows it
when beams are reordered, tokens cut off or the cache is copied.

Without gradients and without anybody who listens, a record holds no more than the last layers need: a deep model does
not pay for its depth in memory.
"""

# B batch, L sequence of this call, P tokens before it in the cache, T = B*L, H hidden, A attention heads

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from coterie.errors import ModelError

if TYPE_CHECKING:
    from coterie.routing.base import Routing

Made = TypeVar("Made")
_RECORD: ContextVar[Record | None] = ContextVar("coterie_record", default=None)
SHARED = "routing_shared"  # what routers of one kind share hangs under this name beside the list of layers
_KEPT = "_coterie_routing"  # on a key-value cache


def current() -> Record | None:
    """The record of the model call that runs now; None outside of one, or in a model that keeps none."""
    return _RECORD.get()


@contextmanager
def recording(record: Record | None) -> Iterator[None]:
    """Let `record` be the current one."""
    token = _RECORD.set(record)
    try:
        yield
    finally:
        _RECORD.reset(token)


@dataclass
class Attention:
    """What the attention of a block did, for a router of the same block.

    probability_BALS : [B, A, L, P + L]. output_BLH : before the residual. value_BLM : of this call's tokens, of all
    key-value heads side by side; None where the module has no such projection. projection : from the heads to H.
    """

    probability_BALS: Tensor
    output_BLH: Tensor
    value_BLM: Tensor | None
    projection: nn.Module | None


@dataclass
class Record:
    """One model call.

    routings : what each layer's router decided. states : what a layer left for later ones, by (kind, layer).
    shared : modules that all routers of a kind share. ids_BL, mask_BL, segment_BL : of this call's tokens; a mask of
    None means no padding, segments of None that a row is one sequence. before, past : what routers keep with the
    key-value cache, as it was when the call began and as it will be. made : what a layer shall not make twice.
    """

    owner: nn.Module | None = None
    ids_BL: Tensor | None = None
    mask_BL: Tensor | None = None
    mask_BS: Tensor | None = None  # with the tokens before
    pairs_BLS: Tensor | None = None  # which see which, where the call says it pair by pair
    segment_BL: Tensor | None = None
    grad: bool = False
    listened: bool = False
    before: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    past: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    past_length: int = 0
    cached: bool = False
    shared: Any = None
    routings: dict[int, Routing] = field(default_factory=dict)
    states: dict[tuple[str, int], Any] = field(default_factory=dict)
    made: dict[tuple[str, int], Any] = field(default_factory=dict)
    attention: dict[int, Attention] = field(default_factory=dict)
    streams: dict[int, Tensor] = field(default_factory=dict)  # what a norm received that its block will need
    shape: tuple[int, int] | None = None
    token: Token[Record | None] | None = None


class Here:
    """A record as the router of one layer sees it."""

    def __init__(self, record: Record | None, layer: int, kind: str) -> None:
        self.record, self.layer, self.kind = record, layer, kind
        if record is not None and record.grad and not torch.is_grad_enabled():
            raise ModelError(
                "gradient checkpointing runs the layers without gradients (use_reentrant=True); routers that belong to"
                " a model call cannot be trained so",
                'Say gradient_checkpointing_kwargs={"use_reentrant": False}.',
            )

    @property
    def mask_T(self) -> Tensor | None:
        """Which tokens are no padding; None: all."""
        return None if self.record is None or self.record.mask_BL is None else self.record.mask_BL.reshape(-1)

    @property
    def ids_T(self) -> Tensor:
        """Token ids. Raises ModelError where the model was given embeddings."""
        if self.record is None or self.record.ids_BL is None:
            raise ModelError(
                f"the {self.kind} router of layer {self.layer} needs token ids, which this call does not have",
                "Call the whole model with input_ids instead of inputs_embeds.",
            )
        return self.record.ids_BL.reshape(-1)

    def rows(self, tokens: int) -> tuple[int, int]:
        """(B, L) of this call. Raises ModelError where it is not known."""
        if self.record is None or self.record.shape is None or self.record.shape[0] * self.record.shape[1] != tokens:
            raise ModelError(
                f"the {self.kind} router of layer {self.layer} needs to know which tokens make a sequence, and"
                f" {tokens} tokens came without a call that tells",
                "Call the whole model, not a block of it.",
            )
        return self.record.shape

    @property
    def shared(self) -> Any:
        """The module that all routers of this kind share."""
        found = None if self.record is None or self.record.shared is None else self.record.shared[self.kind]
        if found is None:
            raise ModelError(
                f"the {self.kind} router of layer {self.layer} runs outside of its model",
                "Call the whole model, not a block of it.",
            )
        return found

    def previous(self, what: str = "") -> Any:
        """What `leave` was given in the nearest earlier layer of this call; None in the first."""
        if self.record is None:
            return None
        name = what or self.kind
        layers = [layer for kind, layer in self.record.states if kind == name and layer < self.layer]
        return self.record.states[name, max(layers)] if layers else None

    def leave(self, state: Any, what: str = "") -> None:
        """Leave something for later layers. A layer that is run again for its gradients leaves nothing new."""
        if self.record is None:
            return
        name, states = what or self.kind, self.record.states
        _put(self.record, states, (name, self.layer), state)
        if not self.record.grad:  # nothing is run again: only the nearest earlier state can still be asked for
            for layer in sorted(layer for kind, layer in states if kind == name and layer < self.layer)[:-1]:
                del states[name, layer]

    def once(self, what: str, make: Callable[[], Made]) -> Made:
        """What `make` gives, or gave when this layer ran first: for what changes a module while it trains, and must
        not change it again, nor come out another way, when gradient checkpointing runs the layer a second time."""
        if self.record is None or not self.record.grad:
            return make()
        key = (f"{self.kind}.{what}", self.layer)
        if key not in self.record.made:
            self.record.made[key] = make()
        found: Made = self.record.made[key]
        return found

    def keep(self, routing: Routing) -> None:
        record = self.record
        if record is None:
            return
        if not (record.grad or record.listened):
            record.routings.clear()
        _put(record, record.routings, self.layer, routing)

    @property
    def attention(self) -> Attention:
        """What the attention of this block did. Raises ModelError where its kernel tells no probabilities."""
        found = None if self.record is None else self.record.attention.pop(self.layer, None)
        if found is None:
            raise ModelError(
                f"the {self.kind} router of layer {self.layer} needs attention probabilities, and the attention of"
                " this model tells none",
                'Load the model with attn_implementation="eager".',
            )
        return found

    def growing(self, what: str, value_BLX: Tensor) -> Tensor:
        """The value for all tokens so far, [B, P + L, ...]: with a key-value cache, those of earlier calls too."""
        record = self.record
        if record is None or not record.cached:
            return value_BLX
        key = (f"{self.kind}.{what}", self.layer)
        before = record.before.get(key)
        known = 0 if before is None else before.shape[1]
        if known != record.past_length:
            raise ModelError(
                f"the key-value cache holds {record.past_length} tokens, but the {self.kind} router of layer"
                f" {self.layer} saw {known} of them",
                "Start with an empty cache that only this model fills.",
            )
        whole = value_BLX if before is None else torch.cat([before, value_BLX], 1)
        record.past[key] = whole.detach()
        return whole


def _put(record: Record, table: dict[Any, Any], key: Any, value: Any) -> None:
    """With gradients a second run of a layer is gradient checkpointing's, and the first one's values stay."""
    if not (record.grad and key in table):
        table[key] = value


# -- on a model --------------------------------------------------------------------------------------------------------


def equip(model: nn.Module, base: nn.Module, layers: Sequence[nn.Module]) -> None:
    """From now on every call of `model`, or of the decoder `base` inside it, keeps a record. Once a model."""
    model._coterie_inner = [base]  # type: ignore[assignment]  # in a list: it is a child already
    for module in {id(m): m for m in (model, base)}.values():
        if not getattr(module, "_coterie_records", False):
            module._coterie_records = True  # type: ignore[assignment]
            module.register_forward_pre_hook(_enter, with_kwargs=True)
            module.register_forward_hook(_leave, with_kwargs=True, always_call=True)
    for layer in layers:
        if not getattr(layer, "_coterie_records", False):
            layer._coterie_records = True  # type: ignore[assignment]
            layer.register_forward_pre_hook(_bind)


def share(base: nn.Module, kind: str, module: nn.Module) -> None:
    """Hang what all routers of a kind share beside the list of layers."""
    if not hasattr(base, SHARED):
        base.add_module(SHARED, nn.ModuleDict())
    getattr(base, SHARED)[kind] = module


def _arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    if not args:
        return kwargs
    names = list(inspect.signature(module.forward).parameters)
    return {**dict(zip(names, args)), **kwargs}


def _enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    given, record = _arguments(module, args, kwargs), _RECORD.get()
    inner = getattr(record.owner, "_coterie_inner", ()) if record is not None else ()
    if record is None or not any(m is module for m in inner) or record.owner is module:
        record = Record(owner=module, grad=torch.is_grad_enabled())
        record.listened = bool(getattr(module, "_coterie_listeners", ()))
        record.token = _RECORD.set(record)
    if hasattr(module, SHARED):
        record.shared = getattr(module, SHARED)
    ids_BL, embedded = given.get("input_ids"), given.get("inputs_embeds")
    if ids_BL is not None:
        record.ids_BL = ids_BL
    tokens = ids_BL if ids_BL is not None else embedded
    if tokens is not None:
        record.shape = (int(tokens.shape[0]), int(tokens.shape[1]))
    if record.shape is None:
        return
    cache, use = given.get("past_key_values"), given.get("use_cache")
    if cache is not None:
        record.past_length, record.before = int(cache.get_seq_length()), dict(getattr(cache, _KEPT, {}))
        record.past = dict(record.before)
    if use is None:  # then models do as their config says
        config: Any = getattr(module, "config", None)
        use = config is not None and getattr(config.get_text_config(decoder=True), "use_cache", False)
    record.cached = cache is not None or bool(use)
    _look_at_mask(record, given.get("attention_mask"))
    positions = given.get("position_ids")
    if isinstance(positions, Tensor) and positions.dim() == 2 and record.mask_BS is None and record.shape[1] > 1:
        positions_BL = positions.expand(record.shape)  # packed sequences: positions start again at each
        record.segment_BL = (positions_BL.diff(dim=1, prepend=positions_BL[:, :1] - 1) != 1).cumsum(1)


def _look_at_mask(record: Record, mask: Any) -> None:
    """Of padding [B, P + L], or of pairs [B, 1, L, P + L or more], which generation with a static cache makes of it."""
    assert record.shape is not None
    if isinstance(mask, dict):  # by the kind of layer
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if not isinstance(mask, Tensor):
        return
    B, L = record.shape
    if mask.dim() == 2:
        record.mask_BS = mask.bool()
        record.mask_BL = record.mask_BS[:, -L:]
    elif mask.dim() == 4:
        S = record.past_length + L
        pairs = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2  # added to scores
        record.pairs_BLS = pairs[:, 0, :, :S].expand(B, L, S)
        record.mask_BS = record.pairs_BLS.any(1)  # padding is seen by nobody
        record.mask_BL = record.mask_BS[:, -L:]


def _leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    record = _RECORD.get()
    if record is None:
        return None
    cache = getattr(output, "past_key_values", None)
    if cache is not None and record.past:
        setattr(cache, _KEPT, record.past)
        _follow(cache)
    if record.owner is not module:
        return None
    record.owner = None
    if record.token is not None:
        _RECORD.reset(record.token)
        record.token = None
    if output is None or not record.routings:
        return None
    balance = getattr(module, "_coterie_balance", None)
    if balance is not None and module.training and record.grad and getattr(output, "loss", None) is not None:
        output["loss"] = balance(record, output.loss)
    for listener in getattr(module, "_coterie_listeners", ()):
        listener(record)
    return output


@contextmanager
def listening(model: nn.Module, listener: Callable[[Record], None]) -> Iterator[None]:
    """Show `listener` the record of every call of `model` that has come to its end."""
    before: tuple[Callable[[Record], None], ...] = getattr(model, "_coterie_listeners", ())
    model._coterie_listeners = (*before, listener)  # type: ignore[assignment]
    try:
        yield
    finally:
        model._coterie_listeners = before  # type: ignore[assignment]


def _bind(layer: nn.Module, args: tuple[Any, ...]) -> None:
    """What gradient checkpointing is to run again, it shall run with the record of now."""
    if getattr(layer, "gradient_checkpointing", False) and layer.training:
        checkpoint: Any = layer._gradient_checkpointing_func
        if not getattr(checkpoint, "_coterie", False):
            bound = functools.partial(_checkpointed, checkpoint)
            bound._coterie = True  # type: ignore[attr-defined]
            layer._gradient_checkpointing_func = bound  # type: ignore[assignment]


def _checkpointed(checkpoint: Callable[..., Any], function: Callable[..., Any], *args: Any) -> Any:
    record = current()

    def with_record(*values: Any) -> Any:
        with recording(record):
            return function(*values)

    return checkpoint(with_record, *args)


class _Following:
    """What is kept on a cache changes with it. Mixed into the class of the cache itself, so that its copies follow."""

    def _keep(self, edit: Callable[[Tensor], Tensor]) -> None:
        setattr(self, _KEPT, {key: edit(value) for key, value in getattr(self, _KEPT, {}).items()})

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._keep(lambda value: value.index_select(0, beam_idx.to(value.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._keep(lambda value: value[indices.to(value.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self._keep(lambda value: value.repeat_interleave(repeats, 0))

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)  # type: ignore[misc]
        if tokens_to_remove:
            self._keep(lambda value: value[:, : -abs(tokens_to_remove)])

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self._keep(lambda value: value[:, :0])


def _follow(cache: Any) -> None:
    cls = type(cache)
    if not issubclass(cls, _Following):
        cache.__class__ = type(cls.__name__, (_Following, cls), {})


# -- attention ---------------------------------------------------------------------------------------------------------


def watch_attention(decoder: nn.Module, layer: int) -> None:
    """Keep what the attention of this decoder layer does, for the router of the same block. Once a layer."""
    found = [m for n, m in decoder.named_children() if n in ("self_attn", "attn", "attention", "self_attention")]
    if not found:
        raise ModelError(
            f"decoder layer {layer} has no attention for its router to look at",
            "Choose another router for this layer.",
        )
    module = found[0]
    place: Any = getattr(decoder, "_coterie_watched", None)
    if place is None:
        place = {"layer": layer}
        decoder._coterie_watched = place
        module.register_forward_hook(functools.partial(_attended, place))
        values = getattr(module, "v_proj", None)
        if isinstance(values, nn.Module):
            values.register_forward_hook(functools.partial(_valued, place))
    place["on"] = True


def let_attention_be(decoder: nn.Module) -> None:
    """The router of this decoder layer does not look at attention (any more): nothing of it is kept."""
    place = getattr(decoder, "_coterie_watched", None)
    if isinstance(place, dict):
        place["on"] = False


def _valued(place: dict[str, Any], module: nn.Module, args: Any, output: Tensor) -> None:
    place["value"] = output


def _attended(place: dict[str, Any], module: nn.Module, args: Any, output: Any) -> None:
    record = current()
    value_BLM = place.pop("value", None)
    if (
        record is None
        or not place["on"]
        or not isinstance(output, tuple)
        or len(output) < 2
        or not isinstance(output[1], Tensor)
    ):
        return
    probability = output[1]
    if probability.dim() != 4:
        return
    record.attention[place["layer"]] = Attention(probability, output[0], value_BLM, getattr(module, "o_proj", None))
