"""MXFP4, as GPT-OSS is published: 4-bit numbers in groups of 32 that share a power of two (OCP MX v1.0).

The experts of one projection, W [E, I, O] (inputs before outputs), are stored as `X_blocks` [E, O, I / 32, 16], two
e2m1 numbers a byte, the first in the low half, and `X_scales` [E, O, I / 32], exponents biased by 127. Dequantization
is transformers' own, but for the exponent 255, which is NaN and not 2^128. bfloat16 holds every such number exactly,
so weights are read as bfloat16 whatever computes.

A changed group is quantized anew: of the exponent that the standard names (floor(log2 max |W|) - 2, which may cut the
largest number) and the one above it, the one with the smaller squared error; numbers to the nearest, halves to even.
"""

# E experts, I inputs, O outputs, G groups of 32 inputs

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.mxfp4 import FP4_VALUES, convert_moe_packed_tensors

from coterie.errors import CheckpointError, ModelError
from coterie.streaming.checkpoint import PackedInfo, TensorInfo
from coterie.streaming.stored.form import StoredForm, nothing_packed, partner

_GROUP = 32
_NAN = 255  # the exponent that stands for no number
_BLOCKS, _SCALES = "_blocks", "_scales"


class MXFP4(StoredForm):
    """4-bit numbers with one power of two per 32 inputs; all experts of a projection in one pair of tensors."""

    name = "mxfp4"
    told = "4-bit experts of GPT-OSS"

    def __init__(self, entry: Mapping[str, Any]) -> None:
        self.shown = f"{self.name}, one scale per {_GROUP} weights"

    def weights(self, stored: Mapping[str, TensorInfo], dtype: torch.dtype) -> dict[str, TensorInfo]:
        found: dict[str, TensorInfo] = {}
        for key, info in stored.items():
            base = key.removesuffix(_BLOCKS).removesuffix(_SCALES)
            if key.endswith(_BLOCKS):
                scales = partner(stored, base + _SCALES, key)
                if info.dtype != "U8" or len(info.shape) != 4 or info.shape[3] != _GROUP // 2:
                    raise CheckpointError(
                        f"{key} has shape {list(info.shape)} and dtype {info.dtype}, not [E, O, G, {_GROUP // 2}] bytes"
                    )
                if scales.dtype != "U8" or scales.shape != info.shape[:3]:
                    raise CheckpointError(
                        f"{scales.key} has shape {list(scales.shape)} and dtype {scales.dtype};"
                        f" its blocks ask for {list(info.shape[:3])} bytes",
                        "Blocks and scales do not belong together.",
                    )
                experts, outputs, groups, _ = info.shape
                shape = (experts, groups * _GROUP, outputs)
                found[base] = PackedInfo.of(base, torch.bfloat16, shape, self, (info, scales))
            elif key.endswith(_SCALES):
                partner(stored, base + _BLOCKS, key)
            else:
                found[key] = info
        if len(found) == len(stored):
            raise nothing_packed(self)
        return found

    def layout(self, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        if len(shape) != 3 or shape[1] % _GROUP:
            raise ModelError(
                f"experts of shape {list(shape)} cannot be stored as MXFP4: inputs come in groups of {_GROUP}"
            )
        experts, inputs, outputs = shape
        scales = (experts, outputs, inputs // _GROUP)
        return [(*scales, _GROUP // 2), scales]

    def unpack(self, parts: Sequence[Tensor], out: Tensor) -> None:
        for expert in range(len(out)):  # one at a time: transformers takes a multiple of the result on the way
            one = [part[expert : expert + 1] for part in parts]
            out[expert] = convert_moe_packed_tensors(*one, dtype=out.dtype)[0]
            nan_OG = parts[1][expert] == _NAN
            if bool(nan_OG.any()):
                out[expert].view(-1, _GROUP, out.shape[2]).masked_fill_(nan_OG.T[:, None], torch.nan)

    def pack(self, weight: Tensor, like: Sequence[tuple[torch.dtype, tuple[int, ...]]]) -> list[Tensor]:
        blocks, scales = (torch.empty(shape, dtype=dtype) for dtype, shape in like)
        for w_IO, blocks_OGb, scale_OG in zip(weight, blocks, scales, strict=True):
            code_OGn, exponent_OG = _quantize(_grouped(w_IO).float().contiguous())
            blocks_OGb.copy_(code_OGn[..., 0::2] | code_OGn[..., 1::2] << 4)
            scale_OG.copy_(exponent_OG + 127)
        return [blocks, scales]

    def repack(self, weight: Tensor, before: Sequence[Tensor]) -> list[Tensor]:
        parts = self.pack(weight, [(part.dtype, tuple(part.shape)) for part in before])
        old = torch.empty_like(weight)
        self.unpack(before, old)
        for w_IO, old_IO, *tensors in zip(weight, old, *parts, *before, strict=True):
            blocks_OGb, scale_OG, blocks_old_OGb, scale_old_OG = tensors
            w_OGn, old_OGn = _grouped(w_IO), _grouped(old_IO)
            same_OGn = (w_OGn == old_OGn) | (w_OGn.isnan() & old_OGn.isnan())
            kept_OG = (same_OGn | (w_OGn == 0)).all(-1)
            mask_OGb = same_OGn[..., 0::2] * 0x0F + same_OGn[..., 1::2] * 0xF0  # a zero has code 0
            blocks_OGb[kept_OG] = (blocks_old_OGb & mask_OGb.to(torch.uint8))[kept_OG]
            scale_OG[kept_OG] = scale_old_OG[kept_OG]
        return parts


def _grouped(w_IO: Tensor) -> Tensor:
    """[O, G, 32]."""
    return w_IO.T.reshape(w_IO.shape[1], -1, _GROUP)


def _quantize(w_OGn: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [O, G, 32] uint8 and exponents [O, G] int32 of the smaller squared error."""
    _, e_OG = torch.frexp(w_OGn.abs().amax(-1))  # max |W| = m * 2^e with m in [0.5, 1)
    e_OG = (e_OG - 3).clamp(-127, 126)
    scaled_OGn = torch.ldexp(w_OGn, -e_OG[..., None])
    low_OGn, error_low_OG = _rounded(scaled_OGn.abs())
    high_OGn, error_high_OG = _rounded(scaled_OGn.abs() / 2)
    higher_OG = 4 * error_high_OG < error_low_OG
    code_OGn = torch.where(higher_OG[..., None], high_OGn, low_OGn)
    return code_OGn | (torch.signbit(w_OGn).to(torch.uint8) << 3), e_OG + higher_OG


def _rounded(x_OGn: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest codes of numbers that are not negative, without a sign, and the squared error of each group.

    Codes 0 to 4 are twice their numbers, 5 and 6 lie one apart, 7 is 6.0; `round` takes halves to even.
    """
    upper_OGn = torch.where(x_OGn < 4, x_OGn.round() + 2, (x_OGn / 2).round() + 4)
    code_OGn = torch.where(x_OGn < 2, (x_OGn * 2).round(), upper_OGn).clamp_(max=7).to(torch.uint8)
    value_OGn = torch.tensor(FP4_VALUES[:8]).index_select(0, code_OGn.view(-1).int()).view_as(x_OGn)
    return code_OGn, value_OGn.sub_(x_OGn).square_().sum(-1)
