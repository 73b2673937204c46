"""Experts stored once and read at several widths: base codes and planes of signs (MWQ of D2MoE, arXiv:2504.15299).

Level 0 of a matrix is its base, codes of b_1 bits in groups; level k adds k planes, one sign for every weight and one
scale for every group each:

    W_hat_k = (Q_1 - z) s_1 + sum_{i=1..k} s_(i+1) Q_(i+1),     Q in {-1, +1}

Every plane is a tensor of its own, so that what is not wanted need not be read. Of one projection p of all experts:

    packed_p    int32 [E, O, N]        scale_p, zero_p    [E, O, G]    zero_p only where the base is asymmetric
    planeI_p    int32 [E, O, I/32]     planeI_scale_p     [E, O, G]    for I = 1, 2, ...

A bit router, where there is one, chooses a level for every token and expert (`experts.levels`); without, all of what
is held is used. Nothing here learns; gradients pass through to what matrices are multiplied with.
"""

# E experts, R rows routed to one expert, I inputs and O outputs of a projection, G groups of columns, N words of a row,
# T tokens, K slots per token

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coterie.experts import packing
from coterie.experts.forward import Levels, experts_forward, joined
from coterie.experts.levels import bit_router
from coterie.experts.packed import Packed, Stack, derived, empty
from coterie.experts.packing import Coded, spread

PLANES = r"\.plane(\d+)_(?:scale_)?(?:gate|up|down)$"
Plane = tuple[Tensor, Tensor]  # signs uint8 [O, I], 1 for +1 and 0 for -1; scales [O, G]


@dataclass
class NestedCodes:
    """One matrix at several widths, not packed: level 0 is the base, level k the base and the first k planes."""

    base: Coded
    planes: list[Plane]

    def dense(self, level: int | None = None) -> Tensor:
        """W_hat from the base and the first `level` planes, all of them by default: float32 [O, I]."""
        w_OI = self.base.dense()
        for sign_OI, scale_OG in self.planes[:level]:
            w_OI = with_plane(w_OI, sign_OI, scale_OG, self.base.group)
        return w_OI


def with_plane(w_OI: Tensor, sign_OI: Tensor, scale_OG: Tensor, group: int) -> Tensor:
    """One level more: W_hat + s Q."""
    return w_OI + spread(scale_OG, group, w_OI.shape[-1]) * (2 * sign_OI.float() - 1)


@dataclass(frozen=True)
class NestedStack:
    """One projection of all experts at one level. planes : (words [E, O, I/32], scales [E, O, G]) of those it takes."""

    base: Stack
    planes: Sequence[tuple[Tensor, Tensor]]

    def dense(self, expert: int) -> Tensor:
        """One matrix, [O, I] float32."""
        w_OI = self.base.dense(expert)
        for words_EON, scale_EOG in self.planes:
            sign_OI = packing.unpack(words_EON[expert], 1, w_OI.shape[-1])
            w_OI = with_plane(w_OI, sign_OI, scale_EOG[expert], self.base.group)
        return w_OI


