"""A tokenizer.json as llama.cpp keeps tokenizers: tokens, their kinds, merges or scores, and how text is cut first.

Two kinds are known: byte-level BPE ("gpt2" in llama.cpp) and sentencepiece's BPE with byte tokens ("llama"). llama.cpp
knows how text is cut before merging by a name, not by a rule. The name is found from the rule that tokenizer.json
states; a rule that is not in the table becomes "default", with a note, because tokens may then differ.
"""

# V vocabulary

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coterie.errors import CheckpointError, UsageError

# {(regular expression of a Split, does ByteLevel cut by its own): name in llama.cpp}
CUTS: dict[tuple[str | None, bool], str] = {
    (None, True): "gpt-2",
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        False,
    ): "qwen2",
}
_BYTE = re.compile("<0x[0-9A-F]{2}>")
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # gguf.TokenType


@dataclass
class Vocabulary:
    """Tokens in the order of their ids. kinds : as in gguf.TokenType. scores : empty for "gpt2". pre : see above.

    space_prefix : text gets a leading space; None for "gpt2". notes : what a user should know.
    """

    model: str
    tokens: list[str]
    kinds: list[int]
    pre: str
    scores: list[float] = field(default_factory=list)
    space_prefix: bool | None = None
    notes: list[str] = field(default_factory=list)


def read_vocabulary(folder: Path, size: int) -> Vocabulary:
    """The tokenizer beside a checkpoint whose embeddings have `size` rows; rows without a token get a name.

    Raises UsageError where there is none, or none of a kind that is known; CheckpointError where it is damaged.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise UsageError(f"{folder} has no tokenizer.json, and a GGUF file holds the tokenizer", "Put it there.")
    try:
        described: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        model, steps = described["model"], _steps(described.get("pre_tokenizer"))
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} cannot be read as a tokenizer: {error}", "Fetch it again.") from error
    byte_level = any(step.get("type") == "ByteLevel" for step in steps)
    sentencepiece = bool(model.get("byte_fallback")) and not byte_level
    if model.get("type") != "BPE" or not (byte_level or sentencepiece):
        raise UsageError(
            f"{file} is neither byte-level BPE nor BPE with byte tokens, but {model.get('type')}",
            "Use `coterie export --form dense` (if quantized) and llama.cpp's own converter.",
        )
    by_id: dict[int, tuple[str, int]] = {}
    for token, index in model["vocab"].items():
        kind = BYTE if sentencepiece and _BYTE.fullmatch(token) else NORMAL
        by_id[index] = (token, UNKNOWN if sentencepiece and token == model.get("unk_token") else kind)
    for added in described.get("added_tokens", []):
        token, index = added["content"], added["id"]
        if by_id.get(index, ("", NORMAL))[1] == UNKNOWN:
            continue
        plain = token if byte_level or added["special"] else token.replace("\N{LOWER ONE EIGHTH BLOCK}", " ")
        by_id[index] = (plain, CONTROL if added["special"] else USER_DEFINED)
    if by_id and max(by_id) >= size:
        raise UsageError(
            f"{file} has a token {max(by_id)}, and the model's embeddings {size} rows", "They do not belong together."
        )
    entries = [by_id.get(index, (f"[PAD{index}]", UNUSED)) for index in range(size)]
    tokens, kinds = [token for token, _ in entries], [kind for _, kind in entries]
    if sentencepiece:
        pairs = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
        found = Vocabulary("llama", tokens, kinds, "default", _scores(tokens, pairs), _space_prefix(described, steps))
        if not _merges_all(tokens, kinds, pairs):
            found.notes.append(
                "this tokenizer merges some pairs only in one way, and llama.cpp in any that makes a token: tokens can"
                " differ; compare some"
            )
        return found
    found = Vocabulary("gpt2", tokens, kinds, _cut(steps))
    if found.pre == "default":
        found.notes.append(
            "how this tokenizer cuts text has no known name in llama.cpp: the file says `default`, and tokens can"
            " differ; compare some, and set --override-kv tokenizer.ggml.pre=str:NAME if they do"
        )
    if normalizer := described.get("normalizer"):
        found.notes.append(f"this tokenizer normalizes text first ({normalizer['type']}); llama.cpp does not")
    return found


def _steps(entry: dict[str, Any] | None) -> list[dict[str, Any]]:
    if entry is None:
        return []
    return list(entry["pretokenizers"]) if entry.get("type") == "Sequence" else [entry]


def _cut(steps: list[dict[str, Any]]) -> str:
    """llama.cpp's name for how text is cut, or "default"."""
    kinds = [step["type"] for step in steps]
    if kinds not in (["ByteLevel"], ["Split", "ByteLevel"]) or steps[-1].get("add_prefix_space"):
        return "default"
    expression = None
    if kinds[0] == "Split":
        if steps[0].get("behavior") != "Isolated" or steps[0].get("invert"):
            return "default"
        expression = steps[0]["pattern"].get("Regex")
    return CUTS.get((expression, bool(steps[-1].get("use_regex", True))), "default")


def _scores(tokens: list[str], merges: list[tuple[str, ...]]) -> list[float]:
    """Scores with which merging the best pair first is applying `merges` in order.

    sentencepiece scores the token a merge makes; tokenizer.json lists the merges by that score, best first.
    """
    rank: dict[str, int] = {}
    for order, merge in enumerate(merges):
        rank.setdefault("".join(merge), order)
    return [-float(rank.get(token, len(merges))) for token in tokens]


def _merges_all(tokens: list[str], kinds: list[int], merges: list[tuple[str, ...]]) -> bool:
    """Is every pair of tokens that makes a token merged, as in what was converted from sentencepiece?"""
    known, merged = {token for token, kind in zip(tokens, kinds, strict=True) if kind == NORMAL}, set(merges)
    splits = ((token[:at], token[at:]) for token in known for at in range(1, len(token)))
    return all(split in merged for split in splits if split[0] in known and split[1] in known)


def _space_prefix(described: dict[str, Any], steps: list[dict[str, Any]]) -> bool:
    normalizer = described.get("normalizer") or {}
    parts = normalizer.get("normalizers", [normalizer])
    schemes = [step.get("prepend_scheme") for step in steps if step["type"] == "Metaspace"]
    return any(part.get("type") == "Prepend" for part in parts) or any(scheme != "never" for scheme in schemes)
