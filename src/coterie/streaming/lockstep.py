"""Run batches through a streamed model layer by layer: all of them through layer 0, then all through layer 1, ...

Each batch is one ordinary call of the model in its own greenlet that pauses at every decoder layer's door. When all
batches stand at layer i, layer i is loaded; they pass through one by one; the layer is freed, and so on. Masks,
rotary embeddings and layer types stay the model's own business.

    for step in sweep(streamed, batches):
        step.run()            # every batch passes layer step.index; observers see them
        edit(step.layer)      # the layer is still in memory

Peak memory: the hidden states of all batches (spilled to disk above a limit) beside one layer. Where layers hand more
than hidden states to later ones (a recurrent router's state, momentum over depth), that is kept beside them, and is
neither spilled nor stored: such a sweep cannot go on in the middle, and starts again from the first layer.
"""

# B batch, L sequence, H hidden

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from coterie.errors import CoterieError, ModelError, OutputError
from coterie.streaming.config import one_line
from coterie.streaming.model import StreamedModel


@dataclass
class Batch:
    """Token ids with what observers need to know about them.

    ids_BL : int64. mask_BL : bool, True for real tokens; None where nothing is padded. domain_B : domain of each row.
    """

    ids_BL: Tensor
    mask_BL: Tensor | None = None
    domain_B: Tensor | None = None

    @property
    def tokens(self) -> int:
        return int(self.mask_BL.sum()) if self.mask_BL is not None else self.ids_BL.numel()


class Progress:
    """What a sweep reports; the default says nothing."""

    def start(self, what: str, layers: int, first: int = 0) -> None: ...
    def layer(self, index: int) -> None: ...
    def tokens(self, count: int) -> None: ...
    def done(self) -> None: ...


@dataclass
class States:
    """Hidden states of waiting batches: in memory up to a limit, the rest in files; optionally kept for a restart.

    folder : where files go; None makes a temporary one when needed. limit : bytes to keep in memory.
    durable : write every layer's outputs to `folder`, so that a killed sweep can go on after its last whole layer.
    """

    folder: Path | None = None
    limit: int = 2 * 2**30
    durable: bool = False
    bytes_spilled: int = 0
    _parked: dict[int, tuple[Tensor, Path | None]] = field(default_factory=dict)
    _resident: int = 0
    _temporary: TemporaryDirectory[str] | None = None

    def park(self, batch: int, hidden: Tensor) -> None:
        """`hidden` waits for its layer; its memory may be taken until `unpark`."""
        storage = hidden.untyped_storage()
        size = storage.nbytes()
        file = None
        if self._resident + size > self.limit and hidden.device.type == "cpu" and storage.resizable():
            file = self._scratch() / f"spill-{batch:06d}.bin"
            try:
                file.write_bytes(_bytes_of(storage))
            except OSError as error:
                raise OutputError(f"cannot spill hidden states to {file.parent}: {error.strerror}") from error
            storage.resize_(0)
            self.bytes_spilled += size
        else:
            self._resident += size
        self._parked[batch] = (hidden, file)

    def unpark(self, batch: int) -> None:
        hidden, file = self._parked.pop(batch)
        storage = hidden.untyped_storage()
        if file is None:
            self._resident -= storage.nbytes()
            return
        storage.resize_(file.stat().st_size)
        with file.open("rb") as stream:
            stream.readinto(_bytes_of(storage))

    def keep(self, batch: int, output: Tensor) -> None:
        """Store one batch's output of the present layer for a restart; it counts once `commit` was called."""
        assert self.folder is not None
        building = self.folder / "building"
        try:
            building.mkdir(parents=True, exist_ok=True)
            save_file({"hidden": output.detach().cpu().contiguous()}, building / f"{batch:06d}.safetensors")
        except (OSError, SafetensorError) as error:
            raise OutputError(f"cannot keep hidden states in {self.folder}: {error}") from error

    def commit(self, layer: int) -> None:
        """All outputs of `layer` are stored: a restart goes on after it. The previous layer's are dropped."""
        assert self.folder is not None
        target = self.folder / f"after-{layer:04d}"
        for file in (self.folder / "building").iterdir():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        (self.folder / "building").rename(target)
        for old in self.folder.glob("after-*"):
            if old != target:
                shutil.rmtree(old)

    def discard(self) -> None:
        """Forget outputs that were not committed."""
        if self.folder is not None:
            shutil.rmtree(self.folder / "building", ignore_errors=True)

    def kept(self) -> int | None:
        """The last layer whose outputs are stored whole, or None."""
        found = sorted(self.folder.glob("after-*")) if self.folder is not None and self.folder.exists() else []
        return int(found[-1].name.removeprefix("after-")) if found else None

    def following(self, known: Collection[int] = (), needed: Collection[int] = ()) -> int:
        """Where a sweep goes on: behind the kept outputs; at the start if a needed layer before them is not known,
        as after a damaged journal."""
        kept = self.kept()
        first = 0 if kept is None else kept + 1
        return 0 if any(index < first and index not in known for index in needed) else first

    def restore(self, layer: int, batch: int, device: str) -> Tensor:
        assert self.folder is not None
        file = self.folder / f"after-{layer:04d}" / f"{batch:06d}.safetensors"
        try:
            return load_file(file, device=device)["hidden"]
        except (OSError, SafetensorError, KeyError) as error:
            raise OutputError(
                f"the hidden states kept in {file.parent} are damaged: {error}",
                "Start this run afresh with --overwrite.",
            ) from error

    def _scratch(self) -> Path:
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            return self.folder
        if self._temporary is None:
            self._temporary = TemporaryDirectory(prefix="coterie-states-")
        return Path(self._temporary.name)


