"""Make a checkpoint whose layers differ uniform again, for software that knows one expert count for all layers.

Smaller layers get dead experts: zero weights, and router entries with which they are never picked.

- Routers with a bias (added to the logit, as in GPT-OSS, or to the selection score, as in DeepSeek-V3): the bias of a
  dead expert is so low that it cannot win. Exact, unless the scores themselves depend on all experts (a softmax
  before the bias, as in Ernie 4.5): whether they do is tried out on the router, not looked up.
- Other routers score an expert by w . x, and no w is negative for every x. A dead expert's w points away from the mean
  router input; that is checked on text, token by token, and the share of tokens on which a dead expert could still be
  picked is reported. Picked or not, it adds nothing, but it can take the place of a live one.

In both cases the padding costs the bytes that pruning had saved in the smaller layers.
"""

# T tokens, H hidden, E experts

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coterie.anatomy import MoELayer, narrowed, slice_names
from coterie.anatomy.counts import with_expert_counts
from coterie.anatomy.forms import form_of
from coterie.errors import ModelError, UsageError
from coterie.experts.forward import rerouted
from coterie.profiling.observe import LayerObservation
from coterie.profiling.observers import LayerShape, Observer, Routing
from coterie.streaming.lockstep import Progress, States, sweep
from coterie.streaming.model import StreamedModel
from coterie.streaming.writer import DEFAULT_SHARD_BYTES, ShardWriter, Spec, Workspace, copy_small_files, write_json
from coterie.text import TokenData

NEVER = -1e30  # a bias no score reaches; finite in bfloat16 and float32, where -inf would make NaN of 0 * inf
LOGIT = -1e4  # what a dead expert's logit shall at most be where w . x decides


@dataclass
class Padded:
    """What the padding did and cost.

    layers : {layer: (experts before, after)}. exact : no dead expert can be picked, whatever the text.
    leaks : {layer: share of the given tokens on which one could be}; empty if exact.
    """

    out: Path
    layers: dict[int, tuple[int, int]]
    exact: bool
    bytes_before: int
    bytes_after: int
    leaks: dict[int, float] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "layers": {str(index): list(counts) for index, counts in self.layers.items()},
            "exact": self.exact,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "leaks": {str(index): share for index, share in self.leaks.items()},
        }


class _RouterInputs(Observer):
    """Mean router input, and how far every token (up to 65536) points along it."""

    KEPT = 65536

    def __init__(self, shape: LayerShape) -> None:
        super().__init__(shape)
        self.sum_H = torch.zeros(shape.hidden, dtype=torch.float64)
        self.inputs: list[Tensor] = []
        self.seen = 0

    def see_routing(self, routing: Routing) -> None:
        self.sum_H += routing.x_TH.double().sum(0).cpu()
        room = self.KEPT - sum(len(x) for x in self.inputs)
        self.inputs.append(routing.x_TH[: max(room, 0)].float().cpu())
        self.seen += len(routing.x_TH)

    def away(self) -> tuple[Tensor, float]:
        """A row w [H] whose product with the inputs is at most LOGIT where it can be, and the share where it is not."""
        mean_H = (self.sum_H / max(self.seen, 1)).float()
        along_T = torch.cat(self.inputs) @ mean_H
        reach = float(torch.quantile(along_T[along_T > 0][: 2**20], 0.001)) if bool((along_T > 0).any()) else 1.0
        row_H = mean_H * (LOGIT / max(reach, 1e-6))
        return row_H, float((torch.cat(self.inputs) @ row_H > LOGIT / 10).float().mean())


