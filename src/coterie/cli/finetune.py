"""`coterie finetune`: train a compressed checkpoint a little, routers first."""

from typing import Annotated

import typer

from coterie.cli import options as o
from coterie.cli.common import Common, emit_json, helps_only, say, table, verb
from coterie.cli.progress import Bar


@verb
def finetune(
    common: Common,
    model: o.Model,
    out: Annotated[str, typer.Argument(help="Folder for the trained checkpoint.", show_default=False)],
    data: o.Data = None,
    router_steps: Annotated[int, typer.Option(min=0, help="Steps in which only the routers learn.")] = 100,
    router_rate: Annotated[float, typer.Option(help="Their learning rate.")] = 1e-3,
    steps: Annotated[int, typer.Option(min=0, help="Steps in which everything learns, after that.")] = 500,
    rate: Annotated[float, typer.Option(help="Learning rate then.")] = 5e-5,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per step.")] = 8,
    balance: Annotated[
        float, typer.Option(min=0, help="Weight of the model's own load-balancing loss, where it has one.")
    ] = 0.01,
    stand_in: Annotated[
        float, typer.Option(min=0, help="The vectors of compressed experts learn at this multiple of --rate.")
    ] = 50.0,
    samples: o.Samples = 1024,
    held_out_samples: Annotated[
        int, typer.Option(min=1, help="Sequences per domain kept out of training, to measure the loss on.")
    ] = 16,
    length: o.Length = 256,
    tokens: o.Tokens = None,
    tokenizer: o.Tokenizer = None,
    pack: o.Pack = True,
    seed: o.Seed = 0,
    overwrite: o.Overwrite = False,
) -> None:
    """Fine-tune in two phases: the routers alone, then everything (the model must fit in memory).

    What a method that renews routers needs, as UNCURL does:

      coterie compress MODEL small --method uncurl --keep 0.5 --data task.jsonl
      coterie finetune small tuned --data task.jsonl
    """
    runtime = common.runtime()
    from coterie import api

    with Bar("finetune", enabled=not (common.json or helps_only())) as bar:
        result = api.finetune(
            model,
            out,
            data or (),
            router_steps=router_steps,
            router_rate=router_rate,
            steps=steps,
            rate=rate,
            batch_size=batch_size,
            balance=balance,
            stand_in=stand_in,
            samples=samples,
            held_out_samples=held_out_samples,
            length=length,
            tokens=tokens,
            tokenizer=tokenizer,
            pack=pack,
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
    names = {"before": "before", "routers": "routers trained", "all": "everything trained"}
    table(
        f"loss on held-out text: {out}",
        ["", "nats per token"],
        [[names[k], f"{v:.4f}"] for k, v in result.losses.items()],
    )
    say(f"{result.trained['routers']:,} router parameters of {result.trained['all']:,}")
