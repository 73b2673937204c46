"""Which stored task is a query nearest to? Asked of the router of the first MoE layer, before experts are loaded.

The query's tokens run through the embeddings, the dense layers before the first MoE layer and that layer's attention,
as far as its router; there the walk ends. What is compared is the mean confident logits, as for the tasks' keys, by
plain L2 distance. No weight of an expert is read.
"""

# E experts, D tasks

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from greenlet import GreenletExit
from torch import Tensor

from coterie.anatomy import slice_names
from coterie.errors import UsageError
from coterie.patterns.store import Key, PatternStore
from coterie.profiling.contribution import confident
from coterie.profiling.observe import LayerObservation
from coterie.streaming.lockstep import sweep
from coterie.streaming.model import StreamedModel
from coterie.text import TokenData


@dataclass(frozen=True)
class Match:
    """The nearest task of a query, or None where none is as near as asked; all distances, and the query's length."""

    task: str | None
    distances: dict[str, float]
    tokens: int
    threshold: float | None = None

    def describe(self) -> dict[str, Any]:
        return vars(self)


def nearest(store: PatternStore, query_E: Tensor, tokens: int, threshold: float | None = None) -> Match:
    """The task whose key has the least L2 distance to `query_E`; None if that is above `threshold`."""
    distance_D = (store.keys_DE - query_E.double()).norm(dim=1)
    best = int(distance_D.argmin())
    near = threshold is None or float(distance_D[best]) <= threshold
    return Match(
        store.tasks[best] if near else None,
        dict(zip(store.tasks, distance_D.tolist(), strict=True)),
        tokens,
        threshold,
    )


def match(store: PatternStore, streamed: StreamedModel, query: TokenData, threshold: float | None = None) -> Match:
    """`nearest` for samples of text. Raises UsageError if the store is of another model."""
    store.check(streamed)
    return nearest(store, probe(streamed, query, store.key), sum(query.tokens.values()), threshold)


class _AtTheRouter(LayerObservation):
    """Sees what the router said, and ends the walk of the batch before an expert would run."""

    def routed(self, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> bool:
        super().routed(x_TH, index_TK, weight_TK)
        raise GreenletExit


def probe(streamed: StreamedModel, query: TokenData, key: Key) -> Tensor:
    """Key [E] of samples of text, taken together. Reads no expert; the streamed model is as before afterwards."""
    with _without_experts(streamed, key.layer):
        steps = sweep(streamed, query.batches)
        for step in steps:
            if step.index == key.layer:
                with _AtTheRouter(streamed.moe[key.layer], [key.observer], len(query.domains)) as watch:
                    step.run(before=lambda number, batch: watch.batch(batch))
                steps.close()
                streamed.free_layer(key.layer)
                break
    streamed.free_outer()
    found = watch.result().stats
    if key.name not in found:
        raise UsageError(f"the router of layer {key.layer} shows no logits of all experts: queries cannot be matched")
    return found[key.name].sum(0) / found["tokens_D"].sum()


@contextmanager
def _without_experts(streamed: StreamedModel, last: int) -> Iterator[None]:
    """As if the checkpoint ended at layer `last` and that had no experts: nothing else is loaded or read ahead."""
    before, layer = streamed.layer_keys, streamed.moe[last]
    experts = {name for name in slice_names(layer) if name.startswith(f"{layer.experts_name}.")}
    rest = [key for key in before[last] if streamed.params[key] not in experts]
    streamed.layer_keys = [*before[:last], rest, *([] for _ in before[last + 1 :])]
    try:
        yield
    finally:
        streamed.layer_keys = before


def text_key(logits_TE: Tensor, key: Key) -> Tensor:
    """Key [E] of the router's raw logits of a query's tokens."""
    return confident(logits_TE, key.candidates, key.threshold, key.shift).mean(0).cpu()
