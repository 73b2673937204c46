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
    """Tables of an evaluation, one row per domain: loss with the change against the first model and its 95% interval,
    then KL and agreement."""
    names = names or [r.model for r in results]
    rows = []
    for number, domain in enumerate(results[0].domains):
        cells = [f"{domain.loss:.3f}"]
        for result in results[1:]:
            d = result.domains[number]
            cells.append(f"{d.loss:.3f}  {d.delta:+.3f} ({d.delta_low:+.2f} {d.delta_high:+.2f})")
        rows.append([domain.domain, *cells])
    first = results[0].mean_loss
    rows.append(["mean", f"{first:.3f}", *(f"{r.mean_loss:.3f}  {r.mean_loss - first:+.3f}" for r in results[1:])])
    table("loss, nats per token: change against the first (95% interval)", ["domain", *names], rows)
    if len(results) > 1:
        rows = []
        for number, domain in enumerate(results[0].domains):
            found = [result.domains[number] for result in results[1:]]
            rows.append([domain.domain, *(f"{d.kl:.3f}, {d.agreement:.0%}" for d in found)])
        rows.append(["mean", *(f"{r.mean_kl:.3f}, {r.mean_agreement:.0%}" for r in results[1:])])
        table("\nKL to the first in nats, same most likely token", ["domain", *names[1:]], rows)
