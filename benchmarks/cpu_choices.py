"""The two choices Coterie makes for CPUs, measured here: float32 products, and threads that spin briefly.

1. Matrix products of an expert's shape in float32 and bfloat16, in one run. Storage stays bfloat16 either way;
   compared are the products and, for float32, widening the weights first. A ratio above 1 means float32 is faster.
2. A small `coterie compress` in its own process with threads that spin while they wait (OMP_WAIT_POLICY=ACTIVE), that
   sleep at once (PASSIVE), and that spin for a short count first (what Coterie sets), there and back, alone and beside
   a process that keeps one core busy. CPU seconds count: spinning threads burn what other work needs.

    python benchmarks/cpu_choices.py [--rows 128 512] [--hidden 2048] [--width 768] [--threads 2]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.nn import functional as F


def seconds(function: object, budget: float = 0.5) -> float:
    """Median seconds of one call."""
    assert callable(function)
    function()
    times, end = [], time.perf_counter() + budget
    while time.perf_counter() < end:
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def products(rows: list[int], hidden: int, width: int) -> None:
    """Part 1."""
    stored = torch.randn(width, hidden).to(torch.bfloat16)
    wide = torch.empty(width, hidden)
    print(f"{'rows':>6} {'float32 ms':>12} {'+ widening':>12} {'bfloat16 ms':>12} {'ratio':>7}")
    for count in rows:
        x = torch.randn(count, hidden)
        narrow = x.to(torch.bfloat16)
        plain = seconds(lambda x=x: F.linear(x, wide))
        widened = seconds(lambda x=x: F.linear(x, wide.copy_(stored)))
        low = seconds(lambda x=narrow: F.linear(x, stored))
        print(f"{count:6d} {plain * 1e3:12.3f} {widened * 1e3:12.3f} {low * 1e3:12.3f} {low / widened:7.2f}")


def _burn() -> None:
    while True:
        pass


POLICIES = {"spin": {"OMP_WAIT_POLICY": "ACTIVE"}, "sleep": {"OMP_WAIT_POLICY": "PASSIVE"}, "brief spin": {}}


def compress(policy: str, threads: int, folder: Path) -> tuple[float, float]:
    """Wall and CPU seconds of one compression of the pocket model."""
    from coterie.assets import pocket, write_demo_texts

    text, _ = write_demo_texts(folder / "text")
    command = [sys.executable, "-m", "coterie.cli.main", "compress", str(pocket()), str(folder / "out")]
    command += ["--method", "reap", "--keep", "0.5", "--data", str(text), "--samples", "16", "--length", "256"]
    command += ["--overwrite", "--no-report", "--threads", str(threads)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    plain = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, env={**plain, **POLICIES[policy]})
    wall = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def waiting(threads: int) -> None:
    """Part 2."""
    for busy in (0, 1):
        others = [multiprocessing.Process(target=_burn, daemon=True) for _ in range(busy)]
        for other in others:
            other.start()
        try:
            with tempfile.TemporaryDirectory() as folder:
                order = [*POLICIES, *reversed(POLICIES)]
                found = [(policy, *compress(policy, threads, Path(folder))) for policy in order]
        finally:
            for other in others:
                other.terminate()
        print("alone" if not busy else "beside a busy process")
        for policy in POLICIES:
            wall = statistics.mean(w for p, w, _ in found if p == policy)
            cpu = statistics.mean(c for p, _, c in found if p == policy)
            print(f"{policy:>12}: {wall:5.1f} s wall, {cpu:5.1f} CPU s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 128, 512])
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(f"torch {torch.__version__}, {given.threads} threads, load {os.getloadavg()[0]:.1f}")
    products(given.rows, given.hidden, given.width)
    waiting(given.threads)


if __name__ == "__main__":
    main()
