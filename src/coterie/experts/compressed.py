"""Experts of which a token runs only the strongest few, small vectors standing in for the rest (arXiv:2503.00634).

The router picks k experts as before. The first k_m by applied weight run (main), the others (auxiliary) do not: each
expert i has a vector theta_i = [gate H, up H, down I], all ones at first, and a token's auxiliaries together scale what
the matrices of its main experts are multiplied with:

    t = 1 + sum_aux a_j (theta_j - 1),   a_j = w_j / sum_aux w
    y = sum_main w_m down_m( t_down * act(gate_m(t_gate * x)) * up_m(t_up * x) )

t is the paper's sum_aux a_j theta_j written so that a token without auxiliaries is left as it is, and so that fresh
vectors change no bit. Main weights stay as the router gave them, or take over the weight of the auxiliaries
(`renormalize_main`). `single` has one vector of size H on the hidden state instead of three.

theta is always float32: near 1, bfloat16 would round every update away. Its rows are the router's ids, so an expert map
and factors, which rename or replace experts, do not go together with it. The order is that of the weights applied:
routers that select by something else (a bias, sampling) do not tell an experts module.
"""

# E experts, T tokens, K slots per token, H hidden, I expert intermediate, C = 2H + I numbers in a vector; index E and
# above: no expert

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from coterie.errors import ModelError
from coterie.experts.factored import is_factored
from coterie.experts.forward import Scale, experts_forward, stored_experts
from coterie.experts.mapped import expert_map


