"""Super experts: the few experts that make massive activations and must never be removed (arXiv:2507.23279).

For every expert e of layer l, over all tokens routed to it and all output channels c,

    a[l,e] = max |f_e(x)[c]|                       the raw output, before the gate weight

and with A = {a[l,e] : l in L*}, the layers in which massive activations form,

    super = {(l,e), l in L* : a[l,e] > P99.5(A)  and  a[l,e] > max(A) / 10}

L* is the first 75 % of the layers, as in the authors' code, or the layers in which massive activations are seen to
form, as in the paper. Scores that average over tokens miss these experts: they act on one token, the first, and are
unremarkable otherwise. What comes out is a list to protect, not a compressed model.

Differs from the authors' code: max(A) / 10 is not rounded down; a model whose largest value is below three times the
median has no super expert, instead of its largest; shared experts count in A and are reported, but a list of routed
experts cannot protect them. The down projection's input is taken at the token of the largest output, not over all.
Where families put a norm behind each expert, outputs are those of the norm. Mean router scores are a softmax over all
experts, also where a family uses sigmoids.

The rule for `ma_formation` is ours, the paper gives none: from the first layer behind which an entry is massive (above
100 and above 1000 times the median, arXiv:2402.17762) to the first behind which massive entries reach 90 % of the
largest size they have anywhere.
"""

# E experts, D domains

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from coterie.analysis.ablation import Trace, Variant, check_pairs, random_sets, sink_decay
from coterie.anatomy import MoELayer
from coterie.errors import ModelError, OutputError, UsageError
from coterie.profiling.massive import (
    HiddenPeaks,
    LayerOutputs,
    MassiveOutput,
    SharedPeak,
    StartScore,
    StartShare,
    first_samples,
)
from coterie.profiling.observe import LayerObservation
from coterie.profiling.observers import SelectionCount
from coterie.profiling.profile import LayerProfile
from coterie.streaming.lockstep import Batch, Progress, States, sweep
from coterie.streaming.model import StreamedModel
from coterie.streaming.writer import write_json
from coterie.text import TokenData

Pair = tuple[int, int]  # decoder layer, expert
SHARED = -1  # the expert number of a layer's shared experts, taken together

FORMAT = 1
OBSERVERS = (SelectionCount, MassiveOutput, StartShare, StartScore)
HEAVY_TAIL = 3.0  # times the median; below that the largest value is nothing special
PLATEAU = 0.9
PERCENTILES = (95.0, 99.0, 99.5, 99.9)
FACTORS = (0.1, 0.09, 0.08, 0.07)


@dataclass(frozen=True)
class Rule:
    """Which layers and values count.

    layers : "first_fraction" (decoder layers below round(fraction * layers)) or "ma_formation".
    scope : "selected_layers" (percentile and maximum over L*) or "all_layers" (over the whole model).
    percentile : linear interpolation. factor : of the largest value.
    """

    layers: str = "first_fraction"
    fraction: float = 0.75
    scope: str = "selected_layers"
    percentile: float = 99.5
    factor: float = 0.1

    def __post_init__(self) -> None:
        known = {"layers": ("first_fraction", "ma_formation"), "scope": ("selected_layers", "all_layers")}
        for name, choices in known.items():
            if getattr(self, name) not in choices:
                raise UsageError(f"--{name} {getattr(self, name)!r} is unknown", f"Use {' or '.join(choices)}.")
        for name, low, high in (("fraction", 0, 1), ("percentile", 0, 100), ("factor", 0, 1)):
            if not low < getattr(self, name) <= high:
                raise UsageError(f"--{name} {getattr(self, name)} must be above {low} and at most {high}")


@dataclass
class Statistics:
    """What one sweep saw.

    layers : the observers' statistics of every MoE layer. shared : {layer: (largest |output|, channel)}.
    hidden : {decoder layer: the residual stream behind it}; -1 is what enters layer 0. first_ids : how many sequences
    begin with which token. domains : names, in the order of the statistics.
    """

    layers: dict[int, LayerProfile]
    shared: dict[int, tuple[float, int]]
    hidden: dict[int, HiddenPeaks]
    first_ids: Counter[int]
    domains: list[str]

    def values(self, domain: int | None = None) -> dict[Pair, float]:
        """a[l,e] of every expert; of one domain, routed experts only."""
        found: dict[Pair, float] = {}
        for index, layer in self.layers.items():
            value_E = layer.output_max_DE.amax(0) if domain is None else layer.output_max_DE[domain]
            found |= {(index, e): v for e, v in enumerate(value_E.tolist())}
            if domain is None and index in self.shared:
                found[index, SHARED] = self.shared[index][0]
        return found


