"""Dynamic pruning: run a model as if some experts put out nothing, many such sets in one sweep (arXiv:2507.23279).

Routing is untouched. Where the router picks a removed expert, its part is missing from the sum; the weights of the
others are not renormalised and nobody stands in:

    y_t = sum_{i in top-k, i not in S} g_ti * f_i(x_t)

That equals zeroing the down projections of S. All sets pass each layer while it is in memory once. Beside the final
hidden states, which go to the caller, two mechanisms are measured: the largest entry of the residual stream behind
every layer, and how much attention falls on the first token:

    decay = 1 - mean over heads of  (sum_t p'_t,first) / (sum_t p_t,first)

p and p' are softmax attention before and after. The sums run over all queries behind the first token of all sequences,
before the ratio is taken, per head; the paper leaves the order open, and a mean of ratios is ruled by queries that
barely look at the first token. It does not know what losses are.
"""

# B batch, L sequence, H hidden, E experts, K experts per token, N heads

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from coterie.anatomy import ExpertBank, MoELayer
from coterie.errors import UsageError
from coterie.experts.forward import rerouted
from coterie.profiling.massive import LayerOutputs, shared_experts
from coterie.streaming.lockstep import Batch, Progress, States, sweep
from coterie.streaming.model import StreamedModel
from coterie.text import TokenData

Pair = tuple[int, int]
ATTENTION_BYTES = 128 * 2**20  # of one batch's attention probabilities in one layer


@dataclass(frozen=True)
class Variant:
    """One way to run the model.

    removed : (layer, expert) pairs whose output is dropped; expert -1 is the layer's shared experts.
    zeroed : (layer, expert, output channel, inner channel) of single down projection weights that count as 0.
    """

    name: str
    removed: frozenset[Pair] = frozenset()
    zeroed: tuple[tuple[int, int, int, int], ...] = ()


@dataclass
class Sink:
    """Attention on the first token in one layer. start_N : sum per head. queries : how many. total : sum of rows."""

    start_N: Tensor
    queries: int = 0
    total: float = 0.0

    @property
    def share(self) -> float:
        """Mean attention on the first token."""
        return float(self.start_N.mean()) / max(self.queries, 1)

    @property
    def row_sum(self) -> float:
        """Mean over heads and queries of a row's sum; below 1 where a learned sink takes the rest."""
        return self.total / max(self.queries * len(self.start_N), 1)


@dataclass
class Trace:
    """What a sweep saw of every variant: {variant name: {decoder layer: ...}}. A layer without softmax attention has
    no sink."""

    hidden_max: dict[str, dict[int, float]] = field(default_factory=dict)
    sinks: dict[str, dict[int, Sink]] = field(default_factory=dict)


def sink_decay(before: Sink, after: Sink) -> float | None:
    """0: the first token gets as much attention as before, per head; 1: none; None if it never got any."""
    seen_N = before.start_N > 0
    if not bool(seen_N.any()):
        return None
    return 1 - float((after.start_N[seen_N] / before.start_N[seen_N]).mean())


def check_pairs(pairs: Collection[Pair], moe: Mapping[int, MoELayer]) -> None:
    """Raise UsageError for an expert that the model does not have."""
    for index, expert in sorted(pairs):
        if index not in moe:
            raise UsageError(f"{index}:{expert}: layer {index} is no MoE layer")
        shared = expert == -1 and bool(shared_experts(moe[index]))
        if not (shared or 0 <= expert < moe[index].num_experts):
            raise UsageError(f"{index}:{expert}: layer {index} has experts 0..{moe[index].num_experts - 1}")


def random_sets(
    pairs: Collection[Pair], moe: Mapping[int, MoELayer], count: int, *, same_layers: bool, seed: int
) -> list[frozenset[Pair]]:
    """`count` sets of as many other routed experts, from anywhere or as many from each layer as `pairs` has there.

    A layer without enough others gives all it has.
    """
    routed = [p for p in pairs if p[1] >= 0] or list(pairs)
    sets = []
    for number in range(count):
        draw = random.Random(f"{seed}-{same_layers}-{number}")
        others = {i: [(i, e) for e in range(m.num_experts) if (i, e) not in pairs] for i, m in moe.items()}
        if same_layers:
            wanted = {i: sum(layer == i for layer, _ in routed) for i in sorted({layer for layer, _ in routed})}
            sets.append(frozenset(p for i, n in wanted.items() for p in draw.sample(others[i], min(n, len(others[i])))))
        else:
            everything = [p for i in sorted(others) for p in others[i]]
            sets.append(frozenset(draw.sample(everything, min(len(routed), len(everything)))))
    return sets


