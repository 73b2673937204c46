"""`coterie inspect`: what is in a checkpoint, and which architectures work. Reads headers, no weights."""

from typing import Annotated, Any

import typer

from coterie.cli.common import Common, console, emit_json, gigabytes, millions, notes, table, verb
from coterie.errors import UsageError


@verb
def inspect(
    common: Common,
    model: Annotated[str | None, typer.Argument(help="Checkpoint folder or hub id.", show_default=False)] = None,
    architectures: Annotated[
        bool, typer.Option("--architectures", help="List the architectures of the installed transformers that work.")
    ] = False,
) -> None:
    """Show the MoE layers, sizes and routing of a checkpoint, without reading weights."""
    if architectures:
        _architectures(common)
        return
    if model is None:
        raise UsageError("inspect needs a checkpoint", "Or --architectures, to list what works.")
    runtime = common.runtime()
    from coterie.compression.sizes import measure

    streamed = runtime.open(model)
    size = measure(streamed)
    layers = [
        {
            "layer": m.index,
            "experts": m.num_experts,
            "top_k": m.top_k,
            "active": m.active_experts,
            "groups": m.groups,
            "expert_width": m.bank.intermediate_size,
            "shared": [s.rpartition(".")[2] for s in m.shared],
        }
        for m in streamed.moe.values()
    ]
    text = streamed.config.get_text_config(decoder=True)
    dense = [i for i in range(len(streamed.layers)) if i not in streamed.moe]
    report = {
        "model": model,
        "architecture": type(streamed.model).__name__,
        "model_type": text.model_type,
        "layers": len(streamed.layers),
        "dense_layers": dense,
        "hidden_size": text.hidden_size,
        "vocabulary": text.vocab_size,
        "bytes_of_expert": size.bytes_of_expert,
        **size.describe(),
        **({"stored_as": stored} if (stored := _stored_as(streamed)) else {}),
        "moe_layers": layers,
    }
    if common.json:
        emit_json(report)
        return
    first, moe = layers[0], next(iter(streamed.moe.values()))
    routed = size.bytes_of_expert * sum(layer["experts"] for layer in layers)
    shared = f", shared: {', '.join(first['shared'])}" if first["shared"] else ""
    groups = f" in {first['groups']} groups" if first["groups"] > 1 else ""
    run = "" if moe.active_experts == moe.top_k else f" of which {moe.active_experts} run"
    rows = [
        ["architecture", f"{report['architecture']} ({text.model_type})"],
        ["layers", f"{len(streamed.layers)}: {len(layers)} MoE, {len(dense)} dense"],
        ["experts", f"{size.experts} per layer{groups}, {first['top_k']} per token{run}{shared}"],
        ["hidden, expert width", f"{text.hidden_size}, {first['expert_width']}"],
        ["vocabulary", f"{text.vocab_size}"],
        ["parameters", f"{millions(size.parameters)}, {millions(size.active_parameters)} active per token"],
        ["weights", f"{gigabytes(size.bytes)}, {routed / size.bytes:.0%} of it routed experts"],
        ["one expert", f"{gigabytes(size.bytes_of_expert)}"],
    ]
    if stored:
        rows.append(["stored as", stored])
    table(model, ["", ""], rows, left=2)
    if len({layer["experts"] for layer in layers}) > 1:
        each = [[str(layer["layer"]), str(layer["experts"]), str(layer["top_k"])] for layer in layers]
        table("layers", ["layer", "experts", "top-k"], each)


def _stored_as(streamed: Any) -> str:
    """How weights are stored where they are not plain numbers; "" where they are."""
    from coterie.anatomy.forms import form_of, linears_in
    from coterie.compression.bits import mean_bits

    if streamed.form:
        return str(streamed.form.shown)
    widths = {i: form.bits.widths() for i, moe in streamed.moe.items() if (form := form_of(moe)).bits is not None}
    linears = linears_in(streamed.model)
    told = []
    if widths:
        every = sorted({b for layer in widths.values() for bits in layer.values() for b in bits})
        told.append(f"experts {', '.join(map(str, every))} bits, {mean_bits(streamed.moe, widths):.2f} on average")
    nested = next((grid for moe in streamed.moe.values() if (grid := form_of(moe).nested) is not None), None)
    if nested is not None:
        chosen = ", chosen by bit routers" if nested.options is not None else ""
        told.append(f"experts nested, {nested.base} to {nested.base + nested.planes} bits{chosen}")
    if linears is not None:
        told.append(f"{len(linears.bits)} linear layers {', '.join(map(str, sorted(set(linears.bits.values()))))} bits")
    return "; ".join(told)


def _architectures(common: Common) -> None:
    common.runtime()
    from dataclasses import asdict

    from coterie.anatomy.architectures import discover

    with notes.status("examining architectures") as status:
        found = list(discover(lambda name, done, total: status.update(f"examining {name} ({done}/{total})")))
    if common.json:
        emit_json([asdict(a) for a in found])
        return
    rows = [
        [
            a.model_type,
            a.model_class,
            a.verdict,
            f"{a.experts} x {a.moe_layers}, top-{a.top_k}" if a.experts else "",
            a.reason,
        ]
        for a in sorted(found, key=lambda a: (a.verdict != "works", a.model_type))
    ]
    table("", ["model type", "class", "verdict", "default shape", "reason"], rows, left=5)
    works = sum(a.verdict == "works" for a in found)
    console.print(f"\n{works} of {len(found)} architectures with fused experts work in their default configuration.")
