"""Experts stored and computed as W = A B (+ S): low rank, plus some whole rows of a sparse part.

Each projection p of {gate, up, down} of expert e is kept as A [O, r] and B [r, I], so that y = A (B x) costs r (O + I)
multiplications a token instead of O I. S has whole output rows only (MC-SMoE, arXiv:2310.01334): the values of the
rows that are not zero, of all experts one below the other, and where each belongs.

A stock experts module becomes a factored one in place (`convert`): its class is derived from the class it had, so that
gates, activations, biases and flags stay what they were. Gate and up are always two matrices here.
"""

# E experts, R rows routed to one expert, H hidden, I inputs and O outputs of a projection, Q rank, N kept rows of S

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coterie.experts.forward import experts_forward, joined, projections, widened


class Factored:
    """What a factored experts module has beside what its stock class gives it.

    factor_p_a : [E, O, Q], factor_p_b : [E, Q, I] of each projection p.
    sparse_p : [N, I] rows of S, sparse_p_row : [N] ascending, e * O + output row; only where S is kept.
    """

    is_factored = True

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return experts_forward(self, hidden_states, top_k_index, top_k_weights)  # type: ignore[arg-type]

    @property
    def stored_experts(self) -> int:
        return int(self.factor_down_a.shape[0])  # type: ignore[attr-defined]

    def project(self, name: str, expert: int, x_RI: Tensor) -> Tensor:
        """One projection under its stock name, biases included: [R, I] -> [R, O]."""
        if name == "gate_up_proj":
            gate_RO, up_RO = self._multiply("gate", expert, x_RI), self._multiply("up", expert, x_RI)
            y_RO = joined(self, gate_RO, up_RO)  # type: ignore[arg-type]
        else:
            y_RO = self._multiply(name.removesuffix("_proj"), expert, x_RI)
        bias = getattr(self, f"{name}_bias", None) if self.has_bias else None  # type: ignore[attr-defined]
        return y_RO if bias is None else y_RO + bias[expert].to(y_RO.dtype)

    def _multiply(self, p: str, expert: int, x_RI: Tensor) -> Tensor:
        a_OQ = widened(getattr(self, f"factor_{p}_a")[expert], x_RI.dtype, f"factor_{p}_a")
        b_QI = widened(getattr(self, f"factor_{p}_b")[expert], x_RI.dtype, f"factor_{p}_b")
        y_RO = F.linear(F.linear(x_RI, b_QI), a_OQ)
        rows, values = self.sparse_rows(p, expert)
        if values is not None and len(values):
            y_RO = y_RO.index_add(-1, rows, F.linear(x_RI, values.to(x_RI.dtype)))
        return y_RO

    def sparse_rows(self, p: str, expert: int) -> tuple[Any, Tensor | None]:
        """Output rows [n] of S that one expert keeps, and their values [n, I]; None where there is no S."""
        values = getattr(self, f"sparse_{p}", None)
        if values is None:
            return None, None
        row_N, outputs = getattr(self, f"sparse_{p}_row").long(), getattr(self, f"factor_{p}_a").shape[1]
        ends = torch.tensor([expert * outputs, (expert + 1) * outputs], device=row_N.device)
        first, last = torch.searchsorted(row_N, ends).tolist()
        return row_N[first:last] - expert * outputs, values[first:last]

    def shape_of(self, p: str) -> tuple[int, int]:
        """(O, I) of one projection."""
        return getattr(self, f"factor_{p}_a").shape[1], getattr(self, f"factor_{p}_b").shape[2]

    def dense(self, p: str, expert: int) -> Tensor:
        """A B + S of one projection, [O, I], in float32 or wider."""
        a_OQ, b_QI = getattr(self, f"factor_{p}_a")[expert].detach(), getattr(self, f"factor_{p}_b")[expert].detach()
        dtype = torch.promote_types(a_OQ.dtype, torch.float32)
        w_OI: Tensor = a_OQ.to(dtype) @ b_QI.to(dtype)
        rows, values = self.sparse_rows(p, expert)
        return w_OI if values is None else w_OI.index_add(0, rows, values.detach().to(dtype))


def is_factored(module: object) -> bool:
    return getattr(module, "is_factored", False) is True


def convert(
    module: nn.Module,
    shapes: Mapping[str, tuple[int, int]],
    ranks: Mapping[str, int],
    rows: Mapping[str, int] | None = None,
) -> None:
    """Make a fused experts module a factored one, in place, its factors empty and on the device of its weights.

    shapes : {projection: (O, I)}. ranks : {projection: Q}. rows : {projection: N}, or None without sparse parts.
    """
    weight = module.down_proj
    assert isinstance(weight, Tensor)
    E = weight.shape[0]
    for name in ("gate_up_proj", "up_proj", "down_proj"):
        module._parameters.pop(name, None)
    module.__class__ = _derived(type(module))
    for p in projections(module):
        (O, I), Q = shapes[p], ranks[p]  # noqa: E741
        parts: dict[str, tuple[int, ...]] = {f"factor_{p}_a": (E, O, Q), f"factor_{p}_b": (E, Q, I)}
        if rows is not None:
            parts[f"sparse_{p}"] = (rows[p], I)
            where = torch.empty(rows[p], dtype=torch.int32, device=weight.device)
            module.register_buffer(f"sparse_{p}_row", where)
        for name, shape in parts.items():
            empty = torch.empty(shape, dtype=weight.dtype, device=weight.device)
            module.register_parameter(name, nn.Parameter(empty, requires_grad=weight.requires_grad))
    module._is_hf_initialized = True  # type: ignore[assignment]  # its stock initialisation looks for stock weights


_classes: dict[type, type] = {}


def _derived(stock: type) -> type:
    """The factored class of a stock experts class, made once."""
    if stock not in _classes:
        _classes[stock] = type(f"Factored{stock.__name__}", (Factored, stock), {"__module__": stock.__module__})
    return _classes[stock]


def with_factors(module: nn.Module, factors: Mapping[str, Tensor]) -> None:
    """Give a factored module its numbers: {parameter name: values}."""
    for name, value in factors.items():
        old = getattr(module, name)
        if isinstance(old, nn.Parameter):
            setattr(module, name, nn.Parameter(value.to(old.dtype), requires_grad=old.requires_grad))
        else:
            setattr(module, name, value.to(old.dtype))
