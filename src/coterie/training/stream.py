"""Text of any size to training windows: tokenized once into a file, read from it at random.

Documents come from files, folders and datasets in an order that depends on the seed alone: of all files that are not
used up one is drawn, in proportion to its size, and gives its next document. They are joined, each behind the
tokenizer's start token, until as many tokens are written as a training will read, or the text ends; a training that
wants more reads it again. What is in memory is one document; a training reads the file through a memory map.

Documents whose digest says so are held out for evaluation, whatever the seed, unless other text is given for that.
"""

# L tokens of a window

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from coterie.errors import DataError, OutputError
from coterie.streaming.lockstep import Batch, Progress
from coterie.text import SUFFIXES, Document, TokenData, document_ids, read_documents, samples_of

EVERY = 32  # one document in so many is held out
_DONE = "tokens.json"


@dataclass
class Stream:
    """Tokenized text. file : uint32. tokens : how many. digest : of them. domains : {name: tokens of it}.
    held_out : by domain, for evaluation; {} if other text is given for that."""

    file: Path
    tokens: int
    digest: str
    domains: dict[str, int] = field(default_factory=dict)
    documents: int = 0
    held_out: dict[str, list[list[int]]] = field(default_factory=dict)


class Windows(Dataset[dict[str, Tensor]]):
    """Windows of L tokens, one behind the other; nothing is padded."""

    def __init__(self, stream: Stream, length: int) -> None:
        self.length, self.count = length, stream.tokens // length
        if not self.count:
            raise DataError(
                f"the text has {stream.tokens} tokens, not one window of {length}",
                "Give more text, or a smaller length.",
            )
        self.ids = np.memmap(stream.file, dtype=np.uint32, mode="r", shape=(self.count, length))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        ids_L = torch.from_numpy(self.ids[number].astype(np.int64))
        return {"input_ids": ids_L, "labels": ids_L}


class Order(Dataset[dict[str, Tensor]]):
    """Windows in the order a training reads them: mixed anew in every pass, the same for the same seed whatever the
    batches and processes. skip : windows that an earlier phase has read. count : windows that will be read."""

    def __init__(self, windows: Windows, count: int, *, seed: int = 0, skip: int = 0) -> None:
        self.windows = windows
        n, last = len(windows), skip + count
        passes = [_mixed(n, seed, number) for number in range(skip // n, -(-last // n))]
        self.numbers = torch.cat(passes)[skip % n :][:count]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        return self.windows[int(self.numbers[place])]


def _mixed(count: int, seed: int, number: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(1_000_003 * number + seed))


def tokenized(
    sources: Sequence[str],
    tokenizer: Any,
    folder: Path,
    *,
    tokens: int,
    held_out: int = 0,
    seed: int = 0,
    progress: Progress | None = None,
) -> Stream:
    """Write up to `tokens` tokens of the text to `folder`, or find them there, written whole by an earlier run.

    held_out : tokens of each domain to keep apart, if so many are there; 0: none.

    Raises DataError for text that is missing, unreadable or empty, and for a single document of which a part would have
    to be held out.
    """
    found = _found(folder)
    if found is not None:
        return found
    folder.mkdir(parents=True, exist_ok=True)
    file, bar, sha = folder / "tokens.bin", progress or Progress(), hashlib.sha256()
    stream = Stream(file, 0, "")
    bar.start("tokenizing", 100)
    try:
        with file.open("wb") as out:
            for domain, document in _documents(sources, seed):
                ids = document_ids(document, tokenizer)
                if not ids:
                    continue
                stream.documents += 1
                if held_out and _held(document):
                    stream.held_out.setdefault(domain, []).append(ids)
                    continue
                if stream.tokens >= tokens:
                    if _enough(stream, held_out):
                        break
                    continue
                data = np.asarray(ids, dtype=np.uint32).tobytes()
                sha.update(data)
                out.write(data)
                stream.tokens += len(ids)
                stream.domains[domain] = stream.domains.get(domain, 0) + len(ids)
                bar.layer(min(99, 100 * stream.tokens // tokens))
    except OSError as error:
        raise OutputError(f"cannot write tokens to {folder}: {error.strerror}") from error
    finally:
        bar.done()
    _check(stream, sources, hold_out=bool(held_out))
    stream.digest = sha.hexdigest()
    told = {**stream.__dict__, "file": file.name}
    (folder / _DONE).write_text(json.dumps(told))
    return stream


def evaluation_rows(stream: Stream, length: int, samples: int) -> TokenData:
    """Windows of the held-out documents, at most `samples` of each domain; short text makes one short window."""
    rows: dict[str, list[Tensor]] = {}
    for domain in sorted(stream.held_out):
        joined = torch.tensor([t for ids in stream.held_out[domain] for t in ids])
        whole = [w for w in torch.split(joined, length) if len(w) > 1]
        full = [w for w in whole if len(w) == length]
        rows[domain] = (full or whole)[:samples]
    return samples_of({domain: found for domain, found in rows.items() if found})


def by_domain(data: TokenData) -> dict[str, TokenData]:
    """Each domain as data of its own."""
    apart = {}
    for number, domain in enumerate(data.domains):
        batches = []
        for batch in data.batches:
            assert batch.domain_B is not None
            of_B = batch.domain_B == number
            if of_B.any():
                mask_BL = None if batch.mask_BL is None else batch.mask_BL[of_B]
                batches.append(Batch(batch.ids_BL[of_B], mask_BL, torch.zeros(int(of_B.sum()), dtype=torch.int64)))
        apart[domain] = TokenData(batches, [domain], data.digest, {domain: data.tokens[domain]})
    return apart


def _found(folder: Path) -> Stream | None:
    try:
        told = json.loads((folder / _DONE).read_text())
        stream = Stream(**{**told, "file": folder / told["file"]})
        return stream if stream.file.stat().st_size == 4 * stream.tokens else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _check(stream: Stream, sources: Sequence[str], *, hold_out: bool) -> None:
    if not stream.documents:
        raise DataError(f"no text in {', '.join(sources)}", "A jsonl line needs a `text` field.")
    if hold_out and (not stream.held_out or not stream.tokens):
        raise DataError(
            f"{', '.join(sources)} has {stream.documents} document{'s' * (stream.documents > 1)}, too few to keep some"
            " for evaluation",
            "Give more documents, or other text to evaluate on (evaluate: in the config, or --evaluate).",
        )


def _enough(stream: Stream, held_out: int) -> bool:
    """Is so much of every domain held out, or was far more text read than it should take?"""
    counts = [sum(map(len, stream.held_out.get(domain, []))) for domain in stream.domains]
    return all(count >= held_out for count in counts) or stream.documents > 2**17


def _held(document: Document) -> bool:
    text = document if isinstance(document, str) else json.dumps(document)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little") % EVERY == 0


def _documents(sources: Sequence[str], seed: int) -> Iterator[tuple[str, Document]]:
    """Documents of all files, mixed."""
    draw = random.Random(seed)
    waiting: list[tuple[Iterator[tuple[str, Document]], float]] = []
    for source in sources:
        path = Path(source).expanduser()
        files = sorted(p for p in path.rglob("*") if p.name.endswith(SUFFIXES)) if path.is_dir() else [path]
        if path.exists() and files:
            waiting += [(read_documents(str(file)), max(file.stat().st_size, 1)) for file in files]
        else:
            waiting.append((read_documents(source), 1e9))  # a dataset, or an error that says what is wrong
    while waiting:
        (number,) = draw.choices(range(len(waiting)), [size for _, size in waiting])
        try:
            yield next(waiting[number][0])
        except StopIteration:
            del waiting[number]
