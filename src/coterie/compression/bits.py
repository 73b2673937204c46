"""The plan of a quantization: how many bits every matrix of a checkpoint gets, and why.

    experts   {layer: {gate, up, down: bits of each expert}}, 16 = stays as it is
    linears   {path: bits} of attention, shared experts and dense blocks

One group size, one kind of grid and one quantizer for all of it: what a loader has to know stays short. A protected
expert keeps 16 bits whatever a method wants. Bytes are those of the file: codes padded to words, scales and zeros.
"""

# E experts, O outputs and I inputs of a matrix

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from coterie.anatomy import MoELayer
from coterie.anatomy.forms import LARGEST_GROUP, ExpertBits, Linears, NestedBits, projection_shapes
from coterie.compression.plan import Plan
from coterie.compression.rewrite import layout
from coterie.compression.sites import Site, sites
from coterie.errors import UsageError
from coterie.experts import nested, packed, packing
from coterie.experts.packed import PLAIN
from coterie.streaming.model import StreamedModel

Role = Literal["attention", "shared", "dense"]
ROLES: tuple[Role, ...] = ("attention", "shared", "dense")
Widths = dict[str, list[int]]  # {projection: bits of each expert}


class Grids(BaseModel):
    """How all of a plan's matrices are quantized.

    planes : experts are nested, with so many planes above the bits a plan says; None: they have these bits alone.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    group: Annotated[int, Field(ge=1, le=LARGEST_GROUP)]
    symmetric: bool
    quantizer: Literal["rtn", "hqq", "gptq"]
    planes: Annotated[int, Field(ge=0, le=15)] | None = None


class BitPlan(Plan):
    """A plan that says bits: those of experts stand in `extra["bits"]` of each layer, their reasons in `extra["why"]`.

    grids : how matrices are quantized. linears : {path of a linear layer: bits}. expert_bits : mean over the weights of
    experts. bytes : of all tensors of the result.
    """

    kind: Literal["bits"] = "bits"
    grids: Grids
    linears: dict[str, Annotated[int, Field(ge=1, le=8)]] = Field(default_factory=dict)
    expert_bits: float = 0.0
    bytes: int = 0

    def experts(self) -> dict[int, Widths]:
        """{layer: {projection: bits of each expert}} of the layers that are quantized."""
        return {layer.index: layer.extra["bits"] for layer in self.layers if "bits" in layer.extra}


def load_plan(file: Path) -> Plan:
    """Read a plan of either kind. Raises UsageError saying what is wrong."""
    try:
        bits = json.loads(file.read_text(encoding="utf-8")).get("kind") == "bits"
    except (OSError, ValueError, AttributeError, RecursionError):
        bits = False  # `load` says what is wrong
    return (BitPlan if bits else Plan).load(file)


@dataclass(frozen=True)
class Linear:
    """A linear layer of a decoder layer. name : path of the module. role : what it is part of. shape : (O, I)."""

    name: str
    role: Role
    shape: tuple[int, int]


@dataclass
class Allocation:
    """What a method decides. experts, why : {layer: ...}, see `BitPlan`. linears : {path: bits}; 16 is left out.

    scores : {layer: what decided between its experts}. facts : {layer: figures a reader wants}.
    """

    experts: dict[int, Widths]
    linears: dict[str, int]
    why: dict[int, list[str]] = field(default_factory=dict)
    scores: dict[int, list[float]] = field(default_factory=dict)
    facts: dict[int, dict[str, Any]] = field(default_factory=dict)


def linears_of(streamed: StreamedModel, index: int) -> list[Linear]:
    """Linear layers of one decoder layer that can be quantized. The layer need not be in memory."""
    return [
        Linear(site.name.removesuffix(".weight"), role_of(streamed, site), (outputs_of(site), site.inputs))
        for site in sites(streamed, index)
        if not site.experts
    ]


def all_linears(streamed: StreamedModel) -> list[Linear]:
    """The same of all decoder layers."""
    return [linear for index in range(len(streamed.layers)) for linear in linears_of(streamed, index)]


def outputs_of(site: Site) -> int:
    """O of a site's matrices, gate and up counted together where they are fused."""
    return site.weights // (site.inputs * max(site.experts, 1))


def role_of(streamed: StreamedModel, site: Site) -> Role:
    """What a linear layer is part of: shared experts, a block like those with experts but without (dense), or attention
    and whatever else mixes tokens."""
    if site.kind == "shared":
        return "shared"
    blocks = {layer.name.removeprefix(f"{streamed.prefix}.").split(".")[1] for layer in streamed.moe.values()}
    return "dense" if site.kind in blocks else "attention"


def shapes_of(moe: MoELayer) -> dict[str, tuple[int, int]]:
    """(O, I) of gate, up and down."""
    return projection_shapes(moe.bank)


def protect(experts: Mapping[int, Widths], protected: Collection[tuple[int, int]]) -> dict[int, Widths]:
    """The same widths, but 16 for every protected (layer, expert)."""
    return {
        layer: {p: [PLAIN if (layer, e) in protected else b for e, b in enumerate(bits)] for p, bits in widths.items()}
        for layer, widths in experts.items()
    }


