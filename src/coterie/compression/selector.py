"""From scores to kept experts, under a budget: per layer or over the whole model, in routing groups, with protection.

Used by every method that removes experts. It does not know where scores come from.
"""

# E experts

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coterie.anatomy import MoELayer
from coterie.anatomy.slicing import minimum_keep
from coterie.errors import UsageError


@dataclass(frozen=True)
class Budget:
    """How much may stay.

    keep : share of experts, in (0, 1]. keep_experts : number per layer. target_bytes : size of the whole checkpoint;
        exactly one of the three.
    scope : "uniform" (same number in every layer) or "global" (rank experts over all layers).
    minimum : fewest experts a layer keeps under a global budget.
    layers : decoder layers that may be pruned; None = all. protect : (layer, expert) pairs that always stay.
    """

    keep: float | None = None
    keep_experts: int | None = None
    target_bytes: int | None = None
    scope: str = "uniform"
    minimum: int = 1
    layers: frozenset[int] | None = None
    protect: frozenset[tuple[int, int]] = field(default_factory=frozenset)

    def __post_init__(self) -> None:
        given = [v for v in (self.keep, self.keep_experts, self.target_bytes) if v is not None]
        if len(given) != 1:
            raise UsageError(
                "a budget is exactly one of --keep, --keep-experts and --target-size",
                "For example --keep 0.5 keeps half of the experts of every layer.",
            )
        if self.keep is not None and not 0 < self.keep <= 1:
            raise UsageError(f"--keep {self.keep} is not a share of the experts", "Use a number above 0 and at most 1.")
        if self.scope not in ("uniform", "global"):
            raise UsageError(f"unknown scope {self.scope!r}", "Use uniform or global.")

    def describe(self) -> dict[str, Any]:
        """JSON for the record."""
        entries = {k: v for k, v in asdict(self).items() if v is not None and v != frozenset()}
        for name in ("layers", "protect"):
            if name in entries:
                entries[name] = sorted(entries[name])
        return entries

    def prunes(self, index: int) -> bool:
        return self.layers is None or index in self.layers


def counts_for(
    budget: Budget, moe: Mapping[int, MoELayer], bytes_of_expert: int, other_bytes: int, *, cut: bool = True
) -> dict[int, int]:
    """Experts each layer keeps under a uniform budget, checked against its router.

    Parameters
    ----------
    moe : MoE layers by decoder layer.
    bytes_of_expert, other_bytes : stored size of one expert, and of everything that is not a routed expert.
    cut : is the router cut to them? If not (an expert map), one expert is enough, and routing groups do not matter.

    Raises UsageError for a budget no router can work with, before any weight is read.
    """
    counts = {}
    for index, layer in moe.items():
        E = layer.num_experts
        counts[index] = (
            E if not budget.prunes(index) else min(E, _uniform_count(budget, moe, E, bytes_of_expert, other_bytes, cut))
        )
        _check_count(counts[index], layer, cut)
        if cut:
            _check_room(counts[index], layer, budget)
    return counts


