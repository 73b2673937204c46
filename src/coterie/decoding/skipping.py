"""Dynamic skipping: leave out a token's weak experts while the model runs (NAEE, arXiv:2402.14800; ODP of MC,
arXiv:2410.06270).

w_1 >= w_2 >= ... are the weights the router applies to one token's experts. Rank i >= 2 of layer l is skipped where

    w_i < beta_li * w_1,        beta_li = median over calibration tokens of w_i / w_1

and what is left is scaled to the token's total weight, so that a top-2 model either runs two experts or gives the first
its whole weight. With the median about half of the calibration tokens skip. No weight of the model changes.

The paper has ranks 1 and 2; more ranks, each with a median of its own, are an extension. Its ratios are of weights
before renormalisation, which gives the same numbers. Betas belong to a model's experts: after pruning they have to be
measured again.

ODP is this rule with the same median, except that the most important 2% of each sequence's tokens keep all their
experts (`importance`; at a decoding step only the rule is left), and optionally in some layers alone: give thresholds
for those. Its paper has ranks 1 and 2 too. The authors' code fixes thresholds and layers for one model.
"""

# T tokens, K experts per token, R = K - 1 ranks below the first, B bins, E experts

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from coterie.anatomy import MoELayer, moe_layers
from coterie.decoding.importance import TokenWatch
from coterie.errors import UsageError
from coterie.experts.forward import NAME, rerouted
from coterie.experts.masks import mask_router, strongest_first, taken_over
from coterie.profiling.observers import GateRatio
from coterie.profiling.profile import Profile
from coterie.streaming.model import StreamedModel


@dataclass
class Skipped:
    """What was skipped so far, padding left out. tokens, slots, skipped, protected : {layer: number}; a slot is one
    expert of one token, a protected token keeps all of its experts."""

    tokens: dict[int, int] = field(default_factory=dict)
    slots: dict[int, int] = field(default_factory=dict)
    skipped: dict[int, int] = field(default_factory=dict)
    protected: dict[int, int] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """Skipped share of all slots, which is the share of routed expert FLOPs saved."""
        return sum(self.skipped.values()) / max(sum(self.slots.values()), 1)

    @property
    def active(self) -> float:
        """Experts that ran per token and layer, on average."""
        return (sum(self.slots.values()) - sum(self.skipped.values())) / max(sum(self.tokens.values()), 1)

    def describe(self) -> dict[str, Any]:
        """JSON: the totals, and by layer tokens, slots, skipped slots and protected tokens."""
        told = ("tokens", "slots", "skipped", "protected")
        layers = [{"layer": i, **{name: getattr(self, name)[i] for name in told}} for i in sorted(self.tokens)]
        return {"share_skipped": self.share, "experts_per_token": self.active, "layers": layers}


def betas(
    profile: Profile, quantile: float = 0.5, *, statistic: Literal["quantile", "mean"] = "quantile"
) -> dict[int, Tensor]:
    """Thresholds by layer: beta of the ranks 2, 3, ..., [R] float64.

    quantile : share of calibration tokens that skip, per layer and rank; 0 skips nothing. Read from a histogram, so
        exact to 1/2000 of the largest weight.
    statistic : "mean" takes the mean ratio instead.

    Raises UsageError if the profile lacks `GateRatio`.
    """
    if not 0 <= quantile <= 1:
        raise UsageError(f"quantile {quantile} is no share of tokens", "Use a number from 0 to 1; the paper has 0.5.")
    profile.require([GateRatio])
    return {
        index: (
            layer.gate_ratio_sum_R / layer.gate_ratio_RB.sum(1).clamp(min=1)
            if statistic == "mean"
            else _quantile(layer.gate_ratio_RB, quantile)
        )
        for index, layer in profile.layers.items()
    }


def _quantile(count_RB: Tensor, quantile: float) -> Tensor:
    """The ratio below which this share of tokens lies, [R], linear within a bin; 0 where nothing was counted."""
    below_RB = count_RB.double().cumsum(1)
    wanted_R = quantile * below_RB[:, -1]
    bin_R = torch.searchsorted(below_RB, wanted_R[:, None])[:, 0].clamp(max=count_RB.shape[1] - 1)
    here_R = count_RB.gather(1, bin_R[:, None])[:, 0].double()
    before_R = below_RB.gather(1, bin_R[:, None])[:, 0] - here_R
    within_R = torch.where(here_R > 0, (wanted_R - before_R) / here_R.clamp(min=1), 0.0)
    return (bin_R + within_R) / count_RB.shape[1]


def check_fit(profile: Profile, layers: Iterable[MoELayer]) -> None:
    """Raise UsageError unless the profile is of a model with these layers, experts and experts per token."""
    for layer in layers:
        seen = profile.layers.get(layer.index)
        if seen is None or (seen.experts, seen.top_k) != (layer.num_experts, layer.top_k):
            told = "is missing" if seen is None else f"has {seen.experts} experts, {seen.top_k} per token"
            raise UsageError(
                f"the profile is of another model ({profile.model}): layer {layer.index} {told}, and here it has"
                f" {layer.num_experts}, {layer.top_k} per token",
                "Profile the model that runs; after pruning the weights of the kept experts are others.",
            )