def check_widths(
    streamed: StreamedModel, experts: Mapping[int, Widths], linears: Mapping[str, int], grids: Grids
) -> None:
    """Raise UsageError unless the widths are possible and belong to this model."""
    for index, widths in experts.items():
        if index not in streamed.moe:
            raise UsageError(f"the plan gives bits to experts of layer {index}, which is no MoE layer")
        moe = streamed.moe[index]
        if set(widths) != set(shapes_of(moe)):
            raise UsageError(
                f"layer {index}: bits for {', '.join(widths)}; its experts have {', '.join(shapes_of(moe))}"
            )
        if grids.planes is not None and len({PLAIN, *(b for bits in widths.values() for b in bits)}) != 2:
            raise UsageError(f"layer {index}: nested experts have one and the same base, not {widths}")
        for p, bits in widths.items():
            if len(bits) != moe.bank.num_experts:
                raise UsageError(
                    f"layer {index}: {len(bits)} widths for {p}, but it has {moe.bank.num_experts} experts",
                    "Plan this checkpoint: `coterie plan`.",
                )
            for e, b in enumerate(bits):
                if b not in packing.WIDTHS and b != PLAIN:
                    raise UsageError(
                        f"layer {index}, expert {e}, {p}: {b!r} bits", f"Give 1 to 8, or {PLAIN} to leave it as it is."
                    )
    known = {linear.name for linear in all_linears(streamed)}
    for name, b in linears.items():
        if name not in known:
            raise UsageError(f"the plan gives bits to {name}, which is no linear layer of this model's decoder layers")
        if b not in packing.WIDTHS:
            raise UsageError(f"{name}: {b!r} bits", "Give 1 to 8, or leave it out to keep it as it is.")


def mean_bits(moe: Mapping[int, MoELayer], experts: Mapping[int, Widths], planes: int = 0) -> float:
    """Bits per weight of all routed experts; layers without an entry keep 16. Scales are not counted, planes are."""
    total = weights = 0
    for index, layer in moe.items():
        for p, shape in shapes_of(layer).items():
            bits = experts.get(index, {}).get(p) or [PLAIN - planes] * layer.bank.num_experts
            bits = [b + planes for b in bits]
            total += sum(bits) * math.prod(shape)
            weights += len(bits) * math.prod(shape)
    return total / max(weights, 1)


def replaced(
    streamed: StreamedModel, experts: Mapping[int, Widths], linears: Mapping[str, int], grids: Grids
) -> tuple[dict[int, set[str]], dict[int, dict[str, Tensor]]]:
    """Tensors that go, and meta tensors of what takes their place, by decoder layer."""
    gone: dict[int, set[str]] = {}
    fresh: dict[int, dict[str, Tensor]] = {}
    for index in range(len(streamed.layers)):
        here = {n.name: n for n in linears_of(streamed, index) if n.name in linears}
        if index not in experts and not here:
            continue
        gone[index], fresh[index] = {f"{name}.weight" for name in here}, {}
        for name, linear in here.items():
            stored = streamed.model.get_parameter_or_buffer(f"{name}.weight").dtype
            parts = packed.linear_tensors(
                linears[name], linear.shape, grids.group, symmetric=grids.symmetric, dtype=stored
            )
            fresh[index] |= _metas(f"{name}.", "", parts)
        if index in experts:
            moe = streamed.moe[index]
            matrices = [n for n in ("gate_up_proj", "up_proj", "down_proj") if hasattr(moe.experts, n)]
            gone[index] |= {f"{moe.experts_name}.{name}" for name in matrices}
            down = moe.experts.down_proj
            assert isinstance(down, Tensor)
            for p, shape in shapes_of(moe).items():
                how: dict[str, Any] = {"symmetric": grids.symmetric, "dtype": down.dtype}
                widths = experts[index][p]
                if grids.planes is None:
                    parts = packed.expert_tensors(widths, shape, grids.group, **how)
                else:
                    parts = nested.expert_tensors(len(widths), shape, widths[0], grids.planes, grids.group, **how)
                fresh[index] |= _metas(f"{moe.experts_name}.", f"_{p}", parts)
    return gone, fresh


def total_bytes(
    streamed: StreamedModel, experts: Mapping[int, Widths], linears: Mapping[str, int], grids: Grids
) -> int:
    """Bytes of all tensors of a checkpoint with these widths."""
    specs, _ = layout(streamed, *replaced(streamed, experts, linears, grids))
    return sum(spec.nbytes for spec in specs)


def expert_bytes(moe: MoELayer, bits: int, grids: Grids) -> int:
    """Bytes that one expert of a layer takes at one width; biases, which stay, are not counted."""
    shapes = shapes_of(moe).values()
    if bits == PLAIN:
        down = moe.experts.down_proj
        assert isinstance(down, Tensor)
        return sum(math.prod(shape) for shape in shapes) * down.element_size()
    return sum(packing.coded_bytes(*shape, bits, grids.group, symmetric=grids.symmetric) for shape in shapes)


def _metas(before: str, after: str, parts: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> dict[str, Tensor]:
    return {
        f"{before}{part}{after}": torch.empty(shape, dtype=dtype, device="meta")
        for part, (shape, dtype) in parts.items()
    }


def header_entries(
    experts: Mapping[int, Widths], linears: Mapping[str, int], grids: Grids
) -> tuple[dict[int, dict[str, Any]], Linears | None]:
    """What the coterie header says of these widths: entries of each layer's form, and linear layers."""
    grid: dict[str, Any] = {"group": grids.group, "symmetric": grids.symmetric}
    forms: dict[int, dict[str, Any]] = {}
    for index, widths in experts.items():
        if grids.planes is None:
            forms[index] = {"bits": ExpertBits.model_validate({**grid, **widths})}
        else:
            forms[index] = {"nested": NestedBits(**grid, base=widths["down"][0], planes=grids.planes)}
    return forms, Linears(**grid, bits=dict(linears)) if linears else None
