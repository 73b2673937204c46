"""EASY-EP: a few demonstrations of a domain say which half of the experts it needs (arXiv:2504.06792).

Claim: half of the experts, chosen on up to 25 demonstrations of a domain, keep the model's quality in that domain.
Published: DeepSeek-R1 at 128 of 256 experts keeps 66.55 of 67.20 on average over eight benchmarks; the gate score alone
keeps 56.49. Overlap of the important experts is above 84 % within a domain, and 5 to 25 demonstrations find over 90 %.

Here: half of the experts of a small trained MoE, scored on 25 documents of one domain at a time; held-out loss in that
domain and in the others, averaged over domains, for several draws of the documents. Controls: the same score on
documents of all domains (domain-blind), REAP on the same, frequency in the domain, and random experts. Ablations: the
paper's score without the token weight, and the gate alone. Overlaps are intersection over union of the kept halves.

Two samples of a domain share no document: where a domain has fewer than twice as many, a sample is half of them.

    python reproductions/easy_ep.py
"""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from common import Reproduction, arguments, files_by_domain, mean_and_spread, narrowed_losses, resident, workplace
from coterie import api
from coterie.anatomy import moe_layers
from coterie.compression.methods import get_method
from coterie.compression.selector import Budget, select_layer
from coterie.profiling.profile import LayerProfile, Profile
from coterie.text import read_documents

DEMONSTRATIONS = 25
COUNTS = (5, 10, 25, 100)
METHODS = {
    "EASY-EP": ("easy-ep", {}),
    "without the token weight": ("easy-ep", {"variant": "gate-norm"}),
    "gate alone": ("easy-ep", {"variant": "gate"}),
    "frequency": ("frequency", {}),
}
RULE = (
    "differences are paired by seed and averaged over domains; reproduced if, at half of the experts, EASY-EP's own"
    " masks lose less in their domain than the better of the two domain-blind masks, and less than masks of other"
    " domains, both by more than two standard errors over seeds, and masks of two disjoint samples of one domain"
    " overlap more than masks of two domains; not reproduced if they lose more than the better domain-blind mask by"
    " more than two standard errors; inconclusive otherwise"
)

Masks = dict[int, list[int]]


def masks(model: torch.nn.Module, layers: Mapping[int, LayerProfile], name: str, parameters: dict) -> Masks:
    """The best half of every layer by a method's score."""
    method = get_method(name, parameters)
    found = {}
    for layer in moe_layers(model):
        half = layer.num_experts // 2
        found[layer.index] = select_layer(method.score(layers[layer.index]), half, layer, Budget(keep_experts=half))
    return found


def overlap(a: Masks, b: Masks) -> float:
    """Intersection over union, mean over layers."""
    return statistics.mean(len(set(a[i]) & set(b[i])) / len(set(a[i]) | set(b[i])) for i in a)


def profiled(checkpoint: str, documents: Mapping[str, Sequence[str]], length: int, folder: Path) -> Profile:
    """Statistics on {domain: documents}, one document a sequence."""
    file = folder / "demonstrations.jsonl"
    rows = [{"domain": domain, "text": text} for domain, texts in documents.items() for text in texts]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return api.profile(
        checkpoint,
        [str(file)],
        methods=["easy-ep", "reap", "soft-frequency", "frequency"],
        samples=max(len(texts) for texts in documents.values()),
        length=length,
        pack=False,
    )


def drawn(file: str, seed: int) -> list[str]:
    """The documents of one domain in a random order."""
    texts = [text for _, text in read_documents(file) if isinstance(text, str) and text.strip()]
    random.Random(seed).shuffle(texts)
    return texts


