"""GPTQ for Coterie and for llm-compressor: the same matrices, inputs and grid; seconds a matrix, and what is lost.

What it measures
    Expert matrices of published layers' shapes (random weights, inputs that go together as a layer's do, one Gram
    matrix for each expert), 4 bits, symmetric, groups of 128. Timed is the quantization alone: llm-compressor's
    `quantize_weight`, and Coterie's `gptq`. Below each shape stand the seconds that the machine needs for the products
    nobody can do without: one Cholesky factorisation, and weights times Gram matrix once.

Why it is fair
    Every contender runs in a process of its own, the peer in its own environment with pinned versions, with the same
    threads, and reads the same tensors; order A B C C B A. The peer gets its scales ready-made, its preferred batch of
    experts, and copies of its inputs, which it overwrites, made outside of the clock; Coterie fits its scales inside.
    In static order both work with the same scales and in the same order, so their codes should be the same: how many
    are is printed, and so is ||W X - W_hat X|| / ||W X|| of each, computed by this script. "reference", left out unless
    asked for, is the paper's algorithm written down column by column, without blocks: twenty times slower.

Run
    python benchmarks/gptq_peers.py                                 # minutes
    python benchmarks/gptq_peers.py --shapes olmoe-up --experts 4   # one shape
    python benchmarks/gptq_peers.py --quick                         # seconds; tests the script
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import (
    LLMCOMPRESSOR_PINS,
    Workplace,
    common_options,
    ensure_venv,
    finish,
    machine,
    print_machine,
    table,
    thread_environment,
    timed,
    versions,
)

# E experts, O outputs and I inputs of a matrix, G groups of columns, T tokens

# outputs, inputs
SHAPES = {
    "qwen3-30b-up": (768, 2048),
    "qwen3-30b-down": (2048, 768),
    "olmoe-up": (1024, 2048),
    "mixtral-up": (14336, 4096),
}
USUAL = ("qwen3-30b-up", "qwen3-30b-down", "olmoe-up")
QUICK = {"quick": (48, 96)}
CONTENDERS = ("peer", "peer-static", "coterie", "coterie-static", "coterie-one-by-one", "reference")
BITS, GROUP, DAMP = 4, 128, 0.01


def make(rows: int, columns: int, experts: int, seed: int) -> dict[str, Any]:
    """Weights, Gram matrices, and each group's symmetric scale: a float16 number, held in float32 to compute with."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(columns, columns, generator=generator) / math.sqrt(columns) + torch.eye(columns)
    weights, grams = [], []
    for _ in range(experts):
        x_TI = torch.randn(2 * columns, columns, generator=generator) @ mixed
        grams.append(x_TI.T @ x_TI)
        weights.append(torch.randn(rows, columns, generator=generator) * 0.02)
    w_EOI = torch.stack(weights)
    group = min(GROUP, columns)
    largest_EOG = w_EOI.unflatten(-1, (-1, group)).abs().amax(-1)
    return {"w": w_EOI, "gram": torch.stack(grams), "scale": (largest_EOG * (2 / (2**BITS - 1))).half().float()}


def run_child(spec: dict[str, Any]) -> None:
    """One contender on one shape: prints the seconds of every repeat, writes the dequantized weights."""
    import torch
    from safetensors.torch import load_file, save_file

    torch.set_num_threads(spec["threads"])
    held = load_file(spec["tensors"])
    job: Callable[[dict[str, Any]], Any] = JOBS[spec["contender"]](held)
    seconds, dense = [], None
    for repeat in range(spec["repeats"] + 1):  # the first warms up
        copies = {name: tensor.clone() for name, tensor in held.items()}
        start = time.perf_counter()
        dense = job(copies)
        if repeat:
            seconds.append(time.perf_counter() - start)
    assert dense is not None
    save_file({"dense": dense.contiguous()}, spec["output"])
    print("SECONDS " + json.dumps(seconds))


