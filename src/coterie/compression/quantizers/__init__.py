"""Quantizers: a matrix of weights in, codes of few bits out. Functions on tensors; they know no model and no file."""

# O outputs and I inputs of a matrix

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from coterie.compression.quantizers.gptq import gptq, too_few
from coterie.compression.quantizers.grids import Spec
from coterie.compression.quantizers.hqq import hqq
from coterie.compression.quantizers.measure import Report, report
from coterie.compression.quantizers.mwq import mwq, nested_bytes
from coterie.compression.quantizers.rtn import rtn
from coterie.errors import UsageError
from coterie.experts.nested import NestedCodes
from coterie.experts.packing import Coded

Quantizer = Literal["rtn", "hqq", "gptq"]
QUANTIZERS: tuple[Quantizer, ...] = ("rtn", "hqq", "gptq")

__all__ = [
    "QUANTIZERS",
    "Coded",
    "NestedCodes",
    "Quantizer",
    "Report",
    "Spec",
    "gptq",
    "hqq",
    "mwq",
    "nested_bytes",
    "quantize",
    "report",
    "rtn",
    "too_few",
]


def quantize(
    w_OI: Tensor,
    spec: Spec,
    *,
    quantizer: Quantizer,
    gram_II: Tensor | None = None,
    tokens: int = 0,
    calibration_tokens: int = 0,
    fallback_share: float = 0.005,
    fallback_rows: int = 32,
    **options: Any,
) -> tuple[Coded, Report]:
    """Quantize one matrix, and say what it cost.

    Parameters
    ----------
    w_OI : [O, I], any float type. Not modified.
    gram_II : sum of x x^T over the `tokens` inputs x that the matrix received. GPTQ needs it; with the others it is
        only used for the report.
    calibration_tokens : tokens of the whole calibration set. GPTQ rounds to nearest where the matrix received fewer
        than `fallback_share` of them, or fewer than `fallback_rows`; the report says so.
    options : those of the quantizer.

    Raises UsageError for an unknown quantizer, or GPTQ without a Gram matrix; ModelError for weights or a Gram matrix
    that are not finite.
    """
    if quantizer not in QUANTIZERS:
        raise UsageError(f"there is no quantizer {quantizer!r}", f"Choose one of {', '.join(QUANTIZERS)}.")
    fallback = False
    if quantizer == "hqq":
        coded = hqq(w_OI, spec, **options)
    elif quantizer == "rtn":
        coded = rtn(w_OI, spec, **options)
    elif gram_II is None and tokens > 0:
        raise UsageError(f"GPTQ needs the Gram matrix of its {tokens} inputs", "Calibrate first, or use rtn or hqq.")
    elif gram_II is None or too_few(tokens, calibration_tokens, share=fallback_share, rows=fallback_rows):
        fallback, coded = True, rtn(w_OI, spec)
    else:
        coded = gptq(w_OI, gram_II, tokens, spec, **options)
    return coded, report(w_OI, coded.dense(), gram_II, fallback=fallback, tokens=tokens)
