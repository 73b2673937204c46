"""Straight ways between a checkpoint that keeps one tensor per expert and the fused 3-D tensor in memory.

Most families store experts one by one and fuse them when loading: stacked along a new first dimension, gate and up
joined along the second. transformers does that with two more copies of a layer. Where its conversion is exactly
this stacking and joining, each expert can be read into its place and written from it without any copy; everything
else goes through transformers' own conversion. Which case holds is read from the conversion, not from a model name.
"""

# E experts, S parts joined along dimension 1 (gate and up, or one alone)

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
)

from coterie.streaming.checkpoint import Checkpoint


@dataclass(frozen=True)
class FusedLayout:
    """Where the experts of one fused parameter lie in a checkpoint.

    keys : [E][S] checkpoint keys; part s of expert e is rows [starts[s], starts[s+1]) of fused[e].
    """

    keys: tuple[tuple[str, ...], ...]
    starts: tuple[int, ...]

    def read(self, checkpoint: Checkpoint, fused: Tensor) -> None:
        """Fill `fused` [E, rows, columns], contiguous, from the checkpoint."""
        for e, parts in enumerate(self.keys):
            for s, key in enumerate(parts):
                checkpoint.read(key, out=fused[e, self.starts[s] : self.starts[s + 1]])

    def tensors(self, fused: Tensor, keep: Sequence[int]) -> Iterator[tuple[str, Tensor]]:
        """(key, view) for every tensor of a checkpoint that holds just the experts `keep`, renumbered.

        `fused` may have other rows (and columns) than were read: parts keep their share of the rows.
        """
        starts = [start * fused.shape[1] // self.starts[-1] for start in self.starts]
        for position, expert in enumerate(keep):
            for s, key in enumerate(self.keys[position]):
                yield key, fused[expert, starts[s] : starts[s + 1]]

    def sources(self, keep: Sequence[int]) -> Iterator[str]:
        """Where each of `tensors` was read from."""
        return (key for expert in keep for key in self.keys[expert])


def fused_layouts(
    checkpoint: Checkpoint,
    params: Mapping[str, str | None],
    shapes: Mapping[str, torch.Size],
    mapping: Sequence[WeightTransform],
) -> dict[str, FusedLayout]:
    """{parameter: FusedLayout} for every fused parameter whose conversion is plain stacking and joining."""
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    plain = {p: c for c in converters if _stacks(c) for p in c.source_patterns}
    grouped: dict[str, dict[str, list[str]]] = {}
    for key in sorted(params, key=dot_natural_key):
        param = params[key]
        if param is not None and len(shapes[param]) == 3 and plain:
            _, pattern = rename_source_key(key, renamings, converters)
            if pattern in plain:
                grouped.setdefault(param, {}).setdefault(pattern, []).append(key)
    layouts = {}
    for param, parts in grouped.items():
        order = plain[next(iter(parts))].source_patterns
        columns = [parts[pattern] for pattern in order if pattern in parts]
        E, rows, width = shapes[param]
        heights = [checkpoint.tensors[column[0]].shape[0] for column in columns]
        fits = all(
            len(column) == E and all(checkpoint.tensors[key].shape == (height, width) for key in column)
            for column, height in zip(columns, heights, strict=True)
        )
        one_dtype = len({checkpoint.tensors[key].dtype for column in columns for key in column}) == 1
        if fits and one_dtype and sum(heights) == rows:
            starts = tuple(sum(heights[:s]) for s in range(len(heights) + 1))
            layouts[param] = FusedLayout(tuple(zip(*columns, strict=True)), starts)
    return layouts


def _stacks(converter: WeightConverter) -> bool:
    """Is this conversion one stacking of per-expert tensors, and at most one joining along dimension 1 after it?"""
    operations = list(converter.operations)
    if len(converter.target_patterns) != 1 or not operations or type(operations[0]) is not MergeModulelist:
        return False
    if operations[0].dim != 0 or (len(operations) == 1) != (len(converter.source_patterns) == 1):
        return False
    joins = operations[1:]
    return not joins or (
        len(joins) == 1 and type(joins[0]) is Concatenate and joins[0].dim == 1 and not joins[0].num_shards_attribute
    )
