"""Losses of several runs of one model on the same text: an experiment's control beside its interventions.

The runs share one head, so their hidden states are all that has to be kept.
"""

# B batch, L sequence, H hidden

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from coterie.evaluation.compare import (
    HiddenStates,
    ModelResult,
    _check_predictable,
    _result,
    _score,
    hidden_states,
)
from coterie.streaming.lockstep import Batch, Progress
from coterie.streaming.model import StreamedModel
from coterie.text import TokenData


class _Of(HiddenStates):
    """The hidden states of one run."""

    def __init__(self, held: HiddenStates, run: int, batches: int) -> None:
        self._all, self._first, self._batches = held, run * batches, batches

    def get(self, number: int) -> Tensor:
        return self._all.get(self._first + number)


class RunLosses:
    """Collects the hidden states of all runs, then compares each run with the first.

    pool : all tokens count alike, as one domain "all", whatever their domain.

    loss_S : per run, the sum of losses of each sequence; tokens_S, domain_S : its predicted tokens and domain.
    Raises DataError if there is no token to predict.
    """

    def __init__(self, data: TokenData, limit: int, *, pool: bool = True) -> None:
        if pool:
            pooled = [replace(b, domain_B=torch.zeros(len(b.ids_BL), dtype=torch.int64)) for b in data.batches]
            data = replace(data, batches=pooled, domains=["all"])
        self.data = data
        _check_predictable(self.data)
        self.loss_S: list[Tensor] = []
        self.tokens_S = torch.zeros(0)
        self.domain_S = torch.cat([b.domain_B for b in data.batches if b.domain_B is not None])
        self._held = HiddenStates(limit)

    def finish(self, run: int, number: int, batch: Batch, hidden_BLH: Tensor) -> None:
        self._held.put(run * len(self.data.batches) + number, batch, hidden_BLH)

    def other(
        self,
        streamed: StreamedModel,
        other: StreamedModel,
        name: str,
        *,
        memory: int,
        progress: Progress | None = None,
        seed: int = 0,
    ) -> ModelResult:
        """One more run, of another checkpoint with a head of its own, in a sweep of its own; after `results`.

        streamed : the model of the other runs, its head still loaded. `other` is used up.
        """
        theirs = hidden_states(other, self.data, memory=memory, progress=progress)
        first = _Of(self._held, 0, len(self.data.batches))
        loss_S, kl_S, same_S, tokens_S = _score(other, theirs, streamed, first, self.data)
        other.free_outer()
        self.loss_S.append(loss_S)
        return _result(name, self.data, tokens_S, loss_S, self.loss_S[0], kl_S, same_S, seed)

    def results(self, streamed: StreamedModel, names: Sequence[str], seed: int = 0) -> list[ModelResult]:
        """One result per run; for all but the first also KL, agreement and the change of loss, paired with the first.

        Loads the head and leaves it loaded.
        """
        streamed.load_head()
        count = len(self.data.batches)
        first = _Of(self._held, 0, count)
        own_S, _, _, tokens_S = _score(streamed, first, None, None, self.data)
        self.loss_S, self.tokens_S = [own_S], tokens_S
        results = [_result(names[0], self.data, tokens_S, own_S, None, None, None, seed)]
        for run, name in enumerate(names[1:], 1):
            loss_S, kl_S, same_S, _ = _score(streamed, _Of(self._held, run, count), streamed, first, self.data)
            self.loss_S.append(loss_S)
            results.append(_result(name, self.data, tokens_S, loss_S, own_S, kl_S, same_S, seed))
        return results
