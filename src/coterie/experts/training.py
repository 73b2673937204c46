"""The experts forward and backward for training: every architecture's experts, sorted once, differentiated by hand.

For whoever trains a sparse layer. Registered with transformers as the experts implementation "coterie_train"; results
and gradients are those of the reference implementation "coterie" (`coterie.experts.forward`), up to rounding. A token t
whose slots k chose experts e_k with weights w_tk gets

    y_t = sum_k w_tk W2_e z(W1_e x_t)  =  sum_k W2_e (w_tk z(W1_e x_t))        z = act(gate) * up, or act(up)

Slots are sorted by expert once. Then all is products of a run of rows with the matrix of its expert, in two autograd
functions with the gate between them:

- weights enter in front of the down projection, as its inputs are the narrower side, and as then neither the outputs
  of single experts have to be kept for the gradient of the weights, nor the incoming gradient be scaled for each slot:
  d w_tk = (W2_e^T d y_t) . z,  as in SonicMoE (arXiv:2512.14080);
- gradients of the fused weights are written where they belong in one [E, ...] tensor, zeros for experts without rows;
- what a token's slots put out is summed by gathering, in both directions; nothing is scattered;
- between both functions only the up projection's outputs are kept; SiLU and its product with up are computed again.

Any other gate, GPT-OSS's for one, runs as the module has it, under autograd. Experts of a special form, watched ones,
ones with a norm behind each expert and ones stored in another dtype than their inputs go to the reference.
index >= E is "no expert" everywhere: no cost, and its weight, whatever it is, gets gradient 0. Gradients of gradients
are not to be had. It knows neither routers nor losses.
"""

# T tokens, H hidden, I expert intermediate, P = 2I with a gate (gate and up together) or I without, E experts,
# K slots per token, R routed rows: slots with an expert, sorted by it; C inputs and O outputs of a product

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate

from coterie.errors import UsageError
from coterie.experts.forward import NAME as REFERENCE
from coterie.experts.forward import experts_forward
from coterie.experts.kernels import dense

NAME = "coterie_train"


_buffers = threading.local()


def release_buffers() -> None:
    """Free what this thread keeps between calls, three [R, H] or [R, I] buffers: fresh memory costs page faults, which
    for small experts take as long as products."""
    _buffers.__dict__.clear()


def _buffer(name: str, rows: int, columns: int, like: Tensor) -> Tensor:
    """Memory [rows, columns] that nobody needs after this call of an autograd function."""
    if like.device.type != "cpu":  # elsewhere torch keeps freed memory itself
        return like.new_empty(rows, columns)
    held: Tensor | None = getattr(_buffers, name, None)
    if held is None or held.dtype != like.dtype or held.numel() < rows * columns:
        setattr(_buffers, name, held := like.new_empty(rows * columns))
    return held[: rows * columns].view(rows, columns)


