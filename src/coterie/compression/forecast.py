"""Before anything is written: what the job will need, and whether the budget looks harmful.

Sizes come from the checkpoint's headers, times from the first layer as it was measured. The redundancy estimate is a
rule of thumb made of three figures of a profile; it warns, it does not decide.
"""

# E experts, H hidden

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from coterie.compression.plan import LayerPlan
from coterie.compression.sizes import Size
from coterie.profiling.profile import LayerProfile
from coterie.streaming.checkpoint import DTYPES
from coterie.streaming.model import StreamedModel
from coterie.text import TokenData

HARMFUL_SALIENCY = 0.25  # dropped experts hold more than this share of the saliency ...
REDUNDANT_MATCH = 0.6  # ... and what they put out is not close to any kept expert's
PUBLISHED = "Published 64-expert models keep between 17% and 93% of their GSM8K score at the same 50% of experts."


@dataclass(frozen=True)
class Forecast:
    """Needs of a compression, in bytes and seconds.

    scratch_bytes : hidden states kept for a restart. seconds : None before a layer was measured.
    """

    memory_bytes: int
    memory_available: int
    disk_bytes: int
    scratch_bytes: int
    disk_free: int
    bytes_to_read: int
    sweeps: int
    calibration_tokens: int
    seconds: float | None = None
    redundancy: dict[str, Any] | None = None

    def describe(self) -> dict[str, Any]:
        return asdict(self)

    def problems(self) -> list[str]:
        found = []
        if self.memory_bytes > self.memory_available:
            found.append(
                f"needs about {self.memory_bytes / 1e9:.1f} GB of memory, {self.memory_available / 1e9:.1f} GB are free"
            )
        if self.disk_bytes + self.scratch_bytes > self.disk_free:
            need = self.disk_bytes + self.scratch_bytes
            found.append(f"needs {need / 1e9:.1f} GB of disk, {self.disk_free / 1e9:.1f} GB are free")
        return found


def forecast(
    streamed: StreamedModel,
    size: Size,
    keep_share: float,
    out: Path,
    data: TokenData | None,
    memory_limit: int,
    sweeps: int = 1,
) -> Forecast:
    """What compressing to `keep_share` of the experts will need, in `sweeps` passes. Reads headers only."""
    tensors = streamed.checkpoint.tensors
    layer_bytes = max(sum(tensors[k].bytes_in_memory for k in keys) for keys in streamed.layer_keys)
    widen = streamed.compute_dtype.itemsize
    small = max(
        sum(tensors[k].numel for k in keys if not _is_expert(streamed, k)) * widen for keys in streamed.layer_keys
    )
    embedding = sum(tensors[k].numel * (widen + DTYPES[tensors[k].dtype].itemsize) for k in _embedding_keys(streamed))
    hidden = kept = 0
    if data is not None:
        width = streamed.config.get_text_config(decoder=True).hidden_size
        kept = data.samples * data.length * width * widen  # outputs of the last whole layer, for a restart
        hidden = min(memory_limit, data.samples * data.length * width * widen) + 6 * 8192 * width * widen
    process = psutil.Process().memory_info().rss
    peak = process + max(embedding, 2 * layer_bytes + small) + hidden
    removed = (1 - keep_share) * size.experts_total * size.bytes_of_expert
    place = next(p for p in (out, *out.absolute().parents) if p.exists())
    return Forecast(
        memory_bytes=int(peak),
        memory_available=psutil.virtual_memory().available + process,
        disk_bytes=int(size.bytes - removed),
        scratch_bytes=2 * kept,
        disk_free=shutil.disk_usage(place).free,
        bytes_to_read=size.bytes * sweeps,
        sweeps=sweeps,
        calibration_tokens=sum(data.tokens.values()) if data else 0,
    )


def _is_expert(streamed: StreamedModel, key: str) -> bool:
    return any(str(streamed.params[key]).startswith(f"{layer.experts_name}.") for layer in streamed.moe.values())


def _embedding_keys(streamed: StreamedModel) -> list[str]:
    embeddings = streamed.model.get_input_embeddings()
    path = next(name for name, module in streamed.model.named_modules() if module is embeddings)
    return streamed.keys_of(f"{path}.{n}" for n, _ in embeddings.named_parameters())


def redundancy(layers: Mapping[int, LayerProfile], plans: Mapping[int, LayerPlan]) -> dict[str, Any]:
    """How concentrated load and saliency are, how alike experts are, and a warning where the plan looks harmful.

    load_concentration, saliency_concentration : 0 = the same for every expert, 1 = all on one (1 - entropy / log E).
    dropped_load, dropped_saliency : share held by the experts the plan drops.
    mean_best_match : cosine of each dropped expert's mean output with the most similar kept expert's, averaged.
    """
    loads, saliencies, dropped_loads, dropped_scores, matches = [], [], [], [], []
    for index, plan in plans.items():
        layer = layers.get(index)
        gone = [e for e in range(plan.experts) if e not in set(plan.keep)]
        drop = [] if "clusters" in plan.extra else gone  # merged experts are not dropped
        if layer is not None and "count_E" in layer.stats:
            share_E = layer.count_E.double() / layer.count_E.sum().clamp(min=1)
            loads.append(_concentration(share_E))
            dropped_loads.append(float(share_E[drop].sum()))
        score_E = torch.tensor(plan.scores, dtype=torch.float64)
        if len(score_E) and score_E.min() >= 0 and score_E.sum() > 0:
            saliencies.append(_concentration(score_E / score_E.sum()))
            dropped_scores.append(float(score_E[drop].sum() / score_E.sum()))
        if layer is not None and "output_sum_EH" in layer.stats and drop:
            unit_EH = torch.nn.functional.normalize(layer.output_sum_EH, dim=1)
            matches.append(float((unit_EH[drop] @ unit_EH[plan.keep].T).amax(1).mean()))
    figures: dict[str, Any] = {
        "load_concentration": _mean(loads),
        "saliency_concentration": _mean(saliencies),
        "dropped_load": _mean(dropped_loads),
        "dropped_saliency": _mean(dropped_scores),
        "mean_best_match": _mean(matches),
    }
    dropped, match = figures["dropped_saliency"], figures["mean_best_match"]
    figures["warning"] = ""
    if dropped is not None and dropped > HARMFUL_SALIENCY and (match is None or match < REDUNDANT_MATCH):
        alike = "" if match is None else f", and resemble the kept ones little (mean best match {match:.2f})"
        figures["warning"] = (
            f"This budget looks harmful: the dropped experts hold {dropped:.0%} of the saliency{alike}. {PUBLISHED}"
            " Evaluate before you rely on the result, or keep more."
        )
    return figures


def _concentration(share_E: torch.Tensor) -> float:
    return 1 - float(torch.special.entr(share_E).sum()) / math.log(len(share_E)) if len(share_E) > 1 else 0.0


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
