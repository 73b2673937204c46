"""Profile a model: one sweep in which observers watch every MoE layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from coterie.profiling.observe import LayerObservation
from coterie.profiling.observers import Observer
from coterie.profiling.profile import LayerProfile, Profile
from coterie.streaming.lockstep import Progress, States, sweep
from coterie.streaming.model import StreamedModel
from coterie.text import TokenData


def profile_model(
    streamed: StreamedModel,
    data: TokenData,
    observers: Sequence[type[Observer]],
    *,
    model: str,
    states: States | None = None,
    progress: Progress | None = None,
    digest: str | None = None,
) -> Profile:
    """Statistics of every MoE layer on `data`.

    Peak memory: one layer, the waiting hidden states up to the limit of `states`, and the observers' sums.
    Raises ModelError if a layer does not follow the contract, CheckpointError for unreadable weights.
    """
    layers: dict[int, LayerProfile] = {}
    for step in sweep(streamed, data.batches, states=states, progress=progress):
        if step.index in streamed.moe:
            with LayerObservation(streamed.moe[step.index], observers, len(data.domains)) as watch:
                step.run(before=lambda number, batch, watch=watch: watch.batch(batch))  # type: ignore[misc]
            layers[step.index] = watch.result()
    settings = {
        "samples": data.samples,
        "length": data.length,
        "tokens": data.tokens,
        "sources": data.sources,
        "compute_dtype": str(streamed.compute_dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }
    rules = {name: rule for observer in observers for name, rule in observer.fields.items()}
    digest = digest or streamed.checkpoint.digest()
    return Profile(model, digest, data.digest, data.domains, layers, settings, rules)


def survey(
    streamed: StreamedModel, observers: Sequence[type[Observer]], progress: Progress | None = None
) -> dict[int, LayerProfile]:
    """Statistics of the weights alone: every MoE block is loaded once, or only its router, no token passes."""
    progress, found = progress or Progress(), {}
    progress.start("layers", len(streamed.layers))
    for index in range(len(streamed.layers)):
        if index in streamed.moe:
            streamed.load_moe(index, experts=any(o.needs_experts for o in observers))
            found[index] = LayerObservation(streamed.moe[index], observers, 1).result()
            streamed.free_layer(index)
        progress.layer(index)
    streamed.forget_buffers()
    progress.done()
    return found
