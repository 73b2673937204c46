"""Demonstrations: prompts answered by the model itself, the text that EASY-EP wants to be judged on (arXiv:2504.06792).

Answers of other models, or prompts alone, show other experts at work. The model must fit in memory to write them; one
that does not can be served elsewhere, and its answers written as JSONL lines with `prompt` and `answer`.
"""

# B batch, L sequence

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from coterie.errors import DataError, OutputError, UsageError


def generate_demonstrations(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    out: str | Path,
    *,
    domain: str = "",
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    seed: int = 0,
) -> Path:
    """Let a resident model answer prompts, and write `prompt` and `answer` as JSONL that every `data` option takes.

    Parameters
    ----------
    model, tokenizer : as from `coterie.load`. prompts : questions of one domain.
    temperature : 0 takes the most likely token; above, tokens are drawn with `seed` (the paper: 0.6).

    An answer ends at the model's end token or after `max_new_tokens`. Without a chat template a prompt is continued
    after an empty line, as it will be read. Raises DataError if there is no prompt, OutputError if nothing can be
    written.
    """
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise DataError("there is no prompt to answer, or an empty one")
    if temperature < 0 or max_new_tokens < 1:
        raise UsageError(f"cannot generate with temperature {temperature} and {max_new_tokens} new tokens")
    drawing = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    torch.manual_seed(seed)
    lines = []
    for prompt in prompts:
        if getattr(tokenizer, "chat_template", None):
            turns = [{"role": "user", "content": prompt}]
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            ids_BL = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        else:
            ids_BL = tokenizer(f"{prompt}\n\n", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            all_BL = model.generate(ids_BL.to(model.device), max_new_tokens=max_new_tokens, **drawing)
        answer = tokenizer.decode(all_BL[0, ids_BL.shape[1] :], skip_special_tokens=True)
        lines.append({"prompt": prompt, "answer": answer} | ({"domain": domain} if domain else {}))
    path = Path(out)
    try:
        path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error
    return path
