"""`coterie grow`: more and other experts out of those a checkpoint has."""

from typing import Annotated, Any

import typer

from coterie.cli import options as o
from coterie.cli.common import Common, emit_json, say, verb

grow = typer.Typer(no_args_is_help=True, help="Cut experts into finer ones, or gather those of several checkpoints.")


@grow.command()
@verb
def segment(
    common: Common,
    model: o.Model,
    out: Annotated[str, typer.Argument(help="Folder to write.", show_default=False)],
    pieces: Annotated[int, typer.Option(min=2, help="Experts that each expert becomes.")] = 4,
    overwrite: o.Overwrite = False,
) -> None:
    """Cut every expert into finer ones; the model computes the same (and must fit in memory twice).

    More experts of less width can be combined in far more ways (DeepSeekMoE): train on from there.

      coterie grow segment MODEL finer --pieces 4
    """
    runtime = common.runtime()
    from coterie import api

    _told(common, api.segment(model, out, pieces=pieces, overwrite=overwrite, runtime=runtime))


@grow.command()
@verb
def aggregate(
    common: Common,
    models: Annotated[list[str], typer.Argument(help="Checkpoints of one architecture, and the folder to write last.")],
    weights: Annotated[
        list[float] | None,
        typer.Option("--weight", help="Of each checkpoint in the mean of all that is no expert.", show_default=False),
    ] = None,
    noise: Annotated[
        float, typer.Option(min=0, help="Relative noise on the experts of all but the first, to tell twins apart.")
    ] = 0.0,
    renormalise_twins: Annotated[
        bool, typer.Option("--renormalise-twins", help="For copies of one model: experts' outputs times their number.")
    ] = False,
    seed: o.Seed = 0,
    overwrite: o.Overwrite = False,
) -> None:
    """Gather the experts of several checkpoints in one model, a warm start for twice the experts (Z-code M3).

    coterie grow aggregate RUN-A RUN-B both
    """
    from coterie.errors import UsageError

    if len(models) < 3:
        raise UsageError("aggregation takes at least two checkpoints, and a folder to write")
    runtime = common.runtime()
    from coterie import api

    result = api.aggregate(
        models[:-1],
        models[-1],
        weights=weights or None,
        noise=noise,
        renormalise_twins=renormalise_twins,
        seed=seed,
        overwrite=overwrite,
        runtime=runtime,
    )
    _told(common, result)


def _told(common: Common, result: Any) -> None:
    if common.json:
        emit_json(result.describe())
        return
    say(f"{result.out}: {result.experts[0]} experts per layer became {result.experts[1]}, {result.top_k[1]} per token")
    say(f"{result.parameters[0]:,} parameters became {result.parameters[1]:,}")
