"""Text to batches of token ids, by domain: files, folders, datasets; packed windows or padded documents.

A domain is what a `domain` field says, or the name of the file. Every domain gives the same number of samples, chosen
with a seed. A record is text or a dialogue (demonstrations). This file knows tokenizers and files, not models.
"""

# B batch, L sequence

from __future__ import annotations

import gzip
import hashlib
import json
import random
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coterie.errors import CheckpointError, DataError
from coterie.streaming.lockstep import Batch

BATCH_TOKENS = 8192  # large enough that widening an expert costs little beside its matrix products
SUFFIXES = (".txt", ".md", ".jsonl", ".jsonl.gz", ".parquet")

Dialogue = list[dict[str, str]]  # turns with `role` and `content`
Document = str | Dialogue


@dataclass
class TokenData:
    """Samples ready to run.

    batches : in order of domains. domains : names; their index is the domain number in a batch.
    digest : identity of ids, masks and domains. tokens : {domain: real tokens}. warnings : for the user.
    """

    batches: list[Batch]
    domains: list[str]
    digest: str
    tokens: dict[str, int]
    warnings: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)

    @property
    def samples(self) -> int:
        return sum(batch.ids_BL.shape[0] for batch in self.batches)

    @property
    def length(self) -> int:
        return max(batch.ids_BL.shape[1] for batch in self.batches)