class Routes(NamedTuple):
    """Which rows run: slots with an expert, sorted by expert.

    counts : rows of each expert. slot_R, token_R : slot (of the T*K) and token of each row. row_S : the row of each
    slot that has an expert, in the order of slots. first_T : where in row_S each token's rows begin.
    """

    counts: list[int]
    slot_R: Tensor
    token_R: Tensor
    row_S: Tensor
    first_T: Tensor

    @classmethod
    def of(cls, index_TK: Tensor, experts: int) -> Routes:
        T, K = index_TK.shape
        expert_S = index_TK.reshape(-1).clamp(max=experts)
        order = torch.argsort(expert_S, stable=True)
        counts = torch.bincount(expert_S, minlength=experts + 1)[:experts].tolist()
        rows = sum(counts)
        slot_R = order[:rows]
        row_S = torch.empty_like(order)
        row_S[order] = torch.arange(T * K, device=order.device)
        if rows == T * K:
            first_T = torch.arange(0, T * K, K, device=order.device)
        else:
            real_TK = (expert_S < experts).view(T, K)
            row_S = row_S[real_TK.flatten()]
            each_T = real_TK.sum(1)
            first_T = each_T.cumsum(0) - each_T
        return cls(counts, slot_R, slot_R if K == 1 else slot_R // K, row_S, first_T)

    def summed(self, y_RH: Tensor) -> Tensor:
        """Each token's rows added up, in at least float32: [R, H] -> [T, H]."""
        y_RH = y_RH.to(torch.promote_types(y_RH.dtype, torch.float32))
        if not len(y_RH):
            return y_RH.new_zeros(len(self.first_T), y_RH.shape[1])
        return torch.embedding_bag(y_RH, self.row_S, self.first_T, mode=0)[0]


def _inputs_first(weight: Tensor, transposed: bool) -> Tensor:
    """A fused weight as [E, C, O], whichever way it is stored."""
    return weight if transposed else weight.transpose(1, 2)


def _bias_gradient(bias_EO: Tensor, counts: list[int], grad_RO: Tensor) -> Tensor:
    parts = torch.split(grad_RO, counts)
    return torch.stack([part.sum(0, dtype=bias_EO.dtype) for part in parts])


def _once() -> None:
    if torch.is_grad_enabled():
        raise UsageError(
            f"the experts implementation {NAME!r} has no second derivative (create_graph=True)",
            f"Take set_experts_implementation({REFERENCE!r}) where gradients of gradients are needed.",
        )


class _Up(torch.autograd.Function):
    """Up, and gate, of every routed row: [T, H] -> [R, P]."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TH: Tensor,
        weight: Tensor,
        bias_EP: Tensor | None,
        routes: Routes,
        transposed: bool,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.routes, ctx.transposed, ctx.dtype = routes, transposed, x_TH.dtype
        narrow_TH = x_TH.to(dtype)
        ctx.save_for_backward(narrow_TH, weight, bias_EP)
        w_EHP = _inputs_first(weight, transposed)
        up_RP = narrow_TH.new_empty(len(routes.slot_R), w_EHP.shape[2])
        dense.times(narrow_TH, routes.token_R, w_EHP, routes.counts, up_RP)
        if bias_EP is not None:
            dense.add_bias(up_RP, bias_EP, routes.counts)
        return up_RP

    @staticmethod
    def backward(ctx: Any, grad_RP: Tensor) -> tuple[Tensor | None, ...]:
        _once()
        x_TH, weight, bias_EP = ctx.saved_tensors
        routes, (for_x, for_weight, for_bias, *_) = ctx.routes, ctx.needs_input_grad
        grad_RP = grad_RP.contiguous()
        grad_x = grad_weight = grad_bias = None
        if for_x:
            grad_RH = _buffer("rows", len(grad_RP), x_TH.shape[1], x_TH)
            dense.times(grad_RP, None, _inputs_first(weight, not ctx.transposed), routes.counts, grad_RH)
            grad_x = routes.summed(grad_RH).to(ctx.dtype)
        if for_weight:
            grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
            grad_EHP = _inputs_first(grad_weight, ctx.transposed)
            dense.outer(x_TH, routes.token_R, grad_RP, None, routes.counts, grad_EHP)
        if for_bias:
            grad_bias = _bias_gradient(bias_EP, routes.counts, grad_RP)
        return grad_x, grad_weight, grad_bias, None, None, None


class _Down(torch.autograd.Function):
    """Down of every routed row, weighted and summed: [R, I] -> [T, H]; with `gated`, first silu(gate) * up: [R, 2I]."""

    @staticmethod
    def forward(
        ctx: Any,
        inner_RP: Tensor,
        weight_TK: Tensor,
        weight: Tensor,
        bias_EH: Tensor | None,
        routes: Routes,
        transposed: bool,
        gated: bool,
    ) -> Tensor:
        ctx.save_for_backward(inner_RP, weight_TK, weight, bias_EH)
        ctx.routes, ctx.transposed, ctx.gated = routes, transposed, gated
        w_EIH = _inputs_first(weight, transposed)
        weight_R = weight_TK.reshape(-1)[routes.slot_R]
        if gated:
            weighted_RI = _buffer("weighted", len(inner_RP), inner_RP.shape[1] // 2, inner_RP)
            dense.silu_gate(inner_RP, weight_R, weighted_RI)
        else:
            weighted_RI = (inner_RP * weight_R[:, None]).to(inner_RP.dtype)
        y_RH = _buffer("rows", len(inner_RP), w_EIH.shape[2], inner_RP)
        dense.times(weighted_RI, None, w_EIH, routes.counts, y_RH)
        if bias_EH is not None:
            dense.add_bias(y_RH, bias_EH, routes.counts, weight_R)
        return routes.summed(y_RH)

    @staticmethod
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor | None, ...]:
        _once()
        inner_RP, weight_TK, weight, bias_EH = ctx.saved_tensors
        routes, (for_inner, for_routing, for_weight, for_bias, *_) = ctx.routes, ctx.needs_input_grad
        weight_R = weight_TK.reshape(-1)[routes.slot_R]
        narrow_TH = grad_TH.to(inner_RP.dtype).contiguous()
        grad_inner = grad_routing = grad_weight = grad_bias = None
        grad_RI = _buffer("grad", len(inner_RP), inner_RP.shape[1] // (2 if ctx.gated else 1), inner_RP)
        dense.times(narrow_TH, routes.token_R, _inputs_first(weight, not ctx.transposed), routes.counts, grad_RI)
        if ctx.gated:
            weighted_RI = _buffer("weighted", len(grad_RI), grad_RI.shape[1], inner_RP)
            grad_inner, grad_R = dense.silu_gate_backward(inner_RP, weight_R, grad_RI, weighted_RI)
        else:
            grad_inner = (grad_RI * weight_R[:, None]).to(inner_RP.dtype)
            weighted_RI = (inner_RP * weight_R[:, None]).to(inner_RP.dtype)
            grad_R = torch.linalg.vecdot(grad_RI.to(grad_TH.dtype), inner_RP.to(grad_TH.dtype))
        if for_weight:
            grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
            grad_EIH = _inputs_first(grad_weight, ctx.transposed)
            dense.outer(weighted_RI, None, narrow_TH, routes.token_R, routes.counts, grad_EIH)
        if bias_EH is not None:
            grad_RH = grad_TH[routes.token_R]
            if for_bias:
                grad_bias = _bias_gradient(bias_EH, routes.counts, grad_RH * weight_R[:, None])
            parts = zip(bias_EH, torch.split(grad_RH, routes.counts))
            grad_R = grad_R + torch.cat([part_RH @ bias_H.to(part_RH.dtype) for bias_H, part_RH in parts])
        if for_routing:
            grad_routing = torch.zeros_like(weight_TK, memory_format=torch.contiguous_format)
            grad_routing.view(-1)[routes.slot_R] = grad_R.to(weight_TK.dtype)
        return grad_inner if for_inner else None, grad_routing, grad_weight, grad_bias, None, None, None


def trains(module: nn.Module) -> bool:
    """Whether these experts are plain matrices that nobody watches; all others run by the reference."""
    special = any(hasattr(module, name) for name in ("project", "stand_in", "choose_levels", "_coterie_tap"))
    return not (special or getattr(module, "_coterie_slots", None) or getattr(module, "has_post_expert_norm", False))


def silu_gated(module: nn.Module) -> bool:
    """Whether between the projections there is silu(gate) * up, gate being the first half."""
    plain = getattr(module._apply_gate, "__func__", None) is _default_apply_gate
    return bool(module.has_gate and plain and isinstance(module.act_fn, (nn.SiLU, SiLUActivation)))


def training_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Sum of the selected experts' outputs, weighted. Shapes: [T, H], [T, K], [T, K] -> [T, H].

    Gradients for hidden_states, top_k_weights and the experts' own tensors. Under autocast products are in its dtype.
    """
    x_TH, device = hidden_states, hidden_states.device.type
    name = "gate_up_proj" if self.has_gate else "up_proj"
    up, down = getattr(self, name, None), getattr(self, "down_proj", None)
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_TH.dtype
    if not trains(self) or not isinstance(up, Tensor) or not isinstance(down, Tensor):
        return experts_forward(self, hidden_states, top_k_index, top_k_weights)
    if up.dtype not in (dtype, x_TH.dtype) or down.dtype != up.dtype:
        return experts_forward(self, hidden_states, top_k_index, top_k_weights)
    routes, gated = Routes.of(top_k_index, len(down)), silu_gated(self)
    up_bias, down_bias = (getattr(self, f"{n}_bias") if self.has_bias else None for n in (name, "down_proj"))
    up_RP: Tensor = _Up.apply(x_TH, up, up_bias, routes, self.is_transposed, dtype)  # type: ignore[no-untyped-call]
    if not gated:
        up_RP = self._apply_gate(up_RP) if self.has_gate else self.act_fn(up_RP)  # type: ignore[operator]
        up_RP = up_RP.to(dtype)
    sum_TH: Tensor = _Down.apply(up_RP, top_k_weights, down, down_bias, routes, self.is_transposed, gated)  # type: ignore[no-untyped-call]
    return sum_TH.to(x_TH.dtype)


ALL_EXPERTS_FUNCTIONS.register(NAME, training_forward)
