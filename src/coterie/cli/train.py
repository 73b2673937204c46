"""`coterie train`: train an MoE model, fresh or from a checkpoint, with any router, on text."""

from pathlib import Path
from typing import Annotated, Any

import typer

from coterie.cli import options as o
from coterie.cli.common import Common, emit_json, helps_only, say, table, verb
from coterie.cli.progress import Bar


@verb
def train(
    common: Common,
    config: Annotated[
        str | None,
        typer.Argument(help="YAML file, or one that ships (small); or --init.", show_default=False),
    ] = None,
    out: Annotated[str, typer.Option("--out", "-o", help="Folder for the run.")] = "trained",
    init: Annotated[str | None, typer.Option(help="Checkpoint to start from.", show_default=False)] = None,
    router: Annotated[
        str | None,
        typer.Option(help="With --init: another router, see `coterie methods`.", show_default=False),
    ] = None,
    data: o.Data = None,
    evaluate: Annotated[
        list[str] | None,
        typer.Option(help="Text to measure on; without it some documents of --data are held out.", show_default=False),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps.", show_default=False)] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any field of the config: training.rate=3e-4, router.nulls=8.", show_default=False),
    ] = None,
    seed: o.Seed = 0,
    overwrite: o.Overwrite = False,
) -> None:
    """Train a model on text: a fresh decoder of any parts, or a checkpoint with another router.

    Some ship: small, deepseekmoe, loss-free, dynamic, slimmable, evolve, recurrent.

      coterie train small --data corpus/ --steps 2000 -o run

    A fresh model is described by a file:

      model: {hidden_size: 256, num_hidden_layers: 6, num_experts: 16, router: {kind: top-k, top_k: 2}}
      balancing: [{name: switch, weight: 0.01}]
      data: [corpus/]
      training: {steps: 2000, batch_size: 16, length: 256, rate: 1e-3}

      coterie train small.yaml -o run

    A checkpoint gets null experts, so that each token runs as many as it needs:

      coterie train --init MODEL --router adamoe --data text.jsonl --steps 500 -o adaptive

    A killed run, started again, goes on from its last checkpoint.
    """
    runtime = common.runtime()
    from coterie import api

    with Bar("train", enabled=not (common.json or helps_only())) as bar:
        result = api.train(
            config,
            out,
            init=init,
            router=router,
            data=data or (),
            evaluate=evaluate or (),
            steps=steps,
            settings=settings or (),
            seed=seed,
            overwrite=overwrite,
            runtime=runtime,
            progress=bar,  # type: ignore[arg-type]
        )
    if not result.main:
        return
    if common.json:
        emit_json({**result.record, "out": out})
        return
    for note in result.notes:
        say(note)
    begun = [entry["held_out"] for entry in result.history.entries if entry["step"] == 0 and "held_out" in entry]
    first: dict[str, Any] = {domain: loss for entry in begun for domain, loss in entry.items()}
    if result.history.curve and result.history.curve[0][0] == 0:
        first["all"] = result.history.curve[0][2]
    rows = [[k, f"{first[k]:.4f}" if k in first else "", f"{v:.4f}"] for k, v in result.history.losses.items()]
    table(f"held-out loss, nats per token: {out}", ["", "before", "after"], rows)
    figures = [
        [f"layer {i}", f"{f['experts_per_token']:.2f}", f"{f['max_vio']:.2f}", f"{f['entropy']:.2f}"]
        for i, f in result.record["experts"].items()
    ]
    if figures:
        table("experts, last steps", ["", "per token", "violation of balance", "gate entropy"], figures)
    say(
        f"{result.record['parameters']:,} parameters, {result.record['tokens']:,} tokens; pictures: "
        f"{Path(out) / 'experts.html'}"
    )
