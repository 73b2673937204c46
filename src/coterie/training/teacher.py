"""What a teacher says about a text, kept on disk: its most likely tokens at every position, from one streamed sweep.

The teacher is read once, layer by layer, so it may be larger than memory. For every real token the cache holds

    ids          int32    [K]  the most likely next tokens
    log_p        float16  [K]  their log-probabilities: logits / temperature - logsumexp
    logsumexp    float32       of logits / temperature, so that the logits can be had back
    tail         float32       log of the probability of all other tokens
    next         float32       log-probability of the true next token at temperature 1; 0 where there is none

Log-probabilities, not logits, are what is narrowed: rounding costs 1/2048 of a value, and the values that matter are
near zero where logits are near 20; bfloat16 would cost 1/256 of the logit, several percent of a probability.

A sample is found by its own tokens and a token by its position in it, so shuffling, packing into other batches and
padding cannot misalign them. `cache.json` says what text, teacher and vocabulary it was made with. The folder appears
whole or not at all; a killed sweep goes on after its last whole layer.
"""

# B batch, L sequence, H hidden, V vocabulary, K most likely tokens, T real tokens

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from coterie.errors import DataError, UsageError
from coterie.evaluation.compare import CHUNK_BYTES
from coterie.streaming.head import logits
from coterie.streaming.lockstep import Batch, Progress, States, sweep
from coterie.streaming.model import StreamedModel
from coterie.streaming.writer import Workspace, disk_error, write_json
from coterie.text import TokenData, sample_key
from coterie.training.distillation import top_k

FORMAT = 1
_FIELDS = ("ids", "log_p", "logsumexp", "tail", "next")


def vocabulary(streamed: StreamedModel) -> int:
    """How many tokens the model gives logits for."""
    return int(streamed.model.get_output_embeddings().weight.shape[0])


class TeacherCache:
    """A finished cache, open for reading. `header` is its cache.json without the list of samples."""

    def __init__(self, folder: Path) -> None:
        file = folder / "cache.json"
        try:
            header = json.loads(file.read_text(encoding="utf-8"))
            found = header.pop("samples")
            self.places = {
                key: (str(shard), int(begin), int(end))
                for shard, rows in found.items()
                for key, (begin, end) in rows.items()
            }
            self.header: dict[str, Any] = header
            self.k, self.temperature = int(header["top"]), float(header["temperature"])
        except FileNotFoundError as error:
            raise DataError(f"{folder} holds no cache of a teacher", "Name another folder.") from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{file} is damaged: {error}", "Delete the folder; it is made again.") from error
        if header.get("format") != FORMAT:
            raise DataError(f"{file} has format {header.get('format')!r}, this version reads {FORMAT}")
        self.folder = folder

    def check(self, *, data: str, teacher: str, vocabulary: int, k: int, temperature: float) -> None:
        """Raise unless this cache was made from this text by this teacher and holds enough of it."""
        hint = "Name another folder with --cache, or delete this one."
        if self.header["vocabulary"] != vocabulary:
            raise UsageError(
                f"the cache {self.folder} is over {self.header['vocabulary']} tokens, the student knows {vocabulary}",
                hint,
            )
        if self.header["data"] != data:
            raise DataError(
                f"the cache {self.folder} was made from other text (digest {self.header['data'][:9]}, now {data[:9]})",
                f"The same --data, --samples, --length and --seed give the same text. {hint}",
            )
        if self.header["teacher"] != teacher:
            raise UsageError(
                f"the cache {self.folder} was made by another teacher ({self.header['teacher'][:12]})", hint
            )
        self.enough(k, temperature)

    def enough(self, k: int, temperature: float) -> int:
        """How many tokens to take when `k` are wanted, or all there are. Raises UsageError if it holds too few."""
        hint = "Name another folder with --cache, or delete this one."
        if self.temperature != temperature:
            raise UsageError(f"the cache {self.folder} has temperature {self.temperature:g}, not {temperature:g}", hint)
        if self.k < min(k, self.header["vocabulary"]):
            raise UsageError(f"the cache {self.folder} holds the top {self.k} tokens, not {k}", hint)
        return min(k, self.k)

    def take(self, key: str, k: int) -> dict[str, Tensor]:
        """The `k` most likely tokens of one sample: ids [T, k] int64, log_p [T, k], tail [T], next [T], float32.

        Raises DataError if the sample is not there or the file is damaged.
        """
        if key not in self.places:
            raise DataError(f"the cache {self.folder} does not hold sample {key}", "It was made from other text.")
        shard, begin, end = self.places[key]
        try:
            with safe_open(self.folder / shard, "pt") as stored:
                part = {name: stored.get_slice(name)[begin:end] for name in ("ids", "log_p", "tail", "next")}
        except (OSError, SafetensorError) as error:
            raise DataError(
                f"the cache file {self.folder / shard} is damaged: {error}", "Delete the folder; it is made again."
            ) from error
        log_p, tail = part["log_p"].float(), part["tail"]
        if k < self.k:
            tail = torch.logaddexp(tail, log_p[:, k:].logsumexp(-1))
        return {"ids": part["ids"][:, :k].long(), "log_p": log_p[:, :k], "tail": tail, "next": part["next"]}