def pad(
    streamed: StreamedModel,
    out: Path,
    *,
    model: str,
    data: TokenData | None = None,
    overwrite: bool = False,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    memory: int = 2 * 2**30,
    progress: Progress | None = None,
) -> Padded:
    """Write a uniform copy of a checkpoint whose layers differ.

    Parameters
    ----------
    streamed : the checkpoint, freshly opened.
    data : text to find and check dead experts on; needed for routers without a bias, ignored for others.

    Raises UsageError if all layers are the same already, or if text is needed and missing. Peak memory: two copies of
    the largest MoE layer.
    """
    streamed.refuse_packed("its layers cannot be padded")
    if any(form_of(layer).describe() for layer in streamed.moe.values()):
        raise UsageError(
            f"the experts of {model} are shared, factored or compressed, which only Coterie can run: nothing to pad"
            " them for",
            "Merge again with --set router=reduced or router=duplicated for a plain checkpoint.",
        )
    counts = {index: layer.num_experts for index, layer in streamed.moe.items()}
    most = max(counts.values())
    smaller = {index: n for index, n in counts.items() if n < most}
    if not smaller:
        raise UsageError(f"all MoE layers of {model} have {most} experts: nothing to pad")
    exact = _bias_decides(streamed, max(streamed.moe.values(), key=lambda layer: layer.num_experts))
    if not exact and data is None:
        raise UsageError(
            "no bias decides alone in the routers of this model: dead experts are kept from being picked on known text",
            "Name some with --data; the share of tokens on which it fails is reported.",
        )
    rows, leaks = ({}, {}) if exact else _rows_away(streamed, data, smaller, memory, progress)
    touched = {index: slice_names(streamed.moe[index]) for index in smaller}
    job = {"pad": streamed.checkpoint.digest(), "data": data.digest if data and not exact else None}
    with Workspace(out, {**job, "shard_bytes": shard_bytes}, overwrite=overwrite) as work:
        gone = {key: index for index, names in touched.items() for key in streamed.keys_of(names)}
        through = [key for key in streamed.checkpoint.tensors if key not in gone]
        writer = ShardWriter(work.folder, _specs(streamed, touched, gone, most), shard_bytes)
        passing = set(through)

        def pass_on(key: str, tensor: Tensor) -> None:
            if key in passing:
                writer.write(key, tensor)

        streamed.on_read = pass_on
        streamed.retain = {name for names in touched.values() for name in names}
        bar = progress or Progress()
        bar.start("layers", len(streamed.layers))
        try:
            for index in range(len(streamed.layers)):
                if index in smaller:
                    streamed.load_moe(index)
                    stored = {name: streamed.retained.pop(name) for name in touched[index]}
                    made = _checkpoint(streamed, index, touched[index], most, stored, rows)
                    for key, tensor in made.items():
                        writer.write(key, tensor)
                    streamed.free_layer(index)
                bar.layer(index)
            for key in through:
                if not writer.has(key):
                    streamed.pass_on(key)
            writer.sync()
            version = importlib.metadata.version("coterie")
            even = dict.fromkeys(counts, most)
            config = with_expert_counts(streamed.checkpoint.raw_config, streamed.config, most, even, version)
            result = Padded(
                out,
                {index: (n, most) for index, n in smaller.items()},
                exact,
                streamed.checkpoint.nbytes,
                writer.total_size,
                leaks,
            )
            record = {"padded": {**result.describe(), "model": model, "out": out.name}}
            write_json(work.folder / "config.json", config)
            write_json(work.folder / "coterie.json", record)
            names = [
                *writer.files,
                "config.json",
                "coterie.json",
                *copy_small_files(streamed.checkpoint.folder, work.folder),
            ]
        finally:
            writer.close()
            bar.done()
            streamed.forget_buffers()
        work.publish(names)
    return result


def _bias_names(streamed: StreamedModel, layer: MoELayer) -> list[str]:
    """Tensors that hold one number per expert and shift what the router picks by."""
    names = []
    for name in slice_names(layer):
        tensor = streamed.model.get_parameter_or_buffer(name)
        inside = not name.startswith(f"{layer.experts_name}.")
        if inside and tensor.numel() == layer.num_experts and "bias" in name.rpartition(".")[2]:
            names.append(name)
    return names


