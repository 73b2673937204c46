"""What the benchmarks share: random checkpoints, environments for peers, and measuring a child process.

Nothing here imports torch, and a benchmark's parent process must not either: Linux carries the peak memory of the
process that forks into the child's `ru_maxrss`, so a small parent is what makes the child's figure its own.
Needs numpy and safetensors only.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import time
import venv
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

# H hidden, I expert intermediate, E experts, K experts per token, V vocabulary, N layers

CACHE = Path("~/.cache/coterie-benchmarks").expanduser()
TORCH_PIN = "torch==2.13.0"
LLMCOMPRESSOR_PINS = ("llmcompressor==0.14.0.1", "transformers==5.17.0", TORCH_PIN)
BUSY_LOAD = 1.5  # above this load average, or with this much stolen below, wall times say nothing
BUSY_OTHERS = 0.25  # cores used by other processes during a run


# ----------------------------------------------------------------------------------------------- checkpoints


@dataclass(frozen=True)
class Shape:
    """Sizes of a Qwen3-MoE decoder whose every layer is sparse. All counts are elements, not bytes."""

    layers: int
    experts: int
    top_k: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    def config(self) -> dict[str, Any]:
        """config.json as the published Qwen3-MoE checkpoints spell it, which every transformers since 4.51 reads."""
        return {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": None,
            "eos_token_id": None,
            "decoder_sparse_step": 1,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "initializer_range": 0.02,
            "intermediate_size": 3 * self.intermediate,
            "max_position_embeddings": 4096,
            "mlp_only_layers": [],
            "moe_intermediate_size": self.intermediate,
            "norm_topk_prob": True,
            "num_attention_heads": self.heads,
            "num_experts": self.experts,
            "num_experts_per_tok": self.top_k,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "output_router_logits": False,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0,
            "router_aux_loss_coef": 0.001,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "vocab_size": self.vocabulary,
        }

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every tensor of the checkpoint, layer by layer."""
        h, i, d = self.hidden, self.intermediate, self.head_dim
        yield "model.embed_tokens.weight", (self.vocabulary, h)
        for n in range(self.layers):
            at = f"model.layers.{n}"
            yield f"{at}.input_layernorm.weight", (h,)
            yield f"{at}.self_attn.q_proj.weight", (self.heads * d, h)
            yield f"{at}.self_attn.k_proj.weight", (self.kv_heads * d, h)
            yield f"{at}.self_attn.v_proj.weight", (self.kv_heads * d, h)
            yield f"{at}.self_attn.o_proj.weight", (h, self.heads * d)
            yield f"{at}.self_attn.q_norm.weight", (d,)
            yield f"{at}.self_attn.k_norm.weight", (d,)
            yield f"{at}.post_attention_layernorm.weight", (h,)
            yield f"{at}.mlp.gate.weight", (self.experts, h)
            for e in range(self.experts):
                yield f"{at}.mlp.experts.{e}.gate_proj.weight", (i, h)
                yield f"{at}.mlp.experts.{e}.up_proj.weight", (i, h)
                yield f"{at}.mlp.experts.{e}.down_proj.weight", (h, i)
        yield "model.norm.weight", (h,)
        yield "lm_head.weight", (self.vocabulary, h)

    def parameters(self) -> int:
        """Number of parameters."""
        return sum(math.prod(shape) for _, shape in self.tensors())


# 824.7 M parameters, 1.65 GB in bf16
STANDARD = Shape(8, 64, 4, 1024, 512, 8, 4, 64, 3072)
# the same job in seconds, for testing the scripts
QUICK = Shape(2, 16, 4, 256, 128, 4, 2, 64, 1024)


