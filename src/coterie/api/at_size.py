"""What is best for a model at a given size: chains of pruning and quantization, carried out and compared."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from coterie import comparison
from coterie.api.runtime import Runtime, vocabulary_of
from coterie.api.shrink import carry_out, target_bytes, two_texts
from coterie.compression.fitting import DEFAULTS, Link, fit
from coterie.errors import CoterieError, UsageError
from coterie.streaming.lockstep import Progress
from coterie.streaming.model import StreamedModel
from coterie.streaming.writer import check_place, parse_size
from coterie.text import check_ids


def compare_at_size(
    model: str,
    data: Sequence[str] = (),
    *,
    target_size: str | int,
    methods: Sequence[str] = (),
    checkpoints: Sequence[str] = (),
    eval_data: Sequence[str] = (),
    eval_tokens: str | None = None,
    eval_samples: int = 32,
    samples: int = 128,
    out: str | None = None,
    work: str | None = None,
    overwrite: bool = False,
    seed: int = 0,
    runtime: Runtime | None = None,
    progress: Progress | None = None,
    **text: Any,
) -> comparison.Comparison:
    """Chains of methods, each turned until it has the wanted size, side by side.

    Unlike other comparisons these checkpoints are written, one after the other, for rounding depends on text that went
    through what was rounded before: each takes its bytes on disk, and they are removed at the end.

    Parameters
    ----------
    target_size : bytes of all tensors, e.g. "0.25x" of the original, or "12GB".
    methods : chains as "reap+quantize:bits=8"; by default those of `compression.fitting.DEFAULTS`.
    work : folder for the checkpoints, which then stay; by default a temporary one, removed.

    Other keywords are those of `compare`.
    """
    runtime = runtime or Runtime()
    chains = list(dict.fromkeys(methods or DEFAULTS))
    parsed = [[Link(e.name, e.parameters) for e in map(comparison.Entry.parse, chain.split("+"))] for chain in chains]
    if out is not None:
        check_place(Path(out), overwrite=overwrite, source=Path(model) if Path(model).is_dir() else None)
    streamed = runtime.open(model)
    target = target_bytes(target_size, streamed)
    first, second = two_texts(model, data, eval_data, eval_tokens, eval_samples, samples, seed, runtime, dict(text))
    for found in (first, second):
        check_ids(found, vocabulary_of(streamed))
    memory = parse_size(runtime.memory, least=0)
    told = str(target_size) if isinstance(target_size, str) else f"{target_size} bytes"
    ready: list[tuple[str, StreamedModel]] = []
    refused: list[comparison.Contender] = []
    with ExitStack() as stack:
        if work is None:
            beside = Path(out).absolute().parent if out is not None else None
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="coterie-compare-", dir=beside)))
        else:
            folder = Path(work)
            folder.mkdir(parents=True, exist_ok=True)
        for number, (chain, links) in enumerate(zip(chains, parsed, strict=True)):
            try:
                fitted = fit(runtime.open(model), links, target)
                label = f"{chain} ({fitted.told})" if fitted.told else chain
                place = folder / f"{number:02d}-{chain.replace('+', '-').partition(':')[0]}"
                _check_disk(folder, target)
                steps = [{**step, "tokens": first, "seed": seed} for step in fitted.steps]
                carry_out(model, str(place), steps, overwrite=True, runtime=runtime, progress=progress)
                ready.append((label, runtime.open(str(place))))
            except UsageError as error:
                refused.append(comparison.Contender(f"{chain} {told}", chain, {}, told, refused=error.message))
        for name in checkpoints:
            ready.append((name, runtime.open(name)))
            if vocabulary_of(ready[-1][1]) != vocabulary_of(streamed):
                raise UsageError(f"{name} has another vocabulary than {model}: they cannot be compared")
        if not ready:
            raise UsageError(f"nothing fits: {refused[0].label}: {refused[0].refused}")
        result = comparison.compare(
            streamed, model, [], [], first, second, checkpoints=ready, memory=memory, seed=seed, progress=progress
        )
    result.contenders += refused
    if out is not None:
        comparison.save(result, Path(out), overwrite=overwrite)
    return result


def _check_disk(folder: Path, target: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < 2 * target:
        raise CoterieError(
            f"{folder} has {free / 1e9:.2f} GB free, a checkpoint of this size takes {target / 1e9:.2f} GB and as much"
            " while it is written",
            "Name another folder with --work.",
        )