class Compressed:
    """What a module of compressed experts has beside what its stock class gives it.

    theta : [E, C] float32. main_experts : how many of a token's experts run. single, renormalize_main : see above.
    """

    main_experts: int
    single: bool
    renormalize_main: bool
    theta: nn.Parameter

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return experts_forward(self, hidden_states, top_k_index, top_k_weights)  # type: ignore[arg-type]

    def stand_in(self, index_TK: Tensor, weight_TK: Tensor) -> tuple[Tensor, Tensor, Scale | None]:
        """Ids and weights of the main experts (the other slots are "no expert"), and what the others scale."""
        E = self.theta.shape[0]
        if index_TK.shape[-1] <= self.main_experts:
            return index_TK, weight_TK, None
        main_TK, aux_TK = division(index_TK, weight_TK, self.main_experts, E)
        index, weights = reduced(index_TK, weight_TK, main_TK, aux_TK, E, renormalize=self.renormalize_main)
        a_TE = shares(index_TK, weight_TK, aux_TK, E, torch.promote_types(self.theta.dtype, weight_TK.dtype))
        with torch.autocast(a_TE.device.type, enabled=False):  # which would round t to two digits
            t_TC = 1 + a_TE @ (self.theta.to(a_TE.dtype) - 1)
        return index, weights, self._scale(t_TC)

    def _scale(self, t_TC: Tensor) -> Scale:
        if self.single:
            return Scale(t_TC)
        H, I = hidden_and_inner(self)  # type: ignore[arg-type]  # noqa: E741
        parts = torch.split(t_TC, [H, H, I] if self.has_gate else [H, I], -1)  # type: ignore[attr-defined]
        return Scale(parts[-2], parts[0] if self.has_gate else None, parts[-1])  # type: ignore[attr-defined]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move or cast the module; theta moves along but stays as wide as it is."""
        own = (self.theta, self.theta.grad)

        def wide(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            narrower = result.dtype.itemsize < tensor.dtype.itemsize
            return tensor.to(result.device) if narrower and any(tensor is o for o in own) else result

        return super()._apply(wide, recurse)  # type: ignore[misc]


def is_compressed(module: object) -> bool:
    return isinstance(module, Compressed)


def main_experts(module: object) -> int | None:
    """How many of a token's experts run; None where all that the router picks do."""
    return module.main_experts if isinstance(module, Compressed) else None


def division(index_TK: Tensor, weight_TK: Tensor, main: int, experts: int) -> tuple[Tensor, Tensor]:
    """Which slots run and which are only stood in for: two masks [T, K]; slots without an expert are in neither.

    The `main` largest applied weights of each token run; of equal ones the earlier slot.
    """
    real_TK = index_TK < experts
    key_TK = torch.where(real_TK, weight_TK.detach(), -torch.inf)
    first = torch.sort(key_TK, dim=-1, descending=True, stable=True).indices[:, :main]
    main_TK = torch.zeros_like(real_TK).scatter(-1, first, True)
    return main_TK & real_TK, ~main_TK & real_TK


def shares(index_TK: Tensor, weight_TK: Tensor, aux_TK: Tensor, experts: int, dtype: torch.dtype) -> Tensor:
    """a_j of each token, by expert: [T, E]; they sum to 1, or to 0 where a token has no auxiliary of any weight."""
    a_TK = torch.where(aux_TK, weight_TK.to(dtype), 0.0)
    a_TK = a_TK / a_TK.sum(-1, keepdim=True).clamp(min=torch.finfo(dtype).tiny)
    return a_TK.new_zeros(len(a_TK), experts + 1).scatter_add(-1, index_TK.clamp(max=experts), a_TK)[:, :experts]


def reduced(
    index_TK: Tensor, weight_TK: Tensor, main_TK: Tensor, aux_TK: Tensor, experts: int, *, renormalize: bool
) -> tuple[Tensor, Tensor]:
    """Ids and weights with the auxiliaries gone; with `renormalize` the main experts take over their weight."""
    weights = torch.where(main_TK, weight_TK, 0.0)
    if renormalize:
        kept = weights.sum(-1, keepdim=True)
        total = kept + torch.where(aux_TK, weight_TK, 0.0).sum(-1, keepdim=True)
        weights = weights * (total / kept.clamp(min=torch.finfo(kept.dtype).tiny))
    return torch.where(main_TK, index_TK, experts), weights


def hidden_and_inner(module: nn.Module) -> tuple[int, int]:
    """H and I of a fused experts module."""
    down = module.down_proj
    assert isinstance(down, Tensor)
    return (down.shape[2], down.shape[1]) if module.is_transposed else (down.shape[1], down.shape[2])


def theta_shape(module: nn.Module, *, single: bool = False) -> tuple[int, int]:
    """(E, 2H + I) for three vectors an expert; (E, H + I) for experts without a gate; (E, H) with `single`."""
    H, I = hidden_and_inner(module)  # noqa: E741
    return stored_experts(module), H if single else (2 if module.has_gate else 1) * H + I


def refuse(module: nn.Module) -> None:
    """Raise ModelError for experts that cannot be stood in for."""
    if is_compressed(module):
        raise ModelError(
            "these experts are compressed experts already", "Start from the checkpoint they were made from."
        )
    if is_factored(module):
        raise ModelError(
            "these experts are stored as low-rank factors, which vectors cannot stand in for",
            "Compress experts that are stored as matrices.",
        )
    if expert_map(module) is not None:
        raise ModelError(
            "several of the router's outputs share these experts (an expert map), and a vector belongs to one output",
            "Merge with --set router=reduced first, where the method has it.",
        )


def convert(module: nn.Module, main: int, *, single: bool = False, renormalize_main: bool = False) -> None:
    """Make a fused experts module one of compressed experts, in place, with fresh vectors. `main`: k_m, at least 1.

    Raises ModelError for factored, mapped or compressed experts.
    """
    refuse(module)
    if main < 1:
        raise ModelError(f"{main} main experts: at least one must run")
    weight = module.down_proj
    assert isinstance(weight, Tensor)
    theta = torch.ones(theta_shape(module, single=single), dtype=torch.float32, device=weight.device)
    module.__class__ = _derived(type(module))
    assert isinstance(module, Compressed)
    module.main_experts, module.single, module.renormalize_main = main, single, renormalize_main
    module.theta = nn.Parameter(theta, requires_grad=weight.requires_grad)


def fill_missing(model: nn.Module) -> None:
    """Ones for vectors that the checkpoint just loaded does not hold: a plain checkpoint under a compressed config."""
    for module in model.modules():
        if isinstance(module, Compressed) and not getattr(module.theta, "_is_hf_initialized", False):
            nn.init.ones_(module.theta)


_classes: dict[type, type] = {}


def _derived(stock: type) -> type:
    """The compressed class of a stock experts class, made once."""
    if stock not in _classes:
        _classes[stock] = type(f"Compressed{stock.__name__}", (Compressed, stock), {"__module__": stock.__module__})
    return _classes[stock]
