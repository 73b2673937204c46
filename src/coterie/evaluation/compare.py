"""Compare checkpoints on text: loss and perplexity, KL to the first, top-1 agreement, per domain, with intervals.

Every model is streamed once; what stays is the hidden state behind its last layer (in memory, or in files above a
limit). Logits are then computed in chunks with the two heads of a pair in memory, so the vocabulary never costs more
than a chunk. Nothing has to fit.

    loss      mean of -log p(next token), nats
    KL        mean of sum_v p(v) (log p(v) - log q(v)), p the first model, q the other, nats
    agreement share of tokens whose most likely next token is the same
"""

# B batch, L sequence, H hidden, V vocabulary, T tokens, S sequences

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from coterie.errors import DataError, OutputError
from coterie.evaluation.bootstrap import interval
from coterie.streaming.head import logits
from coterie.streaming.lockstep import Batch, Progress, States, sweep
from coterie.streaming.model import StreamedModel
from coterie.text import TokenData

CHUNK_BYTES = 64 * 2**20  # of float32 logits


@dataclass(frozen=True)
class DomainResult:
    """One model on one domain. Intervals are 95% bootstrap intervals over sequences; differences are paired."""

    domain: str
    tokens: int
    loss: float
    loss_low: float
    loss_high: float
    perplexity: float
    delta: float = 0.0
    delta_low: float = 0.0
    delta_high: float = 0.0
    kl: float | None = None
    kl_low: float | None = None
    kl_high: float | None = None
    agreement: float | None = None


@dataclass
class ModelResult:
    """One model on all domains; `mean` weighs domains equally."""

    model: str
    domains: list[DomainResult] = field(default_factory=list)

    @property
    def mean_loss(self) -> float:
        return sum(d.loss for d in self.domains) / len(self.domains)

    @property
    def mean_kl(self) -> float | None:
        values = [d.kl for d in self.domains if d.kl is not None]
        return sum(values) / len(values) if values else None

    @property
    def mean_agreement(self) -> float | None:
        values = [d.agreement for d in self.domains if d.agreement is not None]
        return sum(values) / len(values) if values else None

    def describe(self) -> dict[str, Any]:
        means = {"loss": self.mean_loss, "kl": self.mean_kl, "agreement": self.mean_agreement}
        return {"model": self.model, "mean": means, "domains": [asdict(d) for d in self.domains]}


class HiddenStates:
    """Hidden states [B, L, H] of all batches behind the last layer, in memory up to `limit` bytes, then in files."""

    def __init__(self, limit: int) -> None:
        self.limit, self._used = limit, 0
        self._held: dict[int, Tensor | Path] = {}
        self._folder: TemporaryDirectory[str] | None = None

    def put(self, number: int, batch: Batch, hidden_BLH: Tensor) -> None:
        tensor = hidden_BLH.detach().cpu().contiguous()
        if self._used + tensor.nbytes <= self.limit:
            self._used += tensor.nbytes
            self._held[number] = tensor
            return
        self._folder = self._folder or TemporaryDirectory(prefix="coterie-hidden-")
        file = Path(self._folder.name) / f"{number:06d}.safetensors"
        try:
            save_file({"hidden": tensor}, file)
        except (OSError, SafetensorError) as error:
            raise OutputError(f"cannot keep hidden states in {file.parent}: {error}") from error
        self._held[number] = file

    def get(self, number: int) -> Tensor:
        held = self._held[number]
        return held if isinstance(held, Tensor) else load_file(held)["hidden"]


def hidden_states(
    streamed: StreamedModel, data: TokenData, *, memory: int = 2 * 2**30, progress: Progress | None = None
) -> HiddenStates:
    """One streamed pass; then the head is loaded."""
    held = HiddenStates(memory)
    states = States(limit=memory)
    for step in sweep(streamed, data.batches, finish=held.put, states=states, progress=progress):
        step.run()
    streamed.load_head()
    return held


def evaluate_models(
    models: Sequence[tuple[str, StreamedModel]],
    data: TokenData,
    *,
    memory: int = 2 * 2**30,
    progress: Progress | None = None,
    seed: int = 0,
) -> list[ModelResult]:
    """Loss of every model and, for all but the first, KL and agreement with the first, on the same tokens.

    Peak memory: one layer, hidden states of two models up to `memory` each, and two language-model heads.
    Raises DataError, before anything is read, if a domain has no token to predict.
    """
    _check_predictable(data)
    (name, reference), others = models[0], models[1:]
    held = hidden_states(reference, data, memory=memory, progress=progress)
    own, _, _, tokens_S = _score(reference, held, None, None, data)
    results = [_result(name, data, tokens_S, own, None, None, None, seed)]
    for other_name, other in others:
        theirs = hidden_states(other, data, memory=memory, progress=progress)
        loss_S, kl_S, same_S, _ = _score(other, theirs, reference, held, data)
        results.append(_result(other_name, data, tokens_S, loss_S, own, kl_S, same_S, seed))
        other.free_outer()
    reference.free_outer()
    return results


