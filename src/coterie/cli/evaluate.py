"""`coterie evaluate`: what did it cost? Perplexity, KL to the original, agreement, per domain."""

from typing import Annotated, Any

import typer

from coterie.cli import options as o
from coterie.cli.common import Common, emit_json, table, verb
from coterie.cli.progress import Bar


@verb
def evaluate(
    common: Common,
    models: Annotated[list[str], typer.Argument(help="Checkpoints; the first is the reference.", show_default=False)],
    data: o.Data = None,
    samples: o.Samples = 64,
    length: o.Length = 512,
    batch_size: o.BatchSize = None,
    pack: o.Pack = True,
    seed: o.Seed = 0,
    tokens: o.Tokens = None,
    tokenizer: o.Tokenizer = None,
) -> None:
    """Compare checkpoints on text, streamed; nothing has to fit in memory."""
    runtime = common.runtime()
    from coterie import api

    with Bar("evaluate", enabled=not common.json) as bar:
        results = api.evaluate(
            models,
            data or (),
            tokens=tokens,
            tokenizer=tokenizer,
            samples=samples,
            length=length,
            batch_size=batch_size,
            pack=pack,
            seed=seed,
            runtime=runtime,
            progress=bar,  # type: ignore[arg-type]
        )
    if common.json:
        emit_json([result.describe() for result in results])
    else:
        show(results)


def show(results: list[Any], names: list[str] | None = None) -> None:
    """Tables of an evaluation: loss per domain with the change against the first model, then KL and agreement."""
    names = names or [r.model for r in results]
    domains = [d.domain for d in results[0].domains]
    rows = []
    for name, result in zip(names, results, strict=True):
        cells = [f"{d.loss:.3f}" if d.kl is None else f"{d.loss:.3f} ({d.delta:+.3f})" for d in result.domains]
        rows.append([name, *cells, f"{result.mean_loss:.3f}"])
    table("loss, nats per token (change against the first)", ["model", *domains, "mean"], rows)
    if len(results) > 1:
        rows = []
        for name, result in zip(names[1:], results[1:], strict=True):
            cells = [f"{d.kl:.3f}, {d.agreement:.0%}" for d in result.domains]
            rows.append([name, *cells, f"{result.mean_kl:.3f}, {result.mean_agreement:.0%}"])
        table("\nKL to the first in nats, same top token", ["model", *domains, "mean"], rows)
        rows = []
        for name, result in zip(names[1:], results[1:], strict=True):
            rows.append([name, *(f"{d.delta_low:+.3f} {d.delta_high:+.3f}" for d in result.domains)])
        table("\n95% interval of the change (paired, over sequences)", ["model", *domains], rows)
