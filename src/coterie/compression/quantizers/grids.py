"""The grids of numbers that codes can stand for: one scale, and one zero, for each group of neighbouring columns.

    W_hat = (q - z) s,  q = clamp(round(W / s) + z, 0, Q),  Q = 2^b - 1

    asymmetric   s = (max - min) / Q,  z = round(-min / s); the range includes 0
    float zero   the same with z not rounded, and the range is the weights' own
    symmetric    s = 2 max|W| / Q,     z = 2^(b-1); the largest weight may lose half a step
    1 bit        q = [W >= 0],         s = 2 mean|W|,  z = 1/2: the sign times the mean magnitude

Scales and zeros are rounded to the 16-bit type they are stored in before any code is chosen, so that the codes fit what
will be read back. This file does not know where the weights come from, nor what errors cost: that is the quantizers'.
"""

# O outputs and I inputs of a matrix, G groups of columns, N columns of one group; any dimensions may lead

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from coterie.errors import ModelError, UsageError
from coterie.experts.packing import WIDTHS, spread, symmetric_zero

STEPS = 50  # of the range search, on either side of the plain range
POWER = 2.4  # of its error; GPTQ's authors chose it


@dataclass(frozen=True)
class Spec:
    """How a matrix is quantized.

    Parameters
    ----------
    bits : 1 to 8.
    group : columns that share a scale; the last group of a row may be shorter. More than there are: one group a row.
    symmetric : no zeros are stored.
    scale_dtype : float16 or bfloat16, in which scales and zeros are stored.
    search : choose each group's range among multiples of the plain one, by sum |W_hat - W|^2.4. 101 times the work.
    narrowest, widest : the smallest and largest multiple that the search tries. MC (arXiv:2410.06270) has 0.9 and 1.1,
        GPTQModel goes down to 0.2.
    float_zero : zeros are any number, not an integer. Costs no bytes here and pays at 2 and 3 bits, but other formats
        cannot hold it.

    Raises UsageError when a value is out of range.
    """

    bits: int
    group: int
    symmetric: bool = False
    scale_dtype: torch.dtype = torch.float16
    search: bool = False
    float_zero: bool = False
    narrowest: float = 0.9
    widest: float = 1.1

    def __post_init__(self) -> None:
        if self.bits not in WIDTHS:
            raise UsageError(f"weights cannot be quantized to {self.bits} bits", f"Choose {WIDTHS[0]} to {WIDTHS[-1]}.")
        if self.group < 1:
            raise UsageError(f"a group of {self.group} columns cannot share a scale", "Choose 32, 64 or 128.")
        if self.scale_dtype not in (torch.float16, torch.bfloat16):
            raise UsageError(f"scales are stored in 16 bits, not as {self.scale_dtype}", "float16 or bfloat16.")
        if self.symmetric and self.float_zero:
            raise UsageError("a symmetric grid has no zeros to store", "Leave symmetric or float_zero away.")
        if not 0 < self.narrowest <= 1 <= self.widest:
            raise UsageError(
                f"ranges from {self.narrowest} to {self.widest} times the plain one cannot be searched",
                "Give 0 < narrowest <= 1 <= widest.",
            )

    @property
    def top(self) -> int:
        """Q, the largest code."""
        return int(2**self.bits - 1)


def checked(w_OI: Tensor) -> Tensor:
    """The weights in float32. Raises ModelError when one is NaN or infinite: no grid holds it."""
    w_OI = w_OI.detach().float()
    finite = torch.isfinite(w_OI)
    if not finite.all():
        raise ModelError(
            f"{int((~finite).sum())} of {w_OI.numel()} weights of a matrix {list(w_OI.shape)} are NaN or infinite",
            "The checkpoint is damaged or its training diverged; quantizing cannot mend it.",
        )
    return w_OI


def fit(w_OI: Tensor, spec: Spec) -> tuple[Tensor, Tensor | None]:
    """Scales and zeros of every group of columns, [..., O, I] float32 -> [..., O, G] in the dtype they are stored in.

    The zeros of a symmetric grid are None. Every scale is finite, and above 0 except for a group of zeros at 1 bit. A
    group of zeros is reproduced exactly. Weights too large for any scale of the dtype saturate.
    Peak memory: about three times the weights.
    """
    fitted = [_fit(part, spec) for part in parts(w_OI, spec.group)]
    scale_OG = torch.cat([scale for scale, _ in fitted], dim=-1)
    if spec.symmetric:
        return scale_OG, None
    return scale_OG, torch.cat([zero for _, zero in fitted], dim=-1)


def encode(w_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor | None, spec: Spec) -> Tensor:
    """The nearest codes on a given grid, uint8 [..., O, I]."""
    columns = w_OI.shape[-1]
    scale = spread(scale_OG, spec.group, columns)
    zero = symmetric_zero(spec.bits) if zero_OG is None else spread(zero_OG, spec.group, columns)
    return nearest(w_OI, scale, zero, spec).to(torch.uint8)


