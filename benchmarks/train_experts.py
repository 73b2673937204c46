"""What forward and backward of one sparse layer cost: "coterie_train" beside the reference and transformers' own.

Experts modules of published shapes with random float32 weights (time does not depend on them) and uniform random
routing run the same tokens; all their gradients are computed: hidden states, routing weights, expert weights. Then the
forward alone, without gradients, and with `--steps` whole training steps of a small Mixtral (forward, backward,
AdamW), with the fused AdamW and the chunked head loss as further contenders.

Fair means: contenders take turns in every round, so that what else the machine does meets all of them; the least time
of the rounds counts, after one that warms up. `--clock cpu` takes the CPU time of the process instead of the wall's,
which other processes disturb less; only with one thread. `--keep-memory` makes the C library keep freed memory, for all
contenders: fresh memory costs a page fault every 4 KB. batched_mm gathers the weights of every slot; where that is more
than `--most-gb` it is left out.

    ratio   the fastest of transformers' implementations over this one: above 1 is faster

    python benchmarks/train_experts.py [--layers mixtral-small] [--tokens 256 2048] [--threads 2] [--steps] [--quick]
"""

# T tokens, H hidden, I expert width, E experts, K per token

from __future__ import annotations

import argparse
import copy
import ctypes
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, MixtralConfig

from common import machine, print_machine
from coterie.architectures.head_loss import head_loss
from coterie.experts import forward, training
from lowrank_experts import bank

STOCK = ("eager", "grouped_mm", "batched_mm")
# hidden, expert width, experts, experts per token
SHAPES = {
    "olmoe": (2048, 1024, 16, 8),  # of 64: weights and gradients of all of them would take 3.2 GB
    "mixtral-small": (512, 1024, 8, 2),
    "fine-grained": (256, 128, 64, 8),
}
QUICK = {"quick": (64, 32, 8, 2)}
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def keep_memory() -> None:
    """Let glibc neither map large blocks one by one nor give freed memory back."""
    lib = ctypes.CDLL(None)
    lib.mallopt(-4, 0)  # M_MMAP_MAX
    lib.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def turns(contenders: dict[str, Callable[[], None]], rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Least seconds of each."""
    best = dict.fromkeys(contenders, float("inf"))
    for turn in range(rounds + 1):
        for name, call in contenders.items():
            began = clock()
            call()
            if turn:
                best[name] = min(best[name], clock() - began)
    return best


def layer(name: str, shape: tuple[int, int, int, int], given: argparse.Namespace) -> list[dict[str, Any]]:
    H, I, E, K = shape  # noqa: E741
    module = bank(H, I, E, "eager", torch.float32).requires_grad_(True)
    rows = []
    for T in given.tokens:
        generator = torch.Generator().manual_seed(given.seed)
        index = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(T)])
        x, grad = torch.randn(T, H, requires_grad=True), torch.randn(T, H)
        weights = torch.full((T, K), 1 / K, requires_grad=True)

        def run(implementation: str, *, backward: bool, now: Any = (x, index, weights, grad)) -> None:
            x, index, weights, grad = now
            module.config._experts_implementation = implementation
            with torch.set_grad_enabled(backward):
                y = module(x, index, weights)
            if backward:
                y.backward(grad)
                module.zero_grad()
                x.grad = weights.grad = None

        names = [training.NAME, forward.NAME, *STOCK]
        if T * K * 3 * H * I * 4 > given.most_gb * 1e9:
            names.remove("batched_mm")
        for backward in (True, False):
            calls = {n: (lambda n=n, b=backward: run(n, backward=b)) for n in names}
            best = turns(calls, given.rounds, CLOCKS[given.clock])
            reference = min(best[n] for n in STOCK if n in best)
            flops = 6 * T * K * H * I * (3 if backward else 1)
            for n, seconds in best.items():
                what = "forward + backward" if backward else "forward"
                row = {"layer": name, "tokens": T, "pass": what, "experts": n, "ms": seconds * 1e3}
                rows.append(row | {"GFLOP/s": flops / seconds / 1e9, "ratio": reference / seconds})
                print(
                    f"{name:<14} {T:5d}  {what:<18} {n:<14} {seconds * 1e3:9.2f} ms {flops / seconds / 1e9:6.1f}"
                    f" GFLOP/s {reference / seconds:6.2f}",
                    flush=True,
                )
    return rows


def steps(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Whole steps of a small Mixtral."""
    hidden, layers, vocabulary, (B, L) = (64, 2, 128, (2, 16)) if given.quick else (256, 4, 8192, (4, 256))
    config = MixtralConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    ids = torch.randint(0, vocabulary, (B, L), generator=torch.Generator().manual_seed(given.seed))
    labels = torch.nn.functional.pad(ids, (0, 1), value=-100)[:, 1:]

    def contender(implementation: str, *, fused: bool = False, head: bool = False) -> Callable[[], None]:
        torch.manual_seed(given.seed)
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))  # it holds the implementation
        model.set_experts_implementation(implementation)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, **({"fused": True} if fused else {}))

        def call() -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=given.bfloat16):
                if head:
                    loss = head_loss(model.model(ids).last_hidden_state, model.lm_head.weight, labels)
                else:
                    loss = model(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return call

    calls = {n: contender(n) for n in STOCK if n != "batched_mm"}
    calls |= {f"{n}, fused AdamW": contender(n, fused=True) for n in (*calls, training.NAME)}
    calls[f"{training.NAME}, fused AdamW, head loss"] = contender(training.NAME, fused=True, head=True)
    best = turns(calls, given.rounds, CLOCKS[given.clock])
    reference = min(best[n] for n in STOCK if n in best)
    for n, seconds in best.items():
        print(f"step of {config.hidden_size} x {layers}  {n:<40} {seconds * 1e3:9.2f} ms {reference / seconds:6.2f}")
    return [{"step": n, "ms": seconds * 1e3, "ratio": reference / seconds} for n, seconds in best.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="*", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 2048])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--most-gb", type=float, default=2.0)
    parser.add_argument("--keep-memory", action="store_true")
    parser.add_argument("--steps", action="store_true", help="whole training steps too")
    parser.add_argument("--bfloat16", action="store_true", help="the steps under autocast")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a tiny layer; tests the script, measures nothing")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.set_flush_denormal(True)
    torch.manual_seed(given.seed)
    if given.keep_memory:
        keep_memory()
    facts = machine()
    print_machine(facts)
    print(f"torch {torch.__version__}, {given.threads} threads, {given.clock} time")
    rows = []
    for name, shape in (QUICK if given.quick else {n: SHAPES[n] for n in given.layers}).items():
        rows += layer(name, shape, given)
    if given.steps:
        rows += steps(given)
    if given.json:
        given.json.write_text(json.dumps({"machine": facts, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