class _Multiply(torch.autograd.Function):
    """x W^T for a matrix that is made when it is needed, forwards and backwards, and never kept."""

    @staticmethod
    def forward(ctx: Any, x_RI: Tensor, stack: NestedStack, expert: int) -> Tensor:
        ctx.stack, ctx.expert = stack, expert
        return F.linear(x_RI, stack.dense(expert).to(x_RI.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0] @ ctx.stack.dense(ctx.expert).to(grads[0].dtype), None, None


def _multiply(stack: NestedStack, expert: int, x_RI: Tensor) -> Tensor:
    """[R, I] -> [R, O] with one expert's matrix, in the dtype of the inputs."""
    result: Tensor = _Multiply.apply(x_RI, stack, expert)  # type: ignore[no-untyped-call]
    return result


class Nested(Packed):
    """What a module of nested experts has beside what its stock class gives it.

    nested_planes : planes that are held. `packed_bits` are those of the base. level : what every row is computed at,
    whatever a bit router says; None: the router's choice, or all planes without one.
    """

    nested_planes: int
    level: int | None

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sum of the selected experts' outputs, weighted. Shapes: [T, H], [T, K], [T, K] -> [T, H].

        One expert after the other, each matrix unpacked once for every level its tokens have.
        """
        return experts_forward(self, hidden_states, top_k_index, top_k_weights)  # type: ignore[arg-type]

    def stack(self, p: str, level: int | None = None) -> NestedStack:  # type: ignore[override]
        """Projection gate, up or down of all experts at a level, by default the highest that is held."""
        words, scale, zero = (getattr(self, f"{part}_{p}", None) for part in ("packed", "scale", "zero"))
        assert words is not None
        assert scale is not None
        none = scale.new_empty(0, *self.packed_shapes[p])
        bits, shape = self.packed_bits[p], self.packed_shapes[p]
        base = Stack(bits, shape, self.packed_group, words.view(-1), scale, zero, none)
        count = self.nested_planes if level is None else level
        return NestedStack(base, [(getattr(self, f"plane{i}_{p}"), self._scale(i, p)) for i in range(1, count + 1)])

    def _scale(self, number: int, p: str) -> Tensor:
        scale_EOG: Tensor = getattr(self, f"plane{number}_scale_{p}")
        return scale_EOG

    def choose_levels(self, x_TH: Tensor, index_TK: Tensor) -> tuple[Tensor, Levels] | None:
        """Ids of what runs and the level of every slot; None where all rows have one level."""
        router = bit_router(self)  # type: ignore[arg-type]
        if router is None or self.level is not None:
            return None
        return router.choose(x_TH, index_TK, self.nested_planes)

    def project(self, name: str, expert: int, x_RI: Tensor, level_R: Tensor | None = None) -> Tensor:
        """One projection under its stock name, each row at its own level, biases included: [R, I] -> [R, O]."""
        if level_R is None:
            return self._at(name, expert, x_RI, self.level)
        found = sorted(set(level_R.tolist()))
        if len(found) == 1:
            return self._at(name, expert, x_RI, found[0])
        rows = [(level_R == level).nonzero()[:, 0] for level in found]
        parts = [self._at(name, expert, x_RI[row_R], level) for row_R, level in zip(rows, found, strict=True)]
        return torch.cat(parts)[torch.cat(rows).argsort()]

    def _at(self, name: str, expert: int, x_RI: Tensor, level: int | None) -> Tensor:
        if name == "gate_up_proj":
            gate, up = (_multiply(self.stack(p, level), expert, x_RI) for p in ("gate", "up"))
            y_RO = joined(self, gate, up)  # type: ignore[arg-type]
        else:
            y_RO = _multiply(self.stack(name.removesuffix("_proj"), level), expert, x_RI)
        bias = getattr(self, f"{name}_bias", None) if self.has_bias else None  # type: ignore[attr-defined]
        return y_RO if bias is None else y_RO + bias[expert].to(y_RO.dtype)

    def more_tensors(self, p: str) -> list[str]:
        return [f"plane{i}_{part}{p}" for i in range(1, self.nested_planes + 1) for part in ("", "scale_")]

    def dense(self, p: str, expert: int) -> Tensor:
        """One projection of one expert at the level it runs at, [O, I] float32."""
        return self.stack(p, self.level).dense(expert)


def expert_tensors(
    experts: int, shape: tuple[int, int], base: int, planes: int, group: int, *, symmetric: bool, dtype: torch.dtype
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """{part: (shape, dtype)} of one projection of all experts: packed, scale, zero, plane1, plane1_scale, ..."""
    outputs, inputs = shape
    narrow, per_group = packing.scale_dtype(dtype), (experts, outputs, packing.groups(inputs, group))
    parts: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "packed": ((experts, outputs, packing.words(inputs, base)), torch.int32),
        "scale": (per_group, narrow),
    }
    if not symmetric:
        parts["zero"] = (per_group, narrow)
    for i in range(1, planes + 1):
        parts[f"plane{i}"] = ((experts, outputs, packing.words(inputs, 1)), torch.int32)
        parts[f"plane{i}_scale"] = (per_group, narrow)
    return parts


def convert_nested(
    module: nn.Module, shapes: Mapping[str, tuple[int, int]], base: int, planes: int, group: int, *, symmetric: bool
) -> None:
    """Make a fused experts module one of nested experts, in place, its tensors empty and on the device of its weights.

    shapes : {projection: (O, I)}. base : bits of the base. planes : how many are held.
    """
    weight = module.down_proj
    assert isinstance(weight, Tensor)
    E, dtype, device = weight.shape[0], weight.dtype, weight.device
    for name in ("gate_up_proj", "up_proj", "down_proj"):
        module._parameters.pop(name, None)
    module.__class__ = derived(Nested, type(module))
    assert isinstance(module, Nested)
    module.packed_bits = dict.fromkeys(shapes, (base,) * E)
    module.packed_shapes = dict(shapes)
    module.packed_group, module.packed_symmetric = group, symmetric
    module.nested_planes, module.level = planes, None
    for p, shape in shapes.items():
        parts = expert_tensors(E, shape, base, planes, group, symmetric=symmetric, dtype=dtype)
        for part, (size, kind) in parts.items():
            empty(module, f"{part}_{p}", size, kind, device)
    module._is_hf_initialized = True  # type: ignore[assignment]


def assembled(made: Sequence[NestedCodes], dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors of one projection of all experts, by part, from one matrix each."""
    narrow = packing.scale_dtype(dtype)
    bases = [m.base for m in made]
    parts = {
        "packed": torch.stack([b.packed() for b in bases]),
        "scale": torch.stack([b.scale_OG for b in bases]).to(narrow),
    }
    if bases[0].zero_OG is not None:
        parts["zero"] = torch.stack([b.zero_OG for b in bases if b.zero_OG is not None]).to(narrow)
    for i in range(len(made[0].planes)):
        parts[f"plane{i + 1}"] = torch.stack([packing.pack(m.planes[i][0], 1) for m in made])
        parts[f"plane{i + 1}_scale"] = torch.stack([m.planes[i][1] for m in made]).to(narrow)
    return parts


def plane_of(key: str) -> int:
    """Which plane a tensor of a checkpoint belongs to; 0: to none."""
    found = re.search(PLANES, key)
    return int(found[1]) if found else 0


def nested_modules(model: nn.Module) -> list[Nested]:
    """All modules of nested experts of a model."""
    return [module for module in model.modules() if isinstance(module, Nested)]
