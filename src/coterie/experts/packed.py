"""Experts and linear layers that stay packed in memory: codes of 1 to 8 bits, unpacked where they are multiplied.

A stock module becomes a packed one in place (`convert`, `convert_linear`): its class is derived from the class it had,
so that gates, activations, biases and flags stay what they were. Every expert has widths of its own, one for each of
gate, up and down; 16 means that the matrix stays as it was. Of one projection of all experts of a layer there is

    packed_p [sum of O * N_e] int32, one expert below the other     scale_p [Q, O, G]     zero_p [Q, O, G], asymmetric
    plain_p [E - Q, O, I], the matrices that stay as they were

in the order of the experts. Packed weights do not learn; gradients pass through them to what they are multiplied with.
What codes mean stands in `packing`.
"""

# E experts, Q of them quantized, R rows routed to one expert, I inputs and O outputs of a projection, G groups of
# columns, N words of a packed row

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from coterie.experts import kernels, packing
from coterie.experts.forward import experts_forward, joined
from coterie.experts.packing import Coded

PLAIN = 16  # bits of a matrix that is not quantized


@dataclass(frozen=True)
class Stack:
    """One projection of all experts of a layer: what is stored, and where each expert lies in it.

    bits : width of each expert, 1 to 8, or 16. shape : (O, I). words : flat int32. scale_QOG, zero_QOG : see above.
    plain : [E - Q, O, I].
    """

    bits: tuple[int, ...]
    shape: tuple[int, int]
    group: int
    words: Tensor
    scale_QOG: Tensor
    zero_QOG: Tensor | None
    plain: Tensor

    def packed(self, expert: int) -> Tensor:
        """Words of one quantized expert, [O, N]."""
        starts, _ = packing.layout(self.bits, self.shape)
        return self.words[starts[expert] : starts[expert + 1]].view(self.shape[0], -1)

    def dense(self, expert: int) -> Tensor:
        """One matrix, [O, I]: float32, or as it is stored where it is not quantized."""
        bits, rank = self.bits[expert], packing.layout(self.bits, self.shape)[1][expert]
        if bits == PLAIN:
            return self.plain[rank]
        codes_OI = packing.unpack(self.packed(expert), bits, self.shape[1])
        zero_OG = None if self.zero_QOG is None else self.zero_QOG[rank]
        return packing.dense(codes_OI, bits, self.group, self.scale_QOG[rank], zero_OG)


def matrix_words(bits: int, shape: tuple[int, int]) -> int:
    """Words of one packed matrix; none if it stays as it is."""
    return 0 if bits == PLAIN else shape[0] * packing.words(shape[1], bits)


def multiply(stack: Stack, expert: int, x_RI: Tensor) -> Tensor:
    """[R, I] -> [R, O] with one expert's matrix, in the dtype of the inputs."""
    counts = [0] * len(stack.bits)
    counts[expert] = x_RI.shape[0]
    return kernels.grouped(stack, x_RI, counts).to(x_RI.dtype)


_NUMBERS = 2**24  # of an activation that are held at once: 64 MB in float32


def spans(counts: list[int], most: int) -> Iterator[tuple[int, list[int]]]:
    """Rows sorted by expert, in turns of at most `most` rows: (first row, rows of each expert)."""
    start, total = 0, sum(counts)
    if 0 < total <= most:
        yield 0, counts
        return
    while start < total:
        left, some = most, []
        before = start
        for count in counts:
            skipped = min(before, count)
            before -= skipped
            some.append(min(count - skipped, left))
            left -= some[-1]
        yield start, some
        start += sum(some)


