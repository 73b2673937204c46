"""A model with only the experts of a task in memory: read just these from disk, and exchange the difference later.

    model, tokenizer = coterie.load(folder, pattern="store", task="math", keep=0.5)
    switch(model, "code")           # reads the experts that math did not have

The result is an ordinary transformers model with M experts in each layer, as `compress` with the same experts would
have written it. The routers' full rows stay in memory beside it (they are small); everything else of a dropped expert
is on disk. Where a checkpoint keeps a tensor per expert, or all experts of a layer in one tensor of the same layout as
in memory, just the selected experts' bytes are read; a family stored otherwise is read whole, layer by layer, and
`Pattern.whole` names the parameters.
"""

# T tokens, E experts of the checkpoint, M experts in memory

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from coterie.anatomy import MoELayer, check_keep, moe_layers, select, slice_names
from coterie.anatomy.architectures import COUNT_FIELDS
from coterie.anatomy.forms import form_of
from coterie.anatomy.layers import refuse_unsliceable
from coterie.compression.plan import Plan
from coterie.compression.planning import check_plan, plan_method
from coterie.compression.selector import Budget, counts_for
from coterie.errors import CheckpointError, ModelError, UsageError
from coterie.patterns.retrieval import Match, match, nearest, text_key
from coterie.patterns.store import PatternStore
from coterie.streaming.checkpoint import DTYPES, Checkpoint, PackedInfo, TensorInfo
from coterie.streaming.model import StreamedModel, all_finite, put_tensor
from coterie.text import Document, TokenData, check_ids, from_text

Order = Mapping[int, Sequence[int]]  # {decoder layer: experts, best first}
_GROUPS = ("num_group", "n_group", "topk_group")


@dataclass
class ExpertFiles:
    """Where each expert of one parameter lies: `parts[e]` fill rows [starts[s], starts[s+1]) of expert e.

    starts is None where one tensor on disk holds all experts and an expert is one contiguous piece of it.
    """

    parts: list[list[TensorInfo]]
    starts: tuple[int, ...] | None


@dataclass
class Pattern:
    """What a model with few experts knows about where it came from; `of(model)` finds it.

    checkpoint : reads experts only, so `checkpoint.bytes_read` counts them. store : None for a given order.
    task : what is loaded. keep : {layer: experts in memory, ascending; entry j is expert j of the model}.
    whole : parameters that had to be read whole. match : how the task was found, if by a query.
    """

    checkpoint: Checkpoint
    store: PatternStore | None
    task: str
    keep: dict[int, list[int]]
    files: dict[int, dict[str, ExpertFiles]]
    routers: dict[int, dict[str, tuple[Tensor, int]]]  # full tensors by path in the block, with their expert dimension
    source: StreamedModel
    whole: list[str] = field(default_factory=list)
    match: Match | None = None
    allow_nonfinite: bool = False


def of(model: nn.Module) -> Pattern:
    """The pattern of a model loaded with one. Raises UsageError for any other model."""
    pattern = getattr(model, "coterie_pattern", None)
    if not isinstance(pattern, Pattern):
        raise UsageError("this model was not loaded with a pattern", "coterie.load(folder, pattern=..., task=...)")
    return pattern


