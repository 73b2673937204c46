"""`coterie compress`: the main job. Name a checkpoint and a budget, get a smaller one, see what it cost."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from coterie.cli import options as o
from coterie.cli.common import Common, emit_json, gigabytes, millions, parse_set, say, table, verb, warn
from coterie.cli.progress import Bar
from coterie.errors import CoterieError, UsageError


@verb
def compress(
    common: Common,
    context: typer.Context,
    model: o.Model,
    out: Annotated[str, typer.Argument(help="Folder for the smaller checkpoint.", show_default=False)],
    method: Annotated[str, typer.Option(help="One of `coterie methods`.")] = "reap",
    keep: o.Keep = None,
    keep_experts: o.KeepExperts = None,
    target_size: o.TargetSize = None,
    scope: o.Scope = "uniform",
    minimum: o.Minimum = 1,
    layers: o.Layers = None,
    exclude_layers: o.ExcludeLayers = None,
    protect: o.Protect = None,
    data: o.Data = None,
    profile: Annotated[str | None, typer.Option(help="Use a finished profile instead of text.")] = None,
    plan: Annotated[str | None, typer.Option(help="Carry out this plan file; it holds method and budget.")] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Carry out this recipe: a YAML file with methods, budgets and healing, or one that ships with Coterie"
            " (prune-heal, prune-quantize, merge-heal, merge-factorize, slim-heal-slim-heal)."
        ),
    ] = None,
    parameters: o.Set = None,
    propagate: Annotated[
        bool, typer.Option("--propagate", help="Let later layers see what the changed earlier ones put out.")
    ] = False,
    samples: o.Samples = 128,
    length: o.Length = 512,
    batch_size: o.BatchSize = None,
    pack: o.Pack = True,
    demonstrations: o.Demonstrations = None,
    seed: o.Seed = 0,
    tokens: o.Tokens = None,
    tokenizer: o.Tokenizer = None,
    evaluate: Annotated[
        list[str] | None, typer.Option(help="Held-out text: evaluate before and after, and put it into the report.")
    ] = None,
    evaluate_samples: Annotated[int, typer.Option(min=1, help="Sequences per domain for --evaluate.")] = 32,
    shard_size: Annotated[str, typer.Option(help="Largest shard.")] = "5GB",
    report: Annotated[bool, typer.Option(help="Write report.html into the output folder.")] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it would need and stop before anything is written.")
    ] = False,
    overwrite: o.Overwrite = False,
) -> None:
    """Shrink a checkpoint of any size, one layer in memory at a time.

    A killed run, started again with the same command, goes on after its last whole layer.
    """
    began = time.monotonic()
    runtime = common.runtime()
    from coterie import api
    from coterie.cli.evaluate import show
    from coterie.compression.forecast import redundancy
    from coterie.streaming.writer import check_place

    _refuse_contradictions(context, plan=plan, recipe=recipe)
    budget: dict[str, Any] = {
        "keep": keep,
        "keep_experts": keep_experts,
        "target_size": target_size,
        "scope": scope,
        "minimum": minimum,
        "layers": layers,
        "exclude_layers": exclude_layers,
        "protect": protect or (),
    }
    text: dict[str, Any] = {
        "tokens": tokens,
        "tokenizer": tokenizer,
        "samples": samples,
        "length": length,
        "batch_size": batch_size,
        "pack": pack,
        "demonstrations": demonstrations,
        "seed": seed,
    }
    request: dict[str, Any] = {
        "method": method,
        "parameters": parse_set(parameters or []),
        "data": data or (),
        "profile": profile,
        "propagate": propagate,
        **budget,
        **text,
    }

    def measured() -> list[Any]:
        with Bar("evaluate", enabled=not common.json) as bar:
            return api.evaluate(
                [model, out],
                evaluate or (),
                samples=evaluate_samples,
                length=length,
                tokenizer=tokenizer,
                seed=seed,
                runtime=runtime,
                progress=bar,  # type: ignore[arg-type]
            )

    if not dry_run:
        check_place(Path(out), overwrite=overwrite, source=Path(model) if Path(model).is_dir() else None)
    if evaluate:  # what is wrong with this text should not be found after the compression
        api.calibration(model, evaluate, samples=1, length=length, tokenizer=tokenizer, seed=seed, runtime=runtime)
    if plan is not None:
        request = {"plan": plan}
        if _says_bits(plan):  # which text weights are rounded by is not in it
            request |= {"data": data or (), **text}
    if recipe is not None:
        # how the recipe's text is read, not what is done; and the text, if it names none
        also = ("data", "tokens", "tokenizer", "batch_size", "pack", "demonstrations")
        requests = api.recipe_requests(recipe, {k: request[k] for k in also if _was_given(context, k)})
        if len(requests) > 1 or "heal" in requests[0]:
            if dry_run:
                raise UsageError("--dry-run forecasts one compression; this recipe is more", "Leave it out.")
            last = _carry_out(common, runtime, model, out, requests, shard_size, overwrite)
            quality = measured() if evaluate else []
            if common.json:
                emit_json({**last.record, "out": out, "quality": [q.describe() for q in quality]})
            elif quality:
                show(quality)
            return
        request = requests[0]

    def forecast_first_layer(layer: Any, layer_plan: Any) -> None:
        """Printed while the sweep runs: what the first MoE layer says about the budget."""
        if not common.json:
            _show_redundancy(redundancy({layer.index: layer}, {layer.index: layer_plan}), "first MoE layer")

    with Bar("compress", enabled=not common.json) as bar:
        prepared = api.prepare(model, runtime=runtime, **request)
        ahead = api.forecast(model, out, progress=bar, measure=dry_run, prepared=prepared)  # type: ignore[arg-type]
        _show_forecast(ahead, common)
        if dry_run:
            if common.json:
                emit_json(ahead.describe())
            return
        result = api.compress(
            model,
            out,
            progress=bar,  # type: ignore[arg-type]
            shard_size=shard_size,
            overwrite=overwrite,
            on_first_layer=forecast_first_layer,
            prepared=prepared,
        )
    for text_warning in result.warnings:
        warn(text_warning)
    figures = redundancy(result.layers, {layer.index: layer for layer in result.plan.layers})
    if figures["warning"]:
        warn(figures["warning"])
    quality = measured() if evaluate else []
    if report:
        _write_report(out, quality, result, figures, time.monotonic() - began)
    if common.json:
        emit_json({**result.record, "out": out, "redundancy": figures, "quality": [q.describe() for q in quality]})
        return
    _show_result(result, out, time.monotonic() - began, report)
    if quality:
        show(quality)


def _carry_out(
    common: Common, runtime: Any, model: str, out: str, requests: list[Any], shard_size: str, overwrite: bool
) -> Any:
    """Every step of a recipe, told as it is done; returns the last result."""
    from coterie import api
    from coterie.cli.heal import show_healed

    began, number_of_steps = time.monotonic(), len(requests)

    def told(number: int, result: Any) -> None:
        for warning in result.warnings:
            warn(warning)
        if not common.json:
            say(f"step {number} of {number_of_steps}")
            if "heal" in requests[number - 1]:
                show_healed(result, out)
            else:
                _show_result(result, out, time.monotonic() - began, report=False)

    with Bar("compress", enabled=not common.json) as bar:
        return api.carry_out(
            model,
            out,
            requests,
            shard_size=shard_size,
            overwrite=overwrite,
            runtime=runtime,
            progress=bar,  # type: ignore[arg-type]
            on_step=told,
        )


# what a finished plan, or a recipe, already says: command line names of parameters
_BUDGET = ("keep", "keep_experts", "target_size", "scope", "minimum", "layers", "exclude_layers", "protect")
_DECIDED = ("method", "parameters", "propagate", "profile", "samples", *_BUDGET)


def _was_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _refuse_contradictions(context: typer.Context, *, plan: str | None, recipe: str | None) -> None:
    """A plan or a recipe says all of it; an option beside it would be ignored, so it is refused."""
    chosen = "--plan" if plan is not None else "--recipe"
    if plan is None and recipe is None:
        return
    text = ("data", "tokens", "batch_size", "pack", "demonstrations")
    decided: tuple[str, ...] = _DECIDED
    if plan is not None and _says_bits(plan):
        decided = (*(name for name in _DECIDED if name != "samples"), "recipe")
    elif plan is not None:
        decided = (*_DECIDED, "recipe", *text)
    if names := [name for name in decided if _was_given(context, name)]:
        options = ", ".join("--set" if name == "parameters" else "--" + name.replace("_", "-") for name in names)
        raise UsageError(
            f"{chosen} already says what is to be done: {options} would be ignored", f"Leave out {options}."
        )


def _says_bits(plan: str) -> bool:
    from coterie.compression.bits import BitPlan, load_plan

    return isinstance(load_plan(Path(plan)), BitPlan)


def _write_report(out: str, quality: list[Any], result: Any, figures: dict[str, Any], elapsed: float) -> None:
    from coterie.analysis.report import write_report
    from coterie.reporting import build_report

    try:
        page = build_report([out], quality, loads=result.layers, redundancy=figures, elapsed=elapsed)
        write_report(page, Path(out) / "report.html")
    except CoterieError as error:  # the checkpoint is complete; a report that cannot be written must not hide that
        warn(f"the checkpoint is complete, but its report could not be written: {error.message}")


def _show_forecast(ahead: Any, common: Common) -> None:
    for problem in ahead.problems():
        warn(problem)
    if common.json:
        return
    seconds = "" if ahead.seconds is None else f", about {ahead.seconds / 60:.1f} minutes"
    say(
        f"needs about {gigabytes(ahead.memory_bytes)} of memory and {gigabytes(ahead.disk_bytes)} of disk,"
        f" reads {gigabytes(ahead.bytes_to_read)} in {ahead.sweeps} sweep{'s' if ahead.sweeps > 1 else ''}{seconds}"
    )
    if ahead.redundancy:
        _show_redundancy(ahead.redundancy, "first MoE layer")


def _show_redundancy(figures: dict[str, Any], where: str) -> None:
    shown = [f"{name.replace('_', ' ')} {value:.2f}" for name, value in figures.items() if isinstance(value, float)]
    say(f"{where}: {', '.join(shown)}")
    if figures.get("warning"):
        warn(figures["warning"])


def _show_result(result: Any, out: str, elapsed: float, report: bool) -> None:
    from coterie.compression.apply import slimmed_rows, spoken_sparsity
    from coterie.compression.sizes import spoken_experts

    before, after = result.before, result.after
    rows = [
        ["experts per layer", spoken_experts(before.describe()), spoken_experts(after.describe())],
        *([what, str(old), str(new)] for what, old, new in slimmed_rows(result.record)),
        ["weights", gigabytes(before.bytes), gigabytes(after.bytes)],
        ["parameters", millions(before.parameters), millions(after.parameters)],
        ["active per token", millions(before.active_parameters), millions(after.active_parameters)],
    ]
    table(f"{result.plan.method}: {out}", ["", "before", "after"], rows)
    if skipping := result.record.get("skipping"):
        told = ", ".join(f"{entry['experts_per_token']:.2f}" for entry in skipping["layers"])
        say(
            f"{skipping['experts_per_token']:.2f} of {skipping['picked_per_token']:g} experts run per token on this"
            f" text, {skipping['share']:.1%} of the activations; by layer {told}"
        )
    if widths := result.record.get("widths"):
        shares = ", ".join(f"{share:.1%} at {bits}" for bits, share in widths["shares"].items())
        by_layer = ", ".join(f"{entry['mean_bits']:.2f}" for entry in widths["layers"])
        say(f"experts run at {widths['mean_bits']:.3f} bits on this text ({shares}); by layer {by_layer}")
    if sparsity := result.record.get("sparsity"):
        say(f"sparsity {spoken_sparsity(sparsity)}")
        sparse = gigabytes(sparsity["bytes_if_stored_sparse"])
        say(f"a bit mask and the other values would take {sparse}; this checkpoint does not")
    if told := result.record.get("quantization"):
        say(f"experts have {told['expert_bits']:.3f} bits per weight, scales not counted; sizes are those of files")
    resumed = ", resumed" if result.resumed else ""
    say(
        f"{result.sweeps} sweep{'s' if result.sweeps > 1 else ''}, {gigabytes(result.bytes_read)} read,"
        f" {gigabytes(result.bytes_written)} written, {elapsed:.1f} s{resumed}"
        + (f"; see {out}/report.html" if report else "")
    )
