"""Block-scaled FP8, as DeepSeek-V3 and many after it are published (arXiv:2412.19437, section 3.3).

A weight `X` [.., R, C] is stored as float8_e4m3fn numbers q, with one scale for each block of b_R x b_C beside it, in
`X_scale_inv` [.., ceil(R / b_R), ceil(C / b_C)]; blocks at the edges may be smaller. The weight is

    W = q * scale        multiplied in float32, then rounded once to the dtype it is read as

A changed block is quantized anew with scale = max |W| / 448, so that its largest number is the largest of the format;
rounded up to a power of two where the scales are of that kind (`scale_fmt` ue8m0).

Which weights are stored this way is read from the tensors' dtypes, not from the config's list of modules. Scales of
activations (`activation_scheme` static) and one scale for a whole tensor (`weight_block_size` null) are refused.

Differs from transformers 5.23, whose dequantization takes the block size to be R / ceil(R / b_R): the same where blocks
divide the weight; elsewhere (576 rows of DeepSeek-V3's kv_a_proj_with_mqa in blocks of 128) it raises or is wrong.
"""

# R rows, C columns of a weight; r, c blocks along them

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from coterie.errors import CheckpointError, ModelError
from coterie.streaming.checkpoint import PackedInfo, TensorInfo
from coterie.streaming.stored.form import StoredForm, nothing_packed, partner

_LARGEST = 448.0  # of float8_e4m3fn
_SCALES = ("F32", "BF16", "F16", "F8_E8M0", "U8")
_SUFFIX = "_scale_inv"
_STATIC = (".activation_scale", ".input_scale")