def load_pattern(
    folder: Path,
    pattern: str | Path | PatternStore | Plan | Order,
    tokenizer: Any,
    *,
    task: str | Sequence[str] | None = None,
    query: Document | None = None,
    keep: float | None = None,
    keep_experts: int | None = None,
    threshold: float | None = None,
    groups: bool = True,
    dtype: str = "auto",
    device: str = "cpu",
    experts: str | None = None,
    allow_nonfinite: bool = False,
) -> PreTrainedModel:
    """A transformers model with only the selected experts; see `coterie.load` for the parameters.

    tokenizer : for `query`. experts : transformers' experts implementation; its default if None.
    """
    loaded = _pattern_of(pattern)
    store = loaded if isinstance(loaded, PatternStore) else None
    source = StreamedModel(Checkpoint.open(folder), device=device, allow_nonfinite=allow_nonfinite)
    refuse_unsliceable(source.model)
    if any(form_of(layer).describe() for layer in source.moe.values()):
        raise ModelError(
            f"{folder.name} holds shared, factored or compressed experts: no pattern can choose among them",
            "Load patterns of the checkpoint it was made from.",
        )
    found: Match | None = None
    names = ""
    if store is None:
        if task is not None or query is not None:
            raise UsageError("an order of experts has no tasks to choose from", "Give a pattern store, or no task.")
    else:
        store.check(source)
        if (task is None) == (query is None):
            raise UsageError("say which pattern: a task, or a query to find it by", f"Tasks: {', '.join(store.tasks)}.")
        if query is not None:
            found = match(store, source, _query(query, tokenizer, source.model), threshold)
            task = found.task if found.task is not None else store.tasks
        chosen = _names(task)
        names = "+".join(chosen)
    streamed = StreamedModel(
        Checkpoint.open(folder),
        device=device,
        compute_dtype=_dtype(dtype, source),
        experts=experts or "eager",
        allow_nonfinite=allow_nonfinite,
    )
    layers = streamed.moe if groups else {i: _ungrouped(layer, streamed) for i, layer in streamed.moe.items()}
    keeps = (
        {i: store.keep(layers[i], chosen, n) for i, n in _counts(layers, keep, keep_experts).items()}
        if store is not None
        else _order_keeps(loaded, source, layers, keep, keep_experts)
    )
    files, whole = _expert_files(streamed)
    reader = _reader(source.checkpoint, files)
    state = Pattern(reader, store, names, keeps, files, {}, source, whole, found, allow_nonfinite)
    model = _assemble(streamed, layers, state)
    if experts is None:
        model.set_experts_implementation(model.get_correct_experts_implementation(None))  # what transformers prefers
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.coterie_pattern = state
    return model


def switch(
    model: PreTrainedModel,
    task: str | Sequence[str] | None = None,
    *,
    query: Document | None = None,
    tokenizer: Any = None,
    order: Order | None = None,
    threshold: float | None = None,
) -> Pattern:
    """Exchange the experts of a loaded model for those of another task, as many as before; reads only what is missing.

    Parameters
    ----------
    task : a name of the store, several for equal say. query : text whose nearest task is taken (with `tokenizer`); if
        none is within `threshold`, all tasks with equal say. order : {layer: experts} instead.

    Switching back gives the same model bit for bit. Raises UsageError before anything is changed. A file that cannot be
    read leaves every layer whole, but layers of both patterns; the same call again goes on. Peak memory: the experts of
    one layer beside the model.
    """
    state = of(model)
    layers = {layer.index: layer for layer in moe_layers(model)}
    full = {i: _as_full(layer, state) for i, layer in layers.items()}
    if sum(v is not None for v in (task, query, order)) != 1:
        raise UsageError("say what to switch to: a task, a query or an order")
    found: Match | None = None
    if order is not None:
        names, keeps = "", _order_keeps(order, state.source, full, None, len(next(iter(state.keep.values()))))
    else:
        if state.store is None:
            raise UsageError("this model was loaded with an order, without a store of tasks", "Switch with `order`.")
        if query is not None:
            found = match_resident(model, query, tokenizer, threshold)
            task = found.task if found.task is not None else state.store.tasks
        chosen = _names(task)
        names = "+".join(chosen)
        keeps = {i: state.store.keep(full[i], chosen, len(state.keep[i])) for i in layers}
    for index, layer in layers.items():
        _exchange(layer, state, keeps[index])
    state.task, state.match = names, found
    return state


