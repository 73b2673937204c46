"""Make a checkpoint of others: experts cut finer, or gathered from several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coterie.api.runtime import Runtime
from coterie.compression.records import versions
from coterie.streaming.checkpoint import Checkpoint, resolve
from coterie.streaming.writer import Workspace, check_place, save_whole, write_json


@dataclass
class Grown:
    """What was written. experts, top_k : of each MoE layer, before (of the first checkpoint) and after."""

    out: Path
    experts: tuple[int, int]
    top_k: tuple[int, int]
    parameters: tuple[int, int]
    record: dict[str, Any] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        return {**self.record, "out": str(self.out)}


def segment(model: str, out: str, *, pieces: int = 4, overwrite: bool = False, runtime: Runtime | None = None) -> Grown:
    """Cut every expert into `pieces`, exactly, see `coterie.conversion.segment`."""
    from coterie.conversion.segment import segment as cut

    return _written(
        [model], out, {"job": "segment", "pieces": pieces}, lambda models: cut(models[0], pieces), overwrite, runtime
    )


def aggregate(
    models: Sequence[str],
    out: str,
    *,
    weights: Sequence[float] | None = None,
    noise: float = 0.0,
    renormalise_twins: bool = False,
    seed: int = 0,
    overwrite: bool = False,
    runtime: Runtime | None = None,
) -> Grown:
    """Gather the experts of several checkpoints in one model, see `coterie.conversion.aggregate`."""
    from coterie.conversion.aggregate import aggregate as gather

    how: dict[str, Any] = {"weights": weights, "noise": noise, "renormalise_twins": renormalise_twins, "seed": seed}
    return _written(
        models,
        out,
        {"job": "aggregate", **how},
        lambda found: gather(found, **how),
        overwrite,
        runtime,
    )


def _written(
    names: Sequence[str],
    out: str,
    job: dict[str, Any],
    convert: Callable[[list[Any]], Any],
    overwrite: bool,
    runtime: Runtime | None,
) -> Grown:
    from transformers import AutoModelForCausalLM

    from coterie.anatomy import moe_layers
    from coterie.streaming.model import StreamedModel

    runtime = runtime or Runtime()
    runtime.ready()
    folders = [resolve(name, offline=runtime.offline) for name in names]
    check_place(Path(out), overwrite=overwrite, source=folders[0])
    job = {**job, "checkpoints": [Checkpoint.open(folder).digest() for folder in folders], "versions": versions()}
    for folder in folders:  # everything in it is checked before anything is loaded
        StreamedModel(Checkpoint.open(folder)).refuse_packed("what is made of it would not be")
    with Workspace(Path(out), job, overwrite=overwrite) as work:
        given = {"dtype": "auto", "trust_remote_code": runtime.trust_remote_code}
        models = [AutoModelForCausalLM.from_pretrained(folder, **given).eval() for folder in folders]
        made = convert(models)
        layers = [moe_layers(m)[0] for m in (models[0], made)]
        grown = Grown(
            Path(out),
            (layers[0].num_experts, layers[1].num_experts),
            (layers[0].top_k, layers[1].top_k),
            (sum(p.numel() for p in models[0].parameters()), sum(p.numel() for p in made.parameters())),
        )
        files = save_whole(made, folders[0], work.folder)
        grown.record = {
            **job,
            "experts": list(grown.experts),
            "top_k": list(grown.top_k),
            "parameters": list(grown.parameters),
        }
        write_json(work.folder / "coterie.json", grown.record)
        work.publish([*files, "coterie.json"])
    return grown