class Packed:
    """What a packed experts module has beside what its stock class gives it.

    packed_bits : {projection: width of each expert}. packed_shapes : {projection: (O, I)}. packed_group : columns that
    share a scale. packed_symmetric : without zeros.
    """

    packed_bits: dict[str, tuple[int, ...]]
    packed_shapes: dict[str, tuple[int, int]]
    packed_group: int
    packed_symmetric: bool

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sum of the selected experts' outputs, weighted. Shapes: [T, H], [T, K], [T, K] -> [T, H].

        Peak memory beside the weights: a few times 64 MB for routed rows, however many there are, and one [T, H] sum.
        """
        module: Any = self
        if hasattr(self, "_coterie_tap") or hasattr(self, "stand_in"):  # they want to see one expert after the other
            return experts_forward(module, hidden_states, top_k_index, top_k_weights)
        for slot in getattr(self, "_coterie_slots", []):
            top_k_index, top_k_weights = slot(top_k_index, top_k_weights)
        x_TH, K, E = hidden_states, top_k_index.shape[-1], self.stored_experts
        slot_expert = top_k_index.reshape(-1).clamp(max=E)  # the sentinel, and anything above it, is "no expert"
        order = torch.argsort(slot_expert, stable=True)
        counts = torch.bincount(slot_expert, minlength=E + 1)[:E].tolist()
        slot_weight = top_k_weights.reshape(-1, 1)
        sum_TH = torch.zeros(x_TH.shape, dtype=torch.promote_types(x_TH.dtype, torch.float32), device=x_TH.device)
        most = max(64, _NUMBERS // (2 * self.packed_shapes["up"][0]))
        for start, some in spans(counts, most):
            row_R = order[start : start + sum(some)]
            token_R, expert_R = row_R // K, slot_expert[row_R]
            inner_RI = self._inner(x_TH, some, token_R, expert_R)
            y_RH = self._biased("down_proj", kernels.grouped(self.stack("down"), inner_RI, some), expert_R)
            if getattr(module, "has_post_expert_norm", False):
                y_RH = module.post_expert_norm(y_RH.to(x_TH.dtype))
            if y_RH.dtype == sum_TH.dtype and not (y_RH.requires_grad or slot_weight.requires_grad):
                y_RH *= slot_weight[row_R]  # without another [R, H]
            else:
                y_RH = (y_RH * slot_weight[row_R]).to(sum_TH.dtype)
            sum_TH.index_add_(0, token_R, y_RH)
        return sum_TH.to(x_TH.dtype)

    def _inner(self, x_TH: Tensor, counts: list[int], token_R: Tensor, expert_R: Tensor) -> Tensor:
        """What the down projections receive, for rows sorted by expert: [R, I]."""
        module: Any = self
        if not module.has_gate:
            up_RI = kernels.grouped(self.stack("up"), x_TH, counts, token_R)
            act: Tensor = module.act_fn(self._biased("up_proj", up_RI, expert_R).to(x_TH.dtype))
            return act
        gate, up = self.stack("gate"), self.stack("up")
        if torch.is_grad_enabled() and x_TH.requires_grad:
            both = (kernels.grouped(stack, x_TH, counts, token_R) for stack in (gate, up))
            up_RP = joined(module, *both)
        else:  # both are written where a fused projection would have put them
            width, wide = gate.shape[0], torch.promote_types(x_TH.dtype, torch.float32)
            up_RP = torch.empty(len(token_R), 2 * width, dtype=wide, device=x_TH.device)
            halves = up_RP.chunk(2, -1) if module.is_concatenated else (up_RP[:, ::2], up_RP[:, 1::2])
            for stack, half in zip((gate, up), halves):
                kernels.grouped(stack, x_TH, counts, token_R, half)
        inner: Tensor = module._apply_gate(self._biased("gate_up_proj", up_RP, expert_R).to(x_TH.dtype))
        return inner

    def _biased(self, name: str, y_RO: Tensor, expert_R: Tensor) -> Tensor:
        bias = getattr(self, f"{name}_bias", None) if self.has_bias else None  # type: ignore[attr-defined]
        return y_RO if bias is None else y_RO + bias[expert_R].to(y_RO.dtype)

    @property
    def stored_experts(self) -> int:
        return len(self.packed_bits["down"])

    def stack(self, p: str) -> Stack:
        """Projection gate, up or down of all experts."""
        module: Any = self
        parts = [getattr(module, f"{part}_{p}", None) for part in ("packed", "scale", "zero", "plain")]
        return Stack(self.packed_bits[p], self.packed_shapes[p], self.packed_group, *parts)  # type: ignore[arg-type]

    def project(self, name: str, expert: int, x_RI: Tensor) -> Tensor:
        """One projection under its stock name, biases included: [R, I] -> [R, O]."""
        if name == "gate_up_proj":
            y_RO = joined(self, self._multiply("gate", expert, x_RI), self._multiply("up", expert, x_RI))  # type: ignore[arg-type]
        else:
            y_RO = self._multiply(name.removesuffix("_proj"), expert, x_RI)
        bias = getattr(self, f"{name}_bias", None) if self.has_bias else None  # type: ignore[attr-defined]
        return y_RO if bias is None else y_RO + bias[expert].to(y_RO.dtype)

    def _multiply(self, p: str, expert: int, x_RI: Tensor) -> Tensor:
        return multiply(self.stack(p), expert, x_RI)

    def more_tensors(self, p: str) -> list[str]:
        """Tensors of a projection that stand for no weights of their own, beside scales and zeros."""
        return []

    def shape_of(self, p: str) -> tuple[int, int]:
        """(O, I) of one projection."""
        return self.packed_shapes[p]

    def dense(self, p: str, expert: int) -> Tensor:
        """One projection of one expert, [O, I], in float32 or wider."""
        w_OI = self.stack(p).dense(expert)
        return w_OI.to(torch.promote_types(w_OI.dtype, torch.float32))


def is_packed(module: object) -> bool:
    return isinstance(module, (Packed, PackedLinear))


def expert_tensors(
    bits: Sequence[int], shape: tuple[int, int], group: int, *, symmetric: bool, dtype: torch.dtype
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """{part: (shape, dtype)} of one projection of all experts: packed, scale, zero, plain."""
    quantized = sum(b != PLAIN for b in bits)
    narrow = packing.scale_dtype(dtype)
    per_group = (quantized, shape[0], packing.groups(shape[1], group))
    parts: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "packed": ((sum(matrix_words(b, shape) for b in bits),), torch.int32),
        "scale": (per_group, narrow),
    }
    if not symmetric:
        parts["zero"] = (per_group, narrow)
    parts["plain"] = ((len(bits) - quantized, *shape), dtype)
    return parts


def convert(
    module: nn.Module,
    bits: Mapping[str, Sequence[int]],
    shapes: Mapping[str, tuple[int, int]],
    group: int,
    *,
    symmetric: bool,
) -> None:
    """Make a fused experts module a packed one, in place, its tensors empty and on the device of its weights.

    bits : {projection: width of each expert}. shapes : {projection: (O, I)}.
    """
    weight = module.down_proj
    assert isinstance(weight, Tensor)
    for name in ("gate_up_proj", "up_proj", "down_proj"):
        module._parameters.pop(name, None)
    module.__class__ = derived(Packed, type(module))
    assert isinstance(module, Packed)
    module.packed_bits = {p: tuple(bits[p]) for p in shapes}
    module.packed_shapes = dict(shapes)
    module.packed_group, module.packed_symmetric = group, symmetric
    for p, shape in shapes.items():
        parts = expert_tensors(module.packed_bits[p], shape, group, symmetric=symmetric, dtype=weight.dtype)
        for part, (size, dtype) in parts.items():
            empty(module, f"{part}_{p}", size, dtype, weight.device)
    module._is_hf_initialized = True  # type: ignore[assignment]  # its stock initialisation looks for stock weights


def empty(module: nn.Module, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Give a module an empty tensor: codes as a buffer, numbers as a parameter that does not learn."""
    tensor = torch.empty(shape, dtype=dtype, device=device)
    if dtype.is_floating_point:
        module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    else:
        module.register_buffer(name, tensor)


