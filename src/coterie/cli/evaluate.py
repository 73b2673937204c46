"""`coterie evaluate`: what did it cost? Perplexity, KL to the original, agreement, per domain; or benchmark tasks."""

from typing import Annotated, Any

import typer

from coterie.cli import options as o
from coterie.cli.common import Common, emit_json, gigabytes, say, table, verb, warn
from coterie.cli.progress import Bar
from coterie.errors import UsageError

_T = "Benchmark tasks, by the lm-evaluation-harness (the extra `eval`)"
Tasks = Annotated[
    list[str] | None,
    typer.Option(
        help="Score these instead of text: names of tasks or groups (hellaswag,arc_easy), or task files; with commas"
        " or repeated. All in one sweep over each checkpoint.",
        rich_help_panel=_T,
        show_default=False,
    ),
]
NumFewshot = Annotated[
    int | None,
    typer.Option(min=0, help="Examples before each document; by default what a task says.", rich_help_panel=_T),
]
Limit = Annotated[
    float | None,
    typer.Option(
        min=0, help="Only so many documents of each task, or this share of them if below 1.", rich_help_panel=_T
    ),
]
IncludePath = Annotated[
    list[str] | None,
    typer.Option(help="Folder with task files (*.yaml) of your own; repeat for more.", rich_help_panel=_T),
]
Streamed = Annotated[
    bool | None,
    typer.Option(
        "--streamed/--resident",
        help="Layer by layer from the disk, or whole in memory. By default streamed; tasks that make the model write"
        " text can only be resident, and are if it fits into 80% of the free memory.",
        rich_help_panel=_T,
        show_default=False,
    ),
]
ChatTemplate = Annotated[
    bool,
    typer.Option("--apply-chat-template", help="Put prompts into the model's conversation format.", rich_help_panel=_T),
]


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
    skip: Annotated[
        str | None,
        typer.Option(
            help="Folder made by `coterie profile` of the first model: measure it a second time with its weak experts"
            " skipped at run time.",
            show_default=False,
        ),
    ] = None,
    skip_quantile: Annotated[
        float, typer.Option(min=0, max=1, help="Share of tokens that skip, per layer and rank, with --skip.")
    ] = 0.5,
    skip_tokens: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            help="Share of each sequence's tokens, the most important ones, that skip nothing, with --skip: 0.02 makes"
            " it ODP. Needs memory for attention probabilities.",
        ),
    ] = 0.0,
    skip_layers: Annotated[
        str | None, typer.Option(help="Only these decoder layers skip, e.g. 4-30, with --skip.", show_default=False)
    ] = None,
    planes: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Read only so many planes of checkpoints made by --method d2moe: 0 is the base alone.",
            show_default=False,
        ),
    ] = None,
    tasks: Tasks = None,
    num_fewshot: NumFewshot = None,
    limit: Limit = None,
    include_path: IncludePath = None,
    streamed: Streamed = None,
    apply_chat_template: ChatTemplate = False,
) -> None:
    """Compare checkpoints on text or on benchmark tasks, streamed; nothing has to fit in memory."""
    names = [name.strip() for item in tasks or () for name in item.split(",") if name.strip()]
    if names and (data or tokens):
        raise UsageError(f"--tasks and {'--data' if data else '--tokens'} both say what to run on", "Give one of them.")
    if not names and (tasks or num_fewshot is not None or limit is not None or include_path):
        raise UsageError("no task is named", "Name some with --tasks.")
    if names and skip:
        raise UsageError("--skip is measured on text, not on tasks", "Use --data with it.")
    if names and planes is not None:
        raise UsageError("--planes is measured on text, not on tasks", "Use --data with it.")
    if not skip and (skip_tokens or skip_layers):
        raise UsageError("--skip-tokens and --skip-layers say how to skip", "Name a profile with --skip.")
    if not names and (streamed is not None or apply_chat_template):
        raise UsageError("--streamed, --resident and --apply-chat-template are about tasks", "Name some with --tasks.")
    if limit is not None and limit <= 0:
        raise UsageError(f"--limit {limit:g} leaves no document", "Give a number of documents, or a share like 0.1.")
    runtime = common.runtime()
    from coterie import api

    if names:
        with Bar("evaluate", enabled=not common.json) as bar:
            scores = api.score_tasks(
                models,
                names,
                include_path=include_path or (),
                how="auto" if streamed is None else ("streamed" if streamed else "resident"),
                num_fewshot=num_fewshot,
                limit=limit,
                apply_chat_template=apply_chat_template,
                seed=seed,
                batch_size=batch_size,
                tokenizer=tokenizer,
                runtime=runtime,
                progress=bar,  # type: ignore[arg-type]
            )
        if common.json:
            emit_json([score.describe() for score in scores])
        else:
            show_scores(scores)
        return
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
            skip_profile=skip,
            skip_quantile=skip_quantile,
            skip_tokens=skip_tokens,
            skip_layers=skip_layers,
            planes=planes,
            seed=seed,
            runtime=runtime,
            progress=bar,  # type: ignore[arg-type]
        )
    if common.json:
        emit_json([result.describe() for result in results])
    else:
        show(results)


def show_scores(scores: list[Any]) -> None:
    """A row per task and metric, a column per model: value and standard error; then the difference to the first."""
    rows = []
    for metric in scores[0].metrics:
        key = (metric.task, metric.name, metric.filter)
        cells = [f"{metric.value:.4f}{_error(metric.stderr)}"]
        for score in scores[1:]:
            found = next((m for m in score.metrics if (m.task, m.name, m.filter) == key), None)
            cells.append(
                f"{found.value:.4f}{_error(found.stderr)}  {found.delta:+.4f}{_error(found.delta_stderr)}"
                if found
                else ""
            )
        name = metric.name if metric.filter == "none" else f"{metric.name}, {metric.filter}"
        rows.append([metric.task, name, str(metric.documents), str(metric.fewshot or 0), *cells])
    title = "tasks: value (standard error)" + (", change against the first (its error)" if len(scores) > 1 else "")
    table(title, ["task", "metric", "documents", "shots", *(score.model for score in scores)], rows, left=2)
    for score in scores:
        cost = f"{score.sweeps} sweep{'s' * (score.sweeps != 1)}, {gigabytes(score.bytes_read)} read, "
        say(
            f"{score.model}, {score.how}: {cost * (score.how == 'streamed')}{score.requests:,} requests in"
            f" {score.rows:,} inputs of {score.tokens:,} tokens, {score.seconds:.1f} s"
        )
        for warning in score.warnings:
            warn(f"{score.model}: {warning}")
    if scores[0].limit is not None:
        warn("--limit: these are not the benchmarks' numbers, only comparable with each other")


def _error(value: float | None) -> str:
    return f" ({value:.4f})" if value is not None else ""


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
