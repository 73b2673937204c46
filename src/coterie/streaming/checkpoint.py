"""Read a safetensors checkpoint tensor by tensor, without mapping it, and refuse what is damaged or unsafe.

Bytes are read with positioned reads straight into the tensor that will hold them: nothing is memory-mapped, so a
checkpoint of any size costs only what is asked for, also under an address-space limit. All headers are checked when
the checkpoint is opened, so that a truncated shard is reported before any work. It knows no model.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coterie.errors import CheckpointError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_MAX_HEADER = 256 * 2**20
_MAX_SIZE = 2**48  # of a dimension or an offset: beyond any disk, and small enough that products stay integers
_READAHEAD = 128 * 2**10  # the most one fadvise call is honoured for with default kernel settings
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies. `begin` and `end` are byte offsets in `file`."""

    key: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def meta(self) -> Tensor:
        return torch.empty(self.shape, dtype=DTYPES[self.dtype], device="meta")


class LazyTensor:
    """A tensor on disk that is read when indexed with `[...]`; what transformers' weight conversion expects."""

    def __init__(self, checkpoint: Checkpoint, key: str) -> None:
        self._checkpoint, self._info = checkpoint, checkpoint.tensors[key]

    def __getitem__(self, index: Any) -> Tensor:
        tensor = self._checkpoint.read(self._info.key)
        return tensor if index is Ellipsis else tensor[index]

    def get_shape(self) -> list[int]:
        return list(self._info.shape)

    def get_dtype(self) -> str:
        return self._info.dtype