class PackedLinear:
    """What a packed linear layer has beside what its stock class gives it: packed [O, N], scale, zero [O, G]."""

    packed_width: int
    packed_group: int

    def forward(self, x: Tensor) -> Tensor:
        y = multiply(self.stack(), 0, x.reshape(-1, x.shape[-1]))
        bias = self.bias  # type: ignore[attr-defined]
        y = y.view(*x.shape[:-1], -1)
        return y if bias is None else y + bias

    def stack(self) -> Stack:
        """Its matrix as the only expert of a stack."""
        shape = (self.out_features, self.in_features)  # type: ignore[attr-defined]
        zero = getattr(self, "zero", None)
        none = self.scale.new_empty(0, *shape)  # type: ignore[attr-defined]
        scale_1OG = self.scale[None]  # type: ignore[attr-defined]
        words = self.packed.view(-1)  # type: ignore[attr-defined]
        return Stack(
            (self.packed_width,), shape, self.packed_group, words, scale_1OG, None if zero is None else zero[None], none
        )

    def dense(self) -> Tensor:
        """Its matrix in float32, [O, I]."""
        return self.stack().dense(0)


def linear_tensors(
    bits: int, shape: tuple[int, int], group: int, *, symmetric: bool, dtype: torch.dtype
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """{part: (shape, dtype)} of a packed linear layer: packed, scale, zero."""
    narrow, per_group = packing.scale_dtype(dtype), (shape[0], packing.groups(shape[1], group))
    words = (shape[0], packing.words(shape[1], bits))
    parts: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "packed": (words, torch.int32),
        "scale": (per_group, narrow),
    }
    return parts if symmetric else {**parts, "zero": (per_group, narrow)}


