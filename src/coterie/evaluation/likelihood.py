"""Log-likelihoods of continuations, streamed: any number of pairs in one sweep over a checkpoint of any size.

    log p(continuation | context) = sum_j log p(c_j | context, c_1 .. c_(j-1))        nats

What the model runs is context and continuation without its last token. Equal inputs run once, and an input that another
one begins with runs as part of it: the state of a token does not depend on what follows. For the same reason rows of a
batch are padded on the right and no mask is needed; without one most models build no attention matrix per batch.

Only the states whose next token is asked for outlive the sweep; their logits are then computed in chunks. It knows
tokens, not text. A model whose position table changes with the length of the whole input (a "longrope" or "dynamic"
rotary embedding past its original length) sees the length of the longest row of a batch, as it does elsewhere.
"""

# R pairs, T continuation tokens of all pairs, P places (positions whose next token is asked for), B, L, H, V

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coterie.errors import DataError, OutputError
from coterie.evaluation.compare import CHUNK_BYTES, HiddenStates
from coterie.streaming.head import logits
from coterie.streaming.lockstep import Batch, Progress, States, sweep
from coterie.streaming.model import StreamedModel

BATCH_TOKENS = 8192
Pair = tuple[list[int], list[int]]


@dataclass(frozen=True)
class Likelihoods:
    """Answers and what they cost.

    sum_R : log-likelihood of every continuation, float64. greedy_R : whether each of its tokens is the most likely one.
    rows, tokens : inputs that were run, and their tokens without padding. cut : pairs whose context lost its beginning.
    bytes_read : bytes of weights read from the checkpoint.
    """

    sum_R: Tensor
    greedy_R: Tensor
    rows: int = 0
    tokens: int = 0
    cut: int = 0
    bytes_read: int = 0