def nearest(w: Tensor, scale: Tensor, zero: Tensor | float, spec: Spec) -> Tensor:
    """The nearest codes, as float32; scale and zero in float32 and in shapes that broadcast."""
    if spec.bits == 1:
        return (w >= 0).float()
    q = w / scale
    q = q.add_(zero).round_() if spec.float_zero else q.round_().add_(zero)
    return q.clamp_(0, spec.top)


def parts(w_OI: Tensor, group: int) -> Iterator[Tensor]:
    """The whole groups of a row as [..., O, G, N], then the shorter last one as [..., O, 1, N]."""
    whole = w_OI.shape[-1] // group * group
    if whole:
        yield w_OI[..., :whole].reshape(*w_OI.shape[:-1], -1, group)
    if whole < w_OI.shape[-1]:
        yield w_OI[..., None, whole:]


def _fit(w_OGN: Tensor, spec: Spec) -> tuple[Tensor, Tensor]:
    if spec.bits == 1:
        mean_OG = (w_OGN.abs() / w_OGN.shape[-1]).sum(-1)  # divided first: a sum of large weights may overflow
        scale_OG = stored_scale(2 * mean_OG, spec.scale_dtype)
        return scale_OG, torch.full_like(scale_OG, 0.5)
    low_OG, high_OG = w_OGN.amin(-1), w_OGN.amax(-1)
    best = _grid(low_OG, high_OG, spec)
    if not spec.search:
        return best
    lowest_OG = _cost(w_OGN, *best, spec)
    factors = [1 + (spec.widest - 1) * i / STEPS for i in range(1, STEPS + 1)]
    factors += [1 - (1 - spec.narrowest) * i / STEPS for i in range(1, STEPS + 1)]
    for factor in factors:
        tried = _grid(low_OG * factor, high_OG * factor, spec)
        cost_OG = _cost(w_OGN, *tried, spec)
        better_OG = cost_OG < lowest_OG
        lowest_OG = torch.where(better_OG, cost_OG, lowest_OG)
        best = torch.where(better_OG, tried[0], best[0]), torch.where(better_OG, tried[1], best[1])
    return best


def _cost(w_OGN: Tensor, scale_OG: Tensor, zero_OG: Tensor, spec: Spec) -> Tensor:
    scale, zero = scale_OG.float()[..., None], zero_OG.float()[..., None]
    error = nearest(w_OGN, scale, zero, spec).sub_(zero).mul_(scale).sub_(w_OGN)
    return error.abs_().pow_(POWER).sum(-1)


def _grid(low_OG: Tensor, high_OG: Tensor, spec: Spec) -> tuple[Tensor, Tensor]:
    """Scale and zero of the range from low to high, at 2 bits and more."""
    Q = spec.top
    bound = min(torch.finfo(spec.scale_dtype).max * Q / 2, torch.finfo(torch.float32).max / 2)
    low_OG, high_OG = low_OG.clamp(min=-bound), high_OG.clamp(max=bound)
    if spec.symmetric:
        largest_OG = torch.maximum(-low_OG, high_OG)
        scale_OG = stored_scale(torch.where(largest_OG == 0, 1.0, largest_OG) * (2 / Q), spec.scale_dtype)
        return scale_OG, torch.full_like(scale_OG, symmetric_zero(spec.bits))
    if spec.float_zero:
        # A zero far outside of the codes would be too coarse in 16 bits: such a range is widened to include 0.
        step_OG = high_OG / Q - low_OG / Q
        reach = max(Q, 1 / torch.finfo(spec.scale_dtype).eps)
        far_OG = torch.maximum(low_OG, -high_OG) >= step_OG * (reach - Q)
        low_OG = torch.where(far_OG, low_OG.clamp(max=0), low_OG)
        high_OG = torch.where(far_OG, high_OG.clamp(min=0), high_OG)
    else:
        low_OG, high_OG = low_OG.clamp(max=0), high_OG.clamp(min=0)
    nothing_OG = (low_OG == 0) & (high_OG == 0)
    low_OG, high_OG = torch.where(nothing_OG, -1.0, low_OG), torch.where(nothing_OG, 1.0, high_OG)
    scale_OG = stored_scale(high_OG / Q - low_OG / Q, spec.scale_dtype)
    zero_OG = -low_OG / scale_OG.float()
    whole_OG = nothing_OG if spec.float_zero else torch.ones_like(nothing_OG)  # or else 0 would have no code
    zero_OG = torch.where(whole_OG, zero_OG.round().clamp(0, Q), zero_OG)
    return scale_OG, zero_OG.to(spec.scale_dtype)


def stored_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales rounded to nearest; upwards where the dtype loses precision, so that its last bits still cover a range.

    Without it weights below 1e-6 would lose their largest values, or all, to a scale of 0.
    """
    limits = torch.finfo(dtype)
    stored = scale.clamp(max=limits.max).to(dtype)
    short = (scale < limits.smallest_normal) & (stored.float() < scale)
    up = (stored.view(torch.int16) + 1).view(dtype)  # the next number above, for positive floats
    return torch.where(short, up, stored)