def _bytes_of(storage: torch.UntypedStorage) -> memoryview:
    """The storage's memory itself; a numpy view would pin it and forbid resizing."""
    return memoryview((ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())).cast("B")


@dataclass
class Step:
    """One decoder layer in memory, with all batches waiting before it."""

    index: int
    layer: nn.Module
    _pass: Callable[[int, bool], None]
    batches: Sequence[Batch]
    current: int = -1
    finished: bool = False

    def run(self, *, last: bool = True, before: Callable[[int, Batch], None] = lambda number, batch: None) -> None:
        """Pass every batch through the layer.

        Parameters
        ----------
        last : bool
            True: their outputs go on to the next layer. False: outputs are dropped and the batches wait again, so that
            the layer can be edited and run once more.
        before : callable
            Called with (number, batch) before each batch passes.
        """
        for number, batch in enumerate(self.batches):
            self.current = number
            before(number, batch)
            self._pass(number, last)
        self.finished = self.finished or last


def sweep(
    streamed: StreamedModel,
    batches: Sequence[Batch],
    *,
    finish: Callable[[int, Batch, Tensor], None] | None = None,
    states: States | None = None,
    first: int = 0,
    progress: Progress | None = None,
) -> Generator[Step, None, None]:
    """Yield each decoder layer in turn, in memory, with the batches before its door.

    Parameters
    ----------
    finish : callable, optional
        Called with (number, batch, hidden [B, L, H]) after the last layer and final norm. Without it the sweep ends
        with the last layer, and neither the norm nor the head is computed.
    states : States, optional
        Where waiting hidden states live.
    first : int
        Go on from this layer with the outputs `states` kept of the one before.
    progress : Progress, optional

    The layer is freed when the loop body ends; its outputs are kept first if `states` is durable and they are all that
    later layers need. Raises ModelError for a first layer above 0 where they are not.
    """
    states, progress = states or States(), progress or Progress()
    walkers: list[greenlet] = []
    layers, hub = streamed.layers, getcurrent()
    handed_on = carries_state(layers)
    if handed_on and first > 0:
        raise ModelError(
            f"a sweep cannot go on at layer {first}: layer {handed_on[0]} hands more than hidden states to later ones",
            "Run all layers again: start at layer 0.",
        )
    keepable = states.durable and states.folder is not None and not handed_on
    originals = [layer.forward for layer in layers]

    def door(index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def at_the_door(*args: Any, **kwargs: Any) -> Any:
            nonlocal keepable
            number: int = getcurrent().number
            if index < first:  # already done in an earlier run: nothing but the last one's output matters
                return states.restore(first - 1, number, streamed.device)
            hidden = args[0] if args else kwargs["hidden_states"]
            states.park(number, hidden)
            last = hub.switch(("door", index))
            states.unpark(number)
            while not last:
                forward(*args, **kwargs)
                states.park(number, hidden)
                last = hub.switch(("again", index))
                states.unpark(number)
            output = forward(*args, **kwargs)
            if keepable:
                if isinstance(output, Tensor):
                    states.keep(number, output)
                else:  # layers that hand on more than hidden states are run again after a crash
                    keepable = False
            if index == len(layers) - 1 and finish is None:
                raise GreenletExit
            return output

        return at_the_door

    def walk(number: int, batch: Batch) -> None:
        device = streamed.device
        mask = None if batch.mask_BL is None else batch.mask_BL.to(device).long()
        result = streamed.model.base_model(input_ids=batch.ids_BL.to(device), attention_mask=mask, use_cache=False)
        if finish is not None:
            finish(number, batch, result[0])

    def resume(number: int, value: Any = None) -> Any:
        with torch.no_grad():
            return walkers[number].switch() if value is None else walkers[number].switch(value)

    def pass_through(number: int, last: bool) -> None:
        resume(number, last)
        progress.tokens(batches[number].tokens)

    progress.start("layers", len(layers), first)
    states.discard()
    flushed = _flushes_denormals()
    torch.set_flush_denormal(True)  # denormals slow CPU matrix products several times and carry nothing
    try:
        for index, layer in enumerate(layers):
            layer.forward = door(index, originals[index])
        streamed.load_outer()
        for number, batch in enumerate(batches):
            walker = greenlet(lambda number=number, batch=batch: walk(number, batch))
            walker.number = number
            walkers.append(walker)
            try:
                resume(number)
            except (CoterieError, MemoryError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # modelling code that does not come to a decoder layer can raise anything
                raise ModelError(
                    f"{type(streamed.model).__name__} cannot be run layer by layer: {one_line(error)}",
                    "Only decoders that read tokens from left to right can be streamed.",
                ) from error
        streamed.free_embeddings()
        for index in range(first, len(layers)):
            layer = streamed.load_layer(index)
            streamed.prefetch(index + 1)
            step = Step(index, layer, pass_through, batches)
            yield step
            if not step.finished:
                step.run()
            if keepable:
                states.commit(index)
            streamed.free_layer(index)
            progress.layer(index)
    finally:
        for walker in walkers:
            if not walker.dead:
                walker.throw(GreenletExit)
        for layer, forward in zip(layers, originals, strict=True):
            layer.forward = forward
        streamed._stop_prefetch()
        streamed.forget_buffers()
        torch.set_flush_denormal(flushed)
        progress.done()


def carries_state(layers: nn.ModuleList) -> list[int]:
    """Decoder layers with a part that hands something on to later layers besides hidden states."""
    return [i for i, layer in enumerate(layers) if any(getattr(m, "carries_state", False) for m in layer.modules())]


def _flushes_denormals() -> bool:
    return float(torch.full((), 1e-310, dtype=torch.float64) * 1.0) == 0.0
