"""What is special about the experts of a layer: shared by several router outputs, stored as low-rank factors or as
codes of few bits, at one width or at several (nested, perhaps with a bit router that chooses among them); or only the
strongest of a token run and vectors stand in for the rest (compressed experts); or a mask router chooses which run. And
which linear layers beside them are stored as codes.

config.json says so in its "coterie" header (see `uneven`), layer by layer:

    "quantization_config": {"quant_method": "coterie", "format": 1, "layers": {
        "3": {"map": [0, 0, 1, 2, 1, 2, 0, 1], "ranks": {"gate": 32, "up": 32, "down": 32}}, "4": {"main": 2},
        "6": {"nested": {"group": 64, "symmetric": false, "base": 2, "planes": 2}},
        "5": {"bits": {"group": 64, "symmetric": false, "gate": [4, 2], "up": [4, 2], "down": [4, 16]}}},
        "linears": {"group": 64, "symmetric": false, "bits": {"model.layers.0.self_attn.q_proj": 4}}}

A freshly built model is given these forms on the meta device before any weight is loaded; weights are not their
business. Everything in a header is checked against the model first: it may come from anywhere.
"""

# E experts that the router names, O outputs and I inputs of a projection

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from coterie.anatomy.experts import ExpertBank
from coterie.anatomy.layers import MoELayer, moe_layers
from coterie.anatomy.routers import ResidualForm, RouterForm, apply_routing, residual_form, router_form
from coterie.anatomy.slicing import cut_experts
from coterie.errors import CheckpointError, UsageError
from coterie.experts import compressed, factored, levels, mapped, masks, nested, packed, packing
from coterie.experts.forward import projections

Projection = Literal["gate", "up", "down"]
Width = Annotated[int, Field(ge=1, le=16)]
LARGEST_GROUP = 2**20


def _known_width(bits: int) -> int:
    if bits not in packing.WIDTHS and bits != packed.PLAIN:
        raise ValueError(f"{bits} bits: codes have 1 to 8, and {packed.PLAIN} leaves a matrix as it is")
    return bits


class Grid(BaseModel):
    """How codes are spread: one scale, and one zero unless symmetric, for `group` columns of a row."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    group: Annotated[int, Field(ge=1, le=LARGEST_GROUP)]
    symmetric: bool = False


class ExpertBits(Grid):
    """Widths of a layer's experts, one for each stored expert; 16 leaves a matrix as it is."""

    gate: list[Annotated[Width, AfterValidator(_known_width)]] | None = None
    up: list[Annotated[Width, AfterValidator(_known_width)]]
    down: list[Annotated[Width, AfterValidator(_known_width)]]

    def widths(self) -> dict[str, list[int]]:
        """{projection: bits of each expert}."""
        return {p: bits for p in ("gate", "up", "down") if (bits := getattr(self, p)) is not None}


class Linears(Grid):
    """Widths of linear layers outside of experts: {path: bits}."""

    bits: dict[str, Annotated[int, Field(ge=1, le=8)]]


class NestedBits(Grid):
    """Experts that can be read at several widths, see `experts.nested`.

    base : bits of the base. planes : how many there are above it. options : widths, from the base on, that the layer's
    bit router chooses among; None: it has none. There may be fewer planes than it asks for.
    """

    base: Annotated[int, Field(ge=1, le=8)]
    planes: Annotated[int, Field(ge=0, le=15)]
    options: Annotated[int, Field(ge=1, le=16)] | None = None


class MaskForm(BaseModel):
    """The mask router in front of a layer's experts, see `experts.masks`. inner : width of its first layer."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    inner: int = Field(ge=1)
    candidates: masks.Candidates
    renormalise: bool


class Form(BaseModel):
    """What is special about one layer's experts.

    map : stored expert of each of the router's outputs. ranks : rank of each projection's factors.
    rows : rows of each projection's sparse part, over all experts; only with ranks.
    main : experts that run per token, the strongest of those picked; single, renormalize_main : see
    `experts.compressed`; only with main. bits : the experts are stored as codes; not with ranks or main. nested :
    they are stored as codes and planes; not with bits, ranks or main. skip : the mask router that lets a token run
    fewer. router, residual : the router and the residual rule that stand in place of the architecture's.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    map: list[Annotated[int, Field(ge=0)]] | None = None
    ranks: dict[Projection, Annotated[int, Field(ge=1)]] | None = None
    rows: dict[Projection, Annotated[int, Field(ge=0)]] | None = None
    main: Annotated[int, Field(ge=1)] | None = None
    single: bool | None = None
    renormalize_main: bool | None = None
    bits: ExpertBits | None = None
    nested: NestedBits | None = None
    skip: MaskForm | None = None
    router: RouterForm | None = None
    residual: ResidualForm | None = None

    def describe(self) -> dict[str, Any]:
        return self.model_dump(exclude_none=True)