@dataclass
class Selection:
    """What the rule says.

    super_experts, outliers : pairs by falling value; outliers are as large, but stand in layers that do not count.
    threshold : the larger of the percentile and factor * largest. largest, median : of the values that count, experts
    without a token left out of the median. reason : why there is no super expert, or "".
    """

    super_experts: list[Pair]
    outliers: list[Pair]
    layers: list[int]
    threshold: float
    percentile: float
    largest: float
    median: float
    reason: str = ""


def watch(
    streamed: StreamedModel, data: TokenData, *, states: States | None = None, progress: Progress | None = None
) -> Statistics:
    """One sweep over `data`. Peak memory: that of a profile; statistics take O(layers * experts).

    Raises ModelError for outputs that are no finite numbers, or routing that does not follow the contract.
    """
    hidden = {index: HiddenPeaks() for index in range(-1, len(streamed.layers))}
    first = first_samples(data.batches)
    current, entering = 0, iter(range(len(data.batches)))

    def see(index: int, states_BLH: torch.Tensor) -> None:
        number = next(entering) if index == -1 else current
        hidden[index].see(states_BLH, data.batches[number], first[number])

    layers: dict[int, LayerProfile] = {}
    shared: dict[int, tuple[float, int]] = {}
    with LayerOutputs(streamed.layers, see):
        for step in sweep(streamed, data.batches, finish=lambda *_: None, states=states, progress=progress):
            if step.index not in streamed.moe:

                def count(number: int, batch: Batch) -> None:
                    nonlocal current
                    current = number

                step.run(before=count)
                continue
            layer = streamed.moe[step.index]
            with LayerObservation(layer, OBSERVERS, len(data.domains)) as observation, SharedPeak(layer) as beside:

                def announce(
                    number: int,
                    batch: Batch,
                    observation: LayerObservation = observation,
                    beside: SharedPeak = beside,
                ) -> None:
                    nonlocal current
                    current = number
                    observation.batch(batch)
                    beside.batch(batch)

                step.run(before=announce)
            layers[step.index] = observation.result()
            if beside.channel >= 0:
                shared[step.index] = (beside.value, beside.channel)
    found = Statistics(layers, shared, hidden, _first_ids(data), data.domains)
    for (index, expert), value in found.values().items():
        if not math.isfinite(value):
            raise ModelError(
                f"layer {index}: expert {name_of(expert)} put out something that is not a finite number",
                "Compute in a wider type: --compute-dtype float32.",
            )
    return found


def _first_ids(data: TokenData) -> Counter[int]:
    ids: Counter[int] = Counter()
    for batch in data.batches:
        start_B = torch.zeros(len(batch.ids_BL), dtype=torch.int64)
        if batch.mask_BL is not None:
            start_B = batch.mask_BL.int().argmax(1)
        ids.update(batch.ids_BL[torch.arange(len(start_B)), start_B].tolist())
    return ids


def first_fraction(depth: int, fraction: float) -> list[int]:
    """Decoder layers below round(fraction * depth), as in the authors' code."""
    return list(range(min(depth, round(fraction * depth))))


def ma_formation(hidden: Mapping[int, HiddenPeaks]) -> list[int]:
    """Decoder layers in which massive activations form, by the rule on top of this file; [] where there are none."""
    massive = [index for index in sorted(hidden) if index >= 0 and hidden[index].massive]
    if not massive:
        return []
    full = PLATEAU * max(hidden[index].massive_max for index in massive)
    last = next(index for index in massive if hidden[index].massive_max >= full)
    return list(range(massive[0], last + 1))


def select(values: Mapping[Pair, float], layers: Collection[int], rule: Rule) -> Selection:
    """Apply the rule to a[l,e]; `layers` is L*. Comparisons are strict."""
    counted = [v for (layer, _), v in values.items() if rule.scope == "all_layers" or layer in layers]
    here = sorted(set(layers) & {layer for layer, _ in values})
    active = [v for v in counted if v > 0]
    if not active or not here:
        what = "no MoE layer is among the layers that count" if not here else "no expert received a token"
        return Selection([], [], here, 0.0, 0.0, 0.0, 0.0, what)
    value_A = torch.tensor(counted, dtype=torch.float64)
    percentile = float(torch.quantile(value_A, rule.percentile / 100))
    largest, median = max(counted), float(torch.tensor(active, dtype=torch.float64).quantile(0.5))
    threshold = max(percentile, largest * rule.factor)
    above = sorted((p for p, v in values.items() if v > threshold), key=lambda p: (-values[p], p))
    supers = [p for p in above if p[0] in layers]
    outliers = [p for p in above if p[0] not in layers]
    reason = ""
    if largest < HEAVY_TAIL * median:
        reason = f"no heavy tail: the largest value is {largest / median:.2f} times the median, below {HEAVY_TAIL:g}"
        supers = []
    elif not supers:
        reason = f"no expert of these layers is above {threshold:.4g}"
    return Selection(supers, outliers, here, threshold, percentile, largest, median, reason)


