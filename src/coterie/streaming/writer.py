"""Write a safetensors checkpoint in pieces, whole or not at all, and go on after a crash.

The layout (which tensor at which byte of which shard) is fixed before the first weight is written, so that every
tensor can be written straight to its place, in any order, once; what lands in the files does not depend on whether or
when the run was killed. Work happens in `OUT.partial`; the final name appears by one rename.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from coterie.errors import OutputError, UsageError
from coterie.streaming.checkpoint import DTYPE_NAMES, TensorInfo

DEFAULT_SHARD_BYTES = 5 * 10**9  # what save_pretrained of older readers called "5GB"


@dataclass(frozen=True)
class Spec:
    """One tensor that will be written. parts : the tensors that are really written of it, where it is packed."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: tuple[Spec, ...] = ()

    @property
    def nbytes(self) -> int:
        if self.parts:
            return sum(part.nbytes for part in self.parts)
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Workspace:
    """The folder OUT.partial: locked while in use, with the job's identity and a journal of finished steps.

    Parameters
    ----------
    out : Path
        Final folder.
    job : dict
        Everything the result depends on. A partial folder of another job is refused.
    overwrite : bool
        Replace an existing `out`, and throw away a partial folder of another job.

    Raises
    ------
    OutputError
        `out` exists and is not empty; its place is not writable; another run is at work there.
    """

    def __init__(self, out: Path, job: dict[str, Any], *, overwrite: bool = False) -> None:
        check_place(out, overwrite=overwrite)
        self.overwrite = overwrite
        self.out = out = Path(os.path.realpath(out))  # behind a link, so that the rename at the end replaces the folder
        self.folder = out.with_name(out.name + ".partial")
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            self.folder.mkdir(exist_ok=True)
            self._lock = (self.folder / ".lock").open("w")
        except OSError as error:
            raise OutputError(f"cannot write to {out.parent}: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OutputError(f"another run is writing {out}", "Wait for it, or choose another name.") from error
        self.resumed = self._claim(json.loads(json.dumps(job)))
        self._mend_journal()

    def _claim(self, job: dict[str, Any]) -> bool:
        file = self.folder / "job.json"
        try:
            before = json.loads(file.read_text()) if file.exists() else None
        except ValueError:
            before = None
        if before == job:
            return True
        if before is not None and not self.overwrite:
            differs = sorted(k for k in job.keys() | before.keys() if job.get(k) != before.get(k))
            raise OutputError(
                f"{self.folder} holds unfinished work of another run (differs in: {', '.join(differs)})",
                "Repeat that run to finish it, delete the folder, or pass --overwrite to start afresh.",
            )
        for entry in self.folder.iterdir():
            if entry.name != ".lock":
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        write_json(file, job)
        return False

    def journal(self) -> list[dict[str, Any]]:
        """Finished steps, oldest first; a line that was cut off by a crash does not count, nor do any behind it."""
        return [step for step, _ in self._journal_lines()]

    def _journal_lines(self) -> list[tuple[dict[str, Any], int]]:
        """(step, bytes up to and with its line) of every whole line."""
        file, lines, end = self.folder / "journal.jsonl", [], 0
        if file.exists():
            for line in file.read_bytes().split(b"\n")[:-1]:
                end += len(line) + 1
                try:
                    step = json.loads(line)
                except ValueError:
                    break
                if not isinstance(step, dict):
                    break
                lines.append((step, end))
        return lines

    def _mend_journal(self) -> None:
        """Cut a damaged end off, so that the next line does not become part of it."""
        file, lines = self.folder / "journal.jsonl", self._journal_lines()
        if file.exists() and file.stat().st_size != (end := lines[-1][1] if lines else 0):
            os.truncate(file, end)

    def record(self, step: dict[str, Any]) -> None:
        """Append a finished step; on return it survives a crash of the process and of the machine."""
        try:
            with (self.folder / "journal.jsonl").open("ab") as stream:
                stream.write(json.dumps(step).encode() + b"\n")
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise disk_error(error, self.folder) from error

    def publish(self, keep: Sequence[str]) -> None:
        """Give the finished folder its name, holding just the files named in `keep`."""
        # the job's identity goes first: killed from here on, the next run must not go on with what is left of the rest
        (self.folder / "job.json").unlink()
        _sync(self.folder)
        for entry in self.folder.iterdir():
            if entry.name not in keep:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        _sync(self.folder)
        aside = self.out.with_name(self.out.name + ".replaced")
        shutil.rmtree(aside, ignore_errors=True)
        if self.out.exists():
            self.out.rename(aside)  # it is deleted only when the new one has its name
        self.folder.rename(self.out)
        _sync(self.out.parent)
        shutil.rmtree(aside, ignore_errors=True)
        self._lock.close()

    def close(self) -> None:
        """Let go of the folder without finishing. Without any finished step nothing is left behind."""
        if not self._lock.closed:
            if self.folder.exists() and not self.journal():
                shutil.rmtree(self.folder)
            self._lock.close()

    def __enter__(self) -> Workspace:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.close()
        number = _disk_errno(error)
        if number is not None:
            raise disk_error(OSError(number, os.strerror(number)), self.folder) from error


def check_place(out: Path, *, overwrite: bool = False, source: Path | None = None) -> None:
    """Raise OutputError unless a folder can be written to `out`, and UsageError if that would hurt `source`.

    Cheap enough to be asked before hours of work.
    """
    here = Path(os.path.realpath(out))
    if source is not None:
        model = Path(os.path.realpath(source))
        if here == model or here in model.parents or model in here.parents:
            raise UsageError(
                f"writing {out} would overwrite the model {source} or end inside it", "Choose another folder."
            )
    if here.exists() and not here.is_dir():
        raise OutputError(f"{out} is a file, and a folder is to be written", "Choose another name.")
    if here.exists() and any(here.iterdir()) and not overwrite:
        raise OutputError(f"{out} exists and is not empty", "Choose another name, or pass --overwrite.")
    above = next(place for place in here.parents if place.exists())
    if not above.is_dir():
        raise OutputError(f"cannot write to {out.parent}: {above} is a file")
    if not os.access(above, os.W_OK | os.X_OK):
        raise OutputError(f"cannot write to {out.parent}: no permission in {above}")


def _disk_errno(error: BaseException | None) -> int | None:
    """The errno of a failed write to a full or failing disk that nobody has given words to; None for all else."""
    if isinstance(error, OSError):
        number = error.errno
    else:  # safetensors says it in the text of its own exception only
        found = (
            re.search(r"\bos error (\d+)\b|\bcode: (\d+)\b", str(error)) if isinstance(error, SafetensorError) else None
        )
        number = int(found[1] or found[2]) if found else None
    return number if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS) else None