def random_bf16(name: str, count: int, seed: int) -> Iterator[bytes]:
    """Chunks of `count` little-endian bf16 numbers: sign and mantissa random, magnitude in [2**-6, 2**-5).

    About a normal distribution of standard deviation 0.024 once a matrix product has summed them, at the speed of the
    disk. Depends on `name` and `seed` only, so any sharding holds the same numbers.
    """
    rng = np.random.Generator(np.random.PCG64([seed, zlib.crc32(name.encode())]))
    step = 1 << 23
    for start in range(0, count, step):
        here = min(step, count - start)
        bits = rng.integers(0, 1 << 64, size=-(-here // 4), dtype=np.uint64).view(np.uint16)[:here]
        bits &= np.uint16(0x807F)
        bits |= np.uint16(0x3C80)
        yield bits.tobytes()


def write_checkpoint(shape: Shape, folder: Path, *, seed: int, shard_bytes: int = 1 << 62) -> int:
    """Write a random bf16 checkpoint, one shard at a time, in memory of a few tens of MB.

    Returns
    -------
    int
        Bytes of all tensors together.
    """
    folder.mkdir(parents=True)
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    size = 0
    for name, dims in shape.tensors():
        here = 2 * math.prod(dims)
        if shards[-1] and size + here > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append((name, dims))
        size += here
    total, where = 0, {}
    for index, entries in enumerate(shards):
        single = len(shards) == 1
        file = "model.safetensors" if single else f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, dims in entries:
            end = offset + 2 * math.prod(dims)
            header[name] = {"dtype": "BF16", "shape": list(dims), "data_offsets": [offset, end]}
            offset, where[name] = end, file
        encoded = json.dumps(header).encode()
        encoded += b" " * (-len(encoded) % 8)
        with open(folder / file, "wb") as out:
            out.write(len(encoded).to_bytes(8, "little"))
            out.write(encoded)
            for name, dims in entries:
                if name.endswith("norm.weight"):
                    out.write(np.full(math.prod(dims), 0x3F80, dtype=np.uint16).tobytes())  # ones
                else:
                    out.writelines(random_bf16(name, math.prod(dims), seed))
            out.flush()
            os.fsync(out.fileno())
        total += offset
    if len(shards) > 1:
        index_file = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index_file))
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=2))
    return total


def write_tokens(file: Path, *, vocabulary: int, samples: int, length: int, seed: int) -> None:
    """Random token ids, the same for every contender: `input_ids` and `attention_mask`, int64 [samples, length]."""
    from safetensors.numpy import save_file

    ids = np.random.Generator(np.random.PCG64([seed, 1])).integers(0, vocabulary, (samples, length), dtype=np.int64)
    save_file({"input_ids": ids, "attention_mask": np.ones_like(ids)}, file)


