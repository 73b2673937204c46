"""`coterie heal`: train a compressed checkpoint until it says again what its teacher says."""

from typing import Annotated, Any

import typer

from coterie.cli import options as o
from coterie.cli.common import Common, emit_json, helps_only, millions, say, table, verb, warn
from coterie.cli.progress import Bar

_D = "Distillation"


@verb
def heal(
    common: Common,
    student: Annotated[str, typer.Argument(help="The compressed checkpoint.", show_default=False)],
    out: Annotated[str, typer.Argument(help="Folder for the healed checkpoint.", show_default=False)],
    teacher: Annotated[
        str, typer.Option(help="The checkpoint it was made from; it need not fit into memory.", show_default=False)
    ],
    data: o.Data = None,
    train: Annotated[
        str, typer.Option(help="What learns: all, routers, experts, or lora (needs peft); all else stays as it is.")
    ] = "all",
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 200,
    rate: Annotated[
        float | None,
        typer.Option(help="Learning rate; by default 5e-5, for routers 1e-3, for lora 2e-4.", show_default=False),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per batch (and process).")] = 8,
    accumulate: Annotated[int, typer.Option(min=1, help="Batches per step.")] = 1,
    schedule: Annotated[str, typer.Option(help="How the rate falls: linear, cosine, constant_with_warmup.")] = "linear",
    warmup: Annotated[float, typer.Option(help="Share of the steps in which the rate rises.")] = 0.05,
    weight_decay: Annotated[float, typer.Option(help="Weight decay.")] = 0.0,
    precision: Annotated[str, typer.Option(help="Computing: float32, bfloat16 or float16 (autocast).")] = "float32",
    lora_rank: Annotated[int, typer.Option(min=1, help="Rank of the updates of --train lora.")] = 16,
    logits: Annotated[
        str,
        typer.Option(help="cached: stream the teacher once, first. online: hold it in memory.", rich_help_panel=_D),
    ] = "cached",
    cache: Annotated[
        str | None,
        typer.Option(help="Folder to keep the teacher's logits in, or that holds them.", rich_help_panel=_D),
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option(
            help="tail, renormalised, cross-entropy, or full (online only); by default tail, and full if online.",
            show_default=False,
            rich_help_panel=_D,
        ),
    ] = None,
    top: Annotated[
        int, typer.Option(min=1, help="The teacher's most likely tokens that count.", rich_help_panel=_D)
    ] = 64,
    temperature: Annotated[float, typer.Option(help="Temperature of both models.", rich_help_panel=_D)] = 1.0,
    kd_weight: Annotated[float, typer.Option(help="Weight of the loss against the teacher.", rich_help_panel=_D)] = 1.0,
    lm_weight: Annotated[float, typer.Option(help="Weight of the loss on the text itself.", rich_help_panel=_D)] = 0.0,
    samples: o.Samples = 1024,
    held_out_samples: Annotated[
        int, typer.Option(min=1, help="Sequences per domain kept out of training, to measure losses on.")
    ] = 16,
    length: o.Length = 256,
    tokens: o.Tokens = None,
    tokenizer: o.Tokenizer = None,
    pack: o.Pack = True,
    seed: o.Seed = 0,
    overwrite: o.Overwrite = False,
) -> None:
    """Heal a compressed checkpoint: distil the original back into it (the student must fit in memory).

      coterie compress MODEL small --method reap --keep 0.5 --data calibration.jsonl
      coterie heal small healed --teacher MODEL --data text.jsonl --train routers

    Several processes: torchrun --nproc_per_node 2 -m coterie.cli.main heal ... A killed run, started again with the
    same command, goes on from its last checkpoint.
    """
    runtime = common.runtime()
    from coterie import api

    with Bar("heal", enabled=not (common.json or helps_only())) as bar:
        result = api.heal(
            student,
            out,
            data or (),
            teacher=teacher,
            train=train,
            steps=steps,
            rate=rate,
            batch_size=batch_size,
            accumulate=accumulate,
            schedule=schedule,
            warmup=warmup,
            weight_decay=weight_decay,
            precision=precision,
            lora_rank=lora_rank,
            logits=logits,
            cache=cache,
            loss=loss,
            top=top,
            temperature=temperature,
            kd_weight=kd_weight,
            lm_weight=lm_weight,
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
    for warning in result.warnings:
        warn(warning)
    if common.json:
        emit_json({**result.record, "out": out})
        return
    show_healed(result, out)


def show_healed(result: Any, out: str) -> None:
    """Losses before and after, and how much was trained."""
    losses, asked = result.losses, result.record["recipe"]["parameters"]
    rows = [[name, f"{losses[name]['loss']:.4f}", f"{losses[name]['kd']:.4f}"] for name in ("before", "after")]
    rows.append(["teacher", f"{losses['teacher']:.4f}", ""])
    table(f"on held-out text: {out}", ["", "loss (nats per token)", f"{asked['loss']} loss to the teacher"], rows)
    counts, training = result.record["parameters"], result.record["phases"]["training"]
    say(
        f"{asked['train']}: {millions(counts['trained'])} of {millions(counts['all'])} parameters,"
        f" {training['steps']} steps, {training['seconds']:.1f} s"
    )
