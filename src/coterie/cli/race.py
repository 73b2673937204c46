"""`coterie race`: train several configs at equal cost and tell which is better, and by how much that is certain."""

from pathlib import Path
from typing import Annotated, Any

import typer

from coterie.cli import options as o
from coterie.cli.common import Common, emit_json, helps_only, notes, say, table, verb
from coterie.cli.progress import Bar


@verb
def race(
    common: Common,
    configs: Annotated[list[str], typer.Argument(help="YAML files as of `coterie train`; the first is the reference.")],
    out: Annotated[str, typer.Option("--out", "-o", help="Folder for results.")] = "race",
    seeds: Annotated[int, typer.Option(min=1, help="Seeds: each config is trained so often.")] = 3,
    equal: Annotated[str, typer.Option(help="What all get the same of: tokens or flops.")] = "tokens",
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens (of the first config, with --equal flops).", show_default=False)
    ] = None,
    data: o.Data = None,
    evaluate: Annotated[list[str] | None, typer.Option(help="Text to measure on.", show_default=False)] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A field of all configs: training.rate=3e-4.", show_default=False)
    ] = None,
    overwrite: o.Overwrite = False,
) -> None:
    """Train several configs on the same text, in the same order, with the same seeds, and compare them.

      coterie race small deepseekmoe my.yaml --data corpus/ --tokens 5000000

    Told are held-out losses with two standard errors over seeds, differences to the first config paired by seed, what
    the experts did, and the cost: floating-point operations per token as they really were, and tokens per second.
    A killed race goes on with the runs that were not finished.
    """
    runtime = common.runtime()
    from coterie import api

    quiet = common.json or helps_only()

    def on_run(name: str, seed: int, done: int, of: int) -> None:
        if not quiet:
            notes.print(f"run {done + 1} of {of}: {name}, seed {seed}", style="dim", highlight=False)

    with Bar("race", enabled=not quiet) as bar:
        result = api.race(
            configs,
            out,
            seeds=seeds,
            equal=equal,
            tokens=tokens,
            data=data or (),
            evaluate=evaluate or (),
            settings=settings or (),
            overwrite=overwrite,
            runtime=runtime,
            progress=bar,  # type: ignore[arg-type]
            on_run=on_run,
        )
    if common.json:
        emit_json({**result.record, "out": out})
        return
    heads = [
        "",
        "loss",
        "difference",
        "at equal operations",
        "experts",
        "violation",
        "entropy",
        "changing",
        "GFLOP/token",
    ]
    table(
        f"held-out loss, nats per token, {seeds} seed{'s' * (seeds > 1)}: {out}",
        [*heads, "GFLOP/token", "tokens/s"],
        [_row(row) for row in result.table()],
    )
    say(f"± two standard errors over seeds; curves: {Path(out) / 'race.html'}")


def _row(row: dict[str, Any]) -> list[str]:
    def spread(value: float, error: float | None, sign: str = "") -> str:
        return f"{value:{sign}.4f}" + (f" ± {error:.4f}" if error is not None else "")

    return [
        row["name"],
        spread(row["loss"], row["spread"]),
        spread(row["difference"], row["difference_spread"], "+"),
        f"{row['loss_at_equal_flops']:.4f}",
        f"{row['experts_per_token']:.2f}",
        f"{row['max_vio']:.2f}",
        f"{row['entropy']:.2f}",
        "" if row["fluctuation"] is None else f"{100 * row['fluctuation']:.1f}%",
        f"{row['flops_per_token'] / 1e9:.4f}",
        f"{row['tokens_per_second']:,.0f}",
    ]