def _check_room(count: int, layer: MoELayer, budget: Budget) -> None:
    """More protected experts than may stay, in a routing group of its layer: found before any weight is read."""
    size, per_group = layer.num_experts // layer.groups, count // layer.groups
    inside = Counter(expert // size for index, expert in budget.protect if index == layer.index)
    if inside and max(inside.values()) > per_group:
        where = " of a routing group" if layer.groups > 1 else ""
        raise UsageError(
            f"layer {layer.index}: {max(inside.values())} experts{where} are protected, but only {per_group} may stay",
            "Raise the budget or protect fewer experts.",
        )


def _uniform_count(
    budget: Budget, moe: Mapping[int, MoELayer], E: int, bytes_of_expert: int, other_bytes: int, cut: bool
) -> int:
    if budget.keep_experts is not None:
        if budget.keep_experts > E:
            raise UsageError(f"--keep-experts {budget.keep_experts} is more than the {E} experts of a layer")
        return budget.keep_experts
    if budget.keep is not None:
        return int(E * budget.keep + 0.5)
    assert budget.target_bytes is not None
    pruned = [layer for index, layer in moe.items() if budget.prunes(index)]
    fixed = other_bytes + sum(layer.num_experts * bytes_of_expert for i, layer in moe.items() if not budget.prunes(i))
    count = (budget.target_bytes - fixed) // max(bytes_of_expert * len(pruned), 1)
    if cut:
        count -= count % max((layer.groups for layer in pruned), default=1)
    least = max((minimum_keep(layer) for layer in pruned), default=1) if cut else 1
    if count < least:
        smallest = fixed + least * bytes_of_expert * len(pruned)
        raise UsageError(
            f"--target-size {budget.target_bytes / 1e9:.2f} GB cannot be reached by removing experts: with the fewest"
            f" its router allows ({least} per layer) the checkpoint has {smallest / 1e9:.2f} GB",
            f"Ask for at least {smallest / 1e9:.2f}GB.",
        )
    return int(count)


def _check_count(count: int, layer: MoELayer, cut: bool = True) -> None:
    E, least = layer.num_experts, minimum_keep(layer)
    if count == E:
        return
    if layer.router_size != E:
        raise UsageError(
            f"layer {layer.index}: its router names {layer.router_size} experts that share {E} stored ones, and none of"
            " these can be removed or merged again",
            "Start from the model it was merged from, or merge with --set router=reduced.",
        )
    if not cut:
        if count < 1:
            raise UsageError(f"cannot keep {count} of {E} experts in layer {layer.index}", "Keep at least 1.")
        return
    if count < least:
        group = f" in {layer.groups_used} of {layer.groups} groups" if layer.groups > 1 else ""
        raise UsageError(
            f"cannot keep {count} of {E} experts in layer {layer.index}:"
            f" the router picks {layer.top_k} per token{group}",
            f"Keep at least {least} (--keep-experts {least}).",
        )
    if count % layer.groups:
        down, up = count - count % layer.groups, count - count % layer.groups + layer.groups
        near = [str(n) for n in (down, up) if least <= n <= E]
        raise UsageError(
            f"cannot keep {count} of {E} experts in layer {layer.index}: its router splits them into {layer.groups}"
            " groups, and every group must keep the same number",
            f"Keep {' or '.join(near)} (--keep-experts).",
        )


def equal_groups(layer: MoELayer, count: int, cut: bool = True) -> list[tuple[list[int], int]]:
    """(experts, how many of them may stay) of each routing group, or of the whole layer where its router is not cut."""
    groups = layer.groups if cut else 1
    size = layer.num_experts // groups
    return [(list(range(g * size, (g + 1) * size)), count // groups) for g in range(groups)]


def select_layer(scores_E: Tensor, count: int, layer: MoELayer, budget: Budget) -> list[int]:
    """The `count` experts of one layer with the highest scores, the same number in each routing group.

    Ties go to the lower index. Raises UsageError if more experts are protected than may stay.
    """
    E, groups = layer.num_experts, layer.groups
    _check_scores(scores_E, layer)
    if count == E:
        return list(range(E))
    ranked_E = _protected(scores_E, layer, budget)
    size, per_group = E // groups, count // groups
    _check_room(count, layer, budget)
    keep: list[int] = []
    for group in range(groups):
        part = ranked_E[group * size : (group + 1) * size]
        best = torch.argsort(part, descending=True, stable=True)[:per_group]
        keep += [group * size + int(e) for e in best]
    return sorted(keep)


def _check_scores(scores_E: Tensor, layer: MoELayer) -> None:
    E = layer.num_experts
    if scores_E.shape != (E,):
        raise UsageError(f"layer {layer.index}: scores of shape {list(scores_E.shape)} for its {E} experts")
    if bad := int(torch.isnan(scores_E).sum()):
        raise UsageError(
            f"layer {layer.index}: the score of {bad} of its {E} experts is not a number",
            "Weights or activations that are no finite numbers do this; a damaged profile does, too.",
        )


def _protected(scores_E: Tensor, layer: MoELayer, budget: Budget) -> Tensor:
    ranked_E = scores_E.double().clamp(max=torch.finfo(torch.float64).max).clone()
    for index, expert in budget.protect:
        if index == layer.index:
            ranked_E[expert] = float("inf")
    return ranked_E


def check_protect(budget: Budget, moe: Mapping[int, MoELayer]) -> None:
    """Raise UsageError for a protected expert that the model does not have."""
    for index, expert in sorted(budget.protect):
        if index not in moe:
            raise UsageError(f"--protect {index}:{expert}: layer {index} is no MoE layer")
        if not 0 <= expert < moe[index].num_experts:
            raise UsageError(f"--protect {index}:{expert}: layer {index} has experts 0..{moe[index].num_experts - 1}")


def select_global(scores: Mapping[int, Tensor], moe: Mapping[int, MoELayer], budget: Budget) -> dict[int, list[int]]:
    """Rank experts over all layers after dividing each layer's scores by their sum; every layer keeps a minimum.

    Routing groups stay equal: in a grouped layer whole ranks (one expert from each group) compete with their mean.
    """
    total = sum(layer.num_experts for layer in moe.values())
    wanted = global_count(budget, moe, total)
    keep: dict[int, list[int]] = {}
    offers: list[tuple[float, int, tuple[int, ...]]] = []
    for index, layer in moe.items():
        E = layer.num_experts
        if not budget.prunes(index):
            keep[index] = list(range(E))
            continue
        _check_scores(scores[index], layer)
        if not torch.isfinite(scores[index]).all() or scores[index].min() < 0:
            raise UsageError(
                f"layer {index}: scores that are negative or infinite cannot be compared between layers",
                "Use --scope uniform with this method.",
            )
        normal_E = scores[index].double() / scores[index].double().sum().clamp(min=1e-30)
        ranked_E = _protected(normal_E, layer, budget).view(layer.groups, -1)
        order = torch.argsort(ranked_E, dim=1, descending=True, stable=True)
        size = E // layer.groups
        ranks = [tuple(g * size + int(order[g, r]) for g in range(layer.groups)) for r in range(size)]
        least = -(-max(minimum_keep(layer), budget.minimum) // layer.groups)
        keep[index] = [e for rank in ranks[:least] for e in rank]
        for rank in ranks[least:]:
            values = [float(ranked_E.view(-1)[e]) for e in rank]
            offers.append((sum(values) / len(values), index, rank))
    kept = sum(len(k) for k in keep.values())
    if kept > wanted:
        raise UsageError(
            f"the budget keeps {wanted} of {total} experts, but minimum, top-k and excluded layers need {kept}",
            "Raise the budget or lower --minimum.",
        )
    for _, index, rank in sorted(offers, key=lambda o: (-o[0], o[1], o[2])):
        if kept + len(rank) <= wanted:
            keep[index] += rank
            kept += len(rank)
    lost = [(index, expert) for index, expert in sorted(budget.protect) if expert not in keep[index]]
    if lost:
        raise UsageError(
            f"{len(budget.protect)} experts are protected, but only {wanted} of {total} may stay: no room for"
            f" {lost[0][0]}:{lost[0][1]}",
            "Raise the budget or protect fewer experts.",
        )
    return {index: sorted(experts) for index, experts in keep.items()}


def count_of(budget: Budget, layer: MoELayer) -> int:
    """Experts one layer has on average under a budget that a method shares out over the layers by itself."""
    if budget.target_bytes is not None:
        raise UsageError(
            "a method that gives layers different numbers of experts takes a share or a number of them",
            "Use --keep or --keep-experts, or let every layer keep as many (see `coterie methods` for the parameter).",
        )
    E = layer.num_experts
    wanted = int(E * budget.keep + 0.5) if budget.keep is not None else budget.keep_experts or 0
    if not 1 <= wanted <= E:
        raise UsageError(
            f"cannot keep {wanted} of {E} experts in layer {layer.index}", f"Keep 1 to {E} (--keep-experts)."
        )
    if wanted < E and layer.router_size != E:
        _check_count(wanted, layer)  # refuses
    return wanted


def global_count(budget: Budget, moe: Mapping[int, MoELayer], total: int) -> int:
    if budget.keep is not None:
        return int(total * budget.keep + 0.5)
    if budget.keep_experts is not None:
        most = min(layer.num_experts for layer in moe.values())
        if budget.keep_experts > most:
            raise UsageError(f"--keep-experts {budget.keep_experts} is more than the {most} experts of a layer")
        return budget.keep_experts * len(moe)
    raise UsageError("a global budget is a share or a number of experts", "Use --keep or --keep-experts with it.")


def parse_layers(include: str | None, exclude: str | None, available: list[int]) -> frozenset[int] | None:
    """`4-30,35` and the like to a set of decoder layers; None for all. Raises UsageError for what is no MoE layer."""
    if not include and not exclude:
        return None
    wanted = _ranges(include) if include else None
    for low, high in wanted or []:
        if not any(low <= layer <= high for layer in available):
            text = str(low) if low == high else f"{low}-{high}"
            raise UsageError(f"--layers {text} is no MoE layer; the model has them at {_span(available)}")
    unwanted = _ranges(exclude) if exclude else []
    known = [
        layer
        for layer in available
        if (wanted is None or any(low <= layer <= high for low, high in wanted))
        and not any(low <= layer <= high for low, high in unwanted)
    ]
    if not known:
        raise UsageError(f"no MoE layer is left to prune; the model has them at {_span(available)}")
    return frozenset(known)


def _ranges(text: str) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        try:
            found.append((int(low), int(high if dash else low)))
        except ValueError:
            raise UsageError(f"cannot read the layers {text!r}", "Write them like 4-30 or 0,3,7-9.") from None
    return found


def _span(layers: list[int]) -> str:
    return f"{layers[0]}-{layers[-1]}" if layers == list(range(layers[0], layers[-1] + 1)) else str(layers)


def parse_protect(items: list[str], digest: Callable[[], str] | None = None) -> frozenset[tuple[int, int]]:
    """`layer:expert,...` to pairs; `@FILE` or the path of a JSON file stands for the pairs it lists.

    digest : gives the digest of the model that is compressed; a file made for another one is refused.
    """
    pairs: set[tuple[int, int]] = set()
    for item in (part for text in items for part in ([text] if _is_file(text) else text.split(","))):
        text = item.strip()
        if text.startswith("@") or text.endswith(".json") or _is_file(text):
            pairs |= _listed_pairs(Path(text.removeprefix("@")).expanduser(), digest)
        elif text:
            layer, _, expert = text.partition(":")
            try:
                pairs.add((int(layer), int(expert)))
            except ValueError:
                raise UsageError(
                    f"cannot read --protect {text!r}", "Write layer:expert, e.g. 1:68,2:92, or @FILE."
                ) from None
    return frozenset(pairs)


def _is_file(text: str) -> bool:
    """A long list of pairs is no path: asking for a file of that name fails instead of saying no."""
    try:
        return Path(text).is_file()
    except OSError:
        return False


def _listed_pairs(file: Path, digest: Callable[[], str] | None) -> set[tuple[int, int]]:
    """The experts that `coterie analyze` found worth protecting."""
    hint = "It is written by `coterie analyze super-experts MODEL --data TEXT --out FILE`."
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        pairs = {(layer, expert) for layer, expert in found["protect"]}
        model, made_for = str(found["model"]), str(found["model_digest"])
    except OSError as error:
        raise UsageError(f"cannot read the list to protect, {file}: {error.strerror}", hint) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(f"{file} is no list of experts to protect: {type(error).__name__}: {error}", hint) from error
    if not all(type(number) is int for pair in pairs for number in pair):
        raise UsageError(f"{file} is no list of experts to protect: a pair in it is not two whole numbers", hint)
    if digest is not None and made_for != digest():
        raise UsageError(
            f"the list to protect, {file}, was made for another model ({model})",
            "Make one for this model: `coterie analyze super-experts`.",
        )
    return pairs
