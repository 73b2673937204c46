"""Packed experts against 16 and 32 bit ones, and against torch's int4 and int8 operators: one layer, one run.

Experts of a published layer's shape (Mixtral, OLMoE, Qwen3-30B-A3B; random weights and codes, on which time does not
depend) run the same tokens: packed at 2, 3, 4 and 8 bits and at a mixture of 2, 3, 4, 8 and 16, with transformers' own
implementations (eager, grouped_mm, batched_mm) in float32 and bfloat16, with torch's `_weight_int4pack_mm_for_cpu` and
`_weight_int8pack_mm` in a loop over the experts, and, with `--kt FOLDER`, with kt-kernel's int4 experts.

Fair means: all contenders take turns in every round, so that what else the machine does meets all of them; a round has
tokens and a choice of experts of its own, in which the same numbers of rows meet other experts, so that no contender
finds its weights in the cache because it read them a moment ago, as in a model with many layers; the least time of the
rounds counts, for every contender; one that took more than a second twice is not asked again. A copy and a float32
matrix product take their turns too: they are the roof.

    time       of the fastest transformers implementation over the contender's: above 1 is faster
    GB/s       bytes of the weights that the chosen experts have, scales included, over time; beside it the share of
               the copy's bytes (read and written) a second
    GFLOP/s    2 x rows x weights over time; beside it the share of the float32 product's rate
    roof       the least time that either rate allows, over the time taken. It can exceed 100%: the matrix product of
               torch's library is not the fastest that the processor can do, and a copy is not a read

A contender that would gather more than `--most-gb` of weights (batched_mm with many tokens), or that at the rate of its
last number of tokens would take longer than `--most-seconds` a call, is left out, which is said.
kt-kernel quantizes activations to 8 bits, which the others do not; it runs in a process of its own, with this Python
and the wheel unpacked in FOLDER (and gguf, which it imports):

    pip download --no-deps kt-kernel gguf -d wheels && for w in wheels/*.whl; do unzip -qo $w -d FOLDER; done
    python benchmarks/packed_experts.py [--layers qwen3-30b-a3b] [--tokens 1 4 16 512] [--kt FOLDER] [--quick]
"""

# T tokens, H hidden, I expert width, E experts, K per token, O outputs and G groups of a matrix

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import machine, print_machine
from coterie.experts import packed
from coterie.experts.kernels import cpu
from lowrank_experts import bank

# hidden, expert width, experts (of the real layer, or as many as fit), experts per token
SHAPES = {
    "mixtral": (4096, 14336, 4, 2),  # of 8: float32 and bfloat16 of all of them would take 8.5 GB
    "olmoe": (2048, 1024, 64, 8),
    "qwen3-30b-a3b": (2048, 768, 128, 8),
}
QUICK = {"quick": (128, 64, 8, 2)}
MIXTURE = (2, 3, 4, 4, 8, 2, 3, 16)  # 5.25 bits and scales on average
Call = Callable[[Tensor, Tensor, Tensor], Any]


# ------------------------------------------------------------------------------------------------ contenders


def packed_layer(shape: tuple[int, int, int, int], bits: list[int], group: int, dtype: torch.dtype) -> Any:
    """A packed experts module full of random codes."""
    H, I, E, _ = shape  # noqa: E741
    module = bank(H, I, 1, "coterie", dtype)
    module.num_experts = E
    shapes = {"gate": (I, H), "up": (I, H), "down": (H, I)}
    packed.convert(module, dict.fromkeys(shapes, bits), shapes, group, symmetric=False)
    for p in shapes:
        getattr(module, f"packed_{p}").random_(-(2**31), 2**31 - 1)
        getattr(module, f"scale_{p}").data.uniform_(0.001, 0.01)
        getattr(module, f"zero_{p}").data.uniform_(0, 4)
        getattr(module, f"plain_{p}").data.normal_(0, 0.02)
    return module


def stock_layer(shape: tuple[int, int, int, int], implementation: str, weights: Any) -> Any:
    """A stock module over weights that are there already."""
    H, I, E, _ = shape  # noqa: E741
    module = bank(H, I, 1, implementation, weights.down_proj.dtype)
    for name in ("gate_up_proj", "down_proj"):
        setattr(module, name, getattr(weights, name))
    module.num_experts = E
    return module