def main() -> None:
    given = arguments(__doc__, samples=DEMONSTRATIONS, evaluate=16).parse_args()
    losses: dict[str, list[float]] = {}
    overlaps: dict[str, list[float]] = {}
    shown = given.model is None and given.calibration is None
    with workplace(given) as (checkpoint, calibration, evaluation, folder):
        model = resident(checkpoint)
        files = files_by_domain(calibration)
        held_out = api.calibration(checkpoint, evaluation, samples=given.evaluate, length=given.length)
        assert held_out is not None
        assert held_out.domains == sorted(files)
        domains = held_out.domains
        full = statistics.mean(narrowed_losses(model, held_out))
        for seed in given.seeds:
            texts = {d: drawn(files[d], seed) for d in domains}
            size = {d: min(given.samples, len(texts[d]) // 2) for d in domains}
            first = {d: texts[d][: size[d]] for d in domains}
            own = {d: profiled(checkpoint, {d: first[d]}, given.length, folder) for d in domains}
            blind = profiled(checkpoint, first, given.length, folder)
            by_domain = {n: {d: masks(model, own[d].layers, *m) for d in domains} for n, m in METHODS.items()}
            row: dict[str, float] = {}
            for name, of in by_domain.items():
                table = {d: narrowed_losses(model, held_out, of[d]) for d in domains}
                row[f"{name}, own domain"] = statistics.mean(table[d][i] for i, d in enumerate(domains))
                if name == "EASY-EP":
                    row[f"{name}, another domain's"] = statistics.mean(
                        table[m][i] for i, d in enumerate(domains) for m in domains if m != d
                    )
            for name, method in (("EASY-EP", "easy-ep"), ("REAP", "reap")):
                found = narrowed_losses(model, held_out, masks(model, blind.layers, method, {}))
                row[f"{name}, all domains"] = statistics.mean(found)
            chance = masks(model, blind.layers, "random", {"seed": seed})
            row["random"] = statistics.mean(narrowed_losses(model, held_out, chance))
            for name, value in row.items():
                losses.setdefault(name, []).append(value)
                print(f"seed {seed}: {name} {value:.4f}", flush=True)
            of = by_domain["EASY-EP"]
            other = {d: profiled(checkpoint, {d: texts[d][-size[d] :]}, given.length, folder) for d in domains}
            again = {d: masks(model, other[d].layers, "easy-ep", {}) for d in domains}
            pairs = [(a, b) for a in domains for b in domains if a < b]
            seen = {
                "two samples of one domain": statistics.mean(overlap(of[d], again[d]) for d in domains),
                "two domains": statistics.mean(overlap(of[a], of[b]) for a, b in pairs),
            }
            rest = {d: texts[d][size[d] :][: COUNTS[-1]] for d in domains}  # shares none with the first
            many = {d: profiled(checkpoint, {d: rest[d]}, given.length, folder) for d in domains}
            target = {d: masks(model, many[d].layers, "easy-ep", {}) for d in domains}
            for count in [c for c in COUNTS[:-1] if c <= min(size.values())]:
                few = {d: profiled(checkpoint, {d: first[d][:count]}, given.length, folder) for d in domains}
                seen[f"{count} documents and up to {COUNTS[-1]} others"] = statistics.mean(
                    overlap(masks(model, few[d].layers, "easy-ep", {}), target[d]) for d in domains
                )
            for name, value in seen.items():
                overlaps.setdefault(name, []).append(value)
                print(f"seed {seed}: overlap of {name} {value:.3f}", flush=True)
    result = Reproduction(
        slug="easy-ep" if shown else "easy-ep-other-model",
        title=f"EASY-EP on {'the pocket model' if shown else 'a small MoE and real text'} (arXiv:2504.06792)",
        claim="A few demonstrations of a domain say which half of the experts it needs.",
        published="DeepSeek-R1, 128 of 256 experts: 66.55 of 67.20 (average of eight benchmarks), gate score alone"
        " 56.49; overlap within a domain above 84 %.",
        rule=RULE,
        columns=["masks", "loss", "against EASY-EP", "standard error", "overlap"],
        seeds=given.seeds,
        setting={
            "model": "the pocket model" if given.model is None else "a trained Qwen3-MoE, 11 M parameters",
            "domains": ", ".join(domains),
            "documents per domain": f"{min(size.values())} to {max(size.values())}",
            "most tokens of a document": given.length,
            "evaluation windows per domain": given.evaluate,
            "kept": "half of the experts of every layer",
        },
        command="python reproductions/easy_ep.py"
        + ("" if shown else " --model MODEL --calibration TEXT --evaluation HELD_OUT"),
    )
    base = losses["EASY-EP, own domain"]
    result.rows.append(_row("original", full, full - statistics.mean(base), 0.0))
    for name, values in losses.items():
        difference, spread = mean_and_spread([v - b for v, b in zip(values, base, strict=True)])
        result.rows.append(_row(name, statistics.mean(values), difference, spread / len(values) ** 0.5))
    for name, values in overlaps.items():
        _, spread = mean_and_spread(values)
        result.rows.append(_row(f"overlap: {name}", "", "", spread / len(values) ** 0.5, statistics.mean(values)))
    rows = {r["masks"]: r for r in result.rows}
    blind_row = min((rows["EASY-EP, all domains"], rows["REAP, all domains"]), key=lambda r: r["loss"])
    cross = rows["EASY-EP, another domain's"]
    within, across = (rows[f"overlap: {n}"]["overlap"] for n in ("two samples of one domain", "two domains"))
    clear = [r["against EASY-EP"] > 2 * r["standard error"] for r in (blind_row, cross)]
    if all(clear) and within > across:
        result.verdict = "reproduced"
    elif blind_row["against EASY-EP"] < -2 * blind_row["standard error"]:
        result.verdict = "not reproduced"
    result.show()
    print(f"kept in {result.save()}")


def _row(name: str, loss: float | str, against: float | str, error: float, seen: float | str = "") -> dict:
    values = (name, loss, against, error, seen)
    return dict(zip(("masks", "loss", "against EASY-EP", "standard error", "overlap"), values, strict=True))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