def tail_exponent(values: Collection[float], smallest: float) -> float | None:
    """Exponent of a power law, by maximum likelihood over values >= smallest: 1 + n / sum ln(v / smallest).

    Below 2 the tail is heavy. None for fewer than two values, from which nothing can be told.
    """
    tail = [v for v in values if v >= smallest > 0]
    total = sum(math.log(v / smallest) for v in tail)
    return 1 + len(tail) / total if len(tail) > 1 and total > 0 else None


def jaccard(a: Collection[Pair], b: Collection[Pair]) -> float | None:
    """Shared pairs over all pairs of two sets; None if both are empty."""
    union = set(a) | set(b)
    return len(set(a) & set(b)) / len(union) if union else None


def name_of(expert: int) -> int | str:
    return "shared" if expert == SHARED else expert


def choose(statistics: Statistics, rule: Rule) -> Selection:
    """L* of the rule, and what it selects there."""
    depth = len(statistics.hidden) - 1
    if rule.layers == "first_fraction":
        return select(statistics.values(), first_fraction(depth, rule.fraction), rule)
    layers = ma_formation(statistics.hidden)
    chosen = select(statistics.values(), layers, rule)
    if not layers:
        most = max((h for index, h in statistics.hidden.items() if index >= 0), key=lambda h: h.largest)
        chosen.reason = (
            f"no massive activations: the largest entry of the residual stream is {most.largest:.4g},"
            f" {most.largest / max(most.median, 1e-30):.4g} times the median of its layer"
        )
    return chosen


def describe(statistics: Statistics, rule: Rule, chosen: Selection) -> dict[str, Any]:
    """The report of the statistic, as JSON."""
    values = statistics.values()
    counted = [v for (layer, _), v in values.items() if rule.scope == "all_layers" or layer in chosen.layers]
    grid: list[dict[str, Any]] = []
    for p in PERCENTILES:
        for f in FACTORS:
            varied = Rule(rule.layers, rule.fraction, rule.scope, p, f)
            grid.append({"percentile": p, "factor": f, "experts": select(values, chosen.layers, varied).super_experts})
    sets = [select(statistics.values(d), chosen.layers, rule).super_experts for d in range(len(statistics.domains))]
    overlaps = [j for a, b in combinations(sets, 2) if (j := jaccard(a, b)) is not None]
    return {
        "rule": asdict(rule),
        "layers": chosen.layers,
        "threshold": chosen.threshold,
        "percentile": chosen.percentile,
        "largest": chosen.largest,
        "median": chosen.median,
        "reason": chosen.reason,
        "super_experts": [_entry(statistics, values, pair, n) for n, pair in enumerate(chosen.super_experts, 1)],
        "outliers": [_entry(statistics, values, pair, n) for n, pair in enumerate(chosen.outliers, 1)],
        "protect": [list(pair) for pair in chosen.super_experts if pair[1] != SHARED],
        "next": [_entry(statistics, values, p, n) for n, p in enumerate(_runners_up(values, chosen), 1)],
        "tail": {
            "exponent": tail_exponent(counted, chosen.largest * rule.factor),
            "smallest": chosen.largest * rule.factor,
            "ccdf": _ccdf(counted),
        },
        "sensitivity": grid,
        "constant": all(cell["experts"] == grid[0]["experts"] for cell in grid),
        "domains": {d: [list(p) for p in s] for d, s in zip(statistics.domains, sets, strict=True)},
        "jaccard": sum(overlaps) / len(overlaps) if overlaps and chosen.super_experts else None,
        "hidden": {
            str(index): {
                "peaks": [asdict(p) for p in h.peaks],
                "median": h.median,
                "massive": h.massive,
            }
            for index, h in statistics.hidden.items()
        },
        "values": {
            str(index): {
                "routed": layer.output_max_DE.amax(0).tolist(),
                "shared": statistics.shared[index][0] if index in statistics.shared else None,
                "tokens": layer.count_E.tolist(),
            }
            for index, layer in statistics.layers.items()
        },
        "first_ids": dict(statistics.first_ids),
        "notes": _notes(statistics, rule, chosen, len(counted)),
    }