def _peer(order: str | None) -> Callable[[dict[str, Any]], Any]:
    def prepare(held: dict[str, Any]) -> Any:
        import torch
        from compressed_tensors.quantization import QuantizationArgs  # type: ignore[import-not-found, unused-ignore]
        from llmcompressor.modifiers.gptq.gptq_quantize import (  # type: ignore[import-not-found, unused-ignore]
            quantize_weight,
        )

        group = min(GROUP, held["w"].shape[-1])
        options = QuantizationArgs(
            num_bits=BITS, type="int", symmetric=True, strategy="group", group_size=group, actorder=order
        )
        zero = torch.zeros_like(held["scale"])

        def job(copies: dict[str, Any]) -> Any:
            with torch.no_grad():
                return quantize_weight(
                    copies["w"], copies["gram"], copies["scale"], zero, None, options, blocksize=128, percdamp=DAMP
                )[0]

        return job

    return prepare


def _coterie(order: str, *, together: bool) -> Callable[[dict[str, Any]], Any]:
    def prepare(_: dict[str, Any]) -> Any:
        import torch

        from coterie.compression.quantizers import Spec, gptq
        from coterie.experts.packing import dense

        spec = Spec(BITS, GROUP, symmetric=True)

        def one(w: Any, gram: Any) -> Any:
            found = gptq(w, gram, 1, spec, damp=DAMP, order=order)  # type: ignore[arg-type]
            return dense(found.codes_OI, BITS, GROUP, found.scale_OG, None)  # the peer's result is dequantized, too

        def job(copies: dict[str, Any]) -> Any:
            if together:
                return one(copies["w"], copies["gram"])
            return torch.stack([one(w, gram) for w, gram in zip(copies["w"], copies["gram"])])

        return job

    return prepare


def _reference(_: dict[str, Any]) -> Any:
    """The paper's algorithm without blocks; scales of the original weights, columns in their own order."""
    import torch

    def one(w: Any, h: Any, scale: Any) -> Any:
        columns, half = w.shape[1], 2 ** (BITS - 1)
        group = min(GROUP, columns)
        h.diagonal().add_(DAMP * h.diagonal().mean())
        upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
        for i in range(columns):
            s = scale[:, i // group]
            q = (w[:, i] / s).round().clamp(-half, half - 1) * s
            error = (w[:, i] - q) / upper[i, i]
            w[:, i] = q
            w[:, i + 1 :].addr_(error, upper[i, i + 1 :], alpha=-1)
        return w

    return lambda copies: torch.stack([one(*parts) for parts in zip(copies["w"], copies["gram"], copies["scale"])])


JOBS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "peer": _peer(None),
    "peer-static": _peer("weight"),
    "coterie": _coterie("natural", together=True),
    "coterie-static": _coterie("static", together=True),
    "coterie-one-by-one": _coterie("natural", together=False),
    "reference": _reference,
}


