"""A checkpoint written anew in which some tensors of some layers are replaced, and everything else is copied.

The layout is computed on meta tensors before anything is read: which tensors go, which take their place, what they
will be called in the files and how large they will be. Tensors nobody replaces are copied byte for byte as they are
read, or from file to file if they are not. It does not know why a tensor changes, and nothing of configs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

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
                specs.append(Spec(key, info.meta().dtype, info.shape))
        elif key in made.get(owner[key], {}):
            meta = made[owner[key]][key]
            specs.append(Spec(key, meta.dtype, tuple(meta.shape)))
            done.add(key)
    for tensors in made.values():  # names the source does not have: another layout on disk
        specs += [Spec(key, t.dtype, tuple(t.shape)) for key, t in tensors.items() if key not in done]
    return specs, {key: index for index, tensors in made.items() for key in tensors}


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
        self._through = set(self.through)
        self.notes: list[str] = []
        streamed.on_read = self._pass
        streamed.retain = names
        self.writer = ShardWriter(folder, self.specs, shard_bytes)

    def _pass(self, key: str, tensor: Tensor) -> None:
        if key in self._through:
            self.writer.write(key, tensor)

    def write(self, state: Mapping[str, Tensor], keep: Sequence[int] | None = None) -> None:
        """Write tensors of one layer, by model name; of fused ones only the experts `keep`, if given."""
        others = {}
        for name, tensor in state.items():
            if name in self.streamed.fused:
                experts = range(tensor.shape[0]) if keep is None else keep
                for key, view in self.streamed.fused[name].tensors(tensor, experts):
                    self.writer.write(key, view)
            else:
                others[name] = tensor
        if others:
            for key, tensor in self.streamed.checkpoint_tensors(others).items():
                self.writer.write(key, tensor)

    def mark_written(self, index: int) -> None:
        """Layer `index` was written by an earlier run."""
        fresh = [key for key, layer in self.fresh_of.items() if layer == index]
        self.writer.mark([*fresh, *(k for k in self.streamed.layer_keys[index] if k in self._through)])

    def copy_rest(self, keys: Iterable[str]) -> None:
        """Copy untouched tensors that no sweep has read, one at a time, checked like all others."""
        for key in keys:
            if key in self._through and not self.writer.has(key):
                self.streamed.pass_on(key)
