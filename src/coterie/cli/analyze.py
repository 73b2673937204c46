"""`coterie analyze`: what is inside a model. One command per analysis; each can write a JSON file for other verbs."""

from typing import Annotated, Any

import typer

from coterie.cli import options as o
from coterie.cli.common import Common, console, emit_json, table, verb, warn
from coterie.cli.progress import Bar

analyze = typer.Typer(no_args_is_help=True, help="Look into a model: super experts.")

_R = "The rule"


@analyze.command("super-experts", no_args_is_help=True)
@verb
def super_experts(
    common: Common,
    model: o.Model,
    data: o.Data = None,
    out: Annotated[str | None, typer.Option(help="JSON file to write; --protect takes it.", show_default=False)] = None,
    layers: Annotated[
        str,
        typer.Option(
            help="first_fraction: the first layers (--fraction). ma_formation: where massive activations form.",
            rich_help_panel=_R,
        ),
    ] = "first_fraction",
    fraction: Annotated[
        float, typer.Option(help="Share of the layers, for first_fraction.", rich_help_panel=_R)
    ] = 0.75,
    scope: Annotated[
        str,
        typer.Option(help="Percentile and maximum over selected_layers or all_layers.", rich_help_panel=_R),
    ] = "selected_layers",
    percentile: Annotated[float, typer.Option(help="Values must be above it.", rich_help_panel=_R)] = 99.5,
    factor: Annotated[float, typer.Option(help="And above this share of the largest.", rich_help_panel=_R)] = 0.1,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Run the model without them, and without random others.")
    ] = True,
    controls: Annotated[int, typer.Option(min=1, help="Random sets of each kind to compare with.")] = 5,
    ablate: Annotated[
        list[str] | None, typer.Option(help="Run it also without these: layer:expert,...", show_default=False)
    ] = None,
    samples: o.Samples = 64,
    length: o.Length = 512,
    batch_size: o.BatchSize = None,
    pack: o.Pack = False,
    seed: o.Seed = 0,
    tokens: o.Tokens = None,
    tokenizer: o.Tokenizer = None,
    overwrite: o.Overwrite = False,
) -> None:
    """Find the few experts that make massive activations and must never be removed; check them by removing them."""
    runtime = common.runtime()
    from coterie import api

    with Bar("super experts", enabled=not common.json) as bar:
        found = api.super_experts(
            model,
            data or (),
            out=out,
            layers=layers,
            fraction=fraction,
            scope=scope,
            percentile=percentile,
            factor=factor,
            verify=verify,
            controls=controls,
            ablate=ablate or (),
            samples=samples,
            length=length,
            batch_size=batch_size,
            pack=pack,
            seed=seed,
            tokens=tokens,
            tokenizer=tokenizer,
            overwrite=overwrite,
            runtime=runtime,
            progress=bar,  # type: ignore[arg-type]
        )
    if common.json:
        emit_json(found.report)
        return
    _show(found.report, out)


def _show(report: dict[str, Any], out: str | None) -> None:
    entries = [
        *(("super", e) for e in report["super_experts"]),
        *(("", e) for e in report["next"]),
        *(("outlier", e) for e in report["outliers"]),
    ]
    median = report["median"]
    rows = [
        [
            f"{e['layer']}:{e['expert']}",
            kind,
            f"{e['value']:.4g}",
            f"{e['value'] / median:.1f}" if median else "",
            str(e["channel"]),
            _percent(e.get("first_token_share")),
            _percent(e.get("other_tokens_share")),
        ]
        for kind, e in entries
    ]
    columns = ["expert", "", "largest output", "x median", "channel", "of first token", "of others"]
    table(f"layers {_span(report['layers'])}, threshold {report['threshold']:.4g}", columns, rows, left=2)
    if report["reason"]:
        console.print(f"\nno super expert: {report['reason']}", highlight=False, markup=False)
    if report["verification"]:
        _show_runs(report["verification"])
    for note in report["notes"]:
        warn(note)
    if out is not None:
        pairs = ", ".join(f"{layer}:{expert}" for layer, expert in report["protect"]) or "nothing"
        console.print(f"\n{out} protects {pairs} (--protect {out})", highlight=False, markup=False, soft_wrap=True)


def _show_runs(verification: dict[str, Any]) -> None:
    rows = []
    for run in verification["runs"]:
        decays = [d for d in run["sink_decay"].values() if d is not None]
        experts = [f"{layer}:{expert}" for layer, expert in run["experts"]]
        experts += [f"{layer}:{expert}[{row},{column}]" for layer, expert, row, column in run["weights"]]
        rows.append(
            [
                run["removed"],
                " ".join(experts),
                f"{run['loss']:.3f}",
                f"{run['delta']:+.3f} ({run['delta_low']:+.2f} {run['delta_high']:+.2f})",
                f"{max(run['hidden_max'].values()):.4g}",
                f"{sum(decays) / len(decays):.2f}" if decays else "",
            ]
        )
    columns = ["removed", "experts", "loss", "change (95% interval)", "largest activation", "sink decay"]
    table("\nwithout them", columns, rows, left=2)
    if verification["verdict"]:
        console.print(f"verdict: {verification['verdict']}", highlight=False, markup=False)
    if verification["no_sink"]:
        console.print(
            f"layers {_span(verification['no_sink'])} show no attention probabilities: no sink is measured there",
            highlight=False,
            markup=False,
        )
    learned = [i for i, sink in verification["sink"].items() if sink["row_sum"] < 0.99]
    if learned:
        console.print(
            f"layers {_span([int(i) for i in learned])} have a learned sink beside the first token",
            highlight=False,
            markup=False,
        )


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _span(layers: list[int]) -> str:
    """0, 1, 2, 5 as 0-2,5."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs) or "none"
