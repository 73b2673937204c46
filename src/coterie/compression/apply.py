"""Carry out a plan on a streamed model: edit a layer while it is in memory, write it, forget it.

The output's layout is computed on meta tensors before anything is read: which tensors change, and what they will be
called and how large they will be. Tensors the plan does not touch are copied byte for byte as they are read, or from
file to file if they are not; touched ones are written in the dtype they were stored in.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coterie.anatomy import MoELayer, select, slice_names
from coterie.anatomy.counts import with_expert_counts
from coterie.anatomy.layers import refuse_unsliceable
from coterie.compression.methods import Method
from coterie.compression.plan import LayerPlan, Plan
from coterie.compression.sizes import spoken_experts
from coterie.streaming.model import StreamedModel
from coterie.streaming.writer import ShardWriter, Spec, copy_small_files, disk_error, write_json


class Output:
    """The checkpoint that is being written.

    Parameters
    ----------
    streamed : StreamedModel
        Source; still whole (no layer edited yet).
    folder : Path
        Where files are written.
    counts : {layer: experts it will keep}
    method : Method
        Its `rebuild` and `router_rows` may change weights even where every expert stays.
    shard_bytes : int

    Equal counts make a plain checkpoint; with different ones the config says what each layer has (see
    `anatomy.uneven`).
    """

    def __init__(
        self, streamed: StreamedModel, folder: Path, counts: Mapping[int, int], method: Method, shard_bytes: int
    ) -> None:
        self.streamed, self.folder, self.method = streamed, folder, method
        self.counts = dict(counts)
        self.before = {index: layer.num_experts for index, layer in streamed.moe.items()}
        self.removed = sum(self.before.values()) - sum(counts.values())
        if self.removed:
            refuse_unsliceable(streamed.model)
        self.sliced = {index: slice_names(layer) for index, layer in streamed.moe.items()}
        self.touched = self._touched()
        self.notes: list[str] = []
        self._replaced = {index: set(streamed.keys_of(names)) for index, names in self.touched.items()}
        gone = set().union(*self._replaced.values())
        self.through = [k for k in streamed.checkpoint.tensors if k not in gone and not self._orphan(k)]
        self._through = set(self.through)
        streamed.on_read = self._pass
        streamed.retain = {name for names in self.touched.values() for name in names}
        self.writer = ShardWriter(folder, self._specs(counts), shard_bytes)

    def _touched(self) -> dict[int, dict[str, int | None]]:
        """{layer: {tensor: dimension with one entry per expert, None where it keeps its shape}} of what changes."""
        return {
            index: dict(names) if self.counts[index] < self.before[index] else dict(self._rebuilt(index))
            for index, names in self.sliced.items()
        }

    def _rebuilt(self, index: int) -> dict[str, int]:
        """What a method that removes no expert touches: the experts, the router's rows, or neither."""
        prefix = f"{self.streamed.moe[index].experts_name}."
        method = self.method
        return {
            name: dim
            for name, dim in self.sliced[index].items()
            if (method.rebuilds if name.startswith(prefix) else method.reroutes)
        }

    def _orphan(self, key: str) -> bool:
        """Tensors of extra prediction layers that the model ignores: with other experts they would no longer fit."""
        if self.streamed.params[key] is not None or not self.removed:
            return False
        found = re.search(r"\.layers\.(\d+)\.", key)
        extra = found is not None and int(found[1]) >= len(self.streamed.layers)
        if extra and not self.notes:
            self.notes.append(
                "extra prediction layers (multi-token prediction) were left out: their experts do not fit"
            )
        return extra

    def _specs(self, counts: Mapping[int, int]) -> list[Spec]:
        """Everything that will be written, in the order of the source."""
        streamed = self.streamed
        fresh: dict[int, dict[str, Tensor]] = {}
        for index, names in self.touched.items():
            state = {}
            for name, dim in names.items():
                if name in streamed.fused:
                    continue
                meta = streamed.model.get_parameter_or_buffer(name).detach()
                shape = list(meta.shape)
                if dim is not None:
                    shape[dim] = counts[index]
                state[name] = torch.empty(shape, dtype=meta.dtype, device="meta")
            fresh[index] = streamed.checkpoint_tensors(state) if state else {}
            for name in names:
                if name in streamed.fused:
                    metas = streamed.model.get_parameter_or_buffer(name).detach()
                    fresh[index] |= dict(streamed.fused[name].tensors(metas, range(counts[index])))
        self._fresh_of = {key: index for index, tensors in fresh.items() for key in tensors}
        owner = {key: index for index, keys in self._replaced.items() for key in keys}
        specs: list[Spec] = []
        done: set[str] = set()
        for key, info in streamed.checkpoint.tensors.items():
            layer = owner.get(key)
            if key in self._through:
                specs.append(Spec(key, info.meta().dtype, info.shape))
            elif layer is not None and key in fresh[layer]:
                specs.append(Spec(key, fresh[layer][key].dtype, tuple(fresh[layer][key].shape)))
                done.add(key)
        for tensors in fresh.values():  # names the source does not have: another layout on disk
            specs += [Spec(k, t.dtype, tuple(t.shape)) for k, t in tensors.items() if k not in done]
        return specs

    def _pass(self, key: str, tensor: Tensor) -> None:
        if key in self._through:
            self.writer.write(key, tensor)

    def edit(self, plan: LayerPlan, *, in_memory: bool) -> dict[str, float]:
        """Carry out `plan` on its layer, which is in memory, and write what changed. Returns the method's figures.

        With `in_memory` the layer itself also loses its experts, so that it can run as it will be; without, it is only
        written, from where it lies.
        """
        layer = self.streamed.moe[plan.index]
        figures = self.method.rebuild(layer.bank, plan) if self.method.rebuilds else {}
        stored = {name: self.streamed.retained.pop(name) for name in self.touched[plan.index]}
        rows = router_rows(self.method, layer, stored, plan)
        state: dict[str, Tensor] = {}
        for name, dim in self.touched[plan.index].items():
            if name in rows:
                state[name] = rows[name]
            elif dim is None or name in self.streamed.fused:
                state[name] = stored[name]
            else:
                state[name] = stored[name].index_select(dim, torch.tensor(plan.keep, device=stored[name].device))
        self.write(state, plan.keep)
        if in_memory:
            select(layer, plan.keep)
            for name, value in rows.items():
                tensor = self.streamed.model.get_parameter_or_buffer(name)
                tensor.data.copy_(value)
        return figures

    def write(self, state: Mapping[str, Tensor], keep: Sequence[int]) -> None:
        """Write tensors of one layer, by model name; of fused ones the experts `keep`."""
        others = {}
        for name, tensor in state.items():
            if name in self.streamed.fused:
                for key, view in self.streamed.fused[name].tensors(tensor, keep):
                    self.writer.write(key, view)
            else:
                others[name] = tensor
        if others:
            for key, tensor in self.streamed.checkpoint_tensors(others).items():
                self.writer.write(key, tensor)

    def mark_written(self, index: int) -> None:
        """Layer `index` was written by an earlier run."""
        fresh = [key for key, layer in self._fresh_of.items() if layer == index]
        self.writer.mark([*fresh, *(k for k in self.streamed.layer_keys[index] if k in self._through)])

    def copy_rest(self, keys: Iterable[str]) -> None:
        """Copy untouched tensors that no sweep has read, one at a time, checked like all others."""
        for key in keys:
            if key in self._through and not self.writer.has(key):
                self.streamed.pass_on(key)

    def finish(self, plan: Plan, record: dict[str, Any]) -> list[str]:
        """Write what is not weights: config, tokenizer, plan, record, model card. Returns the names of all files."""
        source, raw = self.streamed.checkpoint.folder, self.streamed.checkpoint.raw_config
        version = importlib.metadata.version("coterie")
        config = with_expert_counts(raw, self.streamed.config, max(self.before.values()), self.counts, version)
        if self.notes:
            for name in ("num_nextn_predict_layers", "num_mtp_layers"):
                if name in config:
                    config[name] = 0
        names = list(self.writer.files)
        write_json(self.folder / "config.json", config)
        write_json(self.folder / "coterie.json", record)
        plan.save(self.folder / "plan.json")
        card = source / "README.md"
        before = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
        self._write_text("README.md", before + model_card(record))
        names += ["config.json", "coterie.json", "plan.json", "README.md"]
        return names + copy_small_files(source, self.folder)

    def _write_text(self, name: str, text: str) -> None:
        try:
            (self.folder / name).write_text(text, encoding="utf-8")
        except OSError as error:
            raise disk_error(error, self.folder) from error