def smaller_batches(data: TokenData, heads: int, limit: int = ATTENTION_BYTES) -> TokenData:
    """The same samples in batches whose attention probabilities (float32, all heads) stay below `limit` bytes."""
    batches = []
    for batch in data.batches:
        B, L = batch.ids_BL.shape
        size = max(1, limit // (4 * heads * L * L))
        for first in range(0, B, size):
            rows = slice(first, first + size)
            parts = (None if t is None else t[rows] for t in (batch.mask_BL, batch.domain_B))
            batches.append(Batch(batch.ids_BL[rows], *parts))
    return replace(data, batches=batches)


def run(
    streamed: StreamedModel,
    batches: Sequence[Batch],
    variants: Sequence[Variant],
    finish: Callable[[int, int, Batch, Tensor], None] = lambda variant, number, batch, hidden_BLH: None,
    *,
    states: States | None = None,
    progress: Progress | None = None,
) -> Trace:
    """Run every variant on all batches in one sweep.

    finish : called with (variant number, batch number, batch, hidden [B, L, H]) behind the final norm.

    Attention runs in its plain form ("eager"), which shows its probabilities. Peak memory: one layer, and the waiting
    hidden states of all variants up to the limit of `states`.
    """
    trace = Trace({v.name: {} for v in variants}, {v.name: {} for v in variants})
    count, current = len(batches), 0

    def end(number: int, batch: Batch, hidden_BLH: Tensor) -> None:
        finish(number // count, number % count, batch, hidden_BLH)

    def see(index: int, hidden: Tensor) -> None:
        if index >= 0:
            batch, largest = batches[current % count], trace.hidden_max[variants[current // count].name]
            size_BLH = hidden.float().abs().flatten(2)
            if batch.mask_BL is not None:
                size_BLH = size_BLH[batch.mask_BL.to(size_BLH.device)]
            largest[index] = max(largest.get(index, 0.0), float(size_BLH.max()))

    with _eager(streamed), LayerOutputs(streamed.layers, see):
        many = [batch for _ in variants for batch in batches]
        for step in sweep(streamed, many, finish=end, states=states, progress=progress):
            with ExitStack() as stack:
                sinks = stack.enter_context(_SinkWatch(step.layer))
                layer = streamed.moe.get(step.index)
                removal = stack.enter_context(_Removal(layer, variants)) if layer is not None else None

                def announce(
                    number: int, batch: Batch, sinks: _SinkWatch = sinks, removal: _Removal | None = removal
                ) -> None:
                    nonlocal current
                    current = number
                    sinks.batch(variants[number // count].name, batch)
                    if removal is not None:
                        removal.turn_to(number // count)

                step.run(before=announce)
            for name, sink in sinks.seen.items():
                trace.sinks[name][step.index] = sink
    return trace


@contextmanager
def _eager(streamed: StreamedModel) -> Iterator[None]:
    before = streamed.model.config._attn_implementation
    streamed.model.set_attn_implementation("eager")
    try:
        yield
    finally:
        streamed.model.set_attn_implementation(before)


class _Removal:
    """Lets one MoE layer run as each variant wants it."""

    def __init__(self, layer: MoELayer, variants: Sequence[Variant]) -> None:
        self.layer, E = layer, layer.num_experts
        self.tables: list[Tensor | None] = []  # expert id -> id that runs; E is "no expert"
        for variant in variants:
            gone = sorted(e for i, e in variant.removed if i == layer.index and e >= 0)
            table = torch.arange(E + 1, device=layer.router_device)
            table[gone] = E
            self.tables.append(table if gone else None)
        self.shared = [(layer.index, -1) in variant.removed for variant in variants]
        self.zeroed = [[z[1:] for z in variant.zeroed if z[0] == layer.index] for variant in variants]
        self.kept: list[tuple[Tensor, Tensor]] = []  # (view of a zeroed weight, its value)
        self.variant = 0

    def __enter__(self) -> _Removal:
        self._stack = ExitStack()
        self._stack.callback(self._restore)
        self._stack.enter_context(rerouted(self.layer.experts, self._slot))
        for module in shared_experts(self.layer) if any(self.shared) else []:
            self._stack.callback(module.register_forward_hook(self._hide).remove)
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def turn_to(self, variant: int) -> None:
        self._restore()
        self.variant = variant
        for expert, channel, inner in self.zeroed[variant]:
            weight = ExpertBank(self.layer.experts).read(expert).down_HI[channel, inner]
            self.kept.append((weight, weight.clone()))
            weight.zero_()

    def _restore(self) -> None:
        while self.kept:
            weight, value = self.kept.pop()
            weight.copy_(value)

    def _slot(self, index_TK: Tensor, weight_TK: Tensor) -> tuple[Tensor, Tensor]:
        table = self.tables[self.variant]
        return (index_TK if table is None else table[index_TK.clamp(max=len(table) - 1)]), weight_TK

    def _hide(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        return torch.zeros_like(output) if self.shared[self.variant] else None


class _SinkWatch:
    """Adds up the attention on first tokens in one decoder layer, for each variant.

    Attention modules are known by what they return: beside their output, probabilities [B, N, L, L].
    """

    def __init__(self, decoder: nn.Module) -> None:
        self.decoder = decoder
        self.seen: dict[str, Sink] = {}
        self._stack = ExitStack()
        self._fresh = False

    def batch(self, variant: str, batch: Batch) -> None:
        self._variant, self._batch, self._fresh = variant, batch, True

    def __enter__(self) -> _SinkWatch:
        for module in self.decoder.modules():
            if module is not self.decoder:
                self._stack.callback(module.register_forward_hook(self._see).remove)
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def _see(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        B, L = self._batch.ids_BL.shape
        found = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if not (self._fresh and isinstance(found, Tensor) and found.dim() == 4 and found.is_floating_point()):
            return
        if found.shape[0] != B or found.shape[2:] != (L, L):
            return
        self._fresh = False  # a module around the attention may hand the same probabilities on
        mask_BL = self._batch.mask_BL
        real_BL = torch.ones(B, L, dtype=torch.bool) if mask_BL is None else mask_BL.clone()
        start_B = real_BL.int().argmax(1)
        real_BL[torch.arange(B), start_B] = False  # what is left are the queries behind the first token
        real_BL = real_BL.to(found.device)
        p_BNLL = found.detach()
        start_BNL = p_BNLL[torch.arange(B), :, :, start_B]
        start_N = (start_BNL.double() * real_BL[:, None]).sum((0, 2)).cpu()
        sink = self.seen.setdefault(self._variant, Sink(torch.zeros_like(start_N)))
        sink.start_N += start_N
        sink.queries += int(real_BL.sum())
        sink.total += float((p_BNLL.sum(-1).double() * real_BL[:, None]).sum())