def _bias_decides(streamed: StreamedModel, layer: MoELayer) -> bool:
    """Is an expert with the lowest bias as good as gone? Tried on one router with random inputs."""
    names = _bias_names(streamed, layer)
    size = layer.num_experts // layer.groups
    keep = [e for e in range(layer.num_experts) if e % size != size - 1]
    if not names:
        return False
    streamed.load_moe(layer.index, experts=False)
    x_BLH = torch.randn(1, 512, layer.bank.hidden_size, generator=torch.Generator().manual_seed(0))
    x_BLH = x_BLH.to(streamed.device, streamed.compute_dtype)
    seen: list[tuple[Tensor, Tensor]] = []

    def capture(index_TK: Tensor, weight_TK: Tensor) -> tuple[Tensor, Tensor]:
        order_TK = index_TK.argsort(-1)
        seen.append((index_TK.gather(-1, order_TK), weight_TK.gather(-1, order_TK)))
        return torch.full_like(index_TK, layer.num_experts), weight_TK  # no expert has to run

    with torch.no_grad(), rerouted(layer.experts, capture):
        with narrowed(layer, keep):
            layer.block(x_BLH)
        for name, dim in slice_names(layer).items():
            if not name.startswith(f"{layer.experts_name}."):
                tensor = streamed.model.get_parameter_or_buffer(name).detach().movedim(dim, 0)
                tensor[size - 1 :: size] = NEVER if name in names else 0
        layer.block(x_BLH)
    streamed.free_layer(layer.index)
    (gone_TK, weight_TK), (dead_TK, other_TK) = seen
    return torch.equal(gone_TK, dead_TK) and torch.allclose(weight_TK, other_TK, atol=1e-6)


def _rows_away(
    streamed: StreamedModel,
    data: TokenData | None,
    smaller: dict[int, int],
    memory: int,
    progress: Progress | None,
) -> tuple[dict[str, Tensor], dict[int, float]]:
    """{router weight: row of a dead expert} and {layer: leak}, from one sweep."""
    assert data is not None
    rows: dict[str, Tensor] = {}
    leaks: dict[int, float] = {}
    for step in sweep(streamed, data.batches, states=States(limit=memory), progress=progress):
        if step.index not in smaller:
            step.run()
            continue
        layer = streamed.moe[step.index]
        with LayerObservation(layer, [_RouterInputs], len(data.domains)) as watch:
            step.run(before=lambda number, batch, watch=watch: watch.batch(batch))  # type: ignore[misc]
        (seen,) = watch.observers
        assert isinstance(seen, _RouterInputs)
        row_H, leaks[step.index] = seen.away()
        weights = [n for n in slice_names(layer) if n.startswith(f"{layer.router_name}.")]
        weights = [n for n in weights if streamed.model.get_parameter_or_buffer(n).numel() > layer.num_experts]
        if len(weights) != 1:
            raise ModelError(f"layer {step.index}: cannot tell which of {weights} is the router's weight")
        rows[weights[0]] = row_H
    return rows, leaks


def _specs(streamed: StreamedModel, touched: dict[int, dict[str, int]], gone: dict[str, int], most: int) -> list[Spec]:
    """Everything that will be written, in the order of the source; a padded layer stands where its first tensor was."""
    specs: list[Spec] = []
    done: set[int] = set()
    for key, info in streamed.checkpoint.tensors.items():
        index = gone.get(key)
        if index is None:
            specs.append(Spec(key, info.meta().dtype, info.shape))
        elif index not in done:
            done.add(index)
            made = _checkpoint(streamed, index, touched[index], most, None, {})
            specs += [Spec(name, t.dtype, tuple(t.shape)) for name, t in made.items()]
    return specs


def _checkpoint(
    streamed: StreamedModel,
    index: int,
    names: dict[str, int],
    most: int,
    stored: dict[str, Tensor] | None,
    rows: dict[str, Tensor],
) -> dict[str, Tensor]:
    """The checkpoint tensors of one padded layer; on meta if nothing is `stored`."""
    layer = streamed.moe[index]
    E, groups = layer.num_experts, layer.groups
    biases = _bias_names(streamed, layer)
    place = [g * (most // groups) + i for g in range(groups) for i in range(E // groups)]
    state = {}
    for name, dim in names.items():
        meta = streamed.model.get_parameter_or_buffer(name).detach()
        shape = list(meta.shape)
        shape[dim] = most
        if stored is None:
            state[name] = torch.empty(shape, dtype=meta.dtype, device="meta")
            continue
        padded = torch.zeros(shape, dtype=stored[name].dtype)
        if name in biases:
            padded.fill_(NEVER if padded.dtype != torch.float16 else torch.finfo(torch.float16).min)
        elif name in rows:
            padded.copy_(rows[name].expand(shape))
        state[name] = padded.index_copy_(dim, torch.tensor(place), stored[name].cpu())
    return streamed.checkpoint_tensors(state)
