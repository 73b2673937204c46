"""From results to a report: collects what a compression recorded and what an evaluation measured."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from coterie.analysis.report import DomainQuality, LayerRow, Report, Size, Variant
from coterie.compression.bits import load_plan
from coterie.compression.methods import methods
from coterie.errors import DataError
from coterie.evaluation.compare import ModelResult
from coterie.profiling.profile import LayerProfile


def build_report(
    folders: Sequence[str],
    quality: Sequence[ModelResult] = (),
    *,
    loads: Mapping[int, LayerProfile] | None = None,
    redundancy: dict[str, Any] | None = None,
    architecture: str = "",
    elapsed: float | None = None,
) -> Report:
    """The report of one or more compressed checkpoints of the same original.

    Parameters
    ----------
    folders : compressed checkpoints, each with its coterie.json and plan.json.
    quality : results of evaluating the original and then each folder, in that order; empty if nothing was evaluated.
    loads : profile of the original's layers, for the expert load.

    Raises DataError for a folder that Coterie did not write.
    """
    records = [_record(Path(folder)) for folder in folders]
    first = records[0]
    domains = set(first["domains"])
    names = _names(records, folders)
    variants = []
    for number, (folder, record) in enumerate(zip(folders, records)):
        result = quality[number + 1] if quality else None
        variants.append(
            Variant(
                name=names[number],
                method=record["recipe"]["method"],
                paper=methods()[record["recipe"]["method"]].paper,
                path=Path(folder).name,
                size=_size(record["after"]),
                layers=_layers(Path(folder), loads or {}),
                quality=_quality(result, domains) if result else [],
                recipe=record["recipe"],
                warnings=list(record["notes"]),
            )
        )
    recipe = first["recipe"]
    calibration = {
        "files": [Path(source).name for source in recipe["data"]],
        "samples": recipe["samples"],
        "length": recipe["length"],
        "tokens_per_domain": first["tokens"],
        "digest": first["data_digest"],
    }
    return Report(
        title=f"{Path(recipe['model']).name}: {', '.join(names)}",
        model=Path(recipe["model"]).name,
        architecture=architecture,
        original=_size(first["before"]),
        original_quality=_quality(quality[0], domains) if quality else [],
        variants=variants,
        calibration=calibration,
        redundancy={k: v for k, v in redundancy.items() if v is not None and v != ""} if redundancy else None,
        versions=first["versions"],
        created=datetime.datetime.now().strftime("%Y-%m-%d %H:%M"),
        elapsed_seconds=elapsed,
    )


def _record(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads((folder / "coterie.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{folder} has no readable coterie.json", "A report is made of checkpoints Coterie wrote."
        ) from error
    assert isinstance(record, dict)
    return record


def _names(records: Sequence[Mapping[str, Any]], folders: Sequence[str]) -> list[str]:
    """A short name for each: the method and what it kept, with the folder where that is not enough."""
    short = [
        f"{r['recipe']['method']}, {r['after']['experts_total']}/{r['before']['experts_total']} experts"
        for r in records
    ]
    return [s if short.count(s) == 1 else f"{s} ({Path(f).name})" for s, f in zip(short, folders)]


def _size(entry: Mapping[str, int]) -> Size:
    return Size(entry["bytes"], entry["parameters"], entry["active_parameters"])


def _layers(folder: Path, loads: Mapping[int, LayerProfile]) -> list[LayerRow]:
    rows = []
    for layer in load_plan(folder / "plan.json").layers:
        seen = loads.get(layer.index)
        load = None
        if seen is not None and "count_E" in seen.stats:
            load = (seen.count_E.double() / seen.count_E.sum().clamp(min=1)).tolist()
        scores = layer.scores if len(layer.scores) == layer.experts else [0.0] * layer.experts
        top_k = seen.top_k if seen is not None else 0
        rows.append(LayerRow(layer.index, layer.name, layer.experts, top_k, layer.keep, scores, load))
    return rows


def _quality(result: ModelResult, calibrated: set[str]) -> list[DomainQuality]:
    """The interval of a variant is that of its paired difference, put on top of the original's loss."""
    rows = []
    for d in result.domains:
        low, high = d.loss_low, d.loss_high
        if d.kl is not None:
            low, high = d.loss - d.delta + d.delta_low, d.loss - d.delta + d.delta_high
        rows.append(
            DomainQuality(
                d.domain, d.tokens, d.loss, low, high, d.kl, d.kl_low, d.kl_high, d.agreement, d.domain in calibrated
            )
        )
    return rows
