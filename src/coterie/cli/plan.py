"""`coterie plan`: decide which experts stay, as a JSON file to read and edit before anything is written."""

from typing import Annotated

import typer

from coterie.cli import options as o
from coterie.cli.common import Common, emit_json, parse_set, table, verb, warn


@verb
def plan(
    common: Common,
    model: o.Model,
    profile: Annotated[str, typer.Option(help="Folder made by `coterie profile`.", show_default=False)],
    out: Annotated[str, typer.Option(help="Plan file to write (JSON).", show_default=False)],
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
    """Decide on a finished profile which experts stay. A pure function: same profile, same plan."""
    runtime = common.runtime()
    from pathlib import Path

    from coterie import api
    from coterie.compression.forecast import redundancy
    from coterie.profiling.profile import Profile

    loaded = Profile.load(Path(profile))
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
    figures = redundancy(loaded.layers, {layer.index: layer for layer in result.layers})
    if common.json:
        emit_json({"plan": out, "redundancy": figures, **result.model_dump(mode="json")})
        return
    rows = [[str(x.index), f"{len(x.keep)} of {x.experts}", " ".join(map(str, x.keep))] for x in result.layers]
    table(f"{method}: {out}", ["layer", "kept", "experts"], rows, left=3)
    if figures["warning"]:
        warn(figures["warning"])