class ShardWriter:
    """Standard safetensors shards with an index, each tensor written straight to its place.

    Parameters
    ----------
    folder : Path
    specs : sequence of Spec
        All tensors, in the order they shall have. Of packed ones, the parts are written.
    shard_bytes : int
        Most bytes of tensors per shard (a single larger tensor gets a shard of its own).

    Raises OutputError if the folder's disk has no room for all of it.
    """

    def __init__(self, folder: Path, specs: Sequence[Spec], shard_bytes: int = DEFAULT_SHARD_BYTES) -> None:
        self.folder = folder
        self._parts = {spec.key: [part.key for part in spec.parts] for spec in specs if spec.parts}
        groups: list[list[Spec]] = [[]]
        size = 0
        for spec in (part for whole in specs for part in whole.parts or (whole,)):
            if groups[-1] and size + spec.nbytes > shard_bytes:
                groups.append([])
                size = 0
            groups[-1].append(spec)
            size += spec.nbytes
        total = len(groups)
        names = [f"model-{i + 1:05d}-of-{total:05d}.safetensors" for i in range(total)]
        self.names = names if total > 1 else ["model.safetensors"]
        self.total_size = sum(spec.nbytes for spec in specs)
        self.places: dict[str, TensorInfo] = {}
        self._streams: dict[Path, IO[bytes]] = {}
        self._mutex = threading.Lock()
        self._written: set[str] = set()
        self._check_room()
        for name, group in zip(self.names, groups, strict=True):
            self._lay_out(folder / name, group)
        if total > 1:
            weight_map = {key: info.file.name for key, info in self.places.items()}
            index = {"metadata": {"total_size": self.total_size}, "weight_map": dict(sorted(weight_map.items()))}
            write_json(folder / "model.safetensors.index.json", index)

    @property
    def files(self) -> list[str]:
        return self.names + (["model.safetensors.index.json"] if len(self.names) > 1 else [])

    @property
    def bytes_written(self) -> int:
        return sum(self.places[key].nbytes for key in self._written)

    def has(self, key: str) -> bool:
        """Has this tensor, with all its parts, been written in this run?"""
        return self._written.issuperset(self._parts.get(key, [key]))

    def mark(self, keys: Iterable[str]) -> None:
        """These were written by an earlier run."""
        for key in keys:
            self._written.update(self._parts.get(key, [key]))

    def _check_room(self) -> None:
        there = sum((self.folder / n).stat().st_blocks * 512 for n in self.names if (self.folder / n).exists())
        check_room(self.folder, self.total_size, there)

    def _lay_out(self, file: Path, group: list[Spec]) -> None:
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        for spec in group:
            end = position + spec.nbytes
            dtype = DTYPE_NAMES[spec.dtype]
            entries[spec.key] = {"dtype": dtype, "shape": list(spec.shape), "data_offsets": [position, end]}
            position = end
        header = json.dumps(entries, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        data = 8 + len(header)
        for spec in group:
            begin, end = entries[spec.key]["data_offsets"]
            self.places[spec.key] = TensorInfo(
                spec.key, file, DTYPE_NAMES[spec.dtype], spec.shape, data + begin, data + end
            )
        try:
            stream = os.fdopen(os.open(file, os.O_RDWR | os.O_CREAT, 0o644), "r+b", buffering=0)
            stream.truncate(data + position)
            os.pwrite(stream.fileno(), len(header).to_bytes(8, "little") + header, 0)
        except OSError as error:
            raise disk_error(error, self.folder) from error
        self._streams[file] = stream

    def write(self, key: str, tensor: Tensor) -> None:
        """Write one tensor to its place. Safe from several threads; repeating it is harmless."""
        place = self.places[key]
        if tuple(tensor.shape) != place.shape or DTYPE_NAMES[tensor.dtype] != place.dtype:
            raise ValueError(f"{key}: {tensor.dtype} {tuple(tensor.shape)} where {place.dtype} {place.shape} belongs")
        if place.nbytes:
            data = memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
            descriptor, done = self._streams[place.file].fileno(), 0
            try:
                while done < len(data):
                    done += os.pwrite(descriptor, data[done : done + 2**30], place.begin + done)
            except OSError as error:
                raise disk_error(error, self.folder) from error
        with self._mutex:
            self._written.add(key)

    def sync(self) -> None:
        """Make everything written so far survive a crash of the machine."""
        for stream in self._streams.values():
            os.fdatasync(stream.fileno())

    def close(self) -> None:
        for stream in self._streams.values():
            stream.close()
        self._streams.clear()


def check_room(folder: Path, size: int, there: int = 0) -> None:
    """Raise OutputError unless `size` bytes fit on the folder's disk, `there` of them being written already."""
    free, need = shutil.disk_usage(folder).free, size + 2**20
    if free + there < need:
        raise OutputError(f"not enough room in {folder.parent}: {need / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free")


def disk_error(error: OSError, folder: Path) -> OutputError:
    """The user's version of a failed write."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(
            f"the disk of {folder.parent} is full", "Free some space and repeat the command: it goes on where it was."
        )
    return OutputError(f"cannot write to {folder}: {error.strerror}")


_SMALL_FILES = (".json", ".txt", ".model", ".jinja", ".tiktoken")
_NOT_COPIED = ("config.json", "coterie.json", "plan.json", "model.safetensors.index.json", "README.md")
_LARGEST_COPY = 256 * 2**20


def copy_small_files(source: Path, folder: Path, but: Sequence[str] = ()) -> list[str]:
    """Copy the tokenizer and what else lies beside the weights, except files called as in `but`; returns the names."""
    names = []
    for file in sorted(source.iterdir()):
        wanted = file.suffix in _SMALL_FILES or file.name.startswith("LICENSE")
        refused = file.name in (*_NOT_COPIED, *but) or file.name.startswith(".")
        if wanted and not refused and file.is_file() and file.stat().st_size <= _LARGEST_COPY:
            try:
                shutil.copyfile(file, folder / file.name)
            except OSError as error:
                raise disk_error(error, folder) from error
            names.append(file.name)
    return names


def save_whole(model: Any, source: Path, folder: Path) -> list[str]:
    """Write a model in memory to `folder`, with what lies beside the weights in `source`; returns the names of all
    files. What an earlier try left is replaced."""
    place = folder / "model"
    shutil.rmtree(place, ignore_errors=True)
    model.save_pretrained(place)
    copy_small_files(source, place)
    names = sorted(entry.name for entry in place.iterdir())
    for name in names:
        (place / name).replace(folder / name)
    place.rmdir()
    return names


def write_json(file: Path, value: Any) -> None:
    """Write JSON whole or not at all."""
    building = file.with_name(file.name + ".tmp")
    try:
        with building.open("w", encoding="utf-8") as stream:
            json.dump(value, stream, indent=2, ensure_ascii=False)
            stream.write("\n")
        building.replace(file)
    except OSError as error:
        with contextlib.suppress(OSError):
            building.unlink(missing_ok=True)
        raise disk_error(error, file.parent) from error


def parse_size(text: str, *, least: int = 1) -> int:
    """Bytes in "12GB", "500 MB", "8GiB" or a plain number. Raises UsageError, also for less than `least`."""
    units = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
    units |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
    digits = text.strip().lower().rstrip("bikmgt ").strip()
    unit = text.strip().lower()[len(digits) :].strip()
    try:
        value = int(float(digits) * units[unit])
    except (ValueError, KeyError, OverflowError):
        value = -1
    if value < least:
        raise UsageError(f"cannot read the size {text!r}", "Write it like 12GB, 500MB or 8GiB.")
    return value


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