def likelihoods(
    streamed: StreamedModel,
    pairs: Sequence[Pair],
    *,
    max_length: int,
    batch_size: int | None = None,
    memory: int = 2 * 2**30,
    progress: Progress | None = None,
) -> Likelihoods:
    """Log-likelihood of every (context, continuation) of token ids, all in one sweep.

    Parameters
    ----------
    max_length : longest input; longer ones lose the beginning of their context.
    batch_size : rows per batch; by default as many as make about 8192 tokens with their padding.
    memory : bytes of waiting hidden states to hold in memory; the rest waits in temporary files.

    Raises DataError for an empty context or continuation, one longer than `max_length`, or an unknown token id, and
    OutputError if the disk cannot hold the waiting states; nothing has been read then.
    """
    if not pairs:
        return Likelihoods(torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.bool))
    check_pairs(pairs, max_length, int(streamed.model.get_input_embeddings().weight.shape[0]))
    inputs = [tuple([*context, *continuation][:-1][-max_length:]) for context, continuation in pairs]
    rows, row_R = distinct(inputs)
    batches, first_row = _batches(rows, batch_size)
    _check_room(streamed, batches, memory)

    # Every continuation token: its pair, its id, and its place, numbered in the order of rows and positions.
    count_R = torch.tensor([len(continuation) for _, continuation in pairs])
    pair_T = torch.repeat_interleave(torch.arange(len(pairs)), count_R)
    target_T = torch.tensor([token for _, continuation in pairs for token in continuation])
    within_T = torch.arange(len(pair_T)) - (count_R.cumsum(0) - count_R)[pair_T]
    begin_R = torch.tensor([len(ids) for ids in inputs]) - count_R
    longest = len(rows[0])
    key_T = torch.tensor(row_R)[pair_T] * longest + begin_R[pair_T] + within_T
    key_P, place_T = torch.unique(key_T, return_inverse=True)
    row_P, position_P = key_P // longest, key_P % longest
    ends = torch.searchsorted(row_P, torch.tensor([*first_row, len(rows)])).tolist()

    held = HiddenStates(memory)
    read_before = streamed.checkpoint.bytes_read

    def finish(number: int, batch: Batch, hidden_BLH: Tensor) -> None:
        here = slice(ends[number], ends[number + 1])
        row_of_batch_P = (row_P[here] - first_row[number]).to(hidden_BLH.device)
        held.put(number, batch, hidden_BLH[row_of_batch_P, position_P[here].to(hidden_BLH.device)])

    for step in sweep(streamed, batches, finish=finish, states=States(limit=memory), progress=progress):
        step.run()

    streamed.load_head()
    order_T = place_T.argsort(stable=True)
    sorted_T = place_T[order_T]
    log_T, best_T = torch.zeros(len(place_T), dtype=torch.float64), torch.zeros(len(place_T), dtype=torch.bool)
    size = max(16, CHUNK_BYTES // (4 * int(streamed.config.get_text_config(decoder=True).vocab_size)))
    for number in range(len(batches)):
        hidden_PH = held.get(number)
        for first in range(0, len(hidden_PH), size):
            part_PH = hidden_PH[first : first + size].to(streamed.device)
            log_PV = logits(streamed, part_PH[None])[0].log_softmax(-1).cpu()
            begin = ends[number] + first
            low, high = torch.searchsorted(sorted_T, torch.tensor([begin, begin + len(part_PH)])).tolist()
            chosen = order_T[low:high]
            inside, target = place_T[chosen] - begin, target_T[chosen]
            log_T[chosen] = log_PV[inside, target].double()
            best_T[chosen] = log_PV.argmax(-1)[inside] == target
    streamed.free_outer()

    sum_R = torch.zeros(len(pairs), dtype=torch.float64).index_add_(0, pair_T, log_T)
    misses_R = torch.zeros(len(pairs), dtype=torch.int64).index_add_(0, pair_T, (~best_T).long())
    cut = sum(len(context) + len(continuation) - 1 > max_length for context, continuation in pairs)
    read = streamed.checkpoint.bytes_read - read_before
    return Likelihoods(sum_R, misses_R == 0, len(rows), sum(map(len, rows)), cut, read)


def check_pairs(pairs: Sequence[Pair], max_length: int, vocabulary: int) -> None:
    """Raise DataError for pairs that have no log-likelihood."""
    for context, continuation in pairs:
        if not context or not continuation:
            what = "continuation" if context else "context"
            raise DataError(f"a request has an empty {what}: there is nothing to score", "Look at the task's choices.")
        if len(continuation) > max_length:
            raise DataError(
                f"a continuation has {len(continuation)} tokens, more than the {max_length} the model takes at once"
            )
        if not 0 <= min(*context, *continuation) <= max(*context, *continuation) < vocabulary:
            raise DataError(
                f"the tokenizer gives token id {max(*context, *continuation)}; the model knows {vocabulary}, from 0 on",
                "The tokenizer belongs to another model: name the right one with --tokenizer.",
            )


def distinct(inputs: Sequence[tuple[int, ...]]) -> tuple[list[tuple[int, ...]], list[int]]:
    """The inputs that have to run, longest first, and for every given input the row that it is, or begins.

    In sorted order an input that others begin with stands right before them.
    """
    kept: list[tuple[int, ...]] = []
    holder: dict[tuple[int, ...], tuple[int, ...]] = {}
    for ids in sorted(set(inputs), reverse=True):
        if not kept or kept[-1][: len(ids)] != ids:
            kept.append(ids)
        holder[ids] = kept[-1]
    kept.sort(key=lambda ids: (-len(ids), ids))
    number = {ids: row for row, ids in enumerate(kept)}
    return kept, [number[holder[ids]] for ids in inputs]


def _batches(rows: Sequence[tuple[int, ...]], batch_size: int | None) -> tuple[list[Batch], list[int]]:
    """Rows, longest first, padded on the right; and the first row of every batch."""
    batches, first_row, first = [], [], 0
    while first < len(rows):
        length = len(rows[first])
        chunk = rows[first : first + (batch_size or max(1, BATCH_TOKENS // length))]
        batches.append(Batch(torch.tensor([[*ids, *[0] * (length - len(ids))] for ids in chunk])))
        first_row.append(first)
        first += len(chunk)
    return batches, first_row


def _check_room(streamed: StreamedModel, batches: Sequence[Batch], memory: int) -> None:
    hidden = streamed.config.get_text_config(decoder=True).hidden_size
    states = sum(batch.ids_BL.numel() for batch in batches) * hidden * streamed.compute_dtype.itemsize
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if states - memory > free:
        raise OutputError(
            f"{states / 1e9:.1f} GB of hidden states would wait between layers, {memory / 1e9:.1f} GB in memory and the"
            f" rest in {folder}, which has only {free / 1e9:.1f} GB free",
            "Score fewer documents with --limit, name a larger disk in TMPDIR, or use --compute-dtype bfloat16.",
        )
