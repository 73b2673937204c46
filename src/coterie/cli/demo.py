"""`coterie demo`: the whole main job on the model that ships with the package, in minutes."""

from pathlib import Path
from typing import Annotated

import typer

from coterie.cli import options as o
from coterie.cli.common import Common, emit_json, gigabytes, millions, say, table, verb
from coterie.cli.progress import Bar


@verb
def demo(
    common: Common,
    out: Annotated[
        str, typer.Option(help="Folder for what it writes; earlier results there are replaced.")
    ] = "coterie-demo",
    keep: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of the experts to keep.")] = 0.5,
    seed: o.Seed = 0,
) -> None:
    """Shrink the pocket model three ways, compare them, write a report, generate. Nothing is downloaded."""
    runtime = common.runtime()
    from coterie.assets import pocket
    from coterie.cli.evaluate import show
    from coterie.cli.inspect import inspect
    from coterie.demo import METHODS, run_demo

    if not common.json:
        inspect(model=str(pocket()), architectures=False, **vars(common))
    with Bar("demo", enabled=not common.json) as bar:
        outcome = run_demo(
            Path(out),
            keep=keep,
            seed=seed,
            runtime=runtime,
            progress=bar,  # type: ignore[arg-type]
            say=lambda text: say(f"- {text}"),
        )
    if common.json:
        emit_json(
            {
                "out": out,
                "report": str(outcome.report),
                "quality": [q.describe() for q in outcome.quality],
                "generated": outcome.written,
                "seconds": outcome.seconds,
            }
        )
        return
    before = outcome.compressed[METHODS[0]].before
    rows = [["original", str(before.experts), gigabytes(before.bytes), millions(before.parameters)]]
    for method, result in outcome.compressed.items():
        rows.append(
            [method, str(result.after.experts), gigabytes(result.after.bytes), millions(result.after.parameters)]
        )
    table("\nsizes", ["model", "experts per layer", "weights", "parameters"], rows)
    print()
    show(outcome.quality, ["original", *outcome.compressed])
    table(
        "\nDERN's half of the pocket model writes",
        ["prompt", "text"],
        [[p, t] for p, t in outcome.written.items()],
        left=2,
    )
    say(f"\n{outcome.seconds:.0f} s. Open {outcome.report} in a browser.")