def _runners_up(values: Mapping[Pair, float], chosen: Selection) -> list[Pair]:
    """The largest of the layers that count which were not chosen: what the super experts stand out from."""
    rest = [p for p in values if p[0] in chosen.layers and p not in chosen.super_experts]
    return sorted(rest, key=lambda p: (-values[p], p))[:5]


def _entry(statistics: Statistics, values: Mapping[Pair, float], pair: Pair, rank: int) -> dict[str, Any]:
    index, expert = pair
    entry: dict[str, Any] = {"rank": rank, "layer": index, "expert": name_of(expert), "value": values[pair]}
    if expert == SHARED:
        return {**entry, "channel": statistics.shared[index][1], "protectable": False}
    layer = statistics.layers[index]
    starts = int(layer.starts)
    rest = layer.tokens - starts

    def mean(name: str, count: int) -> float | None:
        return float(layer.stats[name][expert]) / count if name in layer.stats and count else None

    return {
        **entry,
        "channel": int(layer.output_max_channel_E[expert]),
        "inner_value": float(layer.inner_max_E[expert]),
        "inner_channel": int(layer.inner_max_channel_E[expert]),
        "protectable": True,
        "tokens": int(layer.count_E[expert]),
        "first_token_share": mean("start_share_E", starts),
        "other_tokens_share": mean("rest_share_E", rest),
        "first_token_score": mean("start_score_E", starts),
        "other_tokens_score": mean("rest_score_E", rest),
    }


def _ccdf(values: Collection[float], points: int = 64) -> list[list[float]]:
    """[value, share of values at least as large] at ranks spaced evenly in their logarithm, largest first."""
    ordered = sorted(values, reverse=True)
    last = len(ordered)
    ranks = sorted({round(last ** (i / (points - 1))) for i in range(points)}) if last else []
    return [[ordered[r - 1], r / last] for r in ranks]


def _notes(statistics: Statistics, rule: Rule, chosen: Selection, counted: int) -> list[str]:
    notes = []
    first, total = statistics.first_ids.most_common(1)[0][1], statistics.first_ids.total()
    if first < total or total == 1:
        notes.append(
            f"{total} sequences begin with {len(statistics.first_ids)} different tokens: no start token is seen, and"
            " super experts act on the first token; use whole documents (--no-pack) and a tokenizer that adds one"
        )
    most = counted - 1 - math.floor(rule.percentile / 100 * (counted - 1)) if counted else 0
    if 0 < most < 3:
        notes.append(
            f"with {counted} experts in the layers that count, at most {most} can be above the percentile"
            f" {rule.percentile:g}: look at the next largest too"
        )
    if any(expert == SHARED for _, expert in chosen.super_experts):
        notes.append("shared experts are never removed by a method, so the list to protect leaves them out")
    return notes


# -- verification -----------------------------------------------------------------------------------------------------

WHOLE, SUPER, GIVEN, WEIGHTS, OUTLIERS = "nothing", "super experts", "given experts", "super weights", "outlier experts"
RANDOM, SAME_LAYERS = "random experts", "random experts of the same layers"
VERDICT = (
    "confirmed if removing them raises the loss by more than removing any of the random sets does, also at the lower"
    " end of the 95 % interval of the change"
)


def variants(
    statistics: Statistics,
    chosen: Selection,
    moe: Mapping[int, MoELayer],
    *,
    given: Collection[Pair] = (),
    controls: int = 5,
    seed: int = 0,
) -> list[Variant]:
    """What to run to see whether the chosen experts matter; [] if there is nothing to remove.

    The whole model; without all super experts; without those of one layer, where there are several layers; without the
    single weights they work through; without the outliers; without the `given` experts; and, as controls for the super
    experts (or the given ones, if there are none), random sets of as many.
    """
    check_pairs(given, moe)
    supers = chosen.super_experts
    found = [Variant(WHOLE)]
    if supers:
        found.append(Variant(SUPER, frozenset(supers)))
        layers = sorted({layer for layer, _ in supers})
        if len(layers) > 1:
            found += [Variant(f"{SUPER} of layer {i}", frozenset(p for p in supers if p[0] == i)) for i in layers]
        if weights := tuple(_super_weight(statistics, pair) for pair in supers if pair[1] != SHARED):
            found.append(Variant(WEIGHTS, zeroed=weights))
    if given:
        found.append(Variant(GIVEN, frozenset(given)))
    if len(found) == 1:
        return []
    if chosen.outliers:
        found.append(Variant(OUTLIERS, frozenset(chosen.outliers)))
    for name, same in ((RANDOM, False), (SAME_LAYERS, True)):
        sets = random_sets(supers or given, moe, controls, same_layers=same, seed=seed)
        found += [Variant(f"{name} {n}", pairs) for n, pairs in enumerate(sets, 1)]
    return found


