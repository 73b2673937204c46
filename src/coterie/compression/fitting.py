"""Chains of methods turned until what they write has a wanted size: fewer experts, fewer bits, or both.

    reap                    as many experts as the size allows, at the bits they have
    quantize, pmq, ...      as many bits as the size allows, for all experts
    reap+quantize:bits=8    as many experts as the size allows at 8 bits

Everything is decided from the headers of the checkpoint; what is chosen then is chosen by the methods themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from coterie.compression.bits import expert_bytes, total_bytes
from coterie.compression.methods import Method, OwnJob, get_method
from coterie.compression.quantizing.base import Quantizer
from coterie.compression.quantizing.uniform import Uniform
from coterie.compression.sizes import measure, router_parameters_per_expert
from coterie.errors import UsageError
from coterie.streaming.checkpoint import DTYPES
from coterie.streaming.model import StreamedModel

DEFAULTS = ("reap", "reap+quantize:bits=8", "reap+quantize:bits=4", "quantize", "pmq")


@dataclass(frozen=True)
class Link:
    """One method of a chain."""

    name: str
    parameters: dict[str, Any]

    def method(self) -> Method:
        return get_method(self.name, self.parameters)


@dataclass(frozen=True)
class Fitted:
    """A chain that fits. steps : keywords of `compress` for each. told : what was turned, for a reader."""

    steps: list[dict[str, Any]]
    told: str


def fit(streamed: StreamedModel, chain: Sequence[Link], target: int) -> Fitted:
    """Turn a chain until it writes at most `target` bytes of tensors. Raises UsageError where it cannot."""
    methods = [link.method() for link in chain]
    for link, method in zip(chain, methods, strict=True):
        if isinstance(method, OwnJob) and not isinstance(method, Quantizer):
            raise UsageError(f"{link.name} has nothing to turn towards a size")
    *before, last = methods
    if len(before) > 1 or any(isinstance(m, Quantizer) for m in before):
        raise UsageError("a chain is a method, or one that removes or merges experts and then one that quantizes")
    if not isinstance(last, Quantizer):
        if before:
            raise UsageError(f"after {chain[0].name} only quantization is fitted", f"Leave out {chain[-1].name}.")
        return Fitted([_step(chain[0], target_size=target)], "")
    if not before:
        turned = last.fitted(streamed, target)
        return Fitted([_step(Link(chain[0].name, turned.model_dump(mode="json")))], _bits(turned))
    if not isinstance(last, Uniform):
        raise UsageError("with fewer experts, bits have to be said", f"Use {chain[0].name}+quantize:bits=8, or 4.")
    kept = _experts_that_fit(streamed, last, target)
    most = max(moe.num_experts for moe in streamed.moe.values())
    first = _step(chain[0], keep_experts=kept)
    return Fitted([first, _step(chain[1])], f"{kept} of {most} experts, {_bits(last)}")


def _step(link: Link, **budget: Any) -> dict[str, Any]:
    return {"method": link.name, "parameters": link.parameters, **budget}


def _bits(method: Quantizer) -> str:
    bits = getattr(method, "bits", None)
    return f"{bits} bits" if bits is not None else f"{getattr(method, 'mean', 0):g} bits on average"


def _experts_that_fit(streamed: StreamedModel, method: Uniform, target: int) -> int:
    """The most experts of a layer, the same everywhere, that fit at a method's bits."""
    made = method.allocate(streamed, {})
    experts = {} if method.bits == 16 else made.experts
    whole = total_bytes(streamed, experts, made.linears, method.grids)
    counts = {moe.num_experts for moe in streamed.moe.values()}
    if len(counts) != 1:
        raise UsageError("layers already hold different numbers of experts", "Give --keep-experts yourself.")
    (E,) = counts
    if whole <= target:
        raise UsageError(f"at {method.bits} bits all {E} experts fit: none has to go", "Compare it alone.")
    row = next(iter(streamed.moe.values())).router_name
    stored = next(
        info for key, info in streamed.checkpoint.tensors.items() if str(streamed.params[key]).startswith(row)
    )
    rows = router_parameters_per_expert(streamed) * DTYPES[stored.dtype].itemsize * len(streamed.moe)
    each = sum(expert_bytes(moe, method.bits, method.grids) for moe in streamed.moe.values()) + rows
    kept = E - -(-(whole - target) // each)
    kept -= kept % max(moe.groups for moe in streamed.moe.values())  # every routing group keeps as many
    least = max(moe.top_k for moe in streamed.moe.values())
    if kept < least:
        size = whole - (E - least) * each
        raise UsageError(
            f"at {method.bits} bits even {least} experts, which is top-k, take {size / 1e6:.2f} MB of"
            f" {target / 1e6:.2f} MB"
        )
    return kept


def relative(text: str, streamed: StreamedModel) -> int | None:
    """Bytes of `0.25x`, a share of the checkpoint's tensors; None if it is written in another way."""
    digits = text.strip().lower()
    if not digits.endswith("x"):
        return None
    try:
        share = float(digits[:-1])
    except ValueError:
        share = -1.0
    if not 0 < share <= 1:
        raise UsageError(
            f"cannot read the size {text!r}", "Write it like 0.25x, a share of the original, or like 12GB."
        )
    return int(share * measure(streamed).bytes)