def read_headers(folder: Path) -> dict[str, dict[str, Any]]:
    """Every tensor of a checkpoint folder: name -> dtype, shape, data_offsets, and the file and where data starts."""
    entries: dict[str, dict[str, Any]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            header = json.loads(handle.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            entries[name] = {**entry, "file": file, "start": 8 + length}
    return entries


def read_raw(entry: dict[str, Any]) -> bytes:
    """The bytes of one tensor that `read_headers` found."""
    first, last = entry["data_offsets"]
    with open(entry["file"], "rb") as handle:
        handle.seek(entry["start"] + first)
        return handle.read(last - first)


def expert_rows(folder: Path, layer: int) -> list[bytes]:
    """Router rows of one layer, as bytes: pruning keeps rows whole, so they tell which experts stayed."""
    name = f"model.layers.{layer}.mlp.gate.weight"
    headers = read_headers(folder)
    if name not in headers:
        raise SystemExit(f"{folder}: no tensor {name}")
    entry = headers[name]
    raw = read_raw(entry)
    step = len(raw) // entry["shape"][0]
    return [raw[i : i + step] for i in range(0, len(raw), step)]


def kept_experts(original: Path, pruned: Path, layers: int) -> list[list[int]]:
    """Per layer, the ids (in the original) of the experts that a pruned checkpoint still has."""
    kept = []
    for layer in range(layers):
        ids = {row: e for e, row in enumerate(expert_rows(original, layer))}
        rows = expert_rows(pruned, layer)
        unknown = sum(row not in ids for row in rows)
        if unknown:
            raise SystemExit(f"{pruned}: {unknown} router rows of layer {layer} are not rows of the original")
        kept.append(sorted(ids[row] for row in rows))
    return kept


def folder_bytes(folder: Path) -> int:
    """Size of all weight files."""
    return sum(f.stat().st_size for f in folder.glob("*.safetensors"))


def warm(folder: Path) -> None:
    """Read every file once, so that all contenders start with the checkpoint in the page cache."""
    for file in folder.iterdir():
        with open(file, "rb", buffering=0) as handle:
            while handle.read(1 << 24):
                pass


def cool(folder: Path) -> None:
    """Drop a folder's files from the page cache; needs no privilege."""
    for file in folder.iterdir():
        with open(file, "rb") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# ---------------------------------------------------------------------------------------------- environments


def ensure_venv(name: str, requirements: Sequence[str], cache: Path) -> Path:
    """Python of a virtual environment with exactly these requirements, made on first use.

    pip runs with the machine's own configuration. A finished environment is marked by a file that holds its
    requirements; an unfinished or different one is made again.
    """
    folder = cache / "venvs" / name
    mark = folder / "requirements.txt"
    wanted = "\n".join(requirements) + "\n"
    python = folder / "bin" / "python"
    if not (mark.exists() and mark.read_text() == wanted):
        print(f"creating {folder} with {', '.join(requirements)}", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True)
        subprocess.run(
            [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements], check=True
        )
        mark.write_text(wanted)
    return python


def versions(python: Path, packages: Sequence[str]) -> dict[str, str]:
    """Installed versions as that interpreter reports them; packages it does not have are left out."""
    code = (
        "import sys, json, importlib.metadata as m\n"
        "found = {d.metadata['Name'].lower(): d.version for d in m.distributions()}\n"
        "print(json.dumps({p: found[p.lower()] for p in sys.argv[1:] if p.lower() in found}))"
    )
    run = subprocess.run([python, "-c", code, *packages], check=True, capture_output=True, text=True)
    found: dict[str, str] = json.loads(run.stdout)
    return found


def coterie_command() -> list[str] | None:
    """How to start Coterie's command line: the one beside this interpreter, else the one on PATH, else None."""
    beside = Path(sys.executable).parent / "coterie"
    found = str(beside) if beside.exists() else shutil.which("coterie")
    return [found] if found else None


def thread_environment(threads: int) -> dict[str, str]:
    """This environment with every thread pool pinned, no network, and no progress bars."""
    pools = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS", "RAYON_NUM_THREADS")
    return {
        **os.environ,
        **{name: str(threads) for name in pools},
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


# ------------------------------------------------------------------------------------------------- measuring


@dataclass
class Usage:
    """What one child process and its descendants used. Sizes in bytes, times in seconds.

    `peak_rss` is the kernel's `ru_maxrss`; `peak_sampled` and its parts come from /proc every 20 ms, the parts at
    the moment of the largest total, `peak_anonymous` at the moment of the largest anonymous share. Mapped checkpoint
    pages count as file-backed: the kernel can take them back, so anonymous is what the machine must have.
    """

    command: list[str]
    returncode: int
    wall: float
    user: float
    system: float
    peak_rss: int
    peak_sampled: int = 0
    anonymous_at_peak: int = 0
    file_at_peak: int = 0
    peak_anonymous: int = 0
    samples: int = 0
    rchar: int = 0
    wchar: int = 0
    read_bytes: int = 0
    write_bytes: int = 0
    load_before: float = 0.0
    others_cores: float = 0.0
    floor_rss: int = 0
    cgroup: dict[str, int] = field(default_factory=dict)
    log: str = ""

    @property
    def cpu(self) -> float:
        """User and system CPU seconds."""
        return self.user + self.system

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "cpu": self.cpu}


def _descendants(pid: int) -> Iterator[int]:
    yield pid
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split():
                yield from _descendants(int(child))
    except (FileNotFoundError, ProcessLookupError):
        return


def _resident(pid: int) -> tuple[int, int]:
    """(anonymous, file-backed and shared) resident bytes of one process."""
    anonymous = mapped = 0
    try:
        with open(f"/proc/{pid}/status") as handle:
            for line in handle:
                if line.startswith("RssAnon:"):
                    anonymous = 1024 * int(line.split()[1])
                elif line.startswith(("RssFile:", "RssShmem:")):
                    mapped += 1024 * int(line.split()[1])
    except (FileNotFoundError, ProcessLookupError):
        pass
    return anonymous, mapped


def _busy_seconds() -> float:
    """CPU seconds that all processes of this machine have used since it started."""
    numbers = [int(x) for x in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return (sum(numbers) - numbers[3] - numbers[4]) / os.sysconf("SC_CLK_TCK")


class Limit:
    """No limit: what `measure` uses unless told otherwise. Subclasses confine the child's memory."""

    name = "none"

    def enter(self) -> None:
        """Runs in the child, before it becomes the command."""

    def sample(self, usage: dict[str, int]) -> None:
        """Runs in the parent while the child lives; may raise peaks in `usage`."""

    def finish(self, usage: dict[str, int]) -> None:
        """Runs in the parent after the child ended: final figures, then clean up."""


def measure(
    command: Sequence[str | Path], *, log: Path, environment: dict[str, str], limit: Limit | None = None
) -> Usage:
    """Run a command to its end and report what it used. Output goes to `log`; a failure is a result, not an error."""
    limit = limit or Limit()
    words = [str(word) for word in command]
    peaks = dict.fromkeys(("total", "anonymous_at_peak", "file_at_peak", "anonymous", "samples"), 0)
    cgroup: dict[str, int] = {}
    load, busy = os.getloadavg()[0], _busy_seconds()
    start = time.perf_counter()
    with open(log, "wb") as out:
        child = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment, preexec_fn=limit.enter
        )
        try:
            while os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                parts = [_resident(pid) for pid in _descendants(child.pid)]
                anonymous, mapped = sum(a for a, _ in parts), sum(m for _, m in parts)
                if anonymous + mapped > peaks["total"]:
                    peaks.update(total=anonymous + mapped, anonymous_at_peak=anonymous, file_at_peak=mapped)
                peaks["anonymous"] = max(peaks["anonymous"], anonymous)
                peaks["samples"] += 1
                limit.sample(cgroup)
                time.sleep(0.02)
        except BaseException:
            child.kill()
            child.wait()
            limit.finish(cgroup)
            raise
    wall = time.perf_counter() - start
    counters = {}
    for line in Path(f"/proc/{child.pid}/io").read_text().splitlines():  # still there: not reaped yet
        key, value = line.split(": ")
        counters[key] = int(value)
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    busy = _busy_seconds() - busy
    limit.finish(cgroup)
    return Usage(
        command=words,
        returncode=child.returncode,
        wall=wall,
        user=used.ru_utime,
        system=used.ru_stime,
        peak_rss=1024 * used.ru_maxrss,
        peak_sampled=peaks["total"],
        anonymous_at_peak=peaks["anonymous_at_peak"],
        file_at_peak=peaks["file_at_peak"],
        peak_anonymous=peaks["anonymous"],
        samples=peaks["samples"],
        rchar=counters["rchar"],
        wchar=counters["wchar"],
        read_bytes=counters["read_bytes"],
        write_bytes=counters["write_bytes"],
        load_before=load,
        others_cores=max(0.0, (busy - used.ru_utime - used.ru_stime) / wall),
        floor_rss=1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        cgroup=cgroup,
        log=str(log),
    )


def import_seconds(log: Path) -> float:
    """Seconds spent in imports, from the log of a run with PYTHONPROFILEIMPORTTIME=1."""
    total = 0
    for line in log.read_text(errors="replace").splitlines():
        if line.startswith("import time:") and "self [us]" not in line:
            total += int(line.split(":", 1)[1].split("|")[0])
    return total / 1e6


def tail(log: str | Path, lines: int = 12) -> str:
    """The end of a log, indented, without the import profile."""
    kept = [x for x in Path(log).read_text(errors="replace").splitlines() if not x.startswith("import time:")]
    return "\n".join("    " + line[:300] for line in kept[-lines:])


# --------------------------------------------------------------------------------------------------- limits


class AddressSpace(Limit):
    """RLIMIT_AS: every mapped byte counts, checkpoint files and libraries too, so it is stricter than real memory."""

    name = "address space (RLIMIT_AS)"
    kind = resource.RLIMIT_AS

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes

    def enter(self) -> None:
        resource.setrlimit(self.kind, (self.limit_bytes, self.limit_bytes))


class PrivateData(AddressSpace):
    """RLIMIT_DATA: private writable memory only; mapped checkpoint files are free, as the kernel can drop them."""

    name = "private memory (RLIMIT_DATA)"
    kind = resource.RLIMIT_DATA


class MemoryCgroup(Limit):
    """A memory cgroup below (v1) or beside (v2) this process's own: page cache counts too, and swap is not allowed."""

    def __init__(self, folder: Path, version: int, limit_bytes: int) -> None:
        self.folder, self.version = folder, version
        self.name = f"memory cgroup v{version}"
        folder.mkdir()
        try:
            if version == 1:
                self._write("memory.limit_in_bytes", limit_bytes)
                if (folder / "memory.memsw.limit_in_bytes").exists():
                    self._write("memory.memsw.limit_in_bytes", limit_bytes)
            else:
                self._write("memory.max", limit_bytes)
                if (folder / "memory.swap.max").exists():
                    self._write("memory.swap.max", 0)
        except OSError:
            folder.rmdir()
            raise

    def _write(self, name: str, value: int) -> None:
        (self.folder / name).write_text(str(value))

    def _read(self, name: str) -> int:
        file = self.folder / name
        return int(file.read_text()) if file.exists() else 0

    def enter(self) -> None:
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    def sample(self, usage: dict[str, int]) -> None:
        stat = dict(line.split() for line in (self.folder / "memory.stat").read_text().splitlines())
        names = ("rss", "cache", "mapped_file") if self.version == 1 else ("anon", "file", "file_mapped")
        for label, name in zip(("anonymous", "page_cache", "mapped_file"), names, strict=True):
            usage[f"peak_{label}"] = max(usage.get(f"peak_{label}", 0), int(stat[name]))

    def finish(self, usage: dict[str, int]) -> None:
        if self.version == 1:
            usage["peak"] = self._read("memory.max_usage_in_bytes")
            events = (self.folder / "memory.oom_control").read_text()
        else:
            usage["peak"] = self._read("memory.peak")
            events = (self.folder / "memory.events").read_text()
        counts = dict(line.split() for line in events.splitlines())
        usage["killed_for_memory"] = int(counts.get("oom_kill", 0))
        if self.version == 2:
            usage["times_at_limit"] = int(counts.get("max", 0))
        for pid in (self.folder / "cgroup.procs").read_text().split():  # descendants that outlived the command
            os.kill(int(pid), signal.SIGKILL)
        for _ in range(50):
            try:
                self.folder.rmdir()
                return
            except OSError:
                time.sleep(0.1)
        print(f"could not remove {self.folder}", file=sys.stderr)


def _cgroup_parents() -> Iterator[tuple[Path, int]]:
    """Places where a child memory cgroup may be made: (folder, version)."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    own = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    for fields in mounts:
        root, kind, options = Path(fields[1]), fields[2], fields[3].split(",")
        if kind == "cgroup" and "memory" in options:
            path = next((p for _, c, p in own if "memory" in c.split(",")), "/")
            here = root / path.lstrip("/")
            yield (here if here.exists() else root), 1
        elif kind == "cgroup2":
            path = next((p for number, _, p in own if number == "0"), "/")
            here = root / path.lstrip("/")
            # a v2 group with processes cannot hand memory control to children: its parent is the place
            for place in (here, here.parent):
                control = place / "cgroup.subtree_control"
                if control.exists() and "memory" in control.read_text().split():
                    yield place, 2


def memory_limit(kind: str, limit_bytes: int) -> Limit:
    """A hard limit of the named kind: cgroup, data, address-space, or auto (a cgroup if one can be made, else data)."""
    if kind == "address-space":
        return AddressSpace(limit_bytes)
    if kind == "data":
        return PrivateData(limit_bytes)
    failures = []
    for parent, version in _cgroup_parents():
        try:
            return MemoryCgroup(parent / f"coterie-benchmark-{os.getpid()}", version, limit_bytes)
        except OSError as error:
            failures.append(f"{parent}: {error}")
    if kind == "cgroup":
        raise SystemExit("no memory cgroup can be made here\n  " + "\n  ".join(failures or ["no memory controller"]))
    print("no memory cgroup can be made here; limiting private memory instead (RLIMIT_DATA)")
    return PrivateData(limit_bytes)


# ------------------------------------------------------------------------------------------------ reporting


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    names = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
    memory = int(Path("/proc/meminfo").read_text().splitlines()[0].split()[1]) * 1024
    return {
        "cpu": names[0].split(":", 1)[1].strip() if names else platform.processor(),
        "cores": os.cpu_count(),
        "memory": memory,
        "kernel": platform.release(),
        "load_average": os.getloadavg()[0],
    }


def print_machine(facts: dict[str, Any]) -> None:
    """One line."""
    print(
        f"machine: {facts['cpu']}, {facts['cores']} cores, {gb(facts['memory'])} GB, Linux {facts['kernel']}; "
        f"load average {facts['load_average']:.2f}"
    )


def quietness(load_at_start: float, runs: Sequence[Usage]) -> tuple[bool, str]:
    """Whether the machine was quiet enough to compare wall times, and a sentence that says so.

    The load average counts our own runs too once they started, so it is read before the first one; during the runs
    we count the CPU time that other processes took.
    """
    others = max((run.others_cores for run in runs), default=0.0)
    figures = f"load average {load_at_start:.2f} at the start, other processes used up to {others:.2f} cores"
    if load_at_start > BUSY_LOAD or others > BUSY_OTHERS:
        return False, f"NOT A QUIET MACHINE ({figures}): wall times below are no basis for a conclusion."
    return True, f"quiet machine ({figures})"


def gb(count: float) -> str:
    """Bytes as GB (10**9), two decimals."""
    return f"{count / 1e9:.2f}"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A plain aligned table; first column left, the others right."""
    cells = [[str(x) for x in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    ]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def finish(result: dict[str, Any], json_file: Path | None) -> None:
    """Write the result where --json asked for it; '-' means standard output."""
    if json_file is None:
        return
    text = json.dumps(result, indent=2, default=str)
    if str(json_file) == "-":
        print(text)
    else:
        json_file.write_text(text + "\n")
        print(f"wrote {json_file}")


def common_options(parser: argparse.ArgumentParser) -> None:
    """Options every benchmark has."""
    parser.add_argument("--cache", type=Path, default=CACHE, help=f"peers' environments (default {CACHE})")
    parser.add_argument("--work", type=Path, help="folder for checkpoints (default: CACHE/files)")
    parser.add_argument("--seed", type=int, default=0, help="for weights and tokens (default 0)")
    parser.add_argument("--threads", type=int, default=2, help="threads of every contender (default 2)")
    parser.add_argument("--quick", action="store_true", help="small sizes: tests the script, measures nothing")
    parser.add_argument("--keep-files", action="store_true", help="leave checkpoints and outputs on disk")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result here ('-': standard output)")


class Workplace:
    """A fresh folder for one benchmark's files; removed at the end unless asked to keep it."""

    def __init__(self, options: argparse.Namespace, name: str) -> None:
        self.folder: Path = (options.work or options.cache / "files") / f"{name}-{os.getpid()}"
        self.keep: bool = options.keep_files

    def __enter__(self) -> Path:
        self.folder.mkdir(parents=True)
        return self.folder

    def __exit__(self, *_: object) -> None:
        if self.keep:
            print(f"kept {self.folder}")
        else:
            shutil.rmtree(self.folder, ignore_errors=True)


def timed(function: Callable[[], None]) -> float:
    """Wall seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
