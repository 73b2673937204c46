"""Carry out a plan on a streamed model: edit a layer while it is in memory, write it, forget it.

Tensors the plan does not touch are copied byte for byte; touched ones are written in the dtype they were stored in.
How files are laid out and written is the business of `rewrite`.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coterie.anatomy import MoELayer, select, slice_names
from coterie.anatomy.counts import with_expert_counts
from coterie.anatomy.forms import Form, empty_factors, form_of, put_back_dense
from coterie.anatomy.layers import refuse_unsliceable
from coterie.anatomy.slicing import cut_experts
from coterie.anatomy.uneven import with_forms
from coterie.compression.methods import Method
from coterie.compression.plan import LayerPlan, Plan
from coterie.compression.rewrite import Rewrite
from coterie.compression.sizes import spoken_experts
from coterie.experts.mapped import redirect
from coterie.profiling.profile import LayerProfile
from coterie.streaming.model import StreamedModel
from coterie.streaming.writer import copy_small_files, disk_error, write_json


class Output(Rewrite):
    """The checkpoint that is being written, with other experts in its layers.

    Parameters
    ----------
    streamed : StreamedModel
        Source; still whole (no layer edited yet).
    folder : Path
        Where files are written.
    counts : {layer: experts it will keep}
    method : Method
        Its `rebuild`, `router_rows` and `factor` may change weights even where every expert stays.
    shard_bytes : int

    Equal counts make a plain checkpoint; with different ones the config says what each layer has (see
    `anatomy.uneven`), and so it does of experts that share a router's outputs or are stored as factors.
    """

    def __init__(
        self, streamed: StreamedModel, folder: Path, counts: Mapping[int, int], method: Method, shard_bytes: int
    ) -> None:
        self.counts, self.method = dict(counts), method
        self.before = {index: layer.num_experts for index, layer in streamed.moe.items()}
        self.routers = {index: layer.router_size for index, layer in streamed.moe.items()}
        self.forms = {index: form_of(layer) for index, layer in streamed.moe.items()}
        self.ranks = {index: method.ranks(layer) for index, layer in streamed.moe.items()}
        self.reforms = {index: method.reform(layer) for index, layer in streamed.moe.items()}
        self.added = {index: bool(method.added(layer)) for index, layer in streamed.moe.items()}
        self.removed = sum(self.before.values()) - sum(counts.values())
        if self.removed:
            refuse_unsliceable(streamed.model)
        self.rows: dict[int, dict[str, int]] = {}  # of sparse parts that were not there before
        self.touched, self.fresh = self._replaced(streamed)
        super().__init__(streamed, folder, self.touched, self.fresh, shard_bytes, self._orphan(streamed))
        if any(self._orphan(streamed)(key) for key in streamed.checkpoint.tensors):
            self.notes.append(
                "extra prediction layers (multi-token prediction) were left out: their experts do not fit"
            )

    @property
    def special(self) -> bool:
        """Are experts of the output shared, factored or stood in for?"""
        own = self.method.redirects and self.removed > 0
        own = own or any(self.ranks.values()) or any(self.reforms.values())
        return own or any(form.describe() for form in self.forms.values())

    def _replaced(self, streamed: StreamedModel) -> tuple[dict[int, set[str]], dict[int, dict[str, Tensor]]]:
        """Tensors that go, and what takes their place, of every layer."""
        return replaced(streamed, self.counts, self.method)

    def _orphan(self, streamed: StreamedModel) -> Callable[[str], bool]:
        """Tensors of extra prediction layers that the model ignores: with other experts they would no longer fit."""

        def orphan(key: str) -> bool:
            if streamed.params[key] is not None or not self.removed:
                return False
            found = re.search(r"\.layers\.(\d+)\.", key)
            return found is not None and int(found[1]) >= len(streamed.layers)

        return orphan

    def edit(self, plan: LayerPlan, *, in_memory: bool, seen: LayerProfile | None = None) -> dict[str, float]:
        """Carry out `plan` on its layer, which is in memory, and write what changed. Returns the method's figures.

        With `in_memory` the layer itself also becomes what it will be, so that it can run as it will; without, it is
        only written, from where it lies. seen : what the method looked at once more (`Method.looks_again`).
        """
        layer = self.streamed.moe[plan.index]
        factors = self.method.factor(layer.bank, plan, seen)
        figures = self.method.rebuild(layer.bank, plan, seen) if self.method.rebuilds else {}
        stored = {name: self.streamed.retained.pop(name) for name in self.touched[plan.index]}
        rows = router_rows(self.method, layer, stored, plan)
        state: dict[str, Tensor] = {}
        dims = slice_names(layer)
        keep = torch.tensor(plan.keep)
        for name in self.touched[plan.index]:
            if name in rows:
                state[name] = rows[name]
            elif factors is not None and is_matrix(layer, name):
                continue
            elif name in self.streamed.fused:
                state[name] = stored[name]
            else:
                state[name] = stored[name].index_select(dims[name], keep.to(stored[name].device))
        if factors is not None:
            state |= {f"{layer.experts_name}.{name}": value for name, value in factors.items()}
        state |= {f"{layer.experts_name}.{name}": value for name, value in self.method.added(layer).items()}
        as_read = {name for name in state if name.startswith(f"{layer.experts_name}.") and not self.method.rebuilds}
        figures = {**figures, **self.write(state, plan.keep, as_read=as_read)}
        if in_memory:
            self._become(layer, plan, rows, factors)
        return figures

    def _become(
        self, layer: MoELayer, plan: LayerPlan, rows: Mapping[str, Tensor], factors: Mapping[str, Tensor] | None
    ) -> None:
        """Let the layer in memory be what was written of it."""
        if factors is not None:
            put_back_dense(layer.bank, plan.keep, factors)
        target = self.method.expert_map(plan)
        if target is not None:
            cut_experts(layer, plan.keep)
            redirect(layer.experts, target)
            return
        select(layer, plan.keep)
        for name, value in rows.items():
            self.streamed.model.get_parameter_or_buffer(name).data.copy_(value)

    def finish(self, plan: Plan, record: dict[str, Any]) -> list[str]:
        """Write what is not weights: config, tokenizer, plan, record, model card. Returns the names of all files."""
        source, raw = self.streamed.checkpoint.folder, self.streamed.checkpoint.raw_config
        version = importlib.metadata.version("coterie")
        config = self._config(plan, raw, version)
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

    def _config(self, plan: Plan, raw: dict[str, Any], version: str) -> dict[str, Any]:
        """The config of what was written: counts where routers were cut, forms where experts are special."""
        maps = {layer.index: self.method.expert_map(layer) for layer in plan.layers}
        whole = {i for i, n in self.before.items() if maps[i] is not None or self.routers[i] != n}
        routers = {i: self.routers[i] if i in whole else n for i, n in self.counts.items()}
        config = with_expert_counts(raw, self.streamed.config, max(self.routers.values()), routers, version)
        forms = {}
        for index, form in self.forms.items():
            ranks, rows = self.ranks[index] or form.ranks, self.rows.get(index) or form.rows
            changed = {"map": maps[index] or form.map, "ranks": ranks, "rows": rows}
            forms[index] = Form.model_validate({**form.describe(), **changed, **self.reforms[index]})
        return with_forms(config, forms, version)

    def _write_text(self, name: str, text: str) -> None:
        try:
            (self.folder / name).write_text(text, encoding="utf-8")
        except OSError as error:
            raise disk_error(error, self.folder) from error


def is_matrix(layer: MoELayer, name: str) -> bool:
    """Is this one of the fused matrices of a layer's experts, which factors take the place of?"""
    return name in {f"{layer.experts_name}.{local}" for local in ("gate_up_proj", "up_proj", "down_proj")}


