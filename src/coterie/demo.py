"""The demonstration: the whole main job on the model that ships with the package, in a few minutes on a laptop.

Inspect, profile, compress to half of the experts with three methods, evaluate all on held-out text, write the report,
load one result with plain transformers and let it write. Nothing is downloaded.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from coterie import api, assets
from coterie.analysis.report import write_report
from coterie.compression.compress import Result
from coterie.compression.forecast import redundancy
from coterie.evaluation.compare import ModelResult
from coterie.reporting import build_report
from coterie.streaming.lockstep import Progress

METHODS = ("frequency", "reap", "dern")
LENGTH = 256
PROMPTS = ("The river", "def main(", "El presidente", "Tom has 12 apples and buys 5 more.")


@dataclass
class Outcome:
    """What the demonstration produced."""

    folder: Path
    report: Path
    compressed: dict[str, Result]
    quality: list[ModelResult]
    written: dict[str, str]
    seconds: float


def run_demo(
    folder: Path,
    *,
    keep: float = 0.5,
    seed: int = 0,
    runtime: api.Runtime | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Outcome:
    """Run it into `folder`; earlier results there are replaced."""
    began = time.monotonic()
    model = str(assets.pocket())
    calibration, evaluation = assets.write_demo_texts(folder / "text")
    say("profiling the pocket model on calibration text of six domains")
    profile_folder = folder / "profile"
    seen = api.profile(
        model,
        [str(calibration)],
        out=str(profile_folder),
        methods=METHODS,
        observers=("SelectionCount", "MeanOutput", "DomainCount"),
        samples=16,
        length=LENGTH,
        seed=seed,
        overwrite=True,
        runtime=runtime,
        progress=progress,
    )
    compressed = {}
    for method in METHODS:
        say(f"compressing to {keep:.0%} of the experts with {method}")
        compressed[method] = api.compress(
            model,
            str(folder / method),
            method=method,
            profile=str(profile_folder),
            keep=keep,
            overwrite=True,
            runtime=runtime,
            progress=progress,
        )
    say("evaluating all four on held-out text")
    paths = [str(folder / method) for method in METHODS]
    quality = api.evaluate(
        [model, *paths], [str(evaluation)], samples=8, length=LENGTH, seed=seed, runtime=runtime, progress=progress
    )
    figures = redundancy(seen.layers, {p.index: p for p in compressed["reap"].plan.layers})
    page = build_report(
        paths,
        quality,
        loads=seen.layers,
        redundancy=figures,
        architecture="Qwen3MoeForCausalLM",
        elapsed=time.monotonic() - began,
    )
    write_report(page, folder / "report.html")
    say("loading the DERN result with plain transformers and letting it write")
    written = _generate(folder / "dern", seed)
    return Outcome(folder, folder / "report.html", compressed, quality, written, time.monotonic() - began)


def _generate(folder: Path, seed: int) -> dict[str, str]:
    model, tokenizer = api.load(str(folder), dtype="float32")
    torch.manual_seed(seed)
    texts = {}
    for prompt in PROMPTS:
        ids = tokenizer(f"{tokenizer.eos_token}{prompt}", return_tensors="pt")
        with torch.no_grad():
            out = model.generate(**ids, max_new_tokens=40, do_sample=True, top_k=20, temperature=0.8)
        texts[prompt] = " ".join(tokenizer.decode(out[0], skip_special_tokens=True).split())
    return texts
