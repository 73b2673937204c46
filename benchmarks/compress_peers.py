"""The same pruning job for Coterie and for llm-compressor: time, CPU, memory, and how far each is from the machine.

What it measures
    One job: read a random Qwen3-MoE (8 layers x 64 experts, top-4, 824.7 M parameters, one bf16 shard of 1.65 GB),
    calibrate on 8 sequences of 256 token ids, drop half of the experts of each layer by REAP, write the checkpoint.
    Each contender is one process, and its figures are the kernel's for the whole process: wall, user + system CPU,
    peak memory split into anonymous and file-backed, bytes read and written. Import time is measured apart, in a run
    on a tiny checkpoint that also warms the bytecode caches. Below the table stands what the machine could do: the
    rate of float32 matrix products of exactly these shapes, and of copying, as seconds for the job's arithmetic and
    bytes, with the share of it that each contender reached.

Why it is fair
    Same checkpoint bytes, token ids, sparsity, threads and page cache state; peer in its own environment with pinned
    versions; order A B C C B A; the peer runs at its default and with the best options its documentation and source
    offer, chosen for speed, for memory, and for this CPU (see PEERS). Every output is checked: right number of experts
    on disk and in the config. Whether two contenders kept the same experts is printed, not assumed. A contender that
    fails is a row that says so. When the machine is not quiet the script says that wall times prove nothing.

Run
    python benchmarks/compress_peers.py                          # everything, order there and back; about half an hour
    python benchmarks/compress_peers.py --quick                  # seconds; tests the script
    python benchmarks/compress_peers.py --contenders peer-best,coterie --json result.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import (
    LLMCOMPRESSOR_PINS,
    QUICK,
    STANDARD,
    Shape,
    Usage,
    Workplace,
    common_options,
    cool,
    coterie_command,
    ensure_venv,
    finish,
    folder_bytes,
    gb,
    import_seconds,
    kept_experts,
    machine,
    measure,
    print_machine,
    quietness,
    read_headers,
    table,
    tail,
    thread_environment,
    versions,
    warm,
    write_checkpoint,
    write_tokens,
)

# T tokens, H hidden, I expert intermediate, E experts, K experts per token, M rows of one expert

# Options of llm-compressor 0.14.0.1. "default" is its REAP example: plain load, oneshot, save.
# load_context loads experts as separate Linear modules instead of unfusing them afterwards (its own warning asks for
# it); moe_calibrate_all_experts=False runs routed experts only (its REAP modifier says so in its log);
# propagate_error=False saves the second pass over each layer, so that the model that calibrates is the original, as
# with Coterie; batch_size as measured best here. auto_offload keeps weights on disk beyond max_memory.
BEST: dict[str, Any] = {"moe_calibrate_all_experts": False, "propagate_error": False, "batch_size": 8}
PEERS: dict[str, dict[str, Any]] = {
    "peer-default": {"load_context": False, "dtype": "auto", "oneshot": {}},
    "peer-best": {"load_context": True, "dtype": "auto", "oneshot": BEST},
    "peer-best-float32": {"load_context": True, "dtype": "float32", "oneshot": BEST},
    "peer-best-offload": {"load_context": True, "dtype": "auto", "oneshot": BEST, "offload": 0.25},
    "peer-basic": {"load_context": True, "dtype": "auto", "oneshot": {**BEST, "pipeline": "basic"}},
}
OURS: dict[str, list[str]] = {
    "coterie": [],
    "coterie-bfloat16": ["--compute-dtype", "bfloat16"],
}
DEFAULT_ORDER = [*PEERS, *OURS]


# ------------------------------------------------------------------------------- in the peer's own environment


def run_peer(spec: dict[str, Any]) -> None:
    """One compression by llm-compressor: import, load, oneshot, save. Prints its own stage times as JSON."""
    stages: dict[str, float] = {}
    began = time.perf_counter()
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot  # type: ignore[import-not-found, unused-ignore]
    from llmcompressor.modifiers.pruning.reap import REAPPruningModifier  # type: ignore[import-not-found, unused-ignore]
    from llmcompressor.utils import load_context  # type: ignore[import-not-found, unused-ignore]
    from safetensors.torch import load_file
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    # load_context makes transformers 5.17 list the names of every module, and its aliases of old image processors then
    # import torchvision, which neither package requires and which has no CPU build for this torch on the package
    # index. A text model needs none of them: without the aliases the option works, and starts faster.
    for module in [name for name in sys.modules if name.startswith("transformers.") and name.endswith("_fast")]:
        del sys.modules[module]
    stages["import"] = time.perf_counter() - began

    def lap(name: str) -> None:
        nonlocal began
        stages[name] = time.perf_counter() - began
        began = time.perf_counter()

    began = time.perf_counter()
    torch.set_num_threads(spec["threads"])
    torch.manual_seed(spec["seed"])
    settings = spec["settings"]
    tokens = load_file(spec["tokens"])
    dataset = Dataset.from_dict({name: tensor.tolist() for name, tensor in tokens.items()})
    samples, length = tokens["input_ids"].shape
    # oneshot insists on a processor once there is a dataset; ids need none, so it gets one that is never asked
    processor = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"?": 0}, unk_token="?")))
    dtype = settings["dtype"] if settings["dtype"] == "auto" else getattr(torch, settings["dtype"])
    extra: dict[str, Any] = {}
    if "offload" in settings:
        extra = {
            "device_map": "auto_offload",
            "max_memory": {"cpu": int(settings["offload"] * spec["checkpoint_bytes"])},
            "offload_folder": spec["scratch"],
        }
    if settings["load_context"]:
        with load_context():
            model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=dtype, **extra)
    else:
        model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=dtype, **extra)
    lap("load")
    oneshot(
        model=model,
        processor=processor,
        dataset=dataset,
        recipe=REAPPruningModifier(sparsity=1.0 - spec["keep"]),
        max_seq_length=length,
        num_calibration_samples=samples,
        **settings["oneshot"],
    )
    lap("oneshot")
    if dtype is torch.float32:
        model.to(torch.bfloat16)  # what was read is what is written
    model.save_pretrained(spec["output"], save_compressed=True)
    lap("save")
    print("STAGES " + json.dumps(stages))


# ------------------------------------------------------------------------------------------- physical bound


def job_products(shape: Shape, tokens: int, length: int) -> list[tuple[str, int, int, int, int]]:
    """The float32 matrix products that calibration cannot do without: (what, rows, inner, columns, how many).

    Experts see tokens * K / E rows each; the output head is not needed.
    """
    rows = max(1, tokens * shape.top_k // shape.experts)
    h, i, d = shape.hidden, shape.intermediate, shape.head_dim
    n = shape.layers
    return [
        ("expert gate and up", rows, h, 2 * i, n * shape.experts),
        ("expert down", rows, i, h, n * shape.experts),
        ("router", tokens, h, shape.experts, n),
        ("query", tokens, h, shape.heads * d, n),
        ("key and value", tokens, h, 2 * shape.kv_heads * d, n),
        ("attention output", tokens, shape.heads * d, h, n),
        ("scores", length, d, length, n * shape.heads * tokens // length),
        ("mixing", length, length, d, n * shape.heads * tokens // length),
    ]


def _fastest(work: Callable[[], object], seconds: float) -> tuple[float, float]:
    """Least wall and least CPU seconds of one call, over calls for that long: what others take does not count."""
    work()
    wall, cpu, until = math.inf, math.inf, time.perf_counter() + seconds
    while time.perf_counter() < until or wall == math.inf:
        start, start_cpu = time.perf_counter(), time.process_time()
        work()
        wall = min(wall, time.perf_counter() - start)
        cpu = min(cpu, time.process_time() - start_cpu)
    return wall, cpu


def run_bound(spec: dict[str, Any]) -> None:
    """Measure the rates on this machine, in this process; prints JSON."""
    import torch
    from torch.nn.functional import linear

    torch.set_num_threads(spec["threads"])
    torch.manual_seed(0)
    rows = []
    for what, m, inner, columns, count in spec["products"]:
        # as many different matrices as there are experts: the job's weights come from memory, not from the cache
        different = min(count, max(1, (1 << 28) // (4 * inner * columns)))
        weights = torch.randn(different, columns, inner)
        x = torch.randn(m, inner)
        turn = itertools.cycle(weights)
        wall, cpu = _fastest(lambda x=x, turn=turn: linear(x, next(turn)), 1.0)  # type: ignore[misc]
        rows.append(
            {
                "what": what,
                "shape": [m, inner, columns],
                "count": count,
                "gflops": 2e-9 * m * inner * columns / wall,
                "seconds": wall * count,
                "cpu_seconds": cpu * count,
            }
        )
    source = torch.randint(0, 1 << 15, (1 << 28,), dtype=torch.int16)
    target = torch.empty_like(source).copy_(source)
    wall, cpu = _fastest(lambda: target.copy_(source), 1.0)
    copied = source.numel() * 2
    print("BOUND " + json.dumps({"products": rows, "copy_rate": copied / wall, "copy_cpu_rate": copied / cpu}))


# --------------------------------------------------------------------------------------------------- parent


def marked(log: str | Path, mark: str) -> dict[str, Any]:
    """The JSON that a child printed after `mark`, or nothing."""
    for line in Path(log).read_text(errors="replace").splitlines():
        if line.startswith(mark + " "):
            found: dict[str, Any] = json.loads(line[len(mark) + 1 :])
            return found
    return {}


def check_output(output: Path, shape: Shape, keep: float) -> str:
    """Empty if the output is the pruned checkpoint that was ordered, else what is wrong with it."""
    wanted = shape.experts - int(shape.experts * (1.0 - keep))
    if not (output / "config.json").exists():
        return "no config.json"
    config = json.loads((output / "config.json").read_text())
    stated = config.get("num_experts", config.get("num_local_experts"))
    headers = read_headers(output)
    for layer in range(shape.layers):
        router = headers.get(f"model.layers.{layer}.mlp.gate.weight", {"shape": [0]})["shape"][0]
        last = f"model.layers.{layer}.mlp.experts.{wanted - 1}.down_proj.weight"
        beyond = f"model.layers.{layer}.mlp.experts.{wanted}.down_proj.weight"
        if router != wanted or last not in headers or beyond in headers:
            return f"layer {layer}: not {wanted} experts on disk"
    if stated != wanted:
        return f"config says {stated} experts, tensors say {wanted}"
    types = {entry["dtype"] for entry in headers.values()}
    return "" if types == {"BF16"} else f"written as {sorted(types)}"


class Bench:
    """Everything one benchmark run needs to start a contender."""

    def __init__(self, options: argparse.Namespace, work: Path, peer: Path | None) -> None:
        self.options, self.work, self.peer = options, work, peer
        self.environment = thread_environment(options.threads)

    def command(self, name: str, model: Path, tokens: Path, output: Path) -> list[str]:
        """What is typed to run a contender."""
        options = self.options
        if name in OURS:
            coterie = coterie_command()
            assert coterie is not None
            return [
                *coterie,
                *("compress", str(model), str(output), "--method", "reap", "--keep", str(options.keep)),
                *("--tokens", str(tokens), "--threads", str(options.threads)),
                *OURS[name],
                *options.coterie_options.split(),
            ]
        assert self.peer is not None
        scratch = self.work / "offload"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        spec = {
            "model": str(model),
            "tokens": str(tokens),
            "output": str(output),
            "keep": options.keep,
            "threads": options.threads,
            "seed": options.seed,
            "settings": PEERS[name],
            "checkpoint_bytes": folder_bytes(model),
            "scratch": str(scratch),
        }
        return [str(self.peer), __file__, "--as-peer", json.dumps(spec)]

    def run(self, name: str, model: Path, tokens: Path, label: str, *, profile_imports: bool = False) -> Usage:
        """Measure one run; the output is left in WORK/out-NAME."""
        output = self.work / f"out-{name}"
        shutil.rmtree(output, ignore_errors=True)
        environment = dict(self.environment)
        if profile_imports:
            environment["PYTHONPROFILEIMPORTTIME"] = "1"
        cool(model) if self.options.cold else warm(model)
        command = self.command(name, model, tokens, output)
        return measure(command, log=self.work / f"{label}.log", environment=environment)


def options_from(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common_options(parser)
    known = ", ".join([*PEERS, *OURS])
    parser.add_argument("--contenders", default=",".join(DEFAULT_ORDER), help=f"in order; known: {known}")
    parser.add_argument("--once", action="store_true", help="run the order once, not there and back")
    parser.add_argument("--keep", type=float, default=0.5, help="share of experts kept (default 0.5)")
    parser.add_argument("--samples", type=int, default=8, help="sequences (default 8)")
    parser.add_argument("--length", type=int, default=256, help="tokens per sequence (default 256)")
    parser.add_argument("--cold", action="store_true", help="drop the checkpoint from the page cache before each run")
    parser.add_argument("--coterie-options", default="", help="appended to its command line, e.g. '--batch-size 8'")
    options = parser.parse_args(arguments)
    options.contenders = [name for name in options.contenders.split(",") if name]
    unknown = [name for name in options.contenders if name not in PEERS and name not in OURS]
    if unknown:
        parser.error(f"unknown contender {', '.join(unknown)}; known: {known}")
    return options


def print_bound(bound: dict[str, Any], moved: int) -> dict[str, float]:
    """Print the rates and return the least seconds (wall and CPU) that the job can take at them."""
    rows = [
        (p["what"], "x".join(map(str, p["shape"])), p["count"], f"{p['gflops']:.0f}", f"{p['seconds']:.2f}")
        for p in bound["products"]
    ]
    print(table(("float32 products", "rows x in x out", "count", "GFLOPS", "seconds"), rows))
    products = sum(p["seconds"] for p in bound["products"])
    copying = moved / bound["copy_rate"]
    print(f"copying: {bound['copy_rate'] / 1e9:.1f} GB/s; {gb(moved)} GB read and written take {copying:.2f} s")
    least = {
        "wall": products + copying,
        "cpu": sum(p["cpu_seconds"] for p in bound["products"]) + moved / bound["copy_cpu_rate"],
    }
    print(f"at these rates the job takes at least {least['wall']:.1f} s wall, {least['cpu']:.1f} s CPU\n")
    return least


ROLES = {"peer": run_peer, "bound": run_bound}


def main(arguments: list[str]) -> int:
    """Run the benchmark; 1 if a contender failed or wrote something else than was ordered."""
    if arguments and arguments[0].startswith("--as-"):
        ROLES[arguments[0][5:]](json.loads(arguments[1]))
        return 0
    options = options_from(arguments)
    facts = machine()
    print_machine(facts)
    missing = [name for name in options.contenders if name in OURS] if coterie_command() is None else []
    if missing:
        print(f"not run, no `coterie` command beside this Python or on PATH: {', '.join(missing)}")
    contenders = [name for name in options.contenders if name not in missing]
    peer = None
    if any(name in PEERS for name in contenders):
        peer = ensure_venv("llmcompressor-0.14.0.1", LLMCOMPRESSOR_PINS, options.cache)
        print("peer:", ", ".join(f"{k} {v}" for k, v in versions(peer, PEER_PACKAGES).items()))
    if any(name in OURS for name in contenders):
        ours = versions(Path(sys.executable), ("coterie", "transformers", "torch", "safetensors"))
        print("ours:", ", ".join(f"{k} {v}" for k, v in ours.items()))
    shape = QUICK if options.quick else STANDARD
    load_at_start = os.getloadavg()[0]
    with Workplace(options, "compress-peers") as work:
        bench = Bench(options, work, peer)
        model, tokens, tiny, tiny_tokens = work / "model", work / "tokens.safetensors", work / "tiny", work / "tiny.st"
        size = write_checkpoint(shape, model, seed=options.seed)
        write_checkpoint(QUICK, tiny, seed=options.seed)
        job: dict[str, int] = {"samples": options.samples, "length": options.length, "seed": options.seed}
        write_tokens(tokens, vocabulary=shape.vocabulary, **job)
        write_tokens(tiny_tokens, vocabulary=QUICK.vocabulary, samples=2, length=32, seed=options.seed)
        print(
            f"job: {shape.layers} layers x {shape.experts} experts, top-{shape.top_k}, "
            f"{shape.parameters() / 1e6:.1f} M parameters, {gb(size)} GB; {options.samples} x {options.length} tokens; "
            f"keep {options.keep:g}; {options.threads} threads; page cache {'cold' if options.cold else 'warm'}\n"
        )

        products = job_products(shape, options.samples * options.length, options.length)
        spec = json.dumps({"threads": options.threads, "products": products})
        python = str(peer or sys.executable)
        measured = measure(
            [python, __file__, "--as-bound", spec], log=work / "bound.log", environment=bench.environment
        )
        bound = marked(measured.log, "BOUND")
        if not bound:
            raise SystemExit(f"measuring the machine failed:\n{tail(measured.log)}")
        written = size - math.floor((1.0 - options.keep) * size * expert_share(shape))
        least = print_bound(bound, size + written)

        imports = {}
        for side in (PEERS, OURS):  # once for the bytecode caches, before anything is timed
            for name in [name for name in contenders if name in side][:1]:
                bench.run(name, tiny, tiny_tokens, f"compile-{name}")
        for name in contenders:
            run = bench.run(name, tiny, tiny_tokens, f"warmup-{name}", profile_imports=True)
            imports[name] = import_seconds(Path(run.log))
            if run.returncode:
                print(f"{name}: the warm-up run on a tiny checkpoint failed ({run.returncode}):\n{tail(run.log, 3)}")

        order = contenders if options.once else contenders + contenders[::-1]
        runs: dict[str, list[Usage]] = {name: [] for name in contenders}
        notes: dict[str, str] = {}
        kept: dict[str, list[list[int]]] = {}
        stages: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
        for position, name in enumerate(order):
            run = bench.run(name, model, tokens, f"run-{position}-{name}")
            runs[name].append(run)
            output = work / f"out-{name}"
            wrong = tail(run.log) if run.returncode else check_output(output, shape, options.keep)
            if wrong:
                notes[name] = wrong
            else:
                kept[name] = kept_experts(model, output, shape.layers)
            if name in PEERS:
                stages[name].append(marked(run.log, "STAGES"))
            shutil.rmtree(output, ignore_errors=True)
            state = f"failed ({run.returncode})" if run.returncode else wrong or "done"
            print(
                f"  run {position + 1} of {len(order)}: {name}: {run.wall:.1f} s wall, {run.cpu:.1f} s CPU, "
                f"peak {gb(run.peak_rss)} GB; load before {run.load_before:.2f}, "
                f"others {run.others_cores:.2f} cores: {state}",
                flush=True,
            )

        everything = [run for several in runs.values() for run in several]
        quiet, sentence = quietness(load_at_start, everything)
        print("\n" + sentence)
        rows = [row(name, runs[name], imports[name], least, size, name in notes) for name in contenders]
        print(table(COLUMNS, rows))
        print(LEGEND)
        for name, note in notes.items():
            print(f"\n{name} failed:\n{note}")
        agreement = compare_kept(kept)
        result = {
            "benchmark": "compress_peers",
            "quick": options.quick,
            "machine": facts,
            "quiet": quiet,
            "statement": sentence,
            "shape": shape.config(),
            "parameters": shape.parameters(),
            "job": {**job, "keep": options.keep, "threads": options.threads, "cold": options.cold},
            "peer": {"pins": LLMCOMPRESSOR_PINS, "options": PEERS},
            "bound": {**bound, **least},
            "import_seconds": imports,
            "runs": {name: [run.as_dict() for run in several] for name, several in runs.items()},
            "stages": stages,
            "failures": notes,
            "not_run": missing,
            "kept": kept,
            "agreement": agreement,
        }
        finish(result, options.json)
    return 1 if notes else 0


PEER_PACKAGES = ("llmcompressor", "compressed-tensors", "transformers", "torch", "datasets", "accelerate")
COLUMNS = (
    "contender",
    "runs",
    "wall s",
    "CPU s",
    "import s",
    "peak RSS",
    "anonymous",
    "file",
    "x file",
    "wall %",
    "CPU %",
)
LEGEND = (
    "medians; wall s with [range]; imports are within wall and CPU; sizes in GB; anonymous: its own peak, what the "
    "machine must have;\nfile: mapped pages at the largest total, which the kernel may take back; x file: peak RSS "
    "over checkpoint size;\nwall % and CPU %: the machine's least time for the job over the time taken"
)


def expert_share(shape: Shape) -> float:
    """Share of the parameters that belongs to experts and their router rows."""
    routed = sum(math.prod(d) for n, d in shape.tensors() if ".experts." in n or n.endswith("mlp.gate.weight"))
    return routed / shape.parameters()


def row(name: str, runs: list[Usage], imports: float, least: dict[str, float], size: int, failed: bool) -> list[str]:
    """One line of the result table: medians over a contender's runs."""
    if failed:
        return [name, str(len(runs)), "failed", *("-" for _ in COLUMNS[3:])]
    wall, cpu = statistics.median(r.wall for r in runs), statistics.median(r.cpu for r in runs)
    spread = f"{wall:.1f} [{min(r.wall for r in runs):.1f}, {max(r.wall for r in runs):.1f}]"
    peak = statistics.median(r.peak_rss for r in runs)
    return [
        name,
        str(len(runs)),
        spread,
        f"{cpu:.1f}",
        f"{imports:.1f}",
        gb(peak),
        gb(statistics.median(r.peak_anonymous for r in runs)),
        gb(statistics.median(r.file_at_peak for r in runs)),
        f"{peak / size:.2f}",
        f"{100 * least['wall'] / wall:.1f}",
        f"{100 * least['cpu'] / cpu:.1f}",
    ]


def compare_kept(kept: dict[str, list[list[int]]]) -> dict[str, dict[str, float]]:
    """Share of kept experts that each pair of contenders has in common, over all layers; printed and returned."""
    if len(kept) < 2:
        return {}
    names = list(kept)
    shares = {
        a: {
            b: sum(len(set(x) & set(y)) for x, y in zip(kept[a], kept[b], strict=True)) / sum(map(len, kept[a]))
            for b in names
        }
        for a in names
    }
    print("\nkept experts in common (1 = the same experts in every layer)")
    print(table(("", *names), [(a, *(f"{shares[a][b]:.3f}" for b in names)) for a in names]))
    return shares


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
