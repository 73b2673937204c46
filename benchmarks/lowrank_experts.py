"""Low-rank experts against dense ones: time, resident bytes and operations of one layer's experts, in one run.

Experts of a published layer's shape (Mixtral, OLMoE, Qwen3-30B-A3B; random weights) run the same tokens through the
same forward: dense, and as factors A B of the rank at which operations halve, and of the rank a quarter as large. The
forward computes what is stored: nothing is multiplied out. Also measured: what transformers' own implementations take
for the dense layer (eager, and grouped_mm where it runs), so that a low-rank layer is not only compared with us.

Reported are medians of alternating calls as ratios to the dense layer, resident bytes of the experts as the process
has them (tensors' own storage), and multiplications a token, counted and measured as the fall of time at many tokens,
where time is operations. Ratios below 1 are faster. Fewer operations do not become less time where there are few tokens
and the time is reading weights: there bytes count.

    python benchmarks/lowrank_experts.py [--threads 2] [--tokens 1 16 512] [--quick]
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from coterie.anatomy import ExpertBank
from coterie.anatomy.forms import projection_shapes
from coterie.experts import factored
from coterie.experts.forward import NAME, release_scratch

# hidden, expert width, experts (of the real layer, or as many as fit), experts per token
SHAPES = {
    "mixtral": (4096, 14336, 4, 2),
    "olmoe": (2048, 1024, 64, 8),
    "qwen3-30b-a3b": (2048, 768, 128, 8),
}
QUICK = {"quick": (64, 48, 8, 2)}


def bank(hidden: int, width: int, experts: int, implementation: str, dtype: torch.dtype) -> Any:
    """One stock experts module with random weights."""
    config = AutoConfig.for_model(
        "qwen3_moe", hidden_size=hidden, moe_intermediate_size=width, num_experts=experts, num_experts_per_tok=2
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        module = Qwen3MoeExperts(config)
    module.to_empty(device="cpu").to(dtype)
    for parameter in module.parameters():
        parameter.requires_grad_(False).normal_(0, 0.02)
    return module


def low_rank(module: Any, rank: dict[str, int]) -> None:
    """The module as factors with random numbers: time does not depend on them."""
    factored.convert(module, projection_shapes(ExpertBank(module)), rank)
    for parameter in module.parameters():
        parameter.requires_grad_(False).normal_(0, 0.02)


def half_rank(outputs: int, inputs: int) -> int:
    """The rank at which r (O + I) is half of O I."""
    return outputs * inputs // (2 * (outputs + inputs))


def medians(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each, called in turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(found) for name, found in times.items()}


def resident(module: Any) -> int:
    return sum(p.untyped_storage().nbytes() for p in module.parameters())


def operations(module: Any, top_k: int) -> int:
    """Multiplications of one token, from the matrices that are really there."""
    E = ExpertBank(module).num_experts
    return top_k * sum(p.numel() // E for p in module.parameters())


def layer(name: str, shape: tuple[int, int, int, int], given: argparse.Namespace) -> list[dict[str, Any]]:
    hidden, width, experts, top_k = shape
    dtype = getattr(torch, given.dtype)
    dense = bank(hidden, width, experts, NAME, dtype)
    variants = {"dense": dense}
    for implementation in ("eager", "grouped_mm"):
        other = bank(hidden, width, 1, implementation, dtype)
        for parameter in ("gate_up_proj", "down_proj"):
            setattr(other, parameter, getattr(dense, parameter))  # the same weights, not another copy
        other.num_experts = experts
        variants[f"transformers {implementation}"] = other
    rank = half_rank(width, hidden)
    for told, r in ((f"rank {rank}", rank), (f"rank {rank // 4}", rank // 4)):
        module = bank(hidden, width, experts, NAME, dtype)
        low_rank(module, dict.fromkeys(("gate", "up", "down"), r))
        variants[told] = module
    rows = []
    for tokens in given.tokens:
        generator = torch.Generator().manual_seed(given.seed)
        x = torch.randn(tokens, hidden, generator=generator, dtype=torch.float32).to(dtype)
        index = torch.stack([torch.randperm(experts, generator=generator)[:top_k] for _ in range(tokens)])
        weight = torch.full((tokens, top_k), 1 / top_k, dtype=dtype)
        calls = {told: functools.partial(module, x, index, weight) for told, module in variants.items()}
        with torch.no_grad():
            seconds = medians(calls, given.rounds)
        for told, module in variants.items():
            rows.append(
                {
                    "layer": name,
                    "tokens": tokens,
                    "experts stored as": told,
                    "ms": seconds[told] * 1e3,
                    "time": seconds[told] / seconds["dense"],
                    "resident MB": resident(module) / 1e6,
                    "bytes": resident(module) / resident(dense),
                    "operations": operations(module, top_k) / operations(dense, top_k),
                }
            )
    release_scratch()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 512])
    parser.add_argument("--layers", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a tiny layer; tests the script, measures nothing")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(f"torch {torch.__version__}, {given.threads} threads, {given.dtype}, load {os.getloadavg()[0]:.1f}")
    rows = []
    for name, shape in (QUICK if given.quick else {n: SHAPES[n] for n in given.layers}).items():
        print(f"\n{name}: hidden {shape[0]}, width {shape[1]}, {shape[2]} experts, {shape[3]} per token", flush=True)
        found = layer(name, shape, given)
        print(f"{'tokens':>6}  {'experts':<24} {'ms':>9} {'time':>6} {'MB':>9} {'bytes':>6} {'operations':>10}")
        for row in found:
            print(
                f"{row['tokens']:6d}  {row['experts stored as']:<24} {row['ms']:9.3f} {row['time']:6.2f}"
                f" {row['resident MB']:9.1f} {row['bytes']:6.2f} {row['operations']:10.2f}"
            )
        rows += found
    if given.json:
        given.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