class Operators:
    """torch's int4 or int8 products in a loop over the experts."""

    def __init__(self, shape: tuple[int, int, int, int], bits: int, group: int, dtype: torch.dtype) -> None:
        H, I, self.experts, _ = shape  # noqa: E741
        self.bits, self.group, self.matrices = bits, group, {}
        for name, (O, C) in {"gate_up": (2 * I, H), "down": (H, I)}.items():  # noqa: E741
            for e in range(self.experts):
                if bits == 4:
                    codes = torch.randint(0, 16, (O, C), dtype=torch.int32)
                    stored = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
                    grid = torch.full((C // group, O, 2), 0.01, dtype=dtype)
                else:
                    stored = torch.randint(-128, 127, (O, C), dtype=torch.int8)
                    grid = torch.full((O,), 0.01, dtype=dtype)
                self.matrices[name, e] = stored, grid

    def product(self, x: Tensor, name: str, expert: int) -> Tensor:
        stored, grid = self.matrices[name, expert]
        if self.bits == 4:
            return torch.ops.aten._weight_int4pack_mm_for_cpu(x, stored, self.group, grid)
        return torch.ops.aten._weight_int8pack_mm(x, stored, grid)

    def __call__(self, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        K = index_TK.shape[1]
        slot = index_TK.reshape(-1)
        order = torch.argsort(slot, stable=True)
        y_TH, start = torch.zeros_like(x_TH, dtype=torch.float32), 0
        for e, count in enumerate(torch.bincount(slot, minlength=self.experts).tolist()):
            if count:
                row = order[start : start + count]
                start += count
                gate, up = self.product(x_TH[row // K], "gate_up", e).chunk(2, -1)
                y = self.product(torch.nn.functional.silu(gate) * up, "down", e)
                y_TH.index_add_(0, row // K, y.float() * weight_TK.reshape(-1, 1)[row])
        return y_TH.to(x_TH.dtype)

    def bytes(self, expert: int) -> int:
        return sum(t.nbytes for name in ("gate_up", "down") for t in self.matrices[name, expert])


KT = """
import ctypes, json, sys, time, torch
H, I, E, K, most, threads = map(int, sys.argv[1:])
torch.set_num_threads(threads)
from kt_kernel import kt_kernel_ext as ext
pool = ext.WorkerPoolConfig()
pool.subpool_count, pool.subpool_numa_map, pool.subpool_thread_count = 1, [0], [threads]
infer = ext.CPUInfer(pool)
mask = torch.zeros(E, dtype=torch.bool)
config = ext.moe.MOEConfig(E, K, H, I, mask.data_ptr())
config.max_len, config.pool, config.layer_idx = most, infer.backend_, 0
held = [torch.randn(E, *s).mul_(0.02).bfloat16().contiguous() for s in ((I, H), (I, H), (H, I))]
config.gate_proj, config.up_proj, config.down_proj = (t.data_ptr() for t in held)
moe = ext.moe.AMXInt4_MOE(config)
order = torch.arange(E)
infer.submit(moe.load_weights_task(order.data_ptr()))
infer.sync()
del held
print("ready", flush=True)
for line in sys.stdin:
    index = torch.tensor(json.loads(line))
    T = torch.tensor([len(index)], dtype=torch.int32)
    x, y = torch.randn(len(index), H).bfloat16(), torch.zeros(len(index), H, dtype=torch.bfloat16)
    weight = torch.full(index.shape, 1 / K)
    began = time.perf_counter()
    infer.submit(moe.forward_task(T.data_ptr(), K, index.data_ptr(), weight.data_ptr(), x.data_ptr(), y.data_ptr(), False))
    infer.sync()
    print(time.perf_counter() - began, flush=True)
"""  # noqa: E501


class KtKernel:
    """kt-kernel's int4 experts in a process of their own, which says how long a call took."""

    def __init__(self, shape: tuple[int, int, int, int], most: int, threads: int, folder: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(folder)}
        command = [sys.executable, "-c", KT, *map(str, (*shape, most, threads))]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        while self._line() != "ready":  # it says much before
            pass

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("kt-kernel did not start; see above")
        return line.strip()

    def seconds(self, index: Tensor) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(index.tolist()) + "\n")
        self.process.stdin.flush()
        return float(self._line())

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


# ------------------------------------------------------------------------------------------------ measuring


def packed_bytes(module: Any, expert: int) -> int:
    """What one packed expert's matrices take."""
    found = 0
    for p in ("gate", "up", "down"):
        bits, (O, I) = module.packed_bits[p][expert], module.packed_shapes[p]  # noqa: E741
        plain = getattr(module, f"plain_{p}").element_size()
        found += O * I * plain if bits == packed.PLAIN else packed.packing.coded_bytes(
            O, I, bits, module.packed_group, symmetric=False
        )  # fmt: skip
    return found


def routes(T: int, K: int, E: int, rounds: int, seed: int) -> list[Tensor]:
    """A choice of experts for every round: the same numbers of rows, met by other experts each time."""
    generator = torch.Generator().manual_seed(seed)
    choice = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(T)])
    return [torch.randperm(E, generator=generator)[choice] for _ in range(rounds)]


class Roof:
    """A copy and a float32 product, measured like a contender."""

    def __init__(self, hidden: int, size: int) -> None:
        self.source, self.target = torch.ones(size), torch.ones(size)
        self.a, self.b = torch.randn(512, hidden), torch.randn(2048, hidden)
        self.copy_seconds = self.product_seconds = float("inf")

    def measure(self) -> None:
        for name, call in (("copy", lambda: self.target.copy_(self.source)), ("product", lambda: self.a @ self.b.T)):
            began = time.perf_counter()
            call()
            took = time.perf_counter() - began
            setattr(self, f"{name}_seconds", min(getattr(self, f"{name}_seconds"), took))

    @property
    def bytes_per_second(self) -> float:
        return 2 * self.source.nbytes / self.copy_seconds

    @property
    def flops(self) -> float:
        return 2 * self.a.shape[0] * self.b.numel() / self.product_seconds


def layer(name: str, shape: tuple[int, int, int, int], given: argparse.Namespace) -> list[dict[str, Any]]:
    H, I, E, K = shape  # noqa: E741
    weights = 3 * H * I
    contenders: dict[str, tuple[torch.dtype, Call, Callable[[int], int]]] = {}
    dense = {dtype: bank(H, I, E, "eager", dtype) for dtype in (torch.float32, torch.bfloat16)}
    stock = []
    for dtype, module in dense.items():
        told = "float32" if dtype == torch.float32 else "bfloat16"
        for implementation in ("eager", "grouped_mm", "batched_mm"):
            stock.append(f"transformers {implementation} {told}")
            size = weights * dtype.itemsize
            contenders[stock[-1]] = dtype, stock_layer(shape, implementation, module), lambda e, size=size: size
    for dtype in (torch.bfloat16, torch.float32):
        for bits in (4, 8):
            told = "float32" if dtype == torch.float32 else "bfloat16"
            made = Operators(shape, bits, given.group, dtype)
            contenders[f"torch int{bits} operator {told}"] = dtype, made, made.bytes
    choices = {f"packed {b} bits": [b] * E for b in (4, 2, 3, 8)}
    choices["packed mixture"] = [MIXTURE[e % len(MIXTURE)] for e in range(E)]
    for told, bits in choices.items():
        module = packed_layer(shape, bits, given.group, torch.bfloat16)
        contenders[told] = torch.float32, module, functools.partial(packed_bytes, module)
    # the same module a second time, when the others have taken its weights out of the cache
    _, module, size = contenders["packed 4 bits"]
    contenders["packed 4 bits, bfloat16 activations"] = torch.bfloat16, module, size
    kt = KtKernel(shape, max(given.tokens), given.threads, given.kt) if given.kt else None
    roof = Roof(H, 1 << (16 if given.quick else 26))
    rows: list[dict[str, Any]] = []
    for tokens in given.tokens:
        slow = {row["experts"] for row in rows if row["ms"] / 1e3 / row["tokens"] * tokens > given.most_seconds}
        rounds = given.rounds if tokens < 128 else max(3, given.rounds // 4)
        best: dict[str, float] = {}
        read: dict[str, float] = {}
        turns = dict.fromkeys(contenders, 0)
        for index in routes(tokens, K, E, rounds + 1, given.seed):  # the first round counts too: least times do
            x = torch.randn(tokens, H)
            weight = torch.full((tokens, K), 1 / K)
            chosen = index.unique().tolist()
            for told, (dtype, call, size) in contenders.items():
                if "batched_mm" in told and tokens * K * weights * dtype.itemsize > given.most_gb * 1e9:
                    continue
                if told in slow or (turns[told] >= 2 and best[told] > 1):
                    continue
                turns[told] += 1
                xs, ws = x.to(dtype), weight.to(dtype)
                with torch.no_grad():
                    began = time.perf_counter()
                    call(xs, index, ws)
                    took = time.perf_counter() - began
                if took < best.get(told, float("inf")):
                    best[told], read[told] = took, sum(map(size, chosen))
            if kt is not None:
                best["kt-kernel int4"] = min(best.get("kt-kernel int4", float("inf")), kt.seconds(index))
                read["kt-kernel int4"] = len(chosen) * (weights // 2 + 4 * (2 * I + H))  # a scale for each output
            roof.measure()
        reference = min(best[told] for told in stock if told in best)
        flops = 2 * tokens * K * weights
        for told, seconds in best.items():
            least = max(read[told] / roof.bytes_per_second, flops / roof.flops)
            rows.append(
                {
                    "layer": name,
                    "tokens": tokens,
                    "experts": told,
                    "ms": seconds * 1e3,
                    "time": reference / seconds,
                    "MB": read[told] / 1e6,
                    "GB/s": read[told] / seconds / 1e9,
                    "of copy": read[told] / seconds / roof.bytes_per_second,
                    "GFLOP/s": flops / seconds / 1e9,
                    "of product": flops / seconds / roof.flops,
                    "roof": least / seconds,
                }
            )
        show(rows[-len(best) :], roof)
        left_out = [told for told in contenders if told not in best]
        if left_out:
            limits = f"{given.most_gb:g} GB or take more than {given.most_seconds:g} s"
            print(f"        left out, would gather more than {limits}: {', '.join(left_out)}")
    if kt is not None:
        kt.close()
    return rows


def show(rows: list[dict[str, Any]], roof: Roof) -> None:
    print(f"  copy {roof.bytes_per_second / 1e9:.1f} GB/s, float32 product {roof.flops / 1e9:.0f} GFLOP/s")
    print(
        f"{'tokens':>6}  {'experts':<36} {'ms':>9} {'time':>6} {'GB/s':>6} {'copy':>5} {'GFLOP/s':>7} {'gemm':>5} roof"
    )
    for row in sorted(rows, key=lambda row: row["ms"]):
        print(
            f"{row['tokens']:6d}  {row['experts']:<36} {row['ms']:9.3f} {row['time']:6.2f} {row['GB/s']:6.1f}"
            f" {row['of copy']:5.0%} {row['GFLOP/s']:7.1f} {row['of product']:5.0%} {row['roof']:4.0%}",
            flush=True,
        )


def verdicts(rows: list[dict[str, Any]]) -> None:
    """What the targets say: 4 bits at least 4 times faster at 1 and 4 tokens, at least twice at 512."""
    for row in rows:
        wanted = {1: 4.0, 4: 4.0, 512: 2.0}.get(row["tokens"])
        if row["experts"] == "packed 4 bits" and wanted:
            reached = "reached" if row["time"] >= wanted else "NOT reached"
            print(
                f"{row['layer']}, {row['tokens']} tokens: 4 bits {row['time']:.2f} times as fast as the fastest of"
                f" transformers; {wanted:g} wanted: {reached}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 512])
    parser.add_argument("--layers", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--group", type=int, choices=(32, 64, 128), default=64)
    parser.add_argument("--rounds", type=int, default=24, help="for few tokens; a quarter of it for 128 and more")
    parser.add_argument("--most-gb", type=float, default=2.0)
    parser.add_argument("--most-seconds", type=float, default=20.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kt", type=Path, metavar="FOLDER", help="where kt-kernel's wheel is unpacked")
    parser.add_argument("--quick", action="store_true", help="a tiny layer; tests the script, measures nothing")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(given.seed)
    facts = machine()
    print_machine(facts)
    lib = cpu.kernel()
    path = "none" if lib is None else "AVX-512 VBMI" if lib.coterie_wide() else "plain C"
    print(f"torch {torch.__version__}, {given.threads} threads, groups of {given.group}, kernel: {path}")
    rows = []
    for name, shape in (QUICK if given.quick else {n: SHAPES[n] for n in given.layers}).items():
        print(f"\n{name}: hidden {shape[0]}, width {shape[1]}, {shape[2]} experts, {shape[3]} per token", flush=True)
        rows += layer(name, shape, given)
    print()
    verdicts(rows)
    if given.json:
        given.json.write_text(json.dumps({"machine": facts, "kernel": path, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
