"""Read a safetensors checkpoint tensor by tensor, without mapping it, and refuse what is damaged or unsafe.

Bytes are read with positioned reads straight into the tensor that will hold them: nothing is memory-mapped, so a
checkpoint of any size costs only what is asked for, also under an address-space limit. All headers are checked when
the checkpoint is opened, so that a truncated shard is reported before any work. It knows no model.

Where weights are stored in a packed form (see `stored`), `tensors` names the weights and `stored` what the files hold.
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
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from coterie.errors import CheckpointError

if TYPE_CHECKING:
    from coterie.streaming.stored.form import StoredForm

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
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

    @property
    def bytes_in_memory(self) -> int:
        """Bytes of the tensor that `Checkpoint.read` returns."""
        return self.numel * DTYPES[self.dtype].itemsize

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        """The tensors of the files that hold it."""
        return (self,)

    def meta(self) -> Tensor:
        return torch.empty(self.shape, dtype=DTYPES[self.dtype], device="meta")


@dataclass(frozen=True)
class PackedInfo(TensorInfo):
    """A weight that several tensors of the files make up together: numbers in a narrow format and their scales.

    dtype, shape : of the weight as it is read. packed : those tensors, in the order `form` takes them; the place is
    that of the first.
    """

    form: StoredForm
    packed: tuple[TensorInfo, ...]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.packed)

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        return self.packed

    @classmethod
    def of(
        cls, key: str, dtype: torch.dtype, shape: tuple[int, ...], form: StoredForm, packed: tuple[TensorInfo, ...]
    ) -> PackedInfo:
        first = packed[0]
        return cls(key, first.file, DTYPE_NAMES[dtype], shape, first.begin, first.end, form, packed)


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

    folder : where it lies. raw_config : parsed config.json. tensors : {key: TensorInfo} in file order, of weights.
    stored : the same of the tensors in the files; other ones only after `unpack`.
    on_weight : called with (key, tensor) for each weight that was read, from whichever thread reads.
    on_read : the same for each tensor of the files, as it lies there.
    """

    folder: Path
    raw_config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    on_weight: Callable[[str, Tensor], None] | None = None
    on_read: Callable[[str, Tensor], None] | None = None
    stored: dict[str, TensorInfo] = field(init=False)
    bytes_read: int = 0
    _digest: str = ""
    _files: dict[Path, int] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.stored = self.tensors

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
        return sum(info.nbytes for info in self.stored.values())

    def unpack(self, form: StoredForm, dtype: torch.dtype) -> None:
        """From now on, `tensors` are the weights that the files hold in `form`, read as `dtype` where it has no better
        one. Raises CheckpointError where the files do not hold what that form asks for."""
        self.tensors = form.weights(self.stored, dtype)

    def lazy(self, keys: Iterable[str]) -> dict[str, LazyTensor]:
        return {key: LazyTensor(self, key) for key in keys}

    def read(self, key: str, out: Tensor | None = None) -> Tensor:
        """The weight `key` in its dtype. `out`, contiguous and of that shape and dtype, is filled if given."""
        info = self.tensors[key]
        tensor = torch.empty(info.shape, dtype=DTYPES[info.dtype]) if out is None else out
        if isinstance(info, PackedInfo):
            info.form.unpack(self.read_parts(key, passing=True), tensor)
            self._weight(key, tensor)
        else:
            self._fill(info, tensor)
            self._weight(key, tensor)
            self._passing(key, tensor)
        return tensor

    def read_parts(self, key: str, *, passing: bool = False) -> list[Tensor]:
        """What the files hold of the weight `key`; shown to `on_read` only if it is `passing` through."""
        parts = []
        for info in self.tensors[key].parts:
            parts.append(torch.empty(info.shape, dtype=DTYPES[info.dtype]))
            self._fill(info, parts[-1])
            if passing:
                self._passing(info.key, parts[-1])
        return parts

    def _weight(self, key: str, tensor: Tensor) -> None:
        if self.on_weight is not None:
            self.on_weight(key, tensor)

    def _passing(self, key: str, tensor: Tensor) -> None:
        if self.on_read is not None:
            self.on_read(key, tensor)

    def _fill(self, info: TensorInfo, tensor: Tensor) -> None:
        if info.nbytes:
            view = memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
            done = 0
            while done < info.nbytes:
                count = os.preadv(self._descriptor(info.file), [view[done : done + 2**30]], info.begin + done)
                if count <= 0:
                    raise CheckpointError(f"{info.file.name}: ends in the middle of tensor {info.key!r}")
                done += count
        with self._lock:
            self.bytes_read += info.nbytes

    def prefetch(self, keys: Iterable[str], stop: threading.Event) -> None:
        """Ask the system to have these tensors in its page cache soon. Costs no memory of this process."""
        for info in self._parts(keys):
            for position in range(info.begin, info.end, _READAHEAD):
                if stop.is_set():
                    return
                length = min(_READAHEAD, info.end - position)
                os.posix_fadvise(self._descriptor(info.file), position, length, os.POSIX_FADV_WILLNEED)

    def release(self, keys: Iterable[str]) -> None:
        """Tell the system that these bytes will not be read again; it may drop them from its cache."""
        for info in self._parts(keys):
            os.posix_fadvise(self._descriptor(info.file), info.begin, info.nbytes, os.POSIX_FADV_DONTNEED)

    def _parts(self, keys: Iterable[str]) -> Iterable[TensorInfo]:
        return (part for key in keys for part in self.tensors[key].parts)

    def digest(self) -> str:
        """Identity of the checkpoint: config, names, shapes and places of tensors, and a sample of each one's bytes."""
        if self._digest:
            return self._digest
        sha = hashlib.sha256(json.dumps(self.raw_config, sort_keys=True).encode())
        for info in self.stored.values():
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
