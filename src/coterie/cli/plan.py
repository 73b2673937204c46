"""`coterie plan`: decide which experts stay, or how many bits each gets, as a JSON file to read and edit before
anything is written."""

from collections import Counter
from typing import Annotated, Any

import typer

from coterie.cli import options as o
from coterie.cli.common import Common, emit_json, gigabytes, parse_set, say, table, verb, warn


@verb
def plan(
    common: Common,
    model: o.Model,
    out: Annotated[str, typer.Option(help="Plan file to write (JSON).", show_default=False)],
    profile: Annotated[
        str | None,
        typer.Option(help="Folder made by `coterie profile`; not needed by methods that look at weights alone."),
    ] = None,
    method: Annotated[str, typer.Option(help="One of `coterie methods`.")] = "reap",
    keep: o.Keep = None,
    keep_experts: o.KeepExperts = None,
    target_size: o.TargetSize = None,
    scope: o.Scope = "uniform",
    minimum: o.Minimum = 1,
    layers: o.Layers = None,
    exclude_layers: o.ExcludeLayers = None,
    protect: o.Protect = None,
    parameters: o.Set = None,
) -> None:
    """Decide on a finished profile which experts stay, or which matrix gets how many bits.

    A pure function: same profile, same plan.
    """
    runtime = common.runtime()
    from pathlib import Path

    from coterie import api
    from coterie.compression.bits import BitPlan
    from coterie.compression.forecast import redundancy
    from coterie.profiling.profile import Profile

    loaded = None if profile is None else Profile.load(Path(profile))
    result = api.plan(
        model,
        loaded,
        method=method,
        parameters=parse_set(parameters or []),
        out=out,
        runtime=runtime,
        keep=keep,
        keep_experts=keep_experts,
        target_size=target_size,
        scope=scope,
        minimum=minimum,
        layers=layers,
        exclude_layers=exclude_layers,
        protect=protect or (),
    )
    if isinstance(result, BitPlan):
        _show_bits(result, method, out, common)
        return
    assert loaded is not None
    figures = redundancy(loaded.layers, {layer.index: layer for layer in result.layers})
    if common.json:
        emit_json({"plan": out, "redundancy": figures, **result.model_dump(mode="json")})
        return
    rows = [[str(x.index), f"{len(x.keep)} of {x.experts}", " ".join(map(str, x.keep))] for x in result.layers]
    table(f"{method}: {out}", ["layer", "kept", "experts"], rows, left=3)
    if figures["warning"]:
        warn(figures["warning"])


def _show_bits(plan: Any, method: str, out: str, common: Common) -> None:
    """Bits of every layer's experts, and why each got them."""
    if common.json:
        emit_json({"plan": out, **plan.model_dump(mode="json")})
        return
    rows = []
    for layer in plan.layers:
        for e in range(layer.experts):
            bits = {p: widths[e] for p, widths in layer.extra.get("bits", {}).items()}
            told = " ".join(f"{p} {b}" for p, b in bits.items()) if len(set(bits.values())) > 1 else ""
            why = layer.extra.get("why")
            rows.append([f"{layer.index}:{e}", told or str(next(iter(bits.values()), 16)), why[e] if why else ""])
    if any(row[2] for row in rows) or len({row[1] for row in rows}) > 1:
        table(f"{method}: {out}", ["expert", "bits", "why"], rows, left=3)
    linear = Counter(plan.linears.values())
    told = ", ".join(f"{count} linear layers at {bits} bits" for bits, count in sorted(linear.items()))
    say(f"experts have {plan.expert_bits:.3f} bits per weight{'; ' + told if told else ''}")
    say(f"the checkpoint will have {gigabytes(plan.bytes)}")