def _super_weight(statistics: Statistics, pair: Pair) -> tuple[int, int, int, int]:
    layer = statistics.layers[pair[0]]
    return (*pair, int(layer.output_max_channel_E[pair[1]]), int(layer.inner_max_channel_E[pair[1]]))


def verification(
    runs: Collection[Variant], losses: Mapping[str, Mapping[str, Any]], trace: Trace, chosen: Selection
) -> dict[str, Any]:
    """What removing experts did, as JSON, with a verdict by the rule `VERDICT`.

    losses : {variant name: loss, delta, delta_low, delta_high, perplexity, kl of all text together}.
    """
    rows, whole = [], trace.sinks[WHOLE]
    for variant in runs:
        decay = {
            str(i): sink_decay(whole[i], sink) for i, sink in sorted(trace.sinks[variant.name].items()) if i in whole
        }
        rows.append(
            {
                "removed": variant.name,
                "experts": [[layer, name_of(expert)] for layer, expert in sorted(variant.removed)],
                "weights": [list(z) for z in variant.zeroed],
                **losses[variant.name],
                "sink_decay": decay,
                "hidden_max": {str(i): v for i, v in sorted(trace.hidden_max[variant.name].items())},
            }
        )
    controls = [row for row in rows if row["removed"].startswith(RANDOM)]
    verdict = None
    if chosen.super_experts and controls:
        tested = next(row for row in rows if row["removed"] == SUPER)
        most = max(row["delta"] for row in controls)
        verdict = "confirmed" if tested["delta_low"] > most and tested["delta"] > most else "not confirmed"
    depth = sorted(trace.hidden_max[WHOLE])
    return {
        "rule": VERDICT,
        "verdict": verdict,
        "runs": rows,
        "sink": {str(i): {"share": sink.share, "row_sum": sink.row_sum} for i, sink in sorted(whole.items())},
        "no_sink": [i for i in depth if i not in whole],
        "sink_decay_is": "per head, attention on the first token summed over all later queries of all sequences, after"
        " over before; then 1 minus the mean over heads",
    }


@dataclass
class SuperExperts:
    """The finding. report : everything, as JSON; its `protect` is what compression takes with --protect."""

    report: dict[str, Any]

    @property
    def protect(self) -> list[Pair]:
        """The routed super experts: (decoder layer, expert)."""
        return [(layer, expert) for layer, expert in self.report["protect"]]

    def save(self, file: Path, *, overwrite: bool = False) -> None:
        """Write the report. Raises OutputError if `file` is there already or cannot be written."""
        check_file(file, overwrite=overwrite)
        write_json(file, self.report)


def check_file(file: Path, *, overwrite: bool = False) -> None:
    """Raise OutputError unless `file` can be written; cheap enough to be asked first."""
    if file.is_dir():
        raise OutputError(f"{file} is a folder, and a file is to be written", "Choose another name.")
    if file.exists() and not overwrite:
        raise OutputError(f"{file} exists", "Choose another name, or pass --overwrite.")
    if not file.absolute().parent.is_dir():
        raise OutputError(f"cannot write {file}: no folder {file.parent}")


def report(model: str, digest: str, data: TokenData, compute_dtype: str, finding: dict[str, Any]) -> SuperExperts:
    """The finding with what it was made of: the model it holds for, and the text."""
    first_id, first = Counter(finding.pop("first_ids")).most_common(1)[0]
    about = {
        "digest": data.digest,
        "sources": data.sources,
        "samples": data.samples,
        "length": data.length,
        "tokens": data.tokens,
        "first_token": {"id": first_id, "sequences": first},
    }
    head = {"format": FORMAT, "kind": "super-experts", "model": model, "model_digest": digest}
    finding["notes"] += data.warnings
    return SuperExperts({**head, "data": about, "compute_dtype": compute_dtype, **finding})
