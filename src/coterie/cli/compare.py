"""`coterie compare`: which method, at which budget, for your model and your data? Two sweeps, nothing written."""

from typing import Annotated, Any

import typer

from coterie.cli import options as o
from coterie.cli.common import Common, emit_json, gigabytes, millions, say, table, verb, warn
from coterie.cli.progress import Bar


@verb
def compare(
    common: Common,
    model: o.Model,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            help="Methods to compare, separated by commas or repeated. One with parameters stands alone:"
            " --methods dern:alpha=0.3,selector=reap.",
            show_default=False,
        ),
    ] = None,
    checkpoint: Annotated[
        list[str] | None,
        typer.Option(
            help="A finished checkpoint to stand beside the methods (healed, slimmed, ...); repeat for more.",
            show_default=False,
        ),
    ] = None,
    keep: Annotated[
        str | None, typer.Option(help="Shares of the experts, e.g. 0.75,0.5,0.25.", show_default=False)
    ] = None,
    keep_experts: Annotated[
        str | None, typer.Option(help="Numbers of experts per layer, e.g. 96,64.", show_default=False)
    ] = None,
    target_size: Annotated[
        str | None,
        typer.Option(
            help="Instead of budgets: what is best at this size, 0.25x of the original or 2GB? --methods are chains"
            " then, as reap+quantize:bits=8; by default five.",
            show_default=False,
        ),
    ] = None,
    work: Annotated[
        str | None,
        typer.Option(
            help="With --target-size: folder for the checkpoints it writes, to keep them.", show_default=False
        ),
    ] = None,
    data: o.Data = None,
    eval_data: Annotated[
        list[str] | None,
        typer.Option(help="Text to evaluate on; by default samples of --data that no method has seen."),
    ] = None,
    samples: o.Samples = 128,
    eval_samples: Annotated[int, typer.Option(min=1, help="Sequences per domain to evaluate on.")] = 32,
    length: o.Length = 512,
    batch_size: o.BatchSize = None,
    pack: o.Pack = True,
    seed: o.Seed = 0,
    tokens: o.Tokens = None,
    eval_tokens: Annotated[str | None, typer.Option(help="Token ids to evaluate on: a safetensors file.")] = None,
    tokenizer: o.Tokenizer = None,
    scope: o.Scope = "uniform",
    minimum: o.Minimum = 1,
    layers: o.Layers = None,
    exclude_layers: o.ExcludeLayers = None,
    protect: o.Protect = None,
    domains: Annotated[bool, typer.Option("--domains", help="Also show the damage in every domain.")] = False,
    out: Annotated[
        str | None,
        typer.Option(help="Folder for comparison.json, a page with plots, and every plan.", show_default=False),
    ] = None,
    overwrite: o.Overwrite = False,
) -> None:
    """Compare methods and budgets on your model and data: one profile sweep, one evaluation sweep, no checkpoint.

    Every plan is applied on the fly while the model is evaluated layer by layer.

      coterie compare MODEL --methods frequency,reap,dern --keep 0.75,0.5 --data text/

      coterie compare MODEL --methods reap,hc-smoe --keep 0.5 --checkpoint MODEL-healed --data text/

    With --target-size the question is another one: at so many bytes, fewer experts or fewer bits? Its checkpoints are
    written, one after the other, for how weights are rounded depends on text.

      coterie compare MODEL --target-size 0.25x --data text/
    """
    runtime = common.runtime()
    from coterie import api
    from coterie.errors import UsageError

    shared: dict[str, Any] = {
        "methods": _names(methods or []),
        "checkpoints": checkpoint or (),
        "eval_data": eval_data or (),
        "eval_tokens": eval_tokens,
        "eval_samples": eval_samples,
        "samples": samples,
        "length": length,
        "batch_size": batch_size,
        "pack": pack,
        "seed": seed,
        "tokens": tokens,
        "tokenizer": tokenizer,
        "out": out,
        "overwrite": overwrite,
        "runtime": runtime,
    }
    budget: dict[str, Any] = {
        "keep": _numbers(keep, "--keep", float),
        "keep_experts": _numbers(keep_experts, "--keep-experts", int),
        "scope": scope,
        "minimum": minimum,
        "layers": layers,
        "exclude_layers": exclude_layers,
        "protect": protect or (),
    }
    with Bar("compare", enabled=not common.json) as bar:
        if target_size is None:
            if work is not None:
                raise UsageError("--work is for --target-size: other comparisons write no checkpoint", "Leave it out.")
            result = api.compare(model, data or (), **shared, **budget, progress=bar)  # type: ignore[arg-type]
        else:
            given = [name for name, value in budget.items() if value not in ([], (), None, "uniform", 1)]
            if given:
                option = given[0].replace("_", "-")
                raise UsageError(f"--target-size already says how much: --{option} would be ignored", "Leave it out.")
            result = api.compare_at_size(
                model,
                data or (),
                target_size=target_size,
                work=work,
                **shared,
                progress=bar,  # type: ignore[arg-type]
            )
    if common.json:
        emit_json(result.describe())
    else:
        show(result, domains=domains, out=out)