def load_data(
    sources: Sequence[str],
    tokenizer: Any,
    *,
    samples: int,
    length: int,
    batch_size: int | None = None,
    pack: bool = True,
    longest: bool = False,
    seed: int = 0,
) -> TokenData:
    """Tokenize text from files, folders or datasets.

    A record is a `text`, or a demonstration: `messages` with `role` and `content`, or `prompt` and `answer`. Those are
    put into the tokenizer's chat template; without one their turns are joined by empty lines, with a warning.

    Parameters
    ----------
    sources : list of str
        Files (txt, md, jsonl, jsonl.gz, parquet), folders of them, or dataset names (`owner/name[:config[:split]]`).
    tokenizer : PreTrainedTokenizerBase
    samples : int
        Sequences per domain.
    length : int
        Tokens per sequence.
    batch_size : int, optional
        Sequences per batch; by default as many as make about 8192 tokens.
    pack : bool
        True: documents are joined by the tokenizer's own start or end token and cut into full windows.
        False: one document per sequence, cut at `length`, padded on the right.
    longest : bool
        Take a domain's longest documents instead of any (EASY-EP's choice of demonstrations, with `pack=False`).
    seed : int
        Order of documents.

    Raises DataError if a source is missing, unreadable, empty or gives a domain less than one sample.
    """
    documents: dict[str, list[Document]] = {}
    for source in sources:
        for domain, text in read_documents(source, enough=20 * samples * length):  # about five times what is needed
            if _characters(text):
                documents.setdefault(domain, []).append(text)
    if not documents:
        raise DataError(f"no text in {', '.join(sources)}", "A jsonl line needs a `text` field.")
    rows: list[tuple[Tensor, int]] = []
    warnings, domains, tokens = [], sorted(documents), {}
    if not _chats(tokenizer) and any(not isinstance(text, str) for texts in documents.values() for text in texts):
        warnings.append("this tokenizer has no chat template: the turns of demonstrations are joined by empty lines")
    for number, domain in enumerate(domains):
        texts = documents[domain]
        random.Random(f"{seed}-{domain}").shuffle(texts)
        if longest:
            texts.sort(key=_characters, reverse=True)
        cut = _windows if pack else _single
        found = list(cut(texts, tokenizer, length, samples))
        if not found:
            raise DataError(
                f"the text of domain {domain!r} is too short: it does not fill one sample of {length} tokens",
                "Give more text, or a smaller --length.",
            )
        if len(found) < samples:
            warnings.append(f"domain {domain!r} gives only {len(found)} of {samples} samples of {length} tokens")
        tokens[domain] = sum(len(ids) for ids in found)
        rows += [(ids, number) for ids in found]
    batches = list(_batches(rows, batch_size or max(1, BATCH_TOKENS // length), _pad_id(tokenizer)))
    return TokenData(batches, domains, _digest(batches, domains), tokens, warnings, list(sources))


def samples_of(rows: dict[str, list[Tensor]]) -> TokenData:
    """Ready sequences, by domain, as samples."""
    domains = list(rows)
    numbered = [(ids, number) for number, domain in enumerate(domains) for ids in rows[domain]]
    longest = max((len(ids) for ids, _ in numbered), default=1)
    batches = list(_batches(numbered, max(1, BATCH_TOKENS // longest), 0))
    tokens = {domain: sum(len(ids) for ids in rows[domain]) for domain in domains}
    return TokenData(batches, domains, _digest(batches, domains), tokens)


def from_text(document: Document, tokenizer: Any, *, name: str = "text") -> TokenData:
    """One text or dialogue as one sequence, whole. Raises DataError if it is empty."""
    ids = document_ids(document, tokenizer) if _characters(document) else []
    if not ids:
        raise DataError(f"the {name} is empty")
    batches = [Batch(torch.tensor([ids]), None, torch.zeros(1, dtype=torch.int64))]
    return TokenData(batches, [name], _digest(batches, [name]), {name: len(ids)}, sources=[name])


def by_task(found: dict[str, TokenData]) -> TokenData:
    """Samples of several tasks as one, each task a domain whatever domains its files had."""
    batches, tokens, names = [], {}, list(found)
    for number, (task, data) in enumerate(found.items()):
        batches += [Batch(b.ids_BL, b.mask_BL, torch.full((len(b.ids_BL),), number)) for b in data.batches]
        tokens[task] = sum(data.tokens.values())
    warnings = list(dict.fromkeys(w for data in found.values() for w in data.warnings))
    sources = list(dict.fromkeys(s for data in found.values() for s in data.sources))
    return TokenData(batches, names, _digest(batches, names), tokens, warnings, sources)


def held_out(data: TokenData, samples: int) -> tuple[TokenData, TokenData]:
    """The first `samples` sequences of every domain, and the others: no sequence is in both.

    Raises DataError if a domain has no more than `samples`.
    """
    taken = [0] * len(data.domains)
    sides: tuple[list[Batch], list[Batch]] = ([], [])
    for batch in data.batches:
        domain_B = batch.domain_B if batch.domain_B is not None else torch.zeros(len(batch.ids_BL), dtype=torch.int64)
        first = []
        for domain in domain_B.tolist():
            first.append(taken[domain] < samples)
            taken[domain] += 1
        first_B = torch.tensor(first)
        for side, keep_B in zip(sides, (first_B, ~first_B), strict=True):
            if keep_B.any():
                mask_BL = None if batch.mask_BL is None else batch.mask_BL[keep_B]
                side.append(Batch(batch.ids_BL[keep_B], mask_BL, domain_B[keep_B]))
    for domain, count in zip(data.domains, taken, strict=True):
        if count <= samples:
            raise DataError(
                f"domain {domain!r} gives {count} samples: {samples} to calibrate leave none to evaluate on",
                "Give more text, fewer --samples, a smaller --length, or other text to evaluate on.",
            )
    halves = []
    for side in sides:
        counts = dict.fromkeys(data.domains, 0)
        for batch in side:
            assert batch.domain_B is not None
            real_B = (
                batch.mask_BL.sum(1)
                if batch.mask_BL is not None
                else torch.full((len(batch.ids_BL),), batch.ids_BL.shape[1])
            )
            for domain, real in zip(batch.domain_B.tolist(), real_B.tolist(), strict=True):
                counts[data.domains[domain]] += real
        halves.append(TokenData(side, data.domains, _digest(side, data.domains), counts, data.warnings, data.sources))
    return halves[0], halves[1]


def together(*parts: TokenData) -> TokenData:
    """Samples of several sets with the same domains as one, in order: what `held_out` took apart."""
    batches = [batch for data in parts for batch in data.batches]
    domains = parts[0].domains
    tokens = {domain: sum(data.tokens[domain] for data in parts) for domain in domains}
    return TokenData(batches, domains, _digest(batches, domains), tokens, parts[0].warnings, parts[0].sources)


def sample_key(ids_L: Tensor, mask_L: Tensor | None = None) -> str:
    """Identity of one sample: of its real tokens, however it is padded, batched or shuffled."""
    real = ids_L if mask_L is None else ids_L[mask_L.bool()]
    return hashlib.sha256(real.long().cpu().numpy().tobytes()).hexdigest()[:32]


def load_tokens(file: Path, batch_size: int | None = None) -> TokenData:
    """Ready token ids: a safetensors file with `input_ids` [B, L] int64 and optionally `attention_mask` [B, L]."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(file)
        ids_BL = tensors["input_ids"]
        mask_BL = tensors.get("attention_mask", torch.ones_like(ids_BL)).bool()
    except (OSError, SafetensorError, KeyError) as error:
        raise DataError(f"{file} does not hold token ids: {error}", "It needs `input_ids` [B, L], int64.") from error
    if ids_BL.is_floating_point() or ids_BL.is_complex() or ids_BL.dtype == torch.bool:
        raise DataError(f"{file}: input_ids must be int64, not {str(ids_BL.dtype).removeprefix('torch.')}")
    ids_BL = ids_BL.long()
    if ids_BL.dim() != 2 or not ids_BL.numel() or mask_BL.shape != ids_BL.shape:
        raise DataError(f"{file}: input_ids must be [B, L] with a mask of the same shape, not {list(ids_BL.shape)}")
    if not mask_BL.any():
        raise DataError(f"{file}: every token is masked: the attention_mask holds no 1")
    size = batch_size or max(1, BATCH_TOKENS // ids_BL.shape[1])
    batches = []
    for ids, mask in zip(torch.split(ids_BL, size), torch.split(mask_BL, size), strict=True):
        batches.append(Batch(ids, None if mask.all() else mask, torch.zeros(len(ids), dtype=torch.int64)))
    digest = _digest(batches, [file.stem])
    return TokenData(batches, [file.stem], digest, {file.stem: int(mask_BL.sum())}, sources=[str(file)])


def check_ids(data: TokenData, vocabulary: int) -> None:
    """Raise DataError for token ids that a model with `vocabulary` tokens does not know."""
    for batch in data.batches:
        low, high = int(batch.ids_BL.min()), int(batch.ids_BL.max())
        if low < 0 or high >= vocabulary:
            raise DataError(
                f"the data holds token id {low if low < 0 else high}; the model knows {vocabulary}, from 0 on",
                "The tokenizer or the token file belongs to another model.",
            )


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a checkpoint folder. Raises CheckpointError if it has none."""
    from transformers import AutoTokenizer

    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
    hint = "Copy the tokenizer of the original model into the folder, or name one with --tokenizer."
    if not any((folder / name).exists() for name in names):
        raise CheckpointError(f"{folder} has no tokenizer", hint)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizer loading raises whatever its parsers raise
        raise CheckpointError(f"the tokenizer of {folder} cannot be loaded: {error}", hint) from error


def read_documents(source: str, enough: int = 10**9) -> Iterator[tuple[str, Document]]:
    """(domain, document) of every document of a file or a folder; of a dataset, until `enough` characters were read."""
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.name.endswith(SUFFIXES))
        if not files:
            raise DataError(f"folder {source} holds no text files ({', '.join(SUFFIXES)})")
        for file in files:
            yield from _read_file(file)
    elif path.exists():
        yield from _read_file(path)
    elif source.startswith((".", "/", "~")) or source.endswith(SUFFIXES):
        raise DataError(f"no file or folder {source}")
    else:
        yield from _read_dataset(source, enough)


def _read_file(file: Path) -> Iterator[tuple[str, Document]]:
    stem = file.name.split(".")[0]
    try:
        if file.name.endswith(".parquet"):
            import pyarrow.parquet

            try:
                rows = pyarrow.parquet.read_table(file).to_pylist()
            except pyarrow.ArrowException as error:
                raise DataError(f"cannot read {file}: {error}") from error
            yield from (_record(row, f"{file.name}, row {i}", stem) for i, row in enumerate(rows))
        elif file.name.endswith((".jsonl", ".jsonl.gz")):
            opened = gzip.open if file.name.endswith(".gz") else open
            with opened(file, "rb") as stream:  # bytes: a line is decoded alone, so that an error has its number
                for number, line in enumerate(stream, 1):
                    if line.strip():
                        yield _record(_parse(line, file, number), f"{file.name}, line {number}", stem)
        else:
            yield stem, file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file} is not UTF-8 text (byte {error.start})", f"Convert it: iconv -f latin1 -t utf-8 {file.name}"
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {file}: {error}") from error


def _parse(line: bytes, file: Path, number: int) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file}, line {number} is not UTF-8 text (byte {error.start} of the line)",
            f"Convert it: iconv -f latin1 -t utf-8 {file.name}",
        ) from error
    except (ValueError, RecursionError) as error:  # ValueError: also numbers of thousands of digits
        raise DataError(f"{file}, line {number} is not JSON: {error}") from error


def _record(row: Any, where: str, stem: str) -> tuple[str, Document]:
    row = row if isinstance(row, dict) else {}
    document: Any = row.get("text")
    if not isinstance(document, str) and "messages" in row:
        document = row["messages"]
        turns = document if isinstance(document, list) else []
        if not turns or not all(isinstance(t, dict) and _turn(t) for t in turns):
            raise DataError(f"{where}: `messages` must be a list of turns, each with `role` and `content` as text")
    elif not isinstance(document, str) and "prompt" in row:
        document = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row.get("answer")}]
        if not all(_turn(t) for t in document):
            raise DataError(f"{where}: `prompt` needs an `answer` beside it, both text")
    elif not isinstance(document, str):
        raise DataError(f"{where} has no `text` field")
    return str(row.get("domain") or stem), document