def forms_of(header: Mapping[str, Any]) -> dict[int, Form]:
    """{decoder layer: Form} of a header. Raises CheckpointError saying which entry is wrong."""
    layers = header.get("layers", {})
    if not isinstance(layers, dict):
        raise CheckpointError("config.json: quantization_config.layers is no table of layers")
    found = {}
    for key, entry in layers.items():
        try:
            found[int(key)] = Form.model_validate(entry)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise CheckpointError(f"config.json: quantization_config.layers.{key}.{where}: {first['msg']}") from error
        except ValueError as error:
            raise CheckpointError(f"config.json: quantization_config.layers names a layer {key!r}") from error
    return found


def apply_forms(model: nn.Module, forms: Mapping[int, Form]) -> None:
    """Give the layers of a freshly built model their forms. Raises CheckpointError where they do not fit."""
    layers = {layer.index: layer for layer in moe_layers(model)}
    for index, form in forms.items():
        if index not in layers:
            raise CheckpointError(f"config.json describes the experts of layer {index}, which is no MoE layer")
        layer = layers[index]
        if form.map is not None:
            _check_map(layer, form.map)
            cut_experts(layer, range(max(form.map) + 1))
            mapped.redirect(layer.experts, form.map)
        if form.ranks is not None:
            _check_ranks(layer, form)
            factored.convert(layer.experts, projection_shapes(layer.bank), form.ranks, form.rows)  # type: ignore[arg-type]
        elif form.rows is not None:
            raise CheckpointError(f"config.json: layer {index} has sparse rows but no ranks")
        if form.bits is not None:
            _check_bits(layer, form)
            grid, shapes = form.bits, projection_shapes(layer.bank)
            packed.convert(layer.experts, grid.widths(), shapes, grid.group, symmetric=grid.symmetric)
        if form.nested is not None:
            if any(entry is not None for entry in (form.bits, form.ranks, form.main)):
                raise CheckpointError(f"config.json: layer {index} has nested experts and others; not both can be")
            planed, options = form.nested, form.nested.options
            if options is not None:
                levels.attach(layer.experts, empty_bit_router(layer, planed.base, options))
            shapes = projection_shapes(layer.bank)
            nested.convert_nested(
                layer.experts, shapes, planed.base, planed.planes, planed.group, symmetric=planed.symmetric
            )
        if form.main is not None:
            _check_main(layer, form)
            single, renormalize = bool(form.single), bool(form.renormalize_main)
            compressed.convert(layer.experts, form.main, single=single, renormalize_main=renormalize)
        elif form.single is not None or form.renormalize_main is not None:
            raise CheckpointError(f"config.json: layer {index} says how vectors stand in for experts, but has no main")
        if form.skip is not None:
            masks.attach(layer.experts, empty_mask_router(layer, form.skip))
    apply_routing(
        model,
        {index: form.router for index, form in forms.items() if form.router is not None},
        {index: form.residual for index, form in forms.items() if form.residual is not None},
    )


def form_of(layer: MoELayer) -> Form:
    """What is special about the experts of a layer as it is."""
    module, ranks, rows = layer.experts, None, None
    if layer.bank.factored:
        names = projections(module)
        ranks = {p: int(getattr(module, f"factor_{p}_a").shape[2]) for p in names}
        if hasattr(module, f"sparse_{names[0]}"):
            rows = {p: int(getattr(module, f"sparse_{p}").shape[0]) for p in names}
    return Form(
        map=mapped.expert_map(module),
        ranks=ranks,  # type: ignore[arg-type]
        rows=rows,  # type: ignore[arg-type]
        bits=_bits(module),
        nested=_nested(module),
        skip=mask_form(module),
        router=router_form(layer),
        residual=residual_form(layer),
        **_compressed(module),
    )


