"""How well a layer does without some of its experts: reconstruction errors of subsets (after NAEE, arXiv:2402.14800).

For inputs X of a layer, Z = F(X) the weighted sum of its routed experts, and a set C of experts that stay,

    loss(C) = sum over batches of || Z - F_C(X) ||_Frobenius        (the norm, not its square; float64)

F_C is the layer's own block run with `narrowed`: the router picks, normalises and scales as the model itself does, and
shared experts, the same on both sides, cancel. Every expert runs once on every kept token. What is kept of it is the
Gram matrix G_t of the experts' outputs f_e(x_t) in float64: with v the difference of two routings' weights, one entry
per expert, the squared error of token t is v^T G_t v. So a subset costs one pass of the router and no pass of an
expert. A token routed as before costs exactly 0; below some 1e-8 of the layer's output an error is rounding.

- `subset_loss`: the loss of every subset of one size, which is NAEE's search; for few experts.
- `removal_curve`: one expert removed after the other, each time the one whose removal costs least. This is NOT NAEE's
  search, but a greedy stand-in that goes on where C(N, n) subsets are out of reach.

Both work layer by layer on the unpruned model's Z, and do not know who calls them.

Memory while a layer is searched, beside the layer: tokens * (4 H + 8 E^2) bytes and 256 MiB of expert
outputs (tokens * 4 H while the layer runs). At 4096 tokens and H = 2048: 36 MB for 8 experts, 168 MB for 64, 570 MB for
128, 2.2 GB for 256, each plus the chunk.
"""

# T tokens, H hidden, E experts, K slots per token, C subsets, N sizes of subsets

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from coterie.anatomy import MoELayer, narrowed
from coterie.anatomy.slicing import minimum_keep
from coterie.errors import ModelError, UsageError
from coterie.experts.forward import observe
from coterie.profiling.dense import dense_outputs
from coterie.profiling.observers import LayerShape, Observer, Routing
from coterie.profiling.sample import TokenSample

TOKENS = 4096
MAX_SUBSETS = 5000

Counts = int | tuple[tuple[int, int], ...] | None  # experts that stay: in every layer, as (layer, count), or any number


