"""`coterie patterns`: keep what each task needs of every expert, and find a query's task before experts are loaded."""

from typing import Annotated, Any

import typer

from coterie.cli import options as o
from coterie.cli.common import Common, emit_json, parse_set, table, verb, warn
from coterie.cli.progress import Bar

patterns = typer.Typer(
    no_args_is_help=True, help="Which experts each task needs: build a store, list it, match a query."
)

Store = Annotated[str, typer.Argument(help="Folder of a pattern store.", show_default=False)]

_K = "Keys: what queries are compared with"


@patterns.command("build", no_args_is_help=True)
@verb
def build(
    common: Common,
    model: o.Model,
    out: Annotated[str, typer.Option(help="Folder for the store.", show_default=False)],
    task: Annotated[
        list[str], typer.Option(help="name=FILE, a folder or a dataset; repeat for more.", show_default=False)
    ],
    score: Annotated[
        str, typer.Option(help="What ranks the experts: tcess, or a method that scores them on text (easy-ep, reap).")
    ] = "tcess",
    parameters: o.Set = None,
    candidates: Annotated[
        int, typer.Option(min=1, help="K_a: experts of a token whose logit counts.", rich_help_panel=_K)
    ] = 1,
    key_threshold: Annotated[
        float, typer.Option(help="r: least probability among these; -1 is off.", rich_help_panel=_K)
    ] = -1.0,
    shift: Annotated[
        str, typer.Option(help="none (raw logits), mean or logsumexp: where logits are negative.", rich_help_panel=_K)
    ] = "none",
    samples: o.Samples = 128,
    length: o.Length = 512,
    batch_size: o.BatchSize = None,
    pack: o.Pack = True,
    demonstrations: o.Demonstrations = None,
    seed: o.Seed = 0,
    tokenizer: o.Tokenizer = None,
    add: Annotated[bool, typer.Option("--add", help="Add the tasks to the store if it exists.")] = False,
    overwrite: o.Overwrite = False,
) -> None:
    """Score every expert on each task's text and store it."""
    runtime = common.runtime()
    from coterie import api

    with Bar("patterns", enabled=not common.json) as bar:
        store = api.build_patterns(
            model,
            parse_tasks(task),
            out=out,
            score=score,
            parameters=parse_set(parameters or []) or None,
            candidates=candidates,
            key_threshold=key_threshold,
            shift=parse_shift(shift),
            samples=samples,
            length=length,
            batch_size=batch_size,
            pack=pack,
            demonstrations=demonstrations,
            seed=seed,
            tokenizer=tokenizer,
            add=add,
            overwrite=overwrite,
            runtime=runtime,
            progress=bar,  # type: ignore[arg-type]
        )
    show(store, out, common.json)


@patterns.command("list", no_args_is_help=True)
@verb
def show_store(common: Common, store: Store) -> None:
    """Tasks of a store, how much their experts differ, and what the patterns were made with."""
    common.runtime()
    from pathlib import Path

    from coterie.patterns.store import PatternStore

    show(PatternStore.load(Path(store).expanduser()), store, common.json)


@patterns.command("match", no_args_is_help=True)
@verb
def match(
    common: Common,
    store: Store,
    model: o.Model,
    text: Annotated[str | None, typer.Option(help="The query.", show_default=False)] = None,
    data: o.Data = None,
    threshold: Annotated[
        float | None,
        typer.Option(help="Beyond this distance no task matches: use all of them (a generalist) or the whole model."),
    ] = None,
    samples: o.Samples = 1,
    length: o.Length = 512,
    pack: o.Pack = True,
    seed: o.Seed = 0,
    tokenizer: o.Tokenizer = None,
) -> None:
    """The task whose key is nearest to a query's; runs the model only as far as its first router, reads no expert."""
    runtime = common.runtime()
    from coterie import api

    options: dict[str, Any] = {"tokenizer": tokenizer}
    if text is None:
        options |= {"samples": samples, "length": length, "pack": pack, "seed": seed}
    found = api.match_pattern(
        store, model, query=text, data=data or (), threshold=threshold, runtime=runtime, **options
    )
    if common.json:
        emit_json(found.describe())
        return
    rows = [[name, f"{value:.4f}"] for name, value in sorted(found.distances.items(), key=lambda entry: entry[1])]
    title = f"{found.tokens} tokens: {found.task or 'no task is near enough'}"
    table(title, ["task", "distance"], rows)


def parse_tasks(items: list[str]) -> dict[str, list[str]]:
    """`name=FILE`, repeated, to {name: files}."""
    from coterie.errors import UsageError

    tasks: dict[str, list[str]] = {}
    for item in items:
        name, equals, source = item.partition("=")
        if not equals or not name.strip() or not source:
            raise UsageError(f"cannot read --task {item!r}", "Write --task name=FILE.")
        tasks.setdefault(name.strip(), []).append(source)
    return tasks


def parse_shift(text: str) -> Any:
    from coterie.errors import UsageError

    if text not in ("none", "mean", "logsumexp"):
        raise UsageError(f"--shift {text}: no such shift", "Use none, mean or logsumexp.")
    return text


def show(store: Any, folder: str, json: bool) -> None:
    """A store's tasks with the share of experts each has in common with the others at half of the experts."""
    common_half, negative = store.overlap(0.5), store.negative()
    if json:
        emit_json({"store": folder, **store.describe(), "overlap_half": common_half, "negative_scores": negative})
        return
    rows = [
        [task, str(store.tokens[task]), *(f"{common_half[task][other]:.2f}" for other in store.tasks)]
        for task in store.tasks
    ]
    title = f"{folder}: {store.score['name']} of {store.model}, {len(store.experts)} layers"
    table(title, ["task", "tokens", *(f"with {t}" for t in store.tasks)], rows)
    if any(negative.values()):
        worst = max(negative, key=lambda task: negative[task])
        warn(
            f"{negative[worst]} scores of {worst!r} are negative: chosen experts rank below unused ones;"
            " build with --shift mean"
        )