def _bits(module: nn.Module) -> ExpertBits | None:
    if not isinstance(module, packed.Packed) or isinstance(module, nested.Nested):
        return None
    widths = {p: list(bits) for p, bits in module.packed_bits.items()}
    return ExpertBits(group=module.packed_group, symmetric=module.packed_symmetric, **widths)


def _nested(module: nn.Module) -> NestedBits | None:
    if not isinstance(module, nested.Nested):
        return None
    router = levels.bit_router(module)
    return NestedBits(
        group=module.packed_group,
        symmetric=module.packed_symmetric,
        base=module.packed_bits["down"][0],
        planes=module.nested_planes,
        options=None if router is None else len(router.bits),
    )


def empty_bit_router(layer: MoELayer, base: int, options: int) -> levels.BitRouter:
    """A bit router for the experts this layer stores, its weights not set. options : widths from `base` on."""
    bank = layer.bank
    bits = range(base, base + options)
    return levels.BitRouter(bank.hidden_size, bank.num_experts, bits, device=layer.router_device)


def with_planes(header: Mapping[str, Any], planes: int) -> dict[str, Any]:
    """The header of the same checkpoint read with only so many planes of its nested experts.

    Raises UsageError where no experts are nested, or some have fewer planes.
    """
    found = {index: form.nested for index, form in forms_of(header).items() if form.nested is not None}
    if not found:
        raise UsageError("the experts are not stored in planes", "Only what --method d2moe wrote has planes to leave.")
    least = min(grid.planes for grid in found.values())
    if not 0 <= planes <= least:
        raise UsageError(f"{planes} planes cannot be read: the experts have {least}", f"Give 0 to {least}.")
    layers = {
        key: {**entry, "nested": {**entry["nested"], "planes": planes}} if int(key) in found else entry
        for key, entry in header["layers"].items()
    }
    return {**header, "layers": layers}


def linears_of(header: Mapping[str, Any]) -> Linears | None:
    """The packed linear layers of a header. Raises CheckpointError saying which entry is wrong."""
    if "linears" not in header:
        return None
    try:
        return Linears.model_validate(header["linears"])
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"config.json: quantization_config.linears.{where}: {first['msg']}") from error


def apply_linears(model: nn.Module, linears: Linears | None) -> None:
    """Make linear layers of a freshly built model packed ones. Raises CheckpointError where they do not fit."""
    modules = dict(model.named_modules())
    for path, bits in linears.bits.items() if linears is not None else ():
        module = modules.get(path)
        if not isinstance(module, nn.Linear) or packed.is_packed(module):
            raise CheckpointError(f"config.json: quantization_config.linears names {path}, which is no linear layer")
        assert linears is not None
        packed.convert_linear(module, bits, linears.group, symmetric=linears.symmetric)


def linears_in(model: nn.Module) -> Linears | None:
    """The packed linear layers of a model as it is."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, packed.PackedLinear)}
    if not found:
        return None
    first = next(iter(found.values()))
    bits = {name: module.packed_width for name, module in found.items()}
    return Linears(group=first.packed_group, symmetric=not hasattr(first, "zero"), bits=bits)


def mask_form(module: nn.Module) -> MaskForm | None:
    """What describes the mask router of an experts module; None where there is none."""
    router = masks.mask_router(module)
    if router is None:
        return None
    return MaskForm(inner=router.inner, candidates=router.candidates, renormalise=router.renormalise)


def empty_mask_router(layer: MoELayer, form: MaskForm) -> masks.MaskRouter:
    """A mask router of this form that fits the layer, its weights not set. Raises CheckpointError if none fits."""
    if layer.top_k < 2:
        raise CheckpointError(f"layer {layer.index} runs {layer.top_k} expert per token: there is none to skip")
    if form.candidates == "subsets" and layer.top_k > masks.MOST_SUBSETS:
        raise CheckpointError(
            f"layer {layer.index} runs {layer.top_k} experts per token, too many to choose among all subsets",
            "Use nested masks.",
        )
    return masks.MaskRouter(
        layer.bank.hidden_size,
        layer.top_k,
        form.inner,
        candidates=form.candidates,
        renormalise=form.renormalise,
        device=layer.router_device,
    )


def _compressed(module: nn.Module) -> dict[str, Any]:
    """Entries of the form of compressed experts; what is as by default is not said."""
    if not isinstance(module, compressed.Compressed):
        return {}
    flags = {name: True for name in ("single", "renormalize_main") if getattr(module, name)}
    return {"main": module.main_experts, **flags}


def projection_shapes(bank: ExpertBank) -> dict[str, tuple[int, int]]:
    """(O, I) of each of an expert's matrices."""
    wide, narrow = bank.intermediate_size, bank.hidden_size
    shapes = {"gate": (wide, narrow), "up": (wide, narrow), "down": (narrow, wide)}
    return {p: shapes[p] for p in projections(bank.module)}