@contextmanager
def skip(
    layers: nn.Module | StreamedModel | Iterable[MoELayer],
    betas: Mapping[int, Tensor],
    *,
    renormalise: bool = True,
    protect: Collection[tuple[int, int]] = (),
    protect_tokens: float = 0.0,
) -> Iterator[Skipped]:
    """Skip weak experts as long as the context lasts; gives the counts.

    Parameters
    ----------
    layers : a resident model (which runs with the "coterie" experts meanwhile), a streamed one, or some layers of one
        (`streamed.moe.values()`).
    betas : thresholds by layer, as from `betas`; layers without any skip nothing.
    renormalise : scale a token's remaining weights to its total. False leaves them as they are.
    protect : (layer, expert) pairs never skipped, such as super experts.
    protect_tokens : share of each sequence's tokens, the most important ones, that keep all their experts (ODP has
        0.02). The model then runs with attention that shows its probabilities ("eager"), which takes memory for them,
        one layer at a time, and time. Raises ModelError where a layer has no attention, UsageError for layers alone.
    """
    done = Skipped()
    with ExitStack() as stack:
        if protect_tokens:
            stack.enter_context(_eager(layers))
        if isinstance(layers, nn.Module):
            stack.enter_context(_coterie_experts(layers))
            layers = moe_layers(layers)
        for layer in layers.moe.values() if isinstance(layers, StreamedModel) else layers:
            if layer.index in betas:
                held = sorted(expert for index, expert in protect if index == layer.index)
                watch = stack.enter_context(TokenWatch(layer, protect_tokens))
                slot = _Slot(layer, betas[layer.index], renormalise, held, watch, done)
                stack.enter_context(rerouted(layer.experts, slot))
        yield done


@contextmanager
def counted(layers: Iterable[MoELayer]) -> Iterator[Skipped | None]:
    """Count what the mask routers of a checkpoint (`experts.masks`) skip as long as the context lasts; None where it
    has none."""
    routers = [(layer, router) for layer in layers if (router := mask_router(layer.experts)) is not None]
    done = Skipped()
    with ExitStack() as stack:
        for layer, router in routers:
            for counts in (done.tokens, done.slots, done.skipped, done.protected):
                counts[layer.index] = 0
            router.watch = partial(_count, done, layer.index, stack.enter_context(TokenWatch(layer)))
            stack.callback(setattr, router, "watch", None)
        yield done if routers else None


def _count(done: Skipped, index: int, watch: TokenWatch, slots_TK: Tensor, kept_TK: Tensor) -> None:
    real_T = watch.real_T
    assert real_T is not None  # the block that holds the mask router has been entered
    done.tokens[index] += int(real_T.sum())
    done.slots[index] += int(slots_TK[real_T].sum())
    done.skipped[index] += int((slots_TK & ~kept_TK)[real_T].sum())


class _Slot:
    """The rule, between the router and the experts of one layer."""

    def __init__(
        self,
        layer: MoELayer,
        beta_R: Tensor,
        renormalise: bool,
        held: list[int],
        watch: TokenWatch,
        done: Skipped,
    ) -> None:
        if len(beta_R) != layer.top_k - 1:
            raise UsageError(
                f"layer {layer.index}: {len(beta_R)} thresholds for the {layer.top_k - 1} ranks below the first",
                f"Give one each: its router picks {layer.top_k} experts per token.",
            )
        self.index, self.E, self.renormalise, self.done = layer.index, layer.num_experts, renormalise, done
        self.watch = watch
        self.beta_K = torch.cat((beta_R.new_zeros(1), beta_R)).double()  # the first rank always runs
        self.held_E = torch.zeros(self.E + 1, dtype=torch.bool)
        self.held_E[held] = True
        for counts in (done.tokens, done.slots, done.skipped, done.protected):
            counts[layer.index] = 0

    def __call__(self, index_TK: Tensor, weight_TK: Tensor) -> tuple[Tensor, Tensor]:
        device = index_TK.device
        if self.beta_K.device != device:
            self.beta_K, self.held_E = self.beta_K.to(device), self.held_E.to(device)
        real_TK = index_TK < self.E
        sized_TK = torch.where(real_TK, weight_TK.double(), -torch.inf)
        rank_TK = strongest_first(real_TK, weight_TK).argsort(-1)  # 0 is the largest
        largest_T1 = sized_TK.amax(-1, keepdim=True)
        weak_TK = sized_TK < self.beta_K[rank_TK] * largest_T1
        gone_TK = weak_TK & real_TK & ~self.held_E[index_TK.clamp(max=self.E)]
        counted_T, spared_T = self.watch.real_T, self.watch.important_T
        self.watch.taken()
        if counted_T is None:
            counted_T = torch.ones(len(index_TK), dtype=torch.bool, device=device)
        if spared_T is not None:
            gone_TK &= ~spared_T[:, None]
            self.done.protected[self.index] += int(spared_T.sum())
        self.done.tokens[self.index] += int(counted_T.sum())
        self.done.slots[self.index] += int(real_TK[counted_T].sum())
        self.done.skipped[self.index] += int(gone_TK[counted_T].sum())
        kept_TK = weight_TK.masked_fill(gone_TK, 0.0)
        if self.renormalise:
            kept_TK = taken_over(weight_TK, kept_TK, gone_TK.any(-1, keepdim=True))
        return index_TK.masked_fill(gone_TK, self.E), kept_TK


@contextmanager
def _coterie_experts(model: nn.Module) -> Iterator[None]:
    """Run a resident model with experts that let slots in between."""
    before = model.get_experts_implementation()  # type: ignore[operator]
    model.set_experts_implementation(NAME)  # type: ignore[operator]
    try:
        yield
    finally:
        model.set_experts_implementation(before)  # type: ignore[operator]


@contextmanager
def _eager(model: Any) -> Iterator[None]:
    """Run a model with attention that shows its probabilities."""
    whole = model.model if isinstance(model, StreamedModel) else model
    if not isinstance(whole, nn.Module):
        raise UsageError("layers alone cannot protect tokens", "Give the model: all its attention has to run eagerly.")
    before = whole.config._attn_implementation  # type: ignore[union-attr]
    whole.set_attn_implementation("eager")  # type: ignore[operator]
    try:
        yield
    finally:
        whole.set_attn_implementation(before)  # type: ignore[operator]
