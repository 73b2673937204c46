"""Codes of few bits and the numbers they stand for: how a quantized matrix is packed, and what it is when unpacked.

A row of a matrix is one dense stream of bits, least significant first, over little-endian 32-bit words; a code of b
bits may cross a word boundary, and the row is padded to a whole word. This is the layout of compressed-tensors'
"pack-quantized", for all widths from 1 to 8. It does not know how codes were chosen, nor what a matrix is for.

    W_hat = (q - zero) * scale       one scale and one zero for `group` neighbouring columns of a row

A zero is any number. Where there is none the grid is symmetric and zero is 2^(b-1); a single bit always has 1/2.
"""

# O outputs and I inputs of a matrix, G groups of columns, N words of a row

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

WIDTHS = range(1, 9)
_WORD = 32


def words(columns: int, bits: int) -> int:
    """32-bit words that a row of codes takes."""
    return -(-columns * bits // _WORD)


def groups(columns: int, group: int) -> int:
    """Groups of a row; the last one may be shorter."""
    return -(-columns // group)


@functools.lru_cache(maxsize=4096)
def layout(bits: tuple[int, ...], shape: tuple[int, int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Where matrices of one shape lie that are packed one below the other, those of 16 bits beside them.

    The first word of each, and the end; and the position of each among the quantized ones, or among the others.
    """
    starts, ranks, seen = [0], [], {True: 0, False: 0}
    for b in bits:
        starts.append(starts[-1] + (shape[0] * words(shape[1], b) if b in WIDTHS else 0))
        ranks.append(seen[b in WIDTHS])
        seen[b in WIDTHS] += 1
    return tuple(starts), tuple(ranks)


def symmetric_zero(bits: int) -> float:
    """The code that stands for 0 in a symmetric grid."""
    return 0.5 if bits == 1 else float(2 ** (bits - 1))


def pack(codes_OI: Tensor, bits: int) -> Tensor:
    """Codes below 2^bits, [..., I] of any integer type, as int32 words [..., N]."""
    columns = codes_OI.shape[-1]
    count = words(columns, bits)
    padded = torch.nn.functional.pad(codes_OI, (0, -columns % _WORD))
    field = padded.view(*padded.shape[:-1], -1, _WORD).to(torch.int64)  # 32 codes fill `bits` words exactly
    packed = field.new_zeros(*field.shape[:-1], bits)
    for i, word, shift in _fields(bits):
        packed[..., word] |= field[..., i] << shift  # what does not fit in 32 bits is cut off at the end
        if shift + bits > _WORD:
            packed[..., word + 1] |= field[..., i] >> (_WORD - shift)
    return packed.to(torch.int32).flatten(-2)[..., :count].contiguous()


def unpack(packed_ON: Tensor, bits: int, columns: int) -> Tensor:
    """The codes in int32 words [..., N]: uint8 [..., columns]."""
    padded = torch.nn.functional.pad(packed_ON, (0, -packed_ON.shape[-1] % bits))
    word = (
        padded.view(*padded.shape[:-1], -1, bits).to(torch.int64) & 0xFFFFFFFF
    )  # without the sign, shifts bring in zeros
    field = torch.empty(*word.shape[:-1], _WORD, dtype=torch.uint8, device=packed_ON.device)
    mask = 2**bits - 1
    for i, at, shift in _fields(bits):
        value = word[..., at] >> shift
        if shift + bits > _WORD:
            value |= word[..., at + 1] << (_WORD - shift)
        field[..., i] = value & mask
    return field.flatten(-2)[..., :columns].contiguous()


def _fields(bits: int) -> Iterator[tuple[int, int, int]]:
    """(number, word, shift) of the 32 codes that share `bits` words."""
    for i in range(_WORD):
        yield i, i * bits // _WORD, i * bits % _WORD


@dataclass
class Coded:
    """A quantized matrix, not packed.

    codes_OI : uint8, below 2^bits. scale_OG, zero_OG : floats in the dtype they are stored in; zero_OG is None on a
    symmetric grid. group : columns that share a scale.
    """

    codes_OI: Tensor
    bits: int
    group: int
    scale_OG: Tensor
    zero_OG: Tensor | None = None

    def dense(self) -> Tensor:
        """W_hat in float32, [O, I]."""
        return dense(self.codes_OI, self.bits, self.group, self.scale_OG, self.zero_OG)

    def packed(self) -> Tensor:
        """The codes as int32 words, [O, N]."""
        return pack(self.codes_OI, self.bits)


def dense(codes_OI: Tensor, bits: int, group: int, scale_OG: Tensor, zero_OG: Tensor | None) -> Tensor:
    """W_hat = (q - zero) * scale in float32, [..., O, I]."""
    columns = codes_OI.shape[-1]
    w_OI = codes_OI.float()
    if zero_OG is None:
        w_OI -= symmetric_zero(bits)
    else:
        w_OI -= spread(zero_OG, group, columns)
    return w_OI.mul_(spread(scale_OG, group, columns))


def spread(value_OG: Tensor, group: int, columns: int) -> Tensor:
    """One value per group as one per column, in float32: [..., G] -> [..., columns]."""
    return value_OG.float().repeat_interleave(group, dim=-1)[..., :columns]


def scale_dtype(stored: torch.dtype) -> torch.dtype:
    """In which 16-bit type scales and zeros of a matrix stored in this dtype are kept."""
    return torch.bfloat16 if stored == torch.bfloat16 else torch.float16


def coded_bytes(outputs: int, inputs: int, bits: int, group: int, *, symmetric: bool) -> int:
    """Bytes that a quantized matrix takes, padding, scales and zeros included."""
    return outputs * (4 * words(inputs, bits) + (2 if symmetric else 4) * math.ceil(inputs / group))
