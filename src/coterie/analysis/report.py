"""The report of a compression run: one HTML page that needs no other file and no network.

`Report` is the data: frozen dataclasses that go to JSON and back. `write_report` turns one into the page.
Nothing here measures anything. What the page concludes, it concludes from the intervals it was given, by the rules in
`clearly_worse_uncalibrated` and `reversals`.

Losses are nats per token, sizes are bytes, intervals are 95 %.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

from pydantic import TypeAdapter, ValidationError

from coterie.analysis import figures
from coterie.analysis.page import render_page, write_page
from coterie.errors import DataError

# ---- the data ----


@dataclass(frozen=True)
class LayerRow:
    """One MoE layer: its routed experts, what a method thought of them, and which it kept.

    Parameters
    ----------
    kept : list of int
        Experts that stay, as numbered in the original. A merged expert counts under its group's representative.
    saliency : list of float
        One number per original expert, larger is more worth keeping. Compared within the layer only.
    load : list of float, optional
        Share of the routed slots each original expert received, summing to 1. None: not profiled.
    """

    index: int
    name: str
    experts: int
    top_k: int
    kept: list[int]
    saliency: list[float]
    load: list[float] | None

    def __post_init__(self) -> None:
        if len(self.saliency) != self.experts or (self.load is not None and len(self.load) != self.experts):
            raise ValueError(
                f"layer {self.index}: saliency and load need one number for each of {self.experts} experts"
            )
        if any(not 0 <= expert < self.experts for expert in self.kept):
            raise ValueError(f"layer {self.index}: kept experts must lie in 0..{self.experts - 1}")


@dataclass(frozen=True)
class Size:
    """A checkpoint on disk: bytes, all parameters, and those one token passes through."""

    bytes: int
    parameters: int
    active_parameters: int


@dataclass(frozen=True)
class DomainQuality:
    """How well one checkpoint predicts the held-out text of one domain.

    Parameters
    ----------
    loss, loss_low, loss_high : float
        Mean loss and its bootstrap interval, nats per token. A variant's interval, less the original's loss, is read as
        the interval of the change: best a paired one (resample the difference, add the original's loss back).
    kl, kl_low, kl_high : float, optional
        KL divergence from the original's next-token distribution, nats per token.
    agreement : float, optional
        Share of positions where the most likely token is the original's, 0 to 1.
    calibrated : bool
        Whether the calibration text covered this domain.
    """

    domain: str
    tokens: int
    loss: float
    loss_low: float
    loss_high: float
    kl: float | None
    kl_low: float | None
    kl_high: float | None
    agreement: float | None
    calibrated: bool


@dataclass(frozen=True)
class Variant:
    """One compressed checkpoint. `name` is what the page calls it, for example "reap, 50%"; names are unique."""

    name: str
    method: str
    paper: str
    path: str
    size: Size
    layers: list[LayerRow]
    quality: list[DomainQuality]
    recipe: dict[str, Any]
    warnings: list[str]


@dataclass(frozen=True)
class Damage:
    """The rise of the loss on one domain, and its interval: the variant's interval less the original's mean loss."""

    domain: str
    calibrated: bool
    rise: float
    low: float
    high: float


@dataclass(frozen=True)
class Report:
    """Everything the page shows: an original and one or more variants of it.

    Parameters
    ----------
    calibration : dict
        Known keys: files (list), samples, length (tokens), tokens_per_domain (dict), digest. Others are shown too.
    redundancy : dict, optional
        Known keys: load_concentration and saliency_concentration (0 even .. 1 all on one expert), mean_best_match
        (similarity of an expert to its nearest neighbour, 1 = a copy), warning (text). Others are shown too.
    created : str
        When, as the page should say it.
    """

    title: str
    model: str
    architecture: str
    original: Size
    original_quality: list[DomainQuality]
    variants: list[Variant]
    calibration: dict[str, Any]
    redundancy: dict[str, Any] | None
    versions: dict[str, str]
    created: str
    elapsed_seconds: float | None

    def __post_init__(self) -> None:
        names = [variant.name for variant in self.variants]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"a report needs one or more variants with names of their own, not {names}")
        covered = {(quality.domain, quality.calibrated) for variant in self.variants for quality in variant.quality}
        if len(covered) > len({domain for domain, _ in covered}):
            raise ValueError("a report has one calibration: a domain is in it for all variants or for none")

    def to_json(self) -> str:
        """The report as JSON text. Raises DataError where a number is not finite: JSON has no such numbers."""
        data = asdict(self)
        if broken := next(_not_finite(data, ""), None):
            raise DataError(f"a report holds finite numbers only: {broken}", "Leave out what was not measured.")
        return json.dumps(data)

    @staticmethod
    def from_json(text: str) -> "Report":
        """Read what `to_json` wrote. Raises DataError where the text is something else."""
        try:
            report = TypeAdapter(Report).validate_json(text, strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "report"
            raise DataError(f"not a report: {where}: {first['msg']}") from error
        report.to_json()  # pydantic's parser lets NaN pass
        return report

    def damage(self, variant: Variant) -> list[Damage]:
        """The rise of the loss on each domain that was measured on both checkpoints, in the original's order."""
        measured = {quality.domain: quality for quality in variant.quality}
        pairs = [(before, measured[before.domain]) for before in self.original_quality if before.domain in measured]
        return [
            Damage(
                before.domain,
                after.calibrated,
                after.loss - before.loss,
                after.loss_low - before.loss,
                after.loss_high - before.loss,
            )
            for before, after in pairs
        ]


def _not_finite(value: Any, where: str) -> Iterator[str]:
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{where} = {value}"
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _not_finite(item, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list | tuple):
        for position, item in enumerate(value):
            yield from _not_finite(item, f"{where}[{position}]")


# ---- what the numbers say ----


def clearly_worse_uncalibrated(damages: list[Damage]) -> list[Damage]:
    """Domains outside the calibration text that were damaged clearly more than those inside it.

    Clearly: the whole interval of the rise lies above zero and above the interval of every calibrated domain.
    With no calibrated domain measured there is nothing to compare with, and the answer is empty.
    """
    calibrated = [damage.high for damage in damages if damage.calibrated]
    if not calibrated:
        return []
    floor = max(0.0, *calibrated)
    return [damage for damage in damages if not damage.calibrated and damage.low > floor]


def reversals(report: Report) -> list[tuple[Variant, Damage]]:
    """Where the variant that is best on the calibrated domains is the worst on another.

    Best: the smallest mean rise over its calibrated domains. Worst: the largest rise on the other domain, with an
    interval that lies above that of some other variant.
    """
    damages = [(variant, report.damage(variant)) for variant in report.variants]
    rises = [(fmean(inside), v, ds) for v, ds in damages if (inside := [d.rise for d in ds if d.calibrated])]
    if len(rises) < 2:
        return []
    _, best, own = min(rises, key=lambda row: row[0])
    found = []
    for damage in (d for d in own if not d.calibrated):
        rivals = [d for variant, ds in damages if variant is not best for d in ds if d.domain == damage.domain]
        if rivals and damage.rise > max(d.rise for d in rivals) and damage.low > min(d.high for d in rivals):
            found.append((best, damage))
    return found


@dataclass(frozen=True)
class Summary:
    """One variant in one line: means over the domains measured on the original and on every measured variant."""

    variant: Variant
    domains: int
    loss: float | None
    rise: float | None
    kl: float | None
    agreement: float | None
    worst: Damage | None


def summarize(report: Report) -> list[Summary]:
    """A line per variant; None where nothing was measured."""
    measured = [{quality.domain for quality in v.quality} for v in report.variants if v.quality]
    shared = {quality.domain for quality in report.original_quality}.intersection(*measured)
    lines = []
    for variant in report.variants:
        quality = [q for q in variant.quality if q.domain in shared]
        damages = [damage for damage in report.damage(variant) if damage.domain in shared]
        lines.append(
            Summary(
                variant=variant,
                domains=len(quality),
                loss=_mean([q.loss for q in quality]),
                rise=_mean([d.rise for d in damages]),
                kl=_mean([q.kl for q in quality]),
                agreement=_mean([q.agreement for q in quality]),
                worst=max(damages, key=lambda damage: damage.rise, default=None),
            )
        )
    return lines


def _mean(values: list[float] | list[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return fmean(numbers) if numbers and len(numbers) == len(values) else None


def overlap(a: Variant, b: Variant) -> float | None:
    """Share of kept experts that two variants have in common, of the larger count; None without common layers."""
    rows = {row.index: set(row.kept) for row in b.layers}
    pairs = [(set(row.kept), rows[row.index]) for row in a.layers if row.index in rows]
    larger = max(sum(len(x) for x, _ in pairs), sum(len(y) for _, y in pairs))
    return sum(len(x & y) for x, y in pairs) / larger if larger else None


# ---- the page ----


def write_report(report: Report, path: Path) -> None:
    """Write the page to `path`, whole or not at all.

    Raises OutputError where it cannot be written, DataError where a number is not finite.
    """
    write_page(render(report), path)


def render(report: Report) -> str:
    """The page as text."""
    report.to_json()  # a number that is not finite is named here, before it becomes a gap in a figure
    damages = {variant.name: report.damage(variant) for variant in report.variants}
    table = _table(report, damages)
    summaries = summarize(report)
    return render_page(
        "report.html.j2",
        report=report,
        summaries=summaries,
        largest_rise=max((line.rise for line in summaries if line.rise is not None), default=0.0),
        table=table,
        hits=[row for row in table if any(cell["clearly_worse"] for cell in row["cells"])],
        reversals=reversals(report),
        overlaps={(a.name, b.name): overlap(a, b) for a, b in combinations(report.variants, 2)},
        side_by_side=figures.side_by_side(report),
        figures=figures.draw(report),
    )


def _table(report: Report, damages: dict[str, list[Damage]]) -> list[dict[str, Any]]:
    """The quality table by domain, calibrated domains first: the original's quality, then a cell per variant."""
    before = {quality.domain: quality for quality in report.original_quality}
    after = {variant.name: {quality.domain: quality for quality in variant.quality} for variant in report.variants}
    calibrated = {domain: quality.calibrated for side in (before, *after.values()) for domain, quality in side.items()}
    rows = []
    for domain in sorted(calibrated, key=lambda domain: not calibrated[domain]):
        found = {name: damage for name, own in damages.items() for damage in own if damage.domain == domain}
        # Best: the smallest rise, and every variant whose interval reaches down to the upper end of that one's.
        reach = min(found.values(), key=lambda damage: damage.rise).high if found else 0.0
        cells = [
            {
                "variant": v,
                "quality": after[v.name].get(domain),
                "damage": damage,
                "best": damage is not None and damage.low <= reach,
                "clearly_worse": damage is not None and damage in clearly_worse_uncalibrated(damages[v.name]),
            }
            for v in report.variants
            for damage in [found.get(v.name)]
        ]
        rows.append({"domain": domain, "calibrated": calibrated[domain], "before": before.get(domain), "cells": cells})
    return rows