def _check_map(layer: MoELayer, target: list[int]) -> None:
    E = layer.num_experts
    if len(target) != E:
        raise CheckpointError(
            f"config.json maps {len(target)} experts in layer {layer.index}, but its router names {E}"
        )
    stored = max(target) + 1
    if stored > E or set(target) != set(range(stored)):
        raise CheckpointError(f"config.json: the expert map of layer {layer.index} skips or exceeds its {E} experts")


def _check_bits(layer: MoELayer, form: Form) -> None:
    assert form.bits is not None
    widths, expected = form.bits.widths(), projections(layer.experts)
    if set(widths) != set(expected):
        raise CheckpointError(
            f"config.json: bits of layer {layer.index} name {', '.join(sorted(widths))}; its experts have"
            f" {', '.join(expected)}"
        )
    for p, bits in widths.items():
        if len(bits) != layer.bank.num_experts:
            raise CheckpointError(
                f"config.json gives {len(bits)} widths for {p} in layer {layer.index}, which has"
                f" {layer.bank.num_experts} experts"
            )
    if form.ranks is not None or form.main is not None:
        other = "factors" if form.ranks is not None else "vectors for experts"
        raise CheckpointError(f"config.json: layer {layer.index} has bits and {other}; not both can be")


def _check_main(layer: MoELayer, form: Form) -> None:
    assert form.main is not None
    if form.main > layer.top_k:
        raise CheckpointError(
            f"config.json lets {form.main} experts per token run in layer {layer.index}, whose router picks"
            f" {layer.top_k}"
        )
    if form.map is not None or form.ranks is not None:
        other = "an expert map" if form.map is not None else "factors"
        raise CheckpointError(f"config.json: layer {layer.index} has vectors for experts and {other}; not both can be")


def _check_ranks(layer: MoELayer, form: Form) -> None:
    shapes = projection_shapes(layer.bank)
    assert form.ranks is not None
    for name, given in (("ranks", form.ranks), ("rows", form.rows)):
        if given is not None and set(given) != set(shapes):
            raise CheckpointError(
                f"config.json: {name} of layer {layer.index} name {', '.join(sorted(given))}; its experts have"
                f" {', '.join(shapes)}"
            )
    for p, (outputs, inputs) in shapes.items():
        rank, rows = form.ranks[p], (form.rows or {}).get(p, 0)  # type: ignore[index,call-overload]
        if rank > min(outputs, inputs):
            raise CheckpointError(
                f"config.json: rank {rank} of {p} in layer {layer.index} is above the full rank of its {outputs} x"
                f" {inputs} matrices"
            )
        if rows > layer.num_experts * outputs:
            raise CheckpointError(
                f"config.json: {rows} sparse rows of {p} in layer {layer.index}, where all experts have"
                f" {layer.num_experts * outputs}"
            )


def empty_factors(layer: MoELayer, experts: int, ranks: Mapping[str, int]) -> dict[str, Tensor]:
    """{path below the model: meta tensor} of the factors that `experts` experts of these ranks are stored as."""
    found: dict[str, Tensor] = {}
    dtype = layer.experts.down_proj.dtype
    for p, (outputs, inputs) in projection_shapes(layer.bank).items():
        for part, shape in (("a", (experts, outputs, ranks[p])), ("b", (experts, ranks[p], inputs))):
            found[f"{layer.experts_name}.factor_{p}_{part}"] = torch.empty(shape, dtype=dtype, device="meta")  # type: ignore[arg-type]
    return found


def put_back_dense(bank: ExpertBank, keep: Sequence[int], factors: Mapping[str, Tensor]) -> None:
    """Write A B of the kept experts' factors, in order, over their dense weights: the same function, not the form."""
    for position, expert in enumerate(keep):
        weights = bank.read(expert)
        matrices = {
            f"{p}_{'HI' if p == 'down' else 'IH'}": factors[f"factor_{p}_a"][position].float()
            @ factors[f"factor_{p}_b"][position].float()
            for p in projections(bank.module)
        }
        bank.write(expert, replace(weights, **matrices))