def _turn(turn: dict[str, Any]) -> bool:
    return isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)


def _characters(document: Document) -> int:
    """Length of a text or of all turns of a dialogue; 0 where there is only white space."""
    if isinstance(document, str):
        return len(document) if document.strip() else 0
    return sum(len(turn["content"]) for turn in document if turn["content"].strip())


def _read_dataset(name: str, enough: int) -> Iterator[tuple[str, Document]]:
    """Rows of a dataset in its own order, until they hold `enough` characters: some datasets never end."""
    import datasets

    parts = name.split(":")
    config, split = (parts[1] if len(parts) > 1 else None), (parts[2] if len(parts) > 2 else "train")
    try:
        rows = datasets.load_dataset(parts[0], config or None, split=split, streaming=True)
        for number, row in enumerate(rows):
            domain, text = _record(row, f"{name}, row {number}", parts[0].rsplit("/", 1)[-1])
            yield domain, text
            enough -= _characters(text)
            if enough <= 0:
                return
    except DataError:
        raise
    except Exception as error:  # the datasets library raises errors of many libraries
        raise DataError(
            f"no file, folder or dataset {name!r}: {type(error).__name__}",
            "Name a text file, a folder, or a dataset as owner/name[:config[:split]].",
        ) from error


def _chats(tokenizer: Any) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def document_ids(text: Document, tokenizer: Any) -> list[int]:
    """Token ids of a document, the tokenizer's start token first."""
    if not isinstance(text, str):
        if _chats(tokenizer):
            return _chat_ids(text, tokenizer)
        text = "\n\n".join(turn["content"] for turn in text)
    ids: list[int] = tokenizer(text, add_special_tokens=True, verbose=False)["input_ids"]
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    special = {tokenizer.bos_token_id, tokenizer.cls_token_id}
    return ids if start is None or (ids and ids[0] in special) else [start, *ids]


