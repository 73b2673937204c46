"""What reproductions share: the model and text they run on, and the file a result is kept in.

A reproduction states the paper's claim and its rule for a verdict before it runs; the verdict is computed from the
numbers. By default it runs on the pocket model and the demo texts; a larger trained model and real text make a better
test of the same claim.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from coterie import assets

RESULTS = Path(__file__).parent / "results"


@dataclass
class Reproduction:
    """One recorded run. `rows` are dicts with the keys of `columns`."""

    slug: str
    title: str
    claim: str
    published: str
    rule: str
    columns: list[str]
    seeds: list[int]
    setting: dict[str, Any]
    command: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    verdict: str = "inconclusive"
    versions: dict[str, str] = field(default_factory=dict)

    def save(self) -> Path:
        self.versions = {n: importlib.metadata.version(n) for n in ("coterie", "torch", "transformers")}
        RESULTS.mkdir(exist_ok=True)
        file = RESULTS / f"{self.slug}.json"
        file.write_text(json.dumps(asdict(self), indent=2) + "\n")
        return file

    def show(self) -> None:
        print(f"{self.title}\nclaim: {self.claim}\npublished: {self.published}\nrule: {self.rule}\n")
        width = {c: max(len(c), *(len(_text(r[c])) for r in self.rows)) for c in self.columns}
        for row in [{c: c for c in self.columns}, *self.rows]:
            print("  ".join(_text(row[c]).ljust(width[c]) for c in self.columns))
        print(f"\nverdict: {self.verdict}")


def _text(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def arguments(description: str | None, samples: int = 16, evaluate: int = 24) -> argparse.ArgumentParser:
    """The options every reproduction has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="trained MoE checkpoint (default: the pocket model)")
    parser.add_argument("--calibration", nargs="+", help="text files or a folder (default: the demo texts)")
    parser.add_argument("--evaluation", nargs="+", help="held-out text of the same domains")
    parser.add_argument("--samples", type=int, default=samples, help="calibration windows per domain")
    parser.add_argument("--evaluate", type=int, default=evaluate, help="evaluation windows per domain")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    return parser


@contextmanager
def workplace(given: argparse.Namespace) -> Iterator[tuple[str, list[str], list[str], Path]]:
    """(model, calibration text, evaluation text, scratch folder)."""
    with tempfile.TemporaryDirectory(prefix="coterie-reproduction-") as name:
        folder = Path(name)
        calibration, evaluation = assets.write_demo_texts(folder / "text")
        yield (
            given.model or str(assets.pocket()),
            given.calibration or [str(calibration)],
            given.evaluation or [str(evaluation)],
            folder,
        )


def mean_and_spread(values: list[float]) -> tuple[float, float]:
    """Mean and standard deviation over seeds."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def against(values: Sequence[float], base: Sequence[float]) -> tuple[float, float]:
    """Mean difference to `base`, paired by seed, and its standard error."""
    mean, spread = mean_and_spread([v - b for v, b in zip(values, base, strict=True)])
    return mean, spread / len(values) ** 0.5


def told(difference: tuple[float, float]) -> str:
    """A difference of losses in words: below or above by more than two standard errors, or neither."""
    mean, error = difference
    return "below" if mean < -2 * error else "above" if mean > 2 * error else "within two standard errors"


def setting(given: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """What a reader must know of a run, without any path of this machine."""
    return {
        "model": "the pocket model" if given.model is None else "a trained Qwen3-MoE, 11 M parameters",
        "text": "the demo texts"
        if given.calibration is None
        else "encyclopaedia, reviews, arithmetic, news, Spanish, Dutch, Python",
        "calibration windows per domain": given.samples,
        "evaluation windows per domain": given.evaluate,
        "tokens per window": given.length,
        **more,
    }


def resident(model: str) -> Any:
    """A checkpoint whole in memory in float32, with experts that masks can be tried on (`narrowed_losses`)."""
    from coterie import api
    from coterie.experts.forward import NAME

    loaded, _ = api.load(model, dtype="float32")
    loaded.set_experts_implementation(NAME)
    return loaded


def narrowed_losses(model: Any, data: Any, keeps: Mapping[int, Sequence[int]] | None = None) -> list[float]:
    """Loss of each domain of `data` when only the experts {layer: ids} may be used; nothing is copied or written."""
    import torch

    from coterie.anatomy import moe_layers, narrowed

    sums, counts = [0.0] * len(data.domains), [0] * len(data.domains)
    with ExitStack() as stack, torch.no_grad():
        for layer in moe_layers(model):
            if keeps is not None:
                stack.enter_context(narrowed(layer, list(keeps[layer.index])))
        for batch in data.batches:
            mask_BL = batch.mask_BL if batch.mask_BL is not None else torch.ones_like(batch.ids_BL, dtype=torch.bool)
            logits = model(input_ids=batch.ids_BL, attention_mask=mask_BL.long(), use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), batch.ids_BL[:, 1:].flatten(), reduction="none"
            ).view(len(batch.ids_BL), -1)
            for row, domain in enumerate(batch.domain_B.tolist()):
                real = mask_BL[row, 1:]
                sums[domain] += float(loss[row][real].sum())
                counts[domain] += int(real.sum())
    return [total / count for total, count in zip(sums, counts, strict=True)]


def files_by_domain(sources: Sequence[str]) -> dict[str, str]:
    """{name before the first point: file} of the files and of the files in the folders given."""
    files = [f for s in map(Path, sources) for f in (sorted(s.iterdir()) if s.is_dir() else [s])]
    return {file.name.split(".")[0]: str(file) for file in files}


def quantized(
    model: str,
    calibration: list[str],
    evaluation: list[str],
    given: argparse.Namespace,
    folder: Path,
    *,
    seed: int,
    method: str = "quantize",
    plan: Any = None,
    **parameters: Any,
) -> tuple[float, Any]:
    """Write a quantized checkpoint, evaluate it and forget it: its mean loss over domains, and what `compress` told.

    plan : bits decided before, instead of a method.
    """
    from coterie import api

    text = {"data": calibration, "samples": given.samples, "length": given.length, "seed": seed}
    request: dict[str, Any] = {"plan": plan} if plan is not None else {"method": method, "parameters": parameters}
    with tempfile.TemporaryDirectory(dir=folder) as place:
        result = api.compress(model, f"{place}/out", **request, **text)
        (quality,) = api.evaluate(
            [f"{place}/out"], evaluation, samples=given.evaluate, length=given.length, tokenizer=model
        )
    return quality.mean_loss, result
