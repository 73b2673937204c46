"""A first sweep that only looks: statistics of every MoE layer, safe against crashes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coterie.profiling.observe import LayerObservation
from coterie.profiling.observers import Observer
from coterie.profiling.profile import LayerProfile, load_layers, save_layers
from coterie.streaming.lockstep import Progress, States, sweep
from coterie.streaming.model import StreamedModel
from coterie.streaming.writer import Workspace
from coterie.text import TokenData


class Seen:
    """Profiles of layers, kept beside the journal for a restart."""

    def __init__(self, work: Workspace) -> None:
        self.folder = work.folder / "seen"

    def keep(self, layer: LayerProfile) -> dict[str, Any]:
        """Keep the profile of one layer; returns what the journal has to say of it."""
        self.folder.mkdir(exist_ok=True)
        save_layers(self._file(layer.index), [layer])
        return layer.describe()

    def again(self, index: int, told: dict[str, Any]) -> LayerProfile:
        """A kept profile, from what the journal says."""
        return load_layers(self._file(index), [told])[index]

    def _file(self, index: int) -> Path:
        return self.folder / f"{index:04d}.safetensors"


def profile_first(
    streamed: StreamedModel,
    data: TokenData,
    observers: Sequence[type[Observer]],
    work: Workspace,
    states: States,
    progress: Progress,
) -> dict[int, LayerProfile]:
    """One sweep that only profiles. A restart goes on after the last whole layer."""
    seen = Seen(work)
    layers = {line["seen"]: seen.again(line["seen"], line["profile"]) for line in work.journal() if "seen" in line}
    if layers.keys() == streamed.moe.keys():
        return layers
    first = states.following(layers, streamed.moe)
    for step in sweep(streamed, data.batches, states=states, first=first, progress=progress):
        if step.index not in streamed.moe:
            step.run()
            continue
        with LayerObservation(streamed.moe[step.index], observers, len(data.domains)) as watch:
            step.run(before=lambda number, batch, watch=watch: watch.batch(batch))  # type: ignore[misc]
        layers[step.index] = watch.result()
        work.record({"seen": step.index, "profile": seen.keep(layers[step.index])})
    return layers