def _names(items: list[str]) -> list[str]:
    """`a,b` are two methods; `a:x=1,y=2` is one."""
    return [name for item in items for name in ([item] if ":" in item else item.split(","))]


def _numbers(text: str | None, option: str, kind: Any) -> list[Any]:
    from coterie.errors import UsageError

    try:
        return [kind(part) for part in (text or "").split(",") if part.strip()]
    except ValueError:
        raise UsageError(f"cannot read {option} {text!r}", "Write numbers separated by commas.") from None


def show(result: Any, *, domains: bool, out: str | None) -> None:
    """One row per contender: size, rise of the loss with its interval, and how far behind the best of its budget."""
    rows = [["original", gigabytes(result.size.bytes), millions(result.size.active_parameters)]]
    rows[0] += [f"{result.original.mean_loss:.3f}", "", "", "", ""]
    for c in result.contenders:
        if c.refused:
            rows.append([c.label, "", "", "not possible", "", "", "", ""])
            continue
        best = c.behind.mean == 0 and c.behind.low == 0
        rows.append(
            [
                c.label + (" *" if c.pareto else ""),
                gigabytes(c.size.bytes),
                millions(c.size.active_parameters),
                f"{c.quality.mean_loss:.3f}",
                f"{c.delta.mean:+.3f} ({c.delta.low:+.3f} {c.delta.high:+.3f})",
                "best" if best else f"{c.behind.mean:+.3f} ({c.behind.low:+.3f} {c.behind.high:+.3f})",
                f"{c.quality.mean_kl:.3f}",
                f"{c.quality.mean_agreement:.0%}",
            ]
        )
    columns = ["", "weights", "active", "loss", "rise (95%)", "behind the best here (95%)", "KL", "agreement"]
    table("mean over domains, nats per token; * = nothing smaller is better", columns, rows)
    if domains:
        by_domain = [["original", *(f"{d.loss:.3f}" for d in result.original.domains)]]
        for c in result.ran:
            cells = [f"{d.delta:+.3f} ({d.delta_low:+.2f} {d.delta_high:+.2f})" for d in c.quality.domains]
            by_domain.append([c.label, *cells])
        table("\nrise of the loss in each domain (95%)", ["", *result.domains], by_domain)
    for c in result.contenders:
        if c.refused:
            warn(f"{c.label}: {c.refused}")
    for warning in result.warnings:
        warn(warning)
    said = f"{result.sweeps} sweeps, {gigabytes(result.bytes_read)} read for {len(result.ran)} contenders"
    say(said + (f"; see {out}/comparison.html; {out}/plan-*.json go to `coterie compress --plan`" if out else ""))