def replaced(
    streamed: StreamedModel, counts: Mapping[int, int], method: Method
) -> tuple[dict[int, set[str]], dict[int, dict[str, Tensor]]]:
    """Tensors that go, and meta tensors of what takes their place, where `method` leaves layers `counts` experts."""
    gone: dict[int, set[str]] = {}
    fresh: dict[int, dict[str, Tensor]] = {}
    for index, layer in streamed.moe.items():
        ranks, fewer = method.ranks(layer), counts[index] < layer.num_experts
        gone[index], fresh[index] = set(), {}
        for name, dim in slice_names(layer).items():
            expert = name.startswith(f"{layer.experts_name}.")
            factored = ranks is not None and is_matrix(layer, name)
            if fewer:
                changes = expert or not method.redirects
            else:
                changes = (method.rebuilds or factored) if expert else method.reroutes
            if not changes:
                continue
            gone[index].add(name)
            if ranks is None or not is_matrix(layer, name):
                meta = streamed.model.get_parameter_or_buffer(name).detach()
                shape = list(meta.shape)
                shape[dim] = counts[index]
                fresh[index][name] = torch.empty(shape, dtype=meta.dtype, device="meta")
        if ranks is not None:
            fresh[index] |= empty_factors(layer, counts[index], ranks)
        added = method.added(layer).items()
        fresh[index] |= {f"{layer.experts_name}.{name}": value.to("meta") for name, value in added}
    return gone, fresh


def router_rows(method: Method, layer: MoELayer, stored: Mapping[str, Tensor], plan: LayerPlan) -> dict[str, Tensor]:
    """The method's new router tensors by model name; {} if it makes none.

    stored : the layer's tensors with one entry per expert, by model name, in the stored dtype.
    """
    if not method.reroutes or method.redirects:
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


def loads_with(after: Mapping[str, int], forms: bool = False) -> str:
    """What a reader of the result needs. forms : its experts are shared, factored or stood in for."""
    if forms:
        return "Its experts have a special form: loads with transformers after `import coterie` (pip install coterie)."
    if after["experts_total"] == after["experts"] * after["layers"]:
        return "Loads with plain transformers."
    return "Layers differ in size: loads with transformers after `import coterie` (pip install coterie)."


def spoken_sparsity(sparsity: Mapping[str, Any]) -> str:
    """How much of what is zero, from a record's `sparsity`."""
    text = f"{sparsity['measured']:.1%} of {sparsity['weights']:,} weights in decoder layers"
    if sparsity["weights_removed_before"]:
        text += f"; {sparsity['measured_total']:.1%} with the experts removed before"
    return text + "; stored dense, zeros included"


def slimmed_rows(record: Mapping[str, Any]) -> list[tuple[str, int, int]]:
    """(what, before, after) of everything that became narrower, from a record's `slimming`."""
    told = record.get("slimming", {})
    rows = (("neurons per expert", "of", "neurons"), ("key and value heads", "of_kv_heads", "kv_heads"))
    return [(what, told[old], told[new]) for what, old, new in rows if old in told]


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
        *(f"- {what}: {old} -> {new}" for what, old, new in slimmed_rows(record)),
        "",
        loads_with(after, record.get("forms", False))
        + " `coterie.json` holds the recipe, digests and versions; `plan.json` which experts stayed.",
        "",
    ]
    return "\n".join(lines)