def match_resident(model: PreTrainedModel, query: Document, tokenizer: Any, threshold: float | None = None) -> Match:
    """The task nearest to a query, asked of the model in memory with the first router's full rows; no expert runs."""
    state = of(model)
    if state.store is None:
        raise UsageError("this model was loaded with an order, without a store of tasks")
    data = _query(query, tokenizer, model)
    layer = next(layer for layer in moe_layers(model) if layer.index == state.store.key.layer)
    seen: list[Tensor] = []

    def router(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        logits = output[0] if isinstance(output, tuple) else output
        seen.append(logits.detach().reshape(-1, logits.shape[-1]))

    def door(module: nn.Module, args: tuple[Any, ...]) -> None:
        raise _Reached

    hooks = [layer.router.register_forward_hook(router), layer.experts.register_forward_pre_hook(door)]
    try:
        with _full_router(layer, state), torch.no_grad():
            model.base_model(input_ids=data.batches[0].ids_BL.to(model.device), use_cache=False)
    except _Reached:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return nearest(state.store, text_key(seen[0], state.store.key), sum(data.tokens.values()), threshold)


def _query(query: Document, tokenizer: Any, model: PreTrainedModel) -> TokenData:
    data = from_text(query, tokenizer, name="query")
    check_ids(data, int(model.get_input_embeddings().weight.shape[0]))
    return data


class _Reached(Exception):
    """The walk of a query has come to the door of the first experts."""


# -- what shall be loaded ---------------------------------------------------------------------------------------------


def _pattern_of(pattern: str | Path | PatternStore | Plan | Order) -> PatternStore | Plan | Order:
    if isinstance(pattern, (str, Path)):
        path = Path(pattern).expanduser()
        return Plan.load(path) if path.suffix == ".json" and path.is_file() else PatternStore.load(path)
    return pattern


def _names(task: str | Sequence[str] | None) -> list[str]:
    """`math`, `math+code` or a list of names."""
    assert task is not None
    return task.split("+") if isinstance(task, str) else list(task)


def _counts(layers: Mapping[int, MoELayer], keep: float | None, keep_experts: int | None) -> dict[int, int]:
    counts = counts_for(Budget(keep=keep, keep_experts=keep_experts), layers, 0, 0)
    _check_even(counts)
    return counts


def _check_even(counts: Mapping[int, int]) -> None:
    if len(set(counts.values())) > 1:
        raise UsageError(
            f"layers would keep different numbers of experts ({sorted(set(counts.values()))}), and a model has one",
            "Give a number with keep_experts, or an order of one length.",
        )


def _order_keeps(
    order: PatternStore | Plan | Order,
    source: StreamedModel,
    layers: Mapping[int, MoELayer],
    keep: float | None,
    keep_experts: int | None,
) -> dict[int, list[int]]:
    """Experts of a given order, or of the front of it where a budget asks for fewer. Raises UsageError, ModelError."""
    if isinstance(order, Plan):
        check_plan(order, source, source.checkpoint.digest())
        if plan_method(order).rebuilds:
            raise UsageError(
                f"the plan was made by {order.method}, which recombines experts: choosing among them is not enough",
                "Carry it out with `coterie compress --plan` and load the result.",
            )
        order = {layer.index: layer.keep for layer in order.layers}
    assert isinstance(order, Mapping)
    if sorted(order) != sorted(layers):
        raise UsageError(f"the order names layers {sorted(order)}; the model has experts in {sorted(layers)}")
    for index, experts in order.items():
        E = layers[index].num_experts
        wrong = [e for e in experts if type(e) is not int or not 0 <= e < E]
        if wrong or len(set(experts)) != len(experts):
            what = f"expert {wrong[0]!r}" if wrong else "an expert twice"
            raise UsageError(f"the order of layer {index} names {what}; the layer has experts 0 to {E - 1}")
    counts = {index: len(experts) for index, experts in order.items()}
    if keep is not None or keep_experts is not None:
        wanted = _counts(layers, keep, keep_experts)
        if short := [i for i in wanted if wanted[i] > counts[i]]:
            raise UsageError(
                f"the order of layer {short[0]} names {counts[short[0]]} experts, {wanted[short[0]]} are asked for"
            )
        counts = wanted
    _check_even(counts)
    keeps = {index: sorted(list(order[index])[: counts[index]]) for index in layers}
    for index, layer in layers.items():
        check_keep(layer, keeps[index])
    return keeps


# -- reading ----------------------------------------------------------------------------------------------------------


def _dtype(name: str, source: StreamedModel) -> str:
    """The dtype to hold the model in: as it is stored, unless one is named."""
    if name != "auto":
        return name.removeprefix("torch.")
    return str(source.own_dtype).removeprefix("torch.")


def expert_params(layer: MoELayer) -> list[str]:
    """Names inside the model of everything that has one entry per expert and is part of the experts module."""
    return [name for name in slice_names(layer) if name.startswith(f"{layer.experts_name}.")]


def _expert_files(streamed: StreamedModel) -> tuple[dict[int, dict[str, ExpertFiles]], list[str]]:
    """Where every expert lies, by layer and parameter; and the parameters for which it cannot be told."""
    tensors, mapping = streamed.checkpoint.tensors, streamed.mapping
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    files: dict[int, dict[str, ExpertFiles]] = {}
    whole = []
    for index, layer in streamed.moe.items():
        files[index] = {}
        for param in expert_params(layer):
            keys = streamed.keys_of([param])
            shape = tuple(streamed.model.get_parameter_or_buffer(param).shape)
            if param in streamed.fused:
                layout = streamed.fused[param]
                files[index][param] = ExpertFiles([[tensors[k] for k in part] for part in layout.keys], layout.starts)
            elif (
                len(keys) == 1
                and not isinstance(tensors[keys[0]], PackedInfo)
                and tensors[keys[0]].shape == shape
                and rename_source_key(keys[0], renamings, converters)[1] is None
            ):
                files[index][param] = ExpertFiles([[_piece(tensors[keys[0]], e)] for e in range(shape[0])], None)
            else:
                whole.append(param)
    return files, whole


def _piece(info: TensorInfo, entry: int) -> TensorInfo:
    """Entry `entry` of the first dimension of a tensor on disk, as a tensor of its own."""
    size = info.nbytes // info.shape[0]
    begin = info.begin + entry * size
    return replace(info, key=f"{info.key}[{entry}]", shape=info.shape[1:], begin=begin, end=begin + size)


def _reader(checkpoint: Checkpoint, files: Mapping[int, Mapping[str, ExpertFiles]]) -> Checkpoint:
    """The same checkpoint as a reader of single experts, which counts their bytes alone."""
    parts = [info for layer in files.values() for f in layer.values() for part in f.parts for info in part]
    return Checkpoint(checkpoint.folder, {}, {info.key: info for info in parts})


def _read_expert(state: Pattern, where: ExpertFiles, expert: int, out: Tensor) -> None:
    """Fill `out`, one expert's entry of a parameter, in whatever dtype and on whatever device it is."""
    for s, info in enumerate(where.parts[expert]):
        target = out if where.starts is None else out[where.starts[s] : where.starts[s + 1]]
        stored = DTYPES[info.dtype]
        direct = target.dtype == stored and target.device.type == "cpu" and target.is_contiguous()
        tensor = state.checkpoint.read(info.key, out=target if direct else None)
        if not state.allow_nonfinite and tensor.is_floating_point() and tensor.numel() and not all_finite(tensor):
            raise CheckpointError(f"{info.key} holds NaN or Inf weights", "The checkpoint is damaged.")
        if not direct:
            target.copy_(tensor)


def _read_whole(state: Pattern, layer: MoELayer, param: str, keep: Sequence[int]) -> Tensor:
    """Experts `keep` of a parameter that is stored in a way of its own; all of it passes through memory."""
    source = state.source
    source.load_keys(source.keys_of([param]))
    value = source.model.get_parameter_or_buffer(param).detach()
    result: Tensor = value.index_select(0, torch.tensor(list(keep), device=value.device))
    source.free_layer(layer.index)
    return result


def _assemble(streamed: StreamedModel, layers: Mapping[int, MoELayer], state: Pattern) -> PreTrainedModel:
    """Load everything but the experts, slice, and fill in the selected experts."""
    model = streamed.model
    experts = {param for layer in streamed.moe.values() for param in expert_params(layer)}
    streamed.load_keys([k for k, param in streamed.params.items() if param is not None and param not in experts])
    streamed.materialise_buffers(model)
    for name, tensor in streamed.build().state_dict().items():  # some modules ask for a dtype of their own
        if tensor.dtype != streamed.compute_dtype and tensor.is_floating_point() and name not in experts:
            put_tensor(model, name, model.get_parameter_or_buffer(name).detach().to(tensor.dtype))
    for index, layer in layers.items():
        E, dtype = layer.num_experts, streamed.compute_dtype
        state.routers[index] = {
            path: (model.get_parameter_or_buffer(path).detach(), dim)
            for path, dim in slice_names(layer).items()
            if path not in experts
        }
        select(layer, state.keep[index])
        for param in expert_params(layer):
            template = model.get_parameter_or_buffer(param)
            value = torch.empty(template.shape, dtype=dtype, device=streamed.device)
            _fill(value, state, layer, param, state.keep[index], {})
            put_tensor(model, param, value)
        _recount(model, E, len(state.keep[index]))
    model.tie_weights()
    missing = [name for name, p in [*model.named_parameters(), *model.named_buffers()] if p.is_meta]
    if missing:
        raise ModelError(f"{type(model).__name__} keeps {missing[0]} in no place that can be loaded alone")
    return model.requires_grad_(True)  # as from_pretrained leaves it


def _fill(
    value: Tensor, state: Pattern, layer: MoELayer, param: str, keep: Sequence[int], there: Mapping[int, Tensor]
) -> None:
    """Write the experts `keep` of a parameter into `value`: those in memory from there, the others from disk."""
    if param in state.whole:
        value.copy_(_read_whole(state, layer, param, keep))
        return
    for position, expert in enumerate(keep):
        if expert in there:
            value[position].copy_(there[expert])
        else:
            _read_expert(state, state.files[layer.index][param], expert, value[position])


@torch.no_grad()
def _exchange(layer: MoELayer, state: Pattern, keep: list[int]) -> None:
    """Give a layer the experts `keep` instead of those it has, and its router their rows; all of it or nothing."""
    before = state.keep[layer.index]
    if keep == before:
        return
    values = {}
    for param in expert_params(layer):
        old = _tensor(layer, param)
        values[param] = torch.empty_like(old)
        _fill(values[param], state, layer, param, keep, {e: old[j] for j, e in enumerate(before)})
    for path, (full, dim) in state.routers[layer.index].items():
        values[path] = full.index_select(dim, torch.tensor(keep, device=full.device))
    for path, value in values.items():
        _tensor(layer, path).copy_(value)  # parameter objects stay: hooks and compiled code may hold them
    state.keep[layer.index] = keep


# -- the model in memory ----------------------------------------------------------------------------------------------


def _tensor(layer: MoELayer, path: str) -> Tensor:
    owner, name = _owner(layer, path)
    value = getattr(owner, name)
    assert isinstance(value, Tensor)
    return value


def _owner(layer: MoELayer, path: str) -> tuple[nn.Module, str]:
    owner_path, _, name = path[len(layer.name) + 1 :].rpartition(".")
    return layer.block.get_submodule(owner_path), name


def _recount(model: PreTrainedModel, before: int, after: int) -> None:
    """The number of experts in the config, under all its names, and on the model itself."""
    text = model.config.get_text_config(decoder=True)
    for name in COUNT_FIELDS:
        for owner in (text, model):
            if getattr(owner, name, None) == before:
                setattr(owner, name, after)


def _ungrouped(layer: MoELayer, streamed: StreamedModel) -> MoELayer:
    """The layer with group-limited routing switched off, in the module and in the config: one group of all experts."""
    text = streamed.model.config.get_text_config(decoder=True)
    for owner in (layer.router, layer.block, text):
        for name in _GROUPS:
            if isinstance(getattr(owner, name, None), int):
                setattr(owner, name, 1)
    return replace(layer, groups=1, groups_used=1)


def _as_full(layer: MoELayer, state: Pattern) -> MoELayer:
    """A loaded layer as a layer of the checkpoint, for choosing experts: same router, E experts."""
    full = state.source.moe[layer.index]
    return replace(full, groups=layer.groups, groups_used=layer.groups_used)


@contextmanager
def _full_router(layer: MoELayer, state: Pattern) -> Iterator[None]:
    """Let the router of a loaded layer see all experts, while nothing behind it runs."""
    M, E = len(state.keep[layer.index]), state.source.moe[layer.index].num_experts
    saved: list[tuple[dict[str, Any], str, Any]] = []
    counts = [
        (module, name)
        for module in (layer.block, *layer.router.modules())
        for name in (*COUNT_FIELDS, "out_features")
        if getattr(module, name, None) == M
    ]
    try:
        for path, (full, _) in state.routers[layer.index].items():
            owner, name = _owner(layer, path)
            kind = owner._parameters if name in owner._parameters else owner._buffers
            saved.append((kind, name, kind[name]))
            kind[name] = nn.Parameter(full, requires_grad=False) if kind is owner._parameters else full  # type: ignore[assignment]
        for module, name in counts:
            setattr(module, name, E)
        yield
    finally:
        for kind, name, value in saved:
            kind[name] = value
        for module, name in counts:
            setattr(module, name, M)