def _check_predictable(data: TokenData) -> None:
    count_D = torch.zeros(len(data.domains), dtype=torch.int64)
    for batch in data.batches:
        count_B = _predicted(batch).sum(1)
        count_D.index_add_(0, batch.domain_B if batch.domain_B is not None else torch.zeros_like(count_B), count_B)
    for domain, count in zip(data.domains, count_D.tolist(), strict=True):
        if not count:
            raise DataError(f"domain {domain!r} has no token to predict", "Its sequences need at least two tokens.")


def _score(
    model: StreamedModel,
    held: HiddenStates,
    reference: StreamedModel | None,
    reference_held: HiddenStates | None,
    data: TokenData,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums per sequence [S]: loss, KL, agreements; and predicted tokens."""
    sums: list[list[Tensor]] = [[], [], [], []]
    for number, batch in enumerate(data.batches):
        hidden_BLH = held.get(number)
        real_BL = _predicted(batch)
        target_T = batch.ids_BL[:, 1:][real_BL]
        row_T = torch.arange(len(batch.ids_BL))[:, None].expand(real_BL.shape)[real_BL]
        hidden_TH = hidden_BLH[:, :-1][real_BL]
        base_TH = reference_held.get(number)[:, :-1][real_BL] if reference_held is not None else None
        per_token = torch.zeros(3, len(target_T), dtype=torch.float64)
        size = max(16, CHUNK_BYTES // (4 * _vocabulary(model)))
        for first in range(0, len(target_T), size):
            part = slice(first, first + size)
            log_q_TV = logits(model, hidden_TH[None, part].to(model.device))[0].log_softmax(-1).cpu()
            per_token[0, part] = -log_q_TV.gather(1, target_T[part, None])[:, 0].double()
            if reference is not None and base_TH is not None:
                log_p_TV = logits(reference, base_TH[None, part].to(reference.device))[0].log_softmax(-1).cpu()
                per_token[1, part] = (log_p_TV.exp() * (log_p_TV - log_q_TV)).sum(-1).double()
                per_token[2, part] = (log_p_TV.argmax(-1) == log_q_TV.argmax(-1)).double()
        for i in range(3):
            sums[i].append(torch.zeros(len(batch.ids_BL), dtype=torch.float64).index_add_(0, row_T, per_token[i]))
        sums[3].append(real_BL.sum(1))
    loss_S, kl_S, same_S, tokens_S = (torch.cat(parts) for parts in sums)
    return loss_S, kl_S, same_S, tokens_S


def _vocabulary(model: StreamedModel) -> int:
    return int(model.config.get_text_config(decoder=True).vocab_size)


def _predicted(batch: Batch) -> Tensor:
    """[B, L-1]: positions whose next token is real."""
    if batch.mask_BL is None:
        return torch.ones(batch.ids_BL.shape[0], batch.ids_BL.shape[1] - 1, dtype=torch.bool)
    return batch.mask_BL[:, 1:] & batch.mask_BL[:, :-1]


def _result(
    name: str,
    data: TokenData,
    tokens_S: Tensor,
    loss_S: Tensor,
    reference_S: Tensor | None,
    kl_S: Tensor | None,
    same_S: Tensor | None,
    seed: int,
) -> ModelResult:
    result = ModelResult(name)
    domain_S = torch.cat(
        [b.domain_B if b.domain_B is not None else torch.zeros(len(b.ids_BL), dtype=torch.int64) for b in data.batches]
    )
    for number, domain in enumerate(data.domains):
        here = (domain_S == number) & (tokens_S > 0)
        tokens = tokens_S[here]
        loss, low, high = interval(loss_S[here], tokens, seed=seed)
        values: dict[str, Any] = {}
        if reference_S is not None and kl_S is not None and same_S is not None:
            delta = interval(loss_S[here] - reference_S[here], tokens, seed=seed)
            kl = interval(kl_S[here], tokens, seed=seed)
            values = dict(zip(("delta", "delta_low", "delta_high"), delta, strict=True))
            values |= dict(zip(("kl", "kl_low", "kl_high"), kl, strict=True))
            values["agreement"] = float(same_S[here].sum() / tokens.sum())
        perplexity = math.exp(min(loss, 700.0))
        result.domains.append(DomainResult(domain, int(tokens.sum()), loss, low, high, perplexity, **values))
    return result