def measure_shape(
    name: str, shape: tuple[int, int], options: argparse.Namespace, peer: Path | None, folder: Path
) -> dict[str, Any]:
    """All contenders on one shape."""
    import torch
    from safetensors.torch import load_file, save_file

    torch.set_num_threads(options.threads)
    held = make(*shape, options.experts, options.seed)
    save_file({k: v.contiguous() for k, v in held.items()}, folder / "tensors.safetensors")
    # what nobody can do without, of one expert
    floor = min(timed(lambda: torch.linalg.cholesky_ex(held["gram"][0])) for _ in range(3))
    floor += min(timed(lambda: held["w"][0] @ held["gram"][0]) for _ in range(3))
    contenders = [c for c in options.contenders if peer is not None or not c.startswith("peer")]
    seconds: dict[str, list[float]] = {c: [] for c in contenders}
    failed: dict[str, str] = {}
    for contender in [*contenders, *reversed(contenders)]:
        if contender in failed:
            continue
        spec = {
            "tensors": str(folder / "tensors.safetensors"),
            "output": str(folder / f"{contender}.safetensors"),
            "contender": contender,
            "repeats": options.repeats,
            "threads": options.threads,
        }
        python = peer if contender.startswith("peer") else sys.executable
        environment = thread_environment(options.threads)
        if contender.startswith("peer"):
            environment.pop("PYTHONPATH", None)
        command = [str(python), __file__, "--child", json.dumps(spec)]
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
        line = next((x for x in run.stdout.splitlines() if x.startswith("SECONDS ")), None)
        if run.returncode or line is None:
            failed[contender] = (run.stderr or run.stdout).strip().splitlines()[-1] if run.stderr or run.stdout else "?"
            continue
        seconds[contender] += json.loads(line.removeprefix("SECONDS "))
    dense = {c: load_file(folder / f"{c}.safetensors")["dense"] for c in contenders if c not in failed}
    rows, results = [], []
    base = statistics.median(seconds["peer"]) if seconds.get("peer") else None
    for c in contenders:
        if c in failed:
            rows.append([c, f"failed: {failed[c]}", "", "", ""])
            results.append({"contender": c, "failed": failed[c]})
            continue
        each = statistics.median(seconds[c]) / options.experts
        lost = (held["w"] - dense[c]).double()
        error = math.sqrt(float(((lost @ held["gram"].double()) * lost).sum()))
        error /= math.sqrt(float(((held["w"].double() @ held["gram"].double()) * held["w"].double()).sum()))
        ratio = None if base is None else base / options.experts / each
        twin = {"coterie-static": "peer-static", "peer": "reference"}.get(c)
        half_step = held["scale"].repeat_interleave(min(GROUP, shape[1]), dim=-1) / 2
        same = float(((dense[c] - dense[twin]).abs() < half_step).float().mean()) if twin in dense else None
        results.append(
            {
                "contender": c,
                "seconds": each,
                "peer_over_this": ratio,
                "output_error": error,
                "same_as": twin,
                "same": same,
            }
        )
        spread = (max(seconds[c]) - min(seconds[c])) / options.experts
        rows.append(
            [
                c,
                f"{each:.3f} +- {spread / 2:.3f}",
                "" if ratio is None else f"{ratio:.2f}",
                f"{error:.5f}",
                "" if same is None else f"{same:.2%} of {twin}'s",
            ]
        )
    print(
        f"\n{name}: {options.experts} matrices of {shape[0]} x {shape[1]}; what it takes at least: {floor:.3f} s each"
    )
    print(table(["contender", "s a matrix", "times the peer's speed", "output error", "equal codes"], rows))
    return {"shape": name, "rows": shape[0], "columns": shape[1], "floor_seconds": floor, "contenders": results}


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common_options(parser)
    parser.add_argument("--shapes", nargs="+", choices=[*SHAPES, *QUICK], default=list(USUAL), help="layers' shapes")
    parser.add_argument("--experts", type=int, default=4, help="matrices quantized together (default 4)")
    parser.add_argument("--repeats", type=int, default=3, help="calls of each process that are timed (default 3)")
    parser.add_argument(
        "--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS[:-1]), help="reference takes long"
    )
    parser.add_argument("--peer-python", type=Path, help="Python with llm-compressor (default: made under --cache)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        run_child(json.loads(options.child))
        return
    if options.quick:
        options.shapes, options.experts, options.repeats = list(QUICK), 2, 1
    facts = machine()
    print_machine(facts)
    peer, packages = None, {}
    if any(c.startswith("peer") for c in options.contenders):
        peer = options.peer_python or ensure_venv("llmcompressor", LLMCOMPRESSOR_PINS, options.cache)
        packages = versions(peer, ["llmcompressor", "compressed-tensors", "torch"])
        print("peer: " + ", ".join(f"{k} {v}" for k, v in packages.items()))
    print(f"{BITS} bits, symmetric, groups of {GROUP}; {options.threads} threads")
    with Workplace(options, "gptq") as folder:
        results = [measure_shape(n, {**SHAPES, **QUICK}[n], options, peer, folder) for n in options.shapes]
    load = os.getloadavg()[0]
    if facts["load_average"] > 1.0 or load > options.threads + 1.0:
        print(f"\nNOT A QUIET MACHINE (load {facts['load_average']:.2f} before, {load:.2f} after): ratios may be off.")
    finish({"machine": facts, "peer": packages, "results": results}, options.json)


if __name__ == "__main__":
    main()
