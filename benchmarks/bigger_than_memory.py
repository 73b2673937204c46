"""Prune or merge a checkpoint that is several times larger than the memory the process may use.

What it measures
    A random bf16 checkpoint of at least 16 GB with the layers of Qwen3-30B-A3B (hidden 2048, 128 experts of width 768,
    top-8, vocabulary 151936, shards of 5 GB with an index) is pruned to half its experts by REAP, or merged
    (`--method hc-smoe`, `m-smoe`, `sub-moe`: every expert sees every token, so it takes longer), under a hard limit of
    4 GB. It reports peak memory, split into what must be there (anonymous) and what the kernel may take back
    (mapped files, page cache), wall and CPU time, bytes asked for and bytes that really went to and from the disk,
    how often the checkpoint was swept, and whether the output opens: every tensor present with the right shape, the
    config's count equal to the tensors', and tensors that pruning must not touch equal to the original's, byte by byte:
    attention, kept experts, and of a merged model the routers and the experts that stayed alone.

Why it is honest
    The limit is the kernel's, not a promise: a memory cgroup where one can be made (page cache counts there too, and
    swap is off), else RLIMIT_DATA. The checkpoint is dropped from the page cache first, so its pages are read, and
    charged, inside the limit. With RLIMIT_AS (--limit address-space) even mapping a file counts, which no reader of
    5 GB shards by mapping can pass; it is offered, not used by default. A killed run is reported as such.

Run
    python benchmarks/bigger_than_memory.py                      # needs 30 GB of disk; deletes what it wrote
    python benchmarks/bigger_than_memory.py --method hc-smoe
    python benchmarks/bigger_than_memory.py --gigabytes 4 --memory 2
    python benchmarks/bigger_than_memory.py --quick              # a few MB; tests the script
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import (
    Shape,
    Usage,
    Workplace,
    common_options,
    cool,
    coterie_command,
    finish,
    gb,
    kept_experts,
    machine,
    measure,
    memory_limit,
    print_machine,
    quietness,
    read_headers,
    read_raw,
    table,
    tail,
    thread_environment,
    timed,
    versions,
    write_checkpoint,
    write_tokens,
)

QWEN3_30B = Shape(48, 128, 8, 2048, 768, 32, 4, 128, 151936)
SMALL = Shape(3, 16, 4, 128, 64, 4, 2, 32, 1024)


def shape_of(gigabytes: float) -> Shape:
    """Qwen3-30B-A3B with as many layers as reach that size in bf16 (10**9 bytes); at least one."""
    outer = 2 * replace(QWEN3_30B, layers=0).parameters()
    layer = 2 * replace(QWEN3_30B, layers=1).parameters() - outer
    return replace(QWEN3_30B, layers=max(1, math.ceil((gigabytes * 1e9 - outer) / layer)))


def merged_problems(original: Path, output: Path, shape: Shape, keep: float) -> list[str]:
    """What is wrong with a merged output: an expert map, one copy of the weights, everything else untouched."""
    plan = {layer["index"]: layer for layer in json.loads((output / "plan.json").read_text())["layers"]}
    config = json.loads((output / "config.json").read_text())
    forms = config["quantization_config"]["layers"]
    headers, before = read_headers(output), read_headers(original)
    found, alone = [], 0
    total = sum(len(layer["extra"]["clusters"]) for layer in plan.values())
    if total != round(keep * shape.experts) * shape.layers:
        found.append(
            f"{total} experts in all, ordered were {round(keep * shape.experts)} in each of {shape.layers} layers"
        )
    for index, layer in plan.items():
        clusters = list(layer["extra"]["clusters"].values())
        at = f"model.layers.{index}."
        stored = sum(name.startswith(f"{at}mlp.experts.") for name in headers) // 3
        if stored != len(clusters):
            found.append(f"layer {index} has {stored} experts for {len(clusters)} clusters")
            continue
        target = forms.get(str(index), {}).get("map", list(range(shape.experts)))
        if any(target[member] != position for position, members in enumerate(clusters) for member in members):
            found.append(f"the map of layer {index} is not that of its clusters")
        same = [(f"{at}{name}", f"{at}{name}") for name in ("self_attn.q_proj.weight", "mlp.gate.weight")]
        for position, members in enumerate(clusters):
            if len(members) == 1 and alone < 4 * len(plan):
                alone += 1
                projections = ("gate_proj", "down_proj")
                same += [
                    (f"{at}mlp.experts.{position}.{p}.weight", f"{at}mlp.experts.{members[0]}.{p}.weight")
                    for p in projections
                ]
        for new, old in same:
            if read_raw(headers[new]) != read_raw(before[old]):
                found.append(f"{new} differs from the original's {old}")
    return found if alone else [*found, "no expert stayed alone: nothing could be compared"]


def problems(original: Path, output: Path, shape: Shape, keep: float) -> list[str]:
    """What is wrong with the output; empty if it is the pruned checkpoint that was ordered."""
    wanted = shape.experts - int(shape.experts * (1.0 - keep))
    config = json.loads((output / "config.json").read_text())
    stated = config.get("num_experts", config.get("num_local_experts"))
    found = []
    if stated != wanted:
        found.append(f"config.json says {stated} experts, ordered were {wanted}")
    expected = dict(replace(shape, experts=wanted).tensors())
    headers, before = read_headers(output), read_headers(original)
    odd = sorted(expected.keys() ^ headers.keys())[:5]
    found += [f"{name} is {'missing' if name in expected else 'too many'}" for name in odd]
    for name, entry in headers.items():
        if name in expected and (tuple(entry["shape"]), entry["dtype"]) != (expected[name], "BF16"):
            found.append(f"{name} is {entry['dtype']} {entry['shape']}, expected BF16 {list(expected[name])}")
    index = output / "model.safetensors.index.json"
    if index.exists() and json.loads(index.read_text())["weight_map"].keys() != headers.keys():
        found.append("the index does not name the tensors that the shards hold")
    if found:
        return found
    for layer, ids in enumerate(kept_experts(original, output, shape.layers)):
        pairs = [(f"self_attn.{p}.weight", f"self_attn.{p}.weight") for p in ("q_proj", "o_proj")]
        for new, old in enumerate(ids[:2]):
            pairs.append((f"mlp.experts.{new}.down_proj.weight", f"mlp.experts.{old}.down_proj.weight"))
        for new_name, old_name in pairs:
            at = f"model.layers.{layer}."
            if read_raw(headers[at + new_name]) != read_raw(before[at + old_name]):
                found.append(f"{at}{new_name} differs from the original's {old_name}")
    return found


def sweeps_of(output: Path) -> Any:
    """What coterie.json says about the number of sweeps, or None."""
    file = output / "coterie.json"
    return json.loads(file.read_text()).get("sweeps") if file.exists() else None


def print_usage(run: Usage, size: int, limit_bytes: int, limit_name: str, sweeps: Any) -> None:
    """The result, one fact a line."""
    limited = run.cgroup
    rows: list[tuple[str, str]] = [
        ("hard limit", f"{gb(limit_bytes)} GB, {limit_name}"),
        ("checkpoint", f"{gb(size)} GB, {size / limit_bytes:.1f} times the limit"),
        ("peak RSS (ru_maxrss)", f"{gb(run.peak_rss)} GB"),
        ("  anonymous, at the largest sample", f"{gb(run.anonymous_at_peak)} GB"),
        ("  file-backed, at the largest sample", f"{gb(run.file_at_peak)} GB"),
        ("peak anonymous", f"{gb(run.peak_anonymous)} GB"),
    ]
    if limited:
        rows += [
            ("cgroup: peak, page cache included", f"{gb(limited['peak'])} GB"),
            ("cgroup: peak anonymous", f"{gb(limited.get('peak_anonymous', 0))} GB"),
            ("cgroup: peak page cache", f"{gb(limited.get('peak_page_cache', 0))} GB"),
            ("cgroup: processes killed for memory", str(limited["killed_for_memory"])),
        ]
    rows += [
        ("wall", f"{run.wall:.1f} s, {size / run.wall / 1e6:.0f} MB of checkpoint per second"),
        ("CPU", f"{run.cpu:.1f} s ({run.user:.1f} user, {run.system:.1f} system)"),
        ("bytes asked for by read", f"{gb(run.rchar)} GB, {run.rchar / size:.2f} times the checkpoint"),
        ("bytes fetched from disk", f"{gb(run.read_bytes)} GB, {run.read_bytes / size:.2f} times the checkpoint"),
        ("bytes given to write", f"{gb(run.wchar)} GB"),
        ("bytes sent to disk", f"{gb(run.write_bytes)} GB"),
        ("sweeps of the checkpoint", "not stated in coterie.json" if sweeps is None else json.dumps(sweeps)),
    ]
    print(table(("what", "measured"), rows))


def main(arguments: list[str]) -> int:
    """Run the benchmark; 1 if it did not finish within the limit or the output is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common_options(parser)
    parser.add_argument("--gigabytes", type=float, default=16.0, help="least size of the checkpoint (default 16)")
    parser.add_argument("--memory", type=float, default=4.0, help="hard limit in GB of 10**9 bytes (default 4)")
    parser.add_argument(
        "--limit",
        choices=("auto", "cgroup", "data", "address-space"),
        default="auto",
        help="how to limit: a memory cgroup, RLIMIT_DATA or RLIMIT_AS (default: a cgroup if possible, else data)",
    )
    parser.add_argument("--method", choices=("reap", "hc-smoe", "m-smoe", "sub-moe"), default="reap")
    parser.add_argument("--keep", type=float, default=0.5, help="share of experts kept (default 0.5)")
    parser.add_argument("--samples", type=int, default=8, help="sequences (default 8)")
    parser.add_argument("--length", type=int, default=256, help="tokens per sequence (default 256)")
    parser.add_argument("--coterie-options", default="", help="appended to the command line, e.g. '--batch-size 8'")
    options = parser.parse_args(arguments)

    facts = machine()
    print_machine(facts)
    shape = SMALL if options.quick else shape_of(options.gigabytes)
    shard = 1_000_000 if options.quick else 5_000_000_000
    limit_bytes = int(options.memory * 1e9)
    planned = 2 * shape.parameters()
    with Workplace(options, "bigger-than-memory") as work:
        free = shutil.disk_usage(work).free
        if free < 1.7 * planned:
            raise SystemExit(
                f"{work} has {gb(free)} GB free, checkpoint and output need about {gb(int(1.7 * planned))} GB\n"
                "  Choose another folder with --work, or a smaller checkpoint with --gigabytes."
            )
        model, tokens, output = work / "model", work / "tokens.safetensors", work / "pruned"
        size = 0

        def write() -> None:
            nonlocal size
            size = write_checkpoint(shape, model, seed=options.seed, shard_bytes=shard)

        seconds = timed(write)
        job = {"samples": options.samples, "length": options.length, "seed": options.seed}
        write_tokens(tokens, vocabulary=shape.vocabulary, **job)
        shards = len(list(model.glob("*.safetensors")))
        print(
            f"wrote {gb(size)} GB in {shards} shards in {seconds:.0f} s: {shape.layers} layers x {shape.experts} "
            f"experts, top-{shape.top_k}, {shape.parameters() / 1e9:.2f} G parameters"
        )
        command = coterie_command()
        if command is None:
            raise SystemExit("no `coterie` command beside this Python or on PATH: nothing to measure")
        print("coterie:", versions(Path(sys.executable), ("coterie", "transformers", "torch", "safetensors")))
        command += ["compress", str(model), str(output), "--method", options.method, "--keep", str(options.keep)]
        command += ["--tokens", str(tokens), "--threads", str(options.threads), *options.coterie_options.split()]
        print(" ".join(command), "\n", flush=True)

        limit = memory_limit(options.limit, limit_bytes)
        cool(model)
        load_at_start = os.getloadavg()[0]
        run = measure(command, log=work / "coterie.log", environment=thread_environment(options.threads), limit=limit)
        quiet, sentence = quietness(load_at_start, [run])
        sweeps = sweeps_of(output)
        print_usage(run, size, limit_bytes, limit.name, sweeps)
        print(sentence)
        if run.returncode:
            killed = run.cgroup.get("killed_for_memory", 0)
            wrong = [f"it ended with {run.returncode}" + (", killed for memory" if killed else "")]
            print(f"\nFAILED: {wrong[0]}\n{tail(run.log)}")
        else:
            check = problems if options.method == "reap" else merged_problems
            wrong = check(model, output, shape, options.keep)
            written = sum(f.stat().st_size for f in output.glob("*.safetensors"))
            for problem in wrong:
                print(f"WRONG OUTPUT: {problem}")
            if not wrong:
                print(f"output: {gb(written)} GB; opens, complete, and what must not change did not")
        finish(
            {
                "benchmark": "bigger_than_memory",
                "quick": options.quick,
                "machine": facts,
                "quiet": quiet,
                "statement": sentence,
                "shape": shape.config(),
                "parameters": shape.parameters(),
                "bytes": size,
                "job": {**job, "method": options.method, "keep": options.keep, "threads": options.threads},
                "limit": {"bytes": limit_bytes, "kind": limit.name},
                "run": run.as_dict(),
                "sweeps": sweeps,
                "problems": wrong,
            },
            options.json,
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