def router_rows(method: Method, layer: MoELayer, stored: Mapping[str, Tensor], plan: LayerPlan) -> dict[str, Tensor]:
    """The method's new router tensors by model name; {} if it makes none.

    stored : the layer's tensors with one entry per expert, by model name, in the stored dtype.
    """
    if not method.reroutes:
        return {}
    dims = {name: dim for name, dim in slice_names(layer).items() if not name.startswith(f"{layer.experts_name}.")}
    below = {name[len(layer.name) + 1 :]: stored[name].movedim(dim, 0) for name, dim in dims.items()}
    made = method.router_rows(below, plan)
    found = {}
    for name, dim in dims.items():
        local = name[len(layer.name) + 1 :]
        if local in made:
            new, old = made[local], below[local]
            if new.shape != (len(plan.keep), *old.shape[1:]) or new.dtype != old.dtype:
                raise ValueError(f"{name}: new router tensor of {tuple(new.shape)} {new.dtype}, was {tuple(old.shape)}")
            found[name] = new.movedim(0, dim)
    return found


def loads_with(after: Mapping[str, int]) -> str:
    """What a reader of the result needs."""
    if after["experts_total"] == after["experts"] * after["layers"]:
        return "Loads with plain transformers."
    return "Layers differ in size: loads with transformers after `import coterie` (pip install coterie)."


def spoken_sparsity(sparsity: Mapping[str, Any]) -> str:
    """How much of what is zero, from a record's `sparsity`."""
    text = f"{sparsity['measured']:.1%} of {sparsity['weights']:,} weights in decoder layers"
    if sparsity["weights_removed_before"]:
        text += f"; {sparsity['measured_total']:.1%} with the experts removed before"
    return text + "; stored dense, zeros included"


def model_card(record: dict[str, Any]) -> str:
    """The section of the model card that says what was done."""
    recipe = record["recipe"]
    before, after = record["before"], record["after"]
    lines = [
        "",
        "## Compressed with Coterie",
        "",
        f"- method: `{recipe['method']}` {recipe['parameters'] or ''}".rstrip(),
        f"- experts per layer: {spoken_experts(before)} -> {spoken_experts(after)}",
        f"- parameters: {before['parameters']:,} -> {after['parameters']:,}"
        f" (active per token: {before['active_parameters']:,} -> {after['active_parameters']:,})",
        f"- weights: {before['bytes'] / 1e9:.3f} GB -> {after['bytes'] / 1e9:.3f} GB",
        *([f"- zeroed: {spoken_sparsity(record['sparsity'])}"] if "sparsity" in record else []),
        "",
        loads_with(after) + " `coterie.json` holds the recipe, digests and versions; `plan.json` which experts stayed.",
        "",
    ]
    return "\n".join(lines)