def subsets(experts: int, keep: int, groups: int = 1) -> Iterator[tuple[int, ...]]:
    """The sets of `keep` experts that can stay, in lexicographic order; in routing groups the same number in each."""
    size = experts // groups
    parts = [itertools.combinations(range(g * size, (g + 1) * size), keep // groups) for g in range(groups)]
    return (tuple(itertools.chain.from_iterable(chosen)) for chosen in itertools.product(*parts))


def count_subsets(experts: int, keep: int, groups: int = 1) -> int:
    """How many sets `subsets` gives."""
    return int(math.comb(experts // groups, keep // groups) ** groups)


def possible_counts(layer: MoELayer) -> range:
    """The numbers of experts that can stay in `layer`, ascending."""
    E, step = layer.num_experts, layer.groups
    return range(-(-minimum_keep(layer) // step) * step, E + 1, step)


class Reconstruction(Observer):
    """Keeps a layer's inputs and measures what the layer loses without some of its experts.

    Made by `subset_loss` and `removal_curve`. Up to `sample` tokens are kept: all of them, or a uniform random sample,
    which depends on the order of tokens and not on how they were cut into batches. Each remembers its batch.
    """

    sample: ClassVar[int] = TOKENS
    keep: ClassVar[Counts] = None
    search: ClassVar[str] = "greedy"  # or "exact", or "auto": exact where that is at most MAX_SUBSETS subsets

    def __init__(self, shape: LayerShape) -> None:
        super().__init__(shape)
        self._batches = 0
        self._kept = TokenSample(self.sample)  # batch_T, index_TK, weight_TK, x_TH
        self._found: dict[str, Tensor] = {}

    def see_routing(self, routing: Routing) -> None:
        batch_T = torch.full((routing.x_TH.shape[0],), self._batches, device=routing.x_TH.device)
        self._batches += 1
        self._kept.add(batch_T, routing.index_TK, routing.weight_TK, routing.x_TH)

    @torch.no_grad()
    def see_layer(self, layer: MoELayer) -> None:
        E, counts = layer.num_experts, self._counts(layer)
        number = sum(count_subsets(E, count, layer.groups) for count in counts)
        exact = self.search != "greedy" and number <= MAX_SUBSETS
        if self.search == "exact" and not exact:
            raise UsageError(
                f"layer {layer.index}: an exact search would try {number} sets of experts"
                f" ({'any number' if self.keep is None else counts[0]} of {E}), and tries at most {MAX_SUBSETS}",
                "Search greedily instead (--set search=greedy)."
                + (" Or compress without a profile, where only one number is tried." if self.keep is None else ""),
            )
        kept = self._kept.take()
        if exact and counts == [E]:
            self._keep_found(subset_names(self.sample), torch.tensor([E]), torch.zeros(1, dtype=torch.float64))
        elif kept:
            replay = Replay(layer, *kept)
            if exact:
                losses = torch.cat([replay.exact(count) for count in counts])
                self._keep_found(subset_names(self.sample), torch.tensor(counts), losses)
            else:
                self._keep_found(removal_names(self.sample), *replay.greedy())

    def _keep_found(self, names: tuple[str, str], what: Tensor, loss: Tensor) -> None:
        self._found = dict(zip(names, (what, loss), strict=True))

    def state(self) -> dict[str, Tensor]:
        return self._empty() | self._found

    def _counts(self, layer: MoELayer) -> list[int]:
        """How many experts may stay in this layer."""
        if self.keep is None:
            return list(possible_counts(layer))
        return [self.keep if isinstance(self.keep, int) else dict(self.keep).get(layer.index, layer.num_experts)]

    def _empty(self) -> dict[str, Tensor]:
        """What was not searched: no subsets, no order."""
        E = self.shape.experts
        empty: dict[str, Tensor] = {}
        sets_name, loss_name = subset_names(self.sample)
        if sets_name in self.fields:
            empty |= {sets_name: torch.zeros(0, dtype=torch.int64), loss_name: torch.zeros(0, dtype=torch.float64)}
        order_name, loss_name = removal_names(self.sample)
        if order_name in self.fields:
            empty[order_name] = torch.full((E,), -1, dtype=torch.int64)
            empty[loss_name] = torch.full((E,), math.inf, dtype=torch.float64)
        return empty


def subset_names(tokens: int) -> tuple[str, str]:
    """Where `subset_loss` puts sizes and losses."""
    return f"subset_sizes_t{tokens}_N", f"subset_loss_t{tokens}_C"


def removal_names(tokens: int) -> tuple[str, str]:
    """Where `removal_curve` puts order and losses."""
    return f"removal_order_t{tokens}_E", f"removal_loss_t{tokens}_E"


@functools.cache
def subset_loss(keep: Counts, tokens: int = TOKENS, *, or_greedy: bool = False) -> type[Reconstruction]:
    """subset_loss_t<tokens>_C: the loss of every set of n experts, in the order of `subsets`.

    subset_sizes_t<tokens>_N: which n; the losses of several are behind one another.

    Parameters
    ----------
    keep : n for every layer; or ((layer, n), ...), where layers not named keep all; or None: all numbers that the
        router can work with, ascending.
    tokens : inputs kept per layer; a random sample of them above.
    or_greedy : where there are more than MAX_SUBSETS sets, follow `removal_curve` instead of raising UsageError.
    """
    fields = dict(zip(subset_names(tokens), ("same", "sum"), strict=True))
    if or_greedy:
        fields |= dict.fromkeys(removal_names(tokens), "none")
    body = {"fields": fields, "sample": tokens, "keep": keep, "search": "auto" if or_greedy else "exact"}
    doc = "Losses of all sets of experts" + (", or the greedy curve where these are too many." if or_greedy else ".")
    return type("SubsetLoss", (Reconstruction,), {**body, "__doc__": doc, "__module__": __name__})


@functools.cache
def removal_curve(tokens: int = TOKENS) -> type[Reconstruction]:
    """removal_order_t<tokens>_E: experts in the order they are best removed, one at a time; greedy, not NAEE's search.

    removal_loss_t<tokens>_E: the loss once the first i + 1 of them are gone; inf where it was not measured, because the
    router needs what is left, or because a routing group only goes on with one expert less of each group. The order
    does not depend on a budget. Experts that the router needs come last, those with the least applied weight first.
    """
    fields = dict.fromkeys(removal_names(tokens), "none")
    body = {"fields": fields, "sample": tokens, "__doc__": "The greedy order of removal.", "__module__": __name__}
    return type("RemovalCurve", (Reconstruction,), body)


Route = tuple[Tensor, Tensor]  # index_TK, weight_TK, as the block hands them to its experts


class Replay:
    """One layer on kept inputs, with any of its experts missing.

    Parameters
    ----------
    layer : in memory and whole, with the "coterie" experts implementation.
    batch_T : number of the batch each token came from. index_TK, weight_TK : its routing, as seen. x_TH : its input.

    Raises ModelError if the block, given these inputs alone, does not route them as it did.
    """

    def __init__(self, layer: MoELayer, batch_T: Tensor, index_TK: Tensor, weight_TK: Tensor, x_TH: Tensor) -> None:
        self.layer, self.x_TH = layer, x_TH
        self.batch_T = torch.unique(batch_T, return_inverse=True)[1]
        self.everything = list(range(layer.num_experts))
        self.whole = self.route(self.everything)
        same_T = (self.whole[0].sort(-1).values == index_TK.sort(-1).values).all(-1)
        if same_T.float().mean() < 0.99:  # single tokens on the edge between two experts may fall to either side
            raise ModelError(
                f"layer {layer.index}: given the same inputs again, its router sends {int((~same_T).sum())} of"
                f" {len(same_T)} tokens elsewhere",
                "What else it looks at is not known here, so subsets of its experts cannot be judged.",
            )
        self.gram_TEE = self._gram()
        index_TK, weight_TK = self._dense(self.whole)
        whole_TE = torch.zeros_like(self.gram_TEE[:, 0]).scatter_add_(1, index_TK, weight_TK)
        self.cross_TE = (self.gram_TEE @ whole_TE[:, :, None])[:, :, 0]  # inner products with the whole layer's sum
        self.square_T = (whole_TE * self.cross_TE).sum(-1)

    def exact(self, count: int) -> Tensor:
        """The loss of every set of `count` experts, [C] float64 in the order of `subsets`."""
        layer = self.layer
        losses = [self.loss(self.error(self.route(keep))) for keep in subsets(layer.num_experts, count, layer.groups)]
        return torch.tensor(losses, dtype=torch.float64)

    def greedy(self) -> tuple[Tensor, Tensor]:
        """Order of removal [E] and loss [E] after each, see `removal_curve`."""
        order: list[int] = []
        losses: list[float] = []
        keep, route = self.everything, self.whole
        local = None if self.layer.groups == 1 else False
        least = possible_counts(self.layer)[0]
        while len(keep) > least:
            if self.layer.groups == 1:
                gone, local = self._best_removal(keep, route, local)
            else:
                gone = self._best_removal_of_each_group(keep, route)
            rest = [e for e in keep if e not in gone]
            new = self.route(rest)
            if local and not _agree(new, route, (route[0] != gone[0]).all(-1)):
                local = False  # a removal did touch other tokens: this round again, with all of them
                continue
            order += gone
            losses += [math.inf] * (len(gone) - 1) + [self.loss(self.error(new))]
            keep, route = rest, new
        mass_E = self._mass(route)
        order += sorted(keep, key=lambda e: float(mass_E[e]))
        losses += [math.inf] * len(keep)
        return torch.tensor(order), torch.tensor(losses, dtype=torch.float64)

    def _best_removal(self, keep: list[int], route: Route, local: bool | None) -> tuple[list[int], bool]:
        """The expert whose removal leaves the smallest loss.

        local : does a removal only touch tokens that used the expert? True of routers whose weights depend on the
            selected scores alone. Not assumed: the first round (None) runs every token for every expert and looks,
            and `greedy` looks again after every removal.
        """
        error_T = self.error(route)
        found: list[float] = []
        untouched = True
        for expert in keep:
            rest = [e for e in keep if e != expert]
            used_T = (route[0] == expert).any(-1)
            if local:
                row_R = used_T.nonzero()[:, 0]
                changed_T = error_T.clone()
                changed_T[row_R] = self.error(self.route(rest, row_R), row_R)
            else:
                new = self.route(rest)
                changed_T = self.error(new)
                untouched = untouched and _agree(new, route, ~used_T)
            found.append(self.loss(changed_T))
        best = min(range(len(keep)), key=found.__getitem__)
        return [keep[best]], untouched if local is None else local

    def _best_removal_of_each_group(self, keep: list[int], route: Route) -> list[int]:
        """One expert of each routing group: first the least used of each, then the best of each group in turn."""
        size, mass_E = self.layer.num_experts // self.layer.groups, self._mass(route)
        members = [[e for e in keep if e // size == g] for g in range(self.layer.groups)]
        gone = [min(group, key=lambda e: float(mass_E[e])) for group in members]
        for g, group in enumerate(members):
            found = {}
            for expert in group:
                trial = [*gone[:g], expert, *gone[g + 1 :]]
                found[expert] = self.loss(self.error(self.route([e for e in keep if e not in trial])))
            gone[g] = min(group, key=found.__getitem__)
        return gone

    def route(self, keep: Sequence[int], row_R: Tensor | None = None) -> Route:
        """Ids (of all experts) and weights that the block hands to its experts where only `keep` are there."""
        x_TH = self.x_TH if row_R is None else self.x_TH.index_select(0, row_R)
        layer, door = self.layer, _Door()
        if len(x_TH) == 0:
            return self.whole[0][:0], self.whole[1][:0]
        with observe(layer.experts, door), narrowed(layer, keep), _silent(layer), suppress(_Arrived):
            try:
                layer.block(x_TH[None])
            except (TypeError, ValueError) as error:  # a block that wants more than hidden states
                raise self._unreplayable(str(error)) from error
        if door.seen is None:
            raise self._unreplayable("its experts were not reached")
        seen_TH, index_TK, weight_TK = door.seen
        if len(keep) == layer.num_experts and not torch.equal(seen_TH, x_TH):
            raise self._unreplayable("it changes its inputs before they reach the experts")
        return index_TK, weight_TK

    def _unreplayable(self, why: str) -> ModelError:
        return ModelError(
            f"layer {self.layer.index}: {self.layer.name} cannot be run on the inputs of its experts alone: {why}",
            "Methods that rerun a layer cannot judge this architecture; use one that scores experts, as reap does.",
        )

    def error(self, route: Route, row_R: Tensor | None = None) -> Tensor:
        """Squared distance of each token's sum of experts from that of the whole layer, [T] float64."""
        rows = slice(None) if row_R is None else row_R
        index_TK, weight_TK = self._dense(route)
        whole_index_TK, whole_weight_TK = (part[rows] for part in self._dense(self.whole))
        E, row_T1 = self.gram_TEE.shape[-1], torch.arange(len(self.x_TH), device=index_TK.device)[rows, None]
        at_TK = row_T1 * E + index_TK
        # `take` is several times faster than index tensors, and reads only what this routing needs
        gram_TKK = self.gram_TEE.view(-1).take(at_TK[:, :, None] * E + index_TK[:, None, :])
        square_T = (weight_TK[:, None, :] @ gram_TKK @ weight_TK[:, :, None])[:, 0, 0]
        cross_T = (weight_TK * self.cross_TE.view(-1).take(at_TK)).sum(-1)
        error_T = (square_T - 2 * cross_T + self.square_T[rows]).clamp(min=0)
        same_T = (index_TK == whole_index_TK).all(-1) & (weight_TK == whole_weight_TK).all(-1)
        return torch.where(same_T, 0.0, error_T)

    def _dense(self, route: Route) -> Route:
        """The same in float64, with "no expert" as some expert of weight 0."""
        index_TK, E = route[0], self.layer.num_experts
        return index_TK.clamp(max=E - 1), torch.where(index_TK < E, route[1].double(), 0.0)

    def loss(self, error_T: Tensor) -> float:
        """Sum over batches of the Frobenius norm."""
        return float(torch.bincount(self.batch_T, weights=error_T).sqrt().sum())

    def _mass(self, route: Route) -> Tensor:
        E = self.layer.num_experts
        index = route[0].reshape(-1).clamp(max=E)
        return torch.bincount(index, weights=route[1].reshape(-1).double(), minlength=E + 1)[:E]

    def _gram(self) -> Tensor:
        """[T, E, E] float64: inner products of all experts' outputs on each token."""
        T, E = len(self.x_TH), self.layer.num_experts
        gram_TEE = torch.empty(T, E, E, dtype=torch.float64, device=self.x_TH.device)
        for rows, y_ECH in dense_outputs(self.layer, self.x_TH):
            for gram_REE, y_ERH in zip(torch.split(gram_TEE[rows], 16), torch.split(y_ECH, 16, dim=1), strict=True):
                y_REH = y_ERH.movedim(0, 1).double()  # few at a time: they are widened to float64
                gram_REE.copy_(y_REH @ y_REH.mT)
        return gram_TEE


def _agree(one: Route, two: Route, where_T: Tensor) -> bool:
    same = torch.equal(one[0][where_T], two[0][where_T])
    return same and torch.allclose(one[1][where_T], two[1][where_T], rtol=1e-4, atol=1e-6)


class _Arrived(Exception):
    """No error: the block has done what it was run for."""


class _Door:
    """Takes what a block hands to its experts and sends everyone home."""

    seen: tuple[Tensor, Tensor, Tensor] | None = None

    def routed(self, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> bool:
        self.seen = (x_TH, index_TK, weight_TK)
        raise _Arrived

    def expert(self, expert: int, row_R: Tensor, x_RH: Tensor, y_RH: Tensor) -> None: ...
    def combined(self, sum_TH: Tensor) -> None: ...


@contextmanager
def _silent(layer: MoELayer) -> Iterator[None]:
    """Shared experts put out nothing: they are the same for every subset, and some blocks run them first."""
    with ExitStack() as stack:
        for path in layer.shared:
            module: nn.Module = layer.block.get_submodule(path[len(layer.name) + 1 :])
            original = module.__dict__.get("forward")
            module.forward = lambda x, *args, **kwargs: x.new_zeros(()).expand(x.shape)
            stack.callback(_restore, module, original)
        yield


def _restore(module: nn.Module, original: Any) -> None:
    if original is None:
        del module.forward
    else:
        module.forward = original
