"""A checkpoint written anew in which some tensors of some layers are replaced, and everything else is copied.

The layout is computed on meta tensors before anything is read: which tensors go, which take their place, what they
will be called in the files and how large they will be. Tensors nobody replaces are copied byte for byte as they are
read, or from file to file if they are not. It does not know why a tensor changes, and nothing of configs.

Of a checkpoint in a packed form, the result has the same form. A replacing tensor is written with the packed bytes and
scales of the one it was read from, wherever it still holds the same numbers; what changed is quantized again, block by
block, and counted. Nothing is asked about why: each weight is compared with what its source holds.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from coterie.streaming.checkpoint import PackedInfo, TensorInfo
from coterie.streaming.model import StreamedModel
from coterie.streaming.writer import ShardWriter, Spec


def layout(
    streamed: StreamedModel,
    gone: Mapping[int, Collection[str]],
    fresh: Mapping[int, Mapping[str, Tensor]],
    left_out: Callable[[str], bool] = lambda key: False,
) -> tuple[list[Spec], dict[str, int]]:
    """Everything that will be written, in the order of the source, and the layer each replacing tensor belongs to.

    Parameters
    ----------
    gone : {layer: model names of tensors that are not copied}.
    fresh : {layer: {model name: meta tensor}} of what is written instead: the same name with another shape, or a name
        the source does not have. Fused experts may have fewer experts, other rows and other columns.
    left_out : keys of the source that are neither copied nor replaced.
    """
    made: dict[int, dict[str, Tensor]] = {}
    for index, tensors in fresh.items():
        others = {name: meta for name, meta in tensors.items() if name not in streamed.fused}
        made[index] = streamed.checkpoint_tensors(others) if others else {}
        for name, meta in tensors.items():
            if name in streamed.fused:
                made[index] |= dict(streamed.fused[name].tensors(meta, range(meta.shape[0])))
    owner = {key: index for index, names in gone.items() for key in streamed.keys_of(names)}
    specs: list[Spec] = []
    done: set[str] = set()
    for key, info in streamed.checkpoint.tensors.items():
        if key not in owner:
            if not left_out(key):
                specs.append(spec_of(info))
        elif key in made.get(owner[key], {}):
            meta = made[owner[key]][key]
            specs.append(spec_of(info, tuple(meta.shape), meta.dtype))
            done.add(key)
    for tensors in made.values():  # names the source does not have: another layout on disk
        specs += [Spec(key, t.dtype, tuple(t.shape)) for key, t in tensors.items() if key not in done]
    return specs, {key: index for index, tensors in made.items() for key in tensors}


def spec_of(info: TensorInfo, shape: tuple[int, ...] | None = None, dtype: torch.dtype | None = None) -> Spec:
    """What is written for a tensor of the source, or for one of another shape (and dtype) under its name."""
    shape = info.shape if shape is None else shape
    parts: tuple[Spec, ...] = ()
    if isinstance(info, PackedInfo):
        shapes = info.form.layout(shape)
        parts = tuple(Spec(p.key, p.meta().dtype, s) for p, s in zip(info.packed, shapes, strict=True))
    return Spec(info.key, dtype or info.meta().dtype, shape, parts)


class Rewrite:
    """The checkpoint that is being written.

    Parameters
    ----------
    streamed : StreamedModel
        Source; still whole (no layer edited yet). Tensors in `gone` are also retained as they are stored.
    folder : Path
        Where files are written.
    gone, fresh, left_out : see `layout`.
    shard_bytes : int

    Attributes
    ----------
    specs, fresh_of : see `layout`. through : keys that are copied. notes : what a user should be told.
    """

    def __init__(
        self,
        streamed: StreamedModel,
        folder: Path,
        gone: Mapping[int, Collection[str]],
        fresh: Mapping[int, Mapping[str, Tensor]],
        shard_bytes: int,
        left_out: Callable[[str], bool] = lambda key: False,
    ) -> None:
        self.streamed, self.folder = streamed, folder
        self.specs, self.fresh_of = layout(streamed, gone, fresh, left_out)
        names = {name for layer in gone.values() for name in layer}
        replaced = set(streamed.keys_of(names))
        self.through = [key for key in streamed.checkpoint.tensors if key not in replaced and not left_out(key)]
        tensors = streamed.checkpoint.tensors
        self._through = {part.key for key in self.through for part in tensors[key].parts}
        self.notes: list[str] = []
        streamed.on_read = self._pass
        streamed.retain = names
        self.writer = ShardWriter(folder, self.specs, shard_bytes)

    def _pass(self, key: str, tensor: Tensor) -> None:
        if key in self._through:
            self.writer.write(key, tensor)

    def write(
        self, state: Mapping[str, Tensor], keep: Sequence[int] | None = None, *, as_read: Collection[str] = ()
    ) -> dict[str, float]:
        """Write tensors of one layer, by model name; of fused ones only the experts `keep`, if given.

        keep : also says which entries of the source the first dimension of other 3-D tensors has.
        as_read : names of tensors that surely hold what was read: packed ones are not unpacked again to find out.
        Returns what had to be quantized again, for the record: {} where nothing had to.
        """
        again = Requantized()
        others: dict[str, Tensor] = {}
        for name, tensor in state.items():
            if name in self.streamed.fused:
                layout = self.streamed.fused[name]
                experts = range(tensor.shape[0]) if keep is None else keep
                for (key, view), source in zip(layout.tensors(tensor, experts), layout.sources(experts), strict=True):
                    self._put(key, view, source, None, again, as_read=name in as_read)
            else:
                others[name] = tensor
        if others:
            params = self.streamed.params
            for key, tensor in self.streamed.checkpoint_tensors(others).items():
                self._put(key, tensor, key, keep, again, as_read=params.get(key) in as_read)
        return again.figures()

    def _put(
        self,
        key: str,
        tensor: Tensor,
        source: str,
        keep: Sequence[int] | None,
        again: Requantized,
        *,
        as_read: bool,
    ) -> None:
        """Write one tensor, in the form its name has in the source. source : the tensor it was read from."""
        info = self.streamed.checkpoint.tensors.get(key)
        if not isinstance(info, PackedInfo):
            self.writer.write(key, tensor)
            return
        before = self.streamed.checkpoint.read_parts(source)
        if keep is not None and tensor.dim() == 3:
            before = [part[torch.tensor(keep)] for part in before]
        fits = [tuple(part.shape) for part in before] == info.form.layout(tuple(tensor.shape))
        if as_read and fits:
            for part, value in zip(info.packed, before, strict=True):
                self.writer.write(part.key, value)
            return
        step = 1 if tensor.dim() == 3 else len(tensor)  # experts one at a time: unpacking them costs memory
        made = []
        for begin in range(0, len(tensor), step):
            weight = tensor[begin : begin + step].detach().cpu()
            old = [part[begin : begin + step] for part in before] if fits and step == 1 else before
            made.append(again.parts(info, weight, old, fits=fits))
        for part, written in zip(info.packed, zip(*made, strict=True), strict=True):
            self.writer.write(part.key, torch.cat(written) if len(written) > 1 else written[0])

    def packed_notes(self, figures: Mapping[int, Mapping[str, float]]) -> list[str]:
        """What a user of a packed checkpoint should know. figures : of all layers, with what `write` returned."""
        again = [f for f in figures.values() if f.get("requantized_tensors")]
        if self.streamed.form is None or not again:
            return []
        count = int(sum(f["requantized_tensors"] for f in again))
        worst = max(f["requantization_error"] for f in again)
        return [
            f"{count} matrices changed and were quantized to {self.streamed.form.name} again, which moved"
            f" them by up to {worst:.1%} of their norm in a layer; all others have their bytes as they were"
        ]

    def mark_written(self, index: int) -> None:
        """Layer `index` was written by an earlier run."""
        fresh = [key for key, layer in self.fresh_of.items() if layer == index]
        self.writer.mark([*fresh, *(k for k in self.streamed.layer_keys[index] if k in self._through)])

    def copy_rest(self, keys: Iterable[str]) -> None:
        """Copy untouched tensors that no sweep has read, one at a time, checked like all others."""
        for key in keys:
            whole = all(part.key in self._through for part in self.streamed.checkpoint.tensors[key].parts)
            if whole and not self.writer.has(key):
                self.streamed.pass_on(key)


class Requantized:
    """Packs weights again, and counts the matrices that could not keep their numbers and what that cost."""

    def __init__(self) -> None:
        self.tensors = 0
        self._lost = self._squared = 0.0

    def parts(self, info: PackedInfo, weight: Tensor, before: Sequence[Tensor], *, fits: bool) -> Sequence[Tensor]:
        """What is written of `weight`. before : what it was read from, of the same shapes if it `fits`."""
        old = torch.empty_like(weight)
        if fits:
            info.form.unpack(before, old)
            if torch.equal(weight, old):
                return before
            parts = info.form.repack(weight, before)
        else:
            shapes = info.form.layout(tuple(weight.shape))
            parts = info.form.pack(weight, [(part.dtype, shape) for part, shape in zip(before, shapes, strict=True)])
        info.form.unpack(parts, old)
        lost = float((old.double() - weight.double()).square().nan_to_num(0.0, 0.0).sum())
        if lost:  # a weight that only became sparser has lost nothing
            self.tensors += 1
            self._lost += lost
            self._squared += float(weight.double().square().nan_to_num(0.0, 0.0).sum())
        return parts

    def figures(self) -> dict[str, float]:
        if not self.tensors:
            return {}
        error = (self._lost / self._squared) ** 0.5 if self._squared else 0.0
        return {"requantized_tensors": float(self.tensors), "requantization_error": error}