def convert_linear(module: nn.Linear, bits: int, group: int, *, symmetric: bool) -> None:
    """Make a linear layer a packed one, in place, its tensors empty and on the device of its weight; a bias stays."""
    weight = module.weight
    del module.weight
    module.__class__ = derived(PackedLinear, type(module))
    module.packed_width, module.packed_group = bits, group  # type: ignore[assignment]
    shape = (weight.shape[0], weight.shape[1])
    for part, (size, dtype) in linear_tensors(bits, shape, group, symmetric=symmetric, dtype=weight.dtype).items():
        empty(module, part, size, dtype, weight.device)
    module._is_hf_initialized = True  # type: ignore[assignment]


_classes: dict[tuple[type, type], type] = {}


def derived(kind: type, stock: type) -> type:
    """The class of a stock class whose weights are stored in another way, made once."""
    if (kind, stock) not in _classes:
        name = f"{kind.__name__.removesuffix('Linear')}{stock.__name__}"
        _classes[kind, stock] = type(name, (kind, stock), {"__module__": stock.__module__})
    return _classes[kind, stock]


def assembled(
    coded: Sequence[Coded | Tensor], shape: tuple[int, int], group: int, dtype: torch.dtype, *, symmetric: bool
) -> dict[str, Tensor]:
    """Tensors of one projection of all experts, by part, from one matrix each: codes, or [O, I] that stays as it is."""
    codes = [c for c in coded if isinstance(c, Coded)]
    plain = [c.to(dtype) for c in coded if not isinstance(c, Coded)]
    no_code = torch.empty(0, dtype=torch.int32)
    no_scale = torch.empty(0, shape[0], packing.groups(shape[1], group), dtype=packing.scale_dtype(dtype))
    parts = {
        "packed": torch.cat([no_code, *(c.packed().flatten() for c in codes)]),
        "scale": torch.cat([no_scale, *(c.scale_OG[None].to(no_scale.dtype) for c in codes)]),
    }
    if not symmetric:
        zeros = [c.zero_OG[None].to(no_scale.dtype) for c in codes if c.zero_OG is not None]
        parts["zero"] = torch.cat([no_scale, *zeros])
    parts["plain"] = torch.stack(plain) if plain else torch.empty(0, *shape, dtype=dtype)
    return parts


def packed_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of everything that is packed."""
    return ((name, module) for name, module in model.named_modules() if is_packed(module))


def checksum(tensor: Tensor) -> int:
    """CRC-32 of a tensor's bytes: codes that were damaged look like any others."""
    return zlib.crc32(memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]


def damaged(model: nn.Module, checksums: Mapping[str, int]) -> str | None:
    """The first tensor of codes in a loaded model that is not what was written, by path; None if all are."""
    for path, module in packed_modules(model):
        for name, codes in module.named_buffers(prefix=path, recurse=False):
            if name in checksums and codes.device.type != "meta" and checksum(codes) != checksums[name]:
                return name
    return None


def logical_sizes(model: nn.Module) -> dict[str, int]:
    """{tensor of a packed module: how many weights of the model it stands for}; scales and zeros stand for none."""
    found: dict[str, int] = {}
    for path, module in packed_modules(model):
        if isinstance(module, PackedLinear):
            found |= {f"{path}.scale": 0, f"{path}.zero": 0}
            found[f"{path}.packed"] = math.prod(module.stack().shape)
            continue
        assert isinstance(module, Packed)
        for p, bits in module.packed_bits.items():
            quantized = sum(b != PLAIN for b in bits)
            found |= {f"{path}.scale_{p}": 0, f"{path}.zero_{p}": 0}
            found[f"{path}.packed_{p}"] = quantized * math.prod(module.packed_shapes[p])
            found |= {f"{path}.{name}": 0 for name in module.more_tensors(p)}
    return found
