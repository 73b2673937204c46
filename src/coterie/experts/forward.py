"""The experts forward of Coterie: every architecture's experts, one expert at a time, observable and frugal.

Registered with transformers as the experts implementation "coterie". It differs from the stock ones in four ways:

- weights may be stored in another dtype than the activations: each expert is widened into one reused buffer just
  before its matrix products, so a layer of bfloat16 experts computes in float32 without a second copy of the layer;
- a tap (`observe`) sees every expert's routed inputs, applied weights and raw outputs, before they are weighted;
- a slot (`rerouted`) may change ids and weights between router and experts: skipping, renumbering, overriding;
- index == num_experts means "no expert" everywhere: no cost, no weight.

Experts of a special form say in methods of their module what is different: `project` how a matrix multiplies,
`stand_in` which of the chosen experts run and what scales their inputs, `choose_levels` at which of its widths each
computes. It does not know what observers do with what they see, nor which model it runs in. A tap sees a token's input
before it is scaled.
"""

# T tokens, H hidden, I expert intermediate, P = 2I with a gate (gate and up together) or I without, E experts,
# K slots per token, R rows routed to one expert

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

NAME = "coterie"


class Tap(Protocol):
    """What watches an experts module while it runs."""

    def routed(self, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> bool:
        """Called once per forward; return False to skip `expert` for this forward."""

    def expert(self, expert: int, row_R: Tensor, x_RH: Tensor, y_RH: Tensor) -> None:
        """Called once per expert that has rows; `row_R` indexes the flattened [T*K] slots, `y_RH` is unweighted."""

    def combined(self, sum_TH: Tensor) -> None:
        """Called once per watched forward with the weighted sum of all experts, in at least float32."""

    # A tap that also has `inner(expert, row_R, inner_RI)` is shown what each expert's down projection receives, just
    # before `expert` is called.


Slot = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # (index_TK, weight_TK) -> what the experts shall run


class Scale(NamedTuple):
    """Factors, token by token, on what the matrices of its experts are multiplied with.

    up_TH : on the input of up, and of gate unless gate_TH is given. down_TI : on the input of down, None for none.
    """

    up_TH: Tensor
    gate_TH: Tensor | None = None
    down_TI: Tensor | None = None

    def of(self, token_R: Tensor) -> Scale:
        """The rows of some tokens."""
        return Scale(*(None if t is None else t[token_R] for t in self))  # type: ignore[arg-type]


class Levels(NamedTuple):
    """At which of its widths each chosen expert computes a token.

    level_TK : of every slot. While levels are learned, outputs are multiplied with factor_TK, all ones, or the outputs
    at all N levels are added times slope_TKN, all zeros: they change no value and carry gradients.
    """

    level_TK: Tensor
    factor_TK: Tensor | None = None
    slope_TKN: Tensor | None = None

    def learned(self, module: nn.Module, expert: int, row_R: Tensor, x_RH: Tensor, y_RH: Tensor) -> Tensor:
        """The outputs y of some rows, with the gradients that choices learn from."""
        if self.factor_TK is not None:
            y_RH = y_RH * self.factor_TK.reshape(-1, 1)[row_R].to(y_RH.dtype)
        if self.slope_TKN is not None:
            slope_RN = self.slope_TKN.flatten(0, -2)[row_R].to(y_RH.dtype)
            for level in range(slope_RN.shape[-1]):
                with torch.no_grad():
                    level_R = torch.full_like(row_R, level)
                    inner_RI = inner_activation(module, expert, x_RH, None, level_R)
                    other_RH = output_projection(module, expert, inner_RI, level_R)
                y_RH = y_RH + slope_RN[:, level, None] * other_RH
        return y_RH


_scratch: dict[tuple[Any, ...], Tensor] = {}


def release_scratch() -> None:
    """Free the buffers in which weights are widened."""
    _scratch.clear()


def widened(weight: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """`weight` in `dtype`; valid until the next call with the same name."""
    if weight.dtype == dtype:
        return weight
    if weight.requires_grad and torch.is_grad_enabled():
        return weight.to(dtype)
    key = (name, weight.shape, dtype, weight.device)
    buffer = _scratch.get(key)
    if buffer is None:
        for stale in [k for k in _scratch if k[0] == name]:
            del _scratch[stale]
        buffer = _scratch[key] = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    return buffer.copy_(weight)


def stored_experts(module: nn.Module) -> int:
    """How many experts an experts module holds."""
    if hasattr(module, "stored_experts"):
        return int(module.stored_experts)  # type: ignore[arg-type]
    assert isinstance(module.down_proj, Tensor)
    return module.down_proj.shape[0]


def projections(module: nn.Module) -> tuple[str, ...]:
    """Names of the matrices of each expert of an experts module, gate and up told apart."""
    return ("gate", "up", "down") if module.has_gate else ("up", "down")


_ALL = slice(None)


def _project(
    module: nn.Module, name: str, expert: int, x_RH: Tensor, outputs: slice = _ALL, level_R: Tensor | None = None
) -> Tensor:
    """One projection, or some of its outputs."""
    if level_R is not None:
        return module.project(name, expert, x_RH, level_R)  # type: ignore[operator,no-any-return]
    if hasattr(module, "project"):  # experts that are not stored as matrices know how to multiply with them
        return module.project(name, expert, x_RH)  # type: ignore[operator,no-any-return]
    weight = widened(getattr(module, name)[expert], x_RH.dtype, name)
    bias = getattr(module, f"{name}_bias")[expert, outputs].to(x_RH.dtype) if module.has_bias else None
    if not module.is_transposed:
        return F.linear(x_RH, weight[outputs], bias)
    y = x_RH @ weight[:, outputs]
    return y if bias is None else y + bias


def joined(module: nn.Module, gate_RI: Tensor, up_RI: Tensor) -> Tensor:
    """Gate and up as one projection would have put them out: [R, I] twice -> [R, P]."""
    if module.is_concatenated:
        return torch.cat([gate_RI, up_RI], -1)
    return torch.stack([gate_RI, up_RI], -1).flatten(-2)


def inner_activation(
    module: nn.Module, expert: int, x_RH: Tensor, scale: Scale | None = None, level_R: Tensor | None = None
) -> Tensor:
    """What one expert's down projection receives for these inputs: [R, H] -> [R, I]. scale, level_R : of the same
    rows."""
    name = "gate_up_proj" if module.has_gate else "up_proj"
    if scale is None:
        up_RP = _project(module, name, expert, x_RH, level_R=level_R)
    elif scale.gate_TH is None:
        up_RP = _project(module, name, expert, _times(x_RH, scale.up_TH))
    else:  # gate and up receive different inputs: each is its own product, on its half of the fused weight
        gate, up = _halves(module)
        gate_RI = _project(module, name, expert, _times(x_RH, scale.gate_TH), gate)
        up_RP = joined(module, gate_RI, _project(module, name, expert, _times(x_RH, scale.up_TH), up))
    inner_RI: Tensor = module._apply_gate(up_RP) if module.has_gate else module.act_fn(up_RP)  # type: ignore[operator]
    return inner_RI if scale is None or scale.down_TI is None else _times(inner_RI, scale.down_TI)


def _times(x: Tensor, factor: Tensor) -> Tensor:
    """Multiplied in the wider of both dtypes: close to 1 a narrow factor would have no digits."""
    return (x * factor).to(x.dtype)


def _halves(module: nn.Module) -> tuple[slice, slice]:
    """Which outputs of the fused projection are gate's, and which up's."""
    if not module.is_concatenated:
        return slice(0, None, 2), slice(1, None, 2)
    weight = module.gate_up_proj
    assert isinstance(weight, Tensor)
    half = weight.shape[2 if module.is_transposed else 1] // 2
    return slice(None, half), slice(half, None)


def output_projection(module: nn.Module, expert: int, inner_RI: Tensor, level_R: Tensor | None = None) -> Tensor:
    """What one expert puts out for what its down projection receives: [R, I] -> [R, H]."""
    y_RH = _project(module, "down_proj", expert, inner_RI, level_R=level_R)
    if getattr(module, "has_post_expert_norm", False):
        y_RH = module.post_expert_norm(y_RH)  # type: ignore[operator]
    return y_RH


def expert_output(module: nn.Module, expert: int, x_RH: Tensor) -> Tensor:
    """One expert on any rows, routed to it or not, without a weight: [R, H] -> [R, H]. No slot and no tap is asked."""
    return output_projection(module, expert, inner_activation(module, expert, x_RH))


def experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Sum of the selected experts' outputs, weighted. Shapes: [T, H], [T, K], [T, K] -> [T, H].

    Peak memory beside the weights: one expert in the activations' dtype, its routed rows, and one [T, H] sum.
    """
    x_TH, E = hidden_states, stored_experts(self)
    slots: list[Slot] = getattr(self, "_coterie_slots", [])
    for slot in slots:
        top_k_index, top_k_weights = slot(top_k_index, top_k_weights)
    scale: Scale | None = None
    if hasattr(self, "stand_in"):
        top_k_index, top_k_weights, scale = self.stand_in(top_k_index, top_k_weights)  # type: ignore[operator]
    levels: Levels | None = None
    if hasattr(self, "choose_levels") and (chosen := self.choose_levels(x_TH, top_k_index)) is not None:  # type: ignore[operator]
        top_k_index, levels = chosen
    tap: Tap | None = getattr(self, "_coterie_tap", None)
    watched = tap is not None and tap.routed(x_TH, top_k_index, top_k_weights)
    inner = getattr(tap, "inner", None) if watched else None
    K = top_k_index.shape[-1]
    slot_expert = top_k_index.reshape(-1).clamp(max=E)  # the sentinel, and anything above it, is "no expert"
    order = torch.argsort(slot_expert, stable=True)
    counts = torch.bincount(slot_expert, minlength=E + 1)[:E].tolist()
    slot_weight = top_k_weights.reshape(-1, 1)
    sum_TH = torch.zeros(x_TH.shape, dtype=torch.promote_types(x_TH.dtype, torch.float32), device=x_TH.device)
    start = 0
    for expert, count in enumerate(counts):
        if not count:
            continue
        row_R = order[start : start + count]
        start += count
        token_R = row_R if K == 1 else row_R // K
        x_RH = x_TH[token_R]
        level_R = None if levels is None else levels.level_TK.reshape(-1)[row_R]
        inner_RI = inner_activation(self, expert, x_RH, None if scale is None else scale.of(token_R), level_R)
        if inner is not None:
            inner(expert, row_R, inner_RI)
        y_RH = output_projection(self, expert, inner_RI, level_R)
        if levels is not None:
            y_RH = levels.learned(self, expert, row_R, x_RH, y_RH)
        if watched:
            assert tap is not None
            tap.expert(expert, row_R, x_RH, y_RH)
        sum_TH.index_add_(0, token_R, (y_RH * slot_weight[row_R]).to(sum_TH.dtype))
    if watched:
        assert tap is not None
        tap.combined(sum_TH)
    return sum_TH.to(x_TH.dtype)


ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


@contextmanager
def observe(module: nn.Module, tap: Tap) -> Iterator[None]:
    """Let `tap` watch one experts module that runs with the "coterie" implementation."""
    module._coterie_tap = tap  # type: ignore[assignment]
    try:
        yield
    finally:
        del module._coterie_tap


@contextmanager
def rerouted(module: nn.Module, slot: Slot) -> Iterator[None]:
    """Let `slot` change the ids [T, K] and weights [T, K] that one experts module of the "coterie" implementation runs.

    Slots nest: one entered later runs earlier, as it stands nearer to the router. Ids >= E mean "no expert".
    """
    before: list[Slot] = getattr(module, "_coterie_slots", [])
    module._coterie_slots = [slot, *before]  # type: ignore[assignment]
    try:
        yield
    finally:
        module._coterie_slots = before  # type: ignore[assignment]