@dataclass
class Checkpoint:
    """An opened checkpoint folder.

    folder : where it lies. raw_config : parsed config.json. tensors : {key: TensorInfo} in file order.
    on_read : called with (key, tensor) after each read, from whichever thread reads.
    """

    folder: Path
    raw_config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    on_read: Callable[[str, Tensor], None] | None = None
    bytes_read: int = 0
    _digest: str = ""
    _files: dict[Path, int] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def open(cls, model: str | Path, *, offline: bool = False) -> Checkpoint:
        """Open a local folder or a model of the hub (downloaded to its cache; only safetensors and small files).

        Raises CheckpointError for anything missing, damaged or unsafe.
        """
        folder = resolve(str(model), offline=offline)
        raw_config = _json(folder / "config.json", "It is part of every Hugging Face checkpoint.")
        tensors: dict[str, TensorInfo] = {}
        for file, expected in _shards(folder).items():
            found = {info.key: info for info in read_header(file)}
            if expected is not None and (missing := sorted(expected - found.keys())):
                raise CheckpointError(
                    f"{file.name}: {len(missing)} tensors that the index promises are missing, first {missing[0]!r}",
                    "The download may be incomplete: fetch this shard again.",
                )
            if expected is not None and (extra := sorted(found.keys() - expected)):
                raise CheckpointError(
                    f"{file.name}: {len(extra)} tensors are not in the index, first {extra[0]!r}",
                    "Shard and index do not belong together: fetch both again.",
                )
            if twice := found.keys() & tensors.keys():
                raise CheckpointError(f"{file.name}: tensor {min(twice)!r} is already in another shard")
            tensors.update(found)
        return cls(folder, raw_config, tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    def lazy(self, keys: Iterable[str]) -> dict[str, LazyTensor]:
        return {key: LazyTensor(self, key) for key in keys}

    def read(self, key: str, out: Tensor | None = None) -> Tensor:
        """The tensor `key` in its stored dtype. `out`, contiguous and of that shape and dtype, is filled if given."""
        info = self.tensors[key]
        tensor = torch.empty(info.shape, dtype=DTYPES[info.dtype]) if out is None else out
        if info.nbytes:
            view = memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
            done = 0
            while done < info.nbytes:
                count = os.preadv(self._descriptor(info.file), [view[done : done + 2**30]], info.begin + done)
                if count <= 0:
                    raise CheckpointError(f"{info.file.name}: ends in the middle of tensor {key!r}")
                done += count
        with self._lock:
            self.bytes_read += info.nbytes
        if self.on_read is not None:
            self.on_read(key, tensor)
        return tensor

    def prefetch(self, keys: Iterable[str], stop: threading.Event) -> None:
        """Ask the system to have these tensors in its page cache soon. Costs no memory of this process."""
        for key in keys:
            info = self.tensors[key]
            for position in range(info.begin, info.end, _READAHEAD):
                if stop.is_set():
                    return
                length = min(_READAHEAD, info.end - position)
                os.posix_fadvise(self._descriptor(info.file), position, length, os.POSIX_FADV_WILLNEED)

    def release(self, keys: Iterable[str]) -> None:
        """Tell the system that these bytes will not be read again; it may drop them from its cache."""
        for key in keys:
            info = self.tensors[key]
            os.posix_fadvise(self._descriptor(info.file), info.begin, info.nbytes, os.POSIX_FADV_DONTNEED)

    def digest(self) -> str:
        """Identity of the checkpoint: config, names, shapes and places of tensors, and a sample of each one's bytes."""
        if self._digest:
            return self._digest
        sha = hashlib.sha256(json.dumps(self.raw_config, sort_keys=True).encode())
        for info in self.tensors.values():
            sha.update(f"{info.key} {info.dtype} {info.shape} {info.file.name} {info.begin}".encode())
            middle = info.begin + info.nbytes // 2
            sha.update(os.pread(self._descriptor(info.file), min(1024, info.end - middle), middle))
        self._digest = sha.hexdigest()
        return self._digest

    def close(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _descriptor(self, file: Path) -> int:
        with self._lock:
            if file not in self._files:
                self._files[file] = os.open(file, os.O_RDONLY)
            return self._files[file]


def resolve(model: str, *, offline: bool = False) -> Path:
    """The local folder of a model: itself, or the hub's snapshot of it. Raises CheckpointError if there is none."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{model} is a file, not a checkpoint folder", "Name the folder that holds config.json.")
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise CheckpointError(f"no folder {model}", "Name a local checkpoint folder or a hub id like owner/name.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.tiktoken"]
        return Path(snapshot_download(model, allow_patterns=patterns, local_files_only=offline))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        where = "in the local cache (--offline)" if offline else "on the hub, nor as a local folder"
        raise CheckpointError(f"no model {model!r} {where}: {type(error).__name__}") from error


def read_header(file: Path) -> list[TensorInfo]:
    """The tensors of one safetensors file, fully checked against the file's size."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise CheckpointError(f"{file.name} is truncated or not a safetensors file ({size} bytes)")
            header = json.loads(stream.read(length))
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # ValueError: no UTF-8, no JSON, numbers of thousands of digits
        raise CheckpointError(f"{file.name} has a damaged header: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file.name} has a damaged header")
    header.pop("__metadata__", None)
    infos, data = [], 8 + length
    for key, entry in header.items():
        try:
            dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            whole = all(isinstance(n, int) and 0 <= n < _MAX_SIZE for n in (*shape, begin, end))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{file.name}: damaged entry for tensor {key!r}") from error
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise CheckpointError(f"{file.name}: tensor {key!r} has the unknown dtype {dtype!r}")
        known = (
            whole and math.prod(n or 1 for n in shape) < 2**63
        )  # torch cannot hold more, even where a 0 is among them
        if not known or end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
            raise CheckpointError(f"{file.name}: tensor {key!r} has a size that does not fit its shape {list(shape)}")
        if data + end > size:
            raise CheckpointError(
                f"{file.name} is truncated: tensor {key!r} ends at byte {data + end}, the file has {size}",
                "The download may be incomplete: fetch this shard again.",
            )
        infos.append(TensorInfo(key, file, dtype, shape, data + begin, data + end))
    infos.sort(key=lambda info: info.begin)
    for one, two in itertools.pairwise(infos):
        if one.end > two.begin:
            raise CheckpointError(f"{file.name}: tensors {one.key!r} and {two.key!r} overlap")
    return infos


def _shards(folder: Path) -> dict[Path, set[str] | None]:
    """{shard: the keys its index promises, None without an index}."""
    index_file = folder / "model.safetensors.index.json"
    if index_file.exists():
        weight_map = _json(index_file, "").get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise CheckpointError(f"{index_file.name} has no weight_map")
        shards: dict[Path, set[str] | None] = {}
        for name in sorted(set(weight_map.values())):
            if name != os.path.basename(name) or name in ("", ".", "..") or not name.endswith(".safetensors"):
                raise CheckpointError(
                    f"{index_file.name} points outside its folder or at something else than a shard: {name!r}",
                    "A checkpoint like this is broken or hostile; it is not read.",
                )
            if not (folder / name).exists():
                raise CheckpointError(f"shard {name} is missing in {folder}", "Fetch it again, or complete the folder.")
            shards[folder / name] = {key for key, value in weight_map.items() if value == name}
        return shards
    single = folder / "model.safetensors"
    if single.exists():
        return {single: None}
    loose = sorted(folder.glob("*.safetensors"))
    if len(loose) == 1:
        return {loose[0]: None}
    if loose:
        raise CheckpointError(f"{folder} holds {len(loose)} safetensors files but no model.safetensors.index.json")
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)
    if pickles:
        raise CheckpointError(
            f"{folder} holds only pickled weights ({pickles[0]}), which can run code when opened",
            "Convert once with transformers: AutoModelForCausalLM.from_pretrained(SRC).save_pretrained(DST).",
        )
    raise CheckpointError(f"{folder} holds no safetensors weights")


def _json(file: Path, hint: str) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{file.parent} has no {file.name}", hint) from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file.name} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file.name} is not a JSON object")
    return value