class BlockFP8(StoredForm):
    """FP8 numbers with a scale per two-dimensional block. Read in the compute dtype: no narrower one holds them."""

    name = "fp8"
    told = "block-scaled FP8"

    def __init__(self, entry: Mapping[str, Any]) -> None:
        size = entry.get("weight_block_size", [128, 128])  # left out, it is what transformers takes it to be
        good = isinstance(size, list | tuple) and len(size) == 2
        if not good or not all(type(n) is int and 0 < n < 2**31 for n in size):
            raise CheckpointError(
                f"config.json: weight_block_size of its fp8 weights is {size!r}, not two positive numbers",
                "Only weights with a scale per block can be read, for example [128, 128].",
            )
        for name, wanted in (("activation_scheme", "dynamic"), ("fmt", "e4m3"), ("expert_dtype", "fp8")):
            if entry.get(name, wanted) != wanted:
                raise CheckpointError(
                    f"config.json: fp8 weights with {name} {entry[name]!r} cannot be read, only {wanted!r}",
                    "Start from the unquantized checkpoint and quantize the result.",
                )
        self.block = (int(size[0]), int(size[1]))
        self.shown = f"{self.name}, one scale per {self.block[0]} x {self.block[1]} block"
        self.power_of_two = entry.get("scale_fmt") == "ue8m0"

    def weights(self, stored: Mapping[str, TensorInfo], dtype: torch.dtype) -> dict[str, TensorInfo]:
        found: dict[str, TensorInfo] = {}
        for key, info in stored.items():
            if key.endswith(_STATIC):
                raise CheckpointError(f"{key}: stored scales of activations cannot be read", "They would be lost.")
            if info.dtype == "F8_E4M3":
                scale = partner(stored, key + _SUFFIX, key)
                self._check(info, scale)
                found[key] = PackedInfo.of(key, dtype, info.shape, self, (info, scale))
            elif key.endswith(_SUFFIX):
                weight = partner(stored, key.removesuffix(_SUFFIX), key)
                if weight.dtype != "F8_E4M3":
                    raise CheckpointError(f"{weight.key} has scales, and its dtype is {weight.dtype}, not F8_E4M3")
            else:
                found[key] = info
        if len(found) == len(stored):
            raise nothing_packed(self)
        return found

    def _check(self, weight: TensorInfo, scale: TensorInfo) -> None:
        if len(weight.shape) < 2 or scale.dtype not in _SCALES:
            raise CheckpointError(
                f"{weight.key}: a weight of shape {list(weight.shape)} with {scale.dtype} scales is no block-scaled FP8"
            )
        wanted = self.layout(weight.shape)[1]
        if scale.shape != wanted:
            raise CheckpointError(
                f"{scale.key} has shape {list(scale.shape)}; a weight of {list(weight.shape)} in blocks of"
                f" {self.block[0]} x {self.block[1]} has {list(wanted)}",
                "Scales and weight do not belong together, or weight_block_size in config.json is wrong.",
            )

    def layout(self, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        if len(shape) < 2:
            raise ModelError(f"a tensor of shape {list(shape)} cannot be stored as block-scaled FP8")
        *lead, R, C = shape
        return [shape, (*lead, -(-R // self.block[0]), -(-C // self.block[1]))]

    def unpack(self, parts: Sequence[Tensor], out: Tensor) -> None:
        weight, scale = parts
        matrices = zip(_matrices(weight), _matrices(_numbers(scale)), _matrices(out), strict=True)
        for q_RC, scale_rc, out_RC in matrices:  # one matrix at a time: the product is wider than what is stored
            out_RC.copy_(q_RC.float().mul_(self._spread(scale_rc, out_RC.shape)))

    def pack(self, weight: Tensor, like: Sequence[tuple[torch.dtype, tuple[int, ...]]]) -> list[Tensor]:
        parts = [torch.empty(shape, dtype=dtype) for dtype, shape in like]
        for w_RC, q_RC, scale_rc in zip(*map(_matrices, (weight, *parts)), strict=True):
            self._quantize(w_RC.float(), q_RC, scale_rc)
        return parts

    def repack(self, weight: Tensor, before: Sequence[Tensor]) -> list[Tensor]:
        parts = self.pack(weight, [(part.dtype, tuple(part.shape)) for part in before])
        old = torch.empty_like(weight)
        self.unpack(before, old)
        for w_RC, old_RC, q_RC, scale_rc, q_old_RC, scale_old_rc in zip(
            *map(_matrices, (weight, old, *parts, *before)), strict=True
        ):
            same_RC = (w_RC == old_RC) | (w_RC.isnan() & old_RC.isnan())
            kept_rc = self._blocks(same_RC | (w_RC == 0), True).all(dim=3).all(dim=1)
            kept_RC = self._spread(kept_rc, w_RC.shape) & same_RC  # what became zero has its code already
            q_RC.view(torch.uint8)[kept_RC] = q_old_RC.view(torch.uint8)[kept_RC]
            _bits(scale_rc)[kept_rc] = _bits(scale_old_rc)[kept_rc]
        return parts

    def _quantize(self, w_RC: Tensor, q_RC: Tensor, scale_rc: Tensor) -> None:
        wide_rc = self._blocks(w_RC.abs(), 0.0).amax(dim=(1, 3)) / _LARGEST
        if self.power_of_two or scale_rc.dtype in (torch.float8_e8m0fnu, torch.uint8):
            fraction, exponent = torch.frexp(wide_rc)  # exact: wide = fraction * 2^exponent, fraction in [0.5, 1)
            exponent = torch.where(fraction == 0.5, exponent - 1, exponent).clamp(-126, 127)
            wide_rc = torch.ldexp(torch.ones_like(wide_rc), exponent)
        kind = torch.float8_e8m0fnu if scale_rc.dtype == torch.uint8 else scale_rc.dtype
        rounded_rc = wide_rc.to(kind)
        scale_rc.copy_(rounded_rc.view(torch.uint8) if scale_rc.dtype == torch.uint8 else rounded_rc)
        divide_rc = rounded_rc.float()
        divide_rc[divide_rc == 0] = 1.0  # a block of zeros
        q_RC.copy_((w_RC / self._spread(divide_rc, w_RC.shape)).clamp_(-_LARGEST, _LARGEST))

    def _blocks(self, x_RC: Tensor, fill: float) -> Tensor:
        """[r, rows of a block, c, columns of a block]; smaller blocks at the edges are filled up."""
        (R, C), rows, columns = x_RC.shape, *self._within(x_RC.shape)
        full = pad(x_RC, (0, -C % columns, 0, -R % rows), value=fill)
        return full.view(full.shape[0] // rows, rows, full.shape[1] // columns, columns)

    def _spread(self, x_rc: Tensor, shape: torch.Size) -> Tensor:
        """[R, C] of one number per block."""
        rows, columns = self._within(shape)
        return x_rc.repeat_interleave(rows, 0)[: shape[0]].repeat_interleave(columns, 1)[:, : shape[1]]

    def _within(self, shape: torch.Size) -> tuple[int, int]:
        """Size of a block, no larger than the weight itself."""
        return min(self.block[0], max(shape[0], 1)), min(self.block[1], max(shape[1], 1))


def _matrices(x: Tensor) -> list[Tensor]:
    """Views of the matrices along the leading dimensions."""
    return list(x.reshape(-1, *x.shape[-2:]).unbind(0))


def _numbers(scale: Tensor) -> Tensor:
    """Scales in float32; bytes are exponents."""
    return (scale.view(torch.float8_e8m0fnu) if scale.dtype == torch.uint8 else scale).float()


def _bits(scale: Tensor) -> Tensor:
    """The same memory as integers, which every dtype of scales can be indexed as."""
    return scale.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[scale.element_size()])