def write_cache(
    streamed: StreamedModel,
    data: TokenData,
    folder: Path,
    *,
    k: int = 64,
    temperature: float = 1.0,
    memory: int = 2 * 2**30,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> TeacherCache:
    """Run the teacher over `data` once and write its top `k` (or all, of a smaller vocabulary) to `folder`.

    Peak memory: one layer or the head with a chunk of logits, and hidden states up to `memory`; on disk, besides, the
    hidden states of all tokens while it runs. Raises OutputError where `folder` cannot be written.
    """
    V = vocabulary(streamed)
    header: dict[str, Any] = {
        "format": FORMAT,
        "data": data.digest,
        "teacher": streamed.checkpoint.digest(),
        "vocabulary": V,
        "top": min(k, V),
        "temperature": temperature,
        "compute": [str(streamed.compute_dtype).removeprefix("torch."), torch.device(streamed.device).type],
        "tokens": sum(batch.tokens for batch in data.batches),
    }
    job = {"cache": header, "batches": [list(batch.ids_BL.shape) for batch in data.batches]}
    with Workspace(folder, job, overwrite=overwrite) as work:
        names = [f"{number:06d}.safetensors" for number in range(len(data.batches))]
        head = [False]

        def finish(number: int, batch: Batch, hidden_BLH: Tensor) -> None:
            if not (work.folder / names[number]).exists():
                if not head[0]:  # only now: the embeddings of a tied model have been freed since the sweep began
                    streamed.load_head()
                    head[0] = True
                _save(work.folder / names[number], _score(streamed, batch, hidden_BLH, header["top"], temperature))

        if not all((work.folder / name).exists() for name in names):
            states = States(work.folder / "states", memory, durable=True)
            first = states.following()
            for step in sweep(streamed, data.batches, finish=finish, states=states, first=first, progress=progress):
                step.run()
                work.record({"layer": step.index})  # something to go on with: the folder stays when this run is stopped
            streamed.free_outer()
        samples = {name: _rows(batch) for name, batch in zip(names, data.batches, strict=True)}
        write_json(work.folder / "cache.json", {**header, "samples": samples})
        work.publish([*names, "cache.json"])
    return TeacherCache(work.out)


def _score(streamed: StreamedModel, batch: Batch, hidden_BLH: Tensor, k: int, temperature: float) -> dict[str, Tensor]:
    """What is kept of the real tokens of a batch, row after row."""
    real_BL = _real(batch)
    hidden_TH = hidden_BLH.detach()[real_BL.to(hidden_BLH.device)]
    next_BL = torch.zeros_like(batch.ids_BL)
    next_BL[:, :-1] = batch.ids_BL[:, 1:]
    follows_BL = torch.zeros_like(real_BL)
    follows_BL[:, :-1] = real_BL[:, 1:]
    next_T, follows_T = next_BL[real_BL], follows_BL[real_BL]
    parts: list[list[Tensor]] = [[] for _ in _FIELDS]
    size = max(16, CHUNK_BYTES // (4 * vocabulary(streamed)))
    for first in range(0, len(hidden_TH), size):
        z_TV = logits(streamed, hidden_TH[None, first : first + size])[0]
        kept = top_k(z_TV, k, temperature)
        log_next_T = z_TV.log_softmax(-1).gather(1, next_T[first : first + size, None].to(z_TV.device))[:, 0]
        values = (
            kept.ids_TK.int(),
            kept.log_p_TK.clamp(min=-60000).half(),
            (z_TV / temperature).logsumexp(-1),
            kept.tail_T,
            torch.where(follows_T[first : first + size].to(z_TV.device), log_next_T, 0.0),
        )
        for part, value in zip(parts, values, strict=True):
            part.append(value.cpu())
    return {name: torch.cat(part).contiguous() for name, part in zip(_FIELDS, parts, strict=True)}


def _real(batch: Batch) -> Tensor:
    return batch.mask_BL if batch.mask_BL is not None else torch.ones_like(batch.ids_BL, dtype=torch.bool)


def _rows(batch: Batch) -> dict[str, tuple[int, int]]:
    """{sample: (first, one past the last) of its tokens in the file of its batch}."""
    rows, begin = {}, 0
    for ids_L, mask_L in zip(batch.ids_BL, _real(batch), strict=True):
        end = begin + int(mask_L.sum())
        rows[sample_key(ids_L, mask_L)] = (begin, end)
        begin = end
    return rows


def _save(file: Path, tensors: dict[str, Tensor]) -> None:
    """Write one file whole or not at all."""
    building = file.with_suffix(".building")
    try:
        save_file(tensors, building)
        with building.open("rb") as stream:
            os.fsync(stream.fileno())
        building.replace(file)
    except OSError as error:
        raise disk_error(error, file.parent) from error