def _chat_ids(dialogue: Dialogue, tokenizer: Any) -> list[int]:
    try:
        text = tokenizer.apply_chat_template(dialogue, tokenize=False)
    except Exception as error:  # templates are programs: roles in an order they refuse, unknown roles, ...
        raise DataError(f"the tokenizer's chat template does not take a demonstration: {error}") from error
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _windows(texts: Iterable[Document], tokenizer: Any, length: int, samples: int) -> Iterator[Tensor]:
    """Full windows of the joined documents; every document begins with the tokenizer's start token."""
    pending: list[int] = []
    given = 0
    for text in texts:
        pending += document_ids(text, tokenizer)
        while len(pending) >= length:
            yield torch.tensor(pending[:length])
            pending, given = pending[length:], given + 1
            if given == samples:
                return


def _single(texts: Iterable[Document], tokenizer: Any, length: int, samples: int) -> Iterator[Tensor]:
    for number, text in enumerate(texts):
        if number == samples:
            return
        yield torch.tensor(document_ids(text, tokenizer)[:length])


def _pad_id(tokenizer: Any) -> int:
    return int(next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0))


def _batches(rows: Sequence[tuple[Tensor, int]], size: int, pad_id: int) -> Iterator[Batch]:
    for first in range(0, len(rows), size):
        chunk = rows[first : first + size]
        longest = max(len(ids) for ids, _ in chunk)
        ids_BL = torch.full((len(chunk), longest), pad_id)
        mask_BL = torch.zeros(ids_BL.shape, dtype=torch.bool)
        for row, (ids, _) in enumerate(chunk):
            ids_BL[row, : len(ids)], mask_BL[row, : len(ids)] = ids, True
        yield Batch(ids_BL, None if mask_BL.all() else mask_BL, torch.tensor([domain for _, domain in chunk]))


def _digest(batches: Iterable[Batch], domains: Sequence[str]) -> str:
    """The same for the same samples, however they are batched."""
    sha = hashlib.sha256("\n".join(domains).encode())
    for batch in batches:
        domain_B = batch.domain_B if batch.domain_B is not None else torch.zeros(len(batch.ids_BL))
        mask_BL = batch.mask_BL if batch.mask_BL is not None else torch.ones_like(batch.ids_BL, dtype=torch.bool)
        for ids, mask, domain in zip(batch.ids_BL, mask_BL, domain_B, strict=True):
            sha.update(ids[mask].numpy().tobytes() + int(domain).to_bytes(4, "little"))
    return sha.hexdigest()
