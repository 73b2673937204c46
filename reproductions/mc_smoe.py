"""MC-SMoE: merging before factoring loses less than factoring alone, at equal bytes (arXiv:2310.01334).

Claim: experts that were merged first are of lower rank, so that merging and then storing low rank plus rows beats
storing all experts that way. Published (switch-base-32, COPA / SQuAD EM): merged, then compressed to 381M parameters
67 / 65.41, compressed only, 570M, 64 / 64.78; the stable rank of expert matrices falls by merging in most layers.

Here: M-SMoE to half of the experts of a small trained MoE, then MC-SMoE's factors and rows, against factors of half the
rank and half the rows for all experts: the same bytes. Both are distilled from the original for the same steps on the
same text while rows go. Beside them the full rank and rows for all experts (twice the bytes of experts), and the merged
model before it is factored. Bytes are those of the files written.

    python reproductions/mc_smoe.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from common import Reproduction, against, arguments, mean_and_spread, setting, told, workplace
from coterie import api

BOTH, ALONE, LARGER = "merged, then factored", "factored only", "factored only, full rank"
MERGED = "merged, no recovery"
RULE = (
    "differences are paired by seed; reproduced if merged, then factored is below factored only by more than two"
    " standard errors, their bytes within 2 %, and the mean stable rank over seeds falls by merging in more than half"
    " of the layers; not reproduced if factored only is below by more than two standard errors, or stable rank falls in"
    " fewer than half of the layers; inconclusive otherwise"
)


class Bench:
    """Losses, bytes and stable ranks of every arm and seed."""

    def __init__(self, given: Any, model: str, calibration: list[str], evaluation: list[str], folder: Path) -> None:
        self.given, self.model, self.folder = given, model, folder
        self.calibration, self.evaluation = calibration, evaluation
        self.losses: dict[str, list[float]] = {}
        self.bytes: dict[str, int] = {}
        self.ranks: dict[str, list[list[float]]] = {}

    def run(self, seed: int) -> None:
        given, merged = self.given, str(self.folder / "merged")
        api.compress(
            self.model,
            merged,
            method="m-smoe",
            data=self.calibration,
            samples=given.samples,
            length=given.length,
            keep=0.5,
            seed=seed,
            overwrite=True,
        )
        self.measure(MERGED, merged)
        self.factored(BOTH, merged, given.rank, given.rows, seed)
        self.factored(ALONE, self.model, given.rank // 2, given.rows / 2, seed)
        self.factored(LARGER, self.model, given.rank, given.rows, seed)

    def factored(self, name: str, source: str, rank: int, rows: float, seed: int) -> None:
        given, out = self.given, str(self.folder / "factored")
        parameters = {"rank": rank, "rows": rows, "steps": given.steps, "rate": given.rate, "teacher": self.model}
        done = api.compress(
            source,
            out,
            method="mc-smoe",
            parameters=parameters,
            data=self.calibration,
            samples=given.train,
            length=given.length // 2,
            seed=seed,
            overwrite=True,
        )
        self.ranks.setdefault(name, []).append([figures["stable_rank"] for figures in done.figures.values()])
        self.measure(name, out)

    def measure(self, name: str, model: str) -> None:
        given = self.given
        found = api.evaluate(
            [model], self.evaluation, tokenizer=self.model, samples=given.evaluate, length=given.length
        )
        self.losses.setdefault(name, []).append(found[0].mean_loss)
        self.bytes[name] = sum(file.stat().st_size for file in Path(model).glob("*.safetensors"))
        print(f"{name} {found[0].mean_loss:.4f}, {self.bytes[name]} bytes", flush=True)


def main() -> None:
    parser = arguments(__doc__, samples=8, evaluate=8)
    parser.add_argument("--steps", type=int, default=40, help="training steps, 8 windows of half the length each")
    parser.add_argument("--train", type=int, default=48, help="windows of each domain to train on")
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--rank", type=int, default=32, help="rank of merged experts; factored only has half")
    parser.add_argument("--rows", type=float, default=0.1, help="share of rows of merged experts that stay, likewise")
    given = parser.parse_args()
    with workplace(given) as (model, calibration, evaluation, folder):
        bench = Bench(given, model, calibration, evaluation, folder)
        bench.measure("original", model)
        for seed in given.seeds:
            bench.run(seed)
    before, after = (mean_by_layer(bench.ranks[name]) for name in (ALONE, BOTH))
    falls = sum(b < a for a, b in zip(before, after, strict=True))
    shown = given.model is None and given.calibration is None
    result = Reproduction(
        slug="mc-smoe" if shown else "mc-smoe-other-model",
        title=f"MC-SMoE on {'the pocket model' if shown else 'a small MoE and real text'} (arXiv:2310.01334)",
        claim="At equal bytes, merging experts and then factoring them loses less than factoring all; stable rank"
        " falls.",
        published="switch-base-32, COPA / SQuAD EM: merged, then compressed (381M) 67 / 65.41, compressed only (570M)"
        " 64 / 64.78, original (2.0B) 68 / 65.39.",
        rule=RULE,
        columns=["model", "loss", "against factored only", "standard error", "bytes", "stable rank by layer"],
        seeds=given.seeds,
        setting=setting(
            given,
            merging="M-SMoE, half of the experts on average over layers",
            factors=f"rank {given.rank} and {given.rows:.0%} of the rows; half of both where all experts are factored"
            " to the same bytes",
            training=f"{given.steps} steps of 8 windows of {given.length // 2} tokens, rate {given.rate:g}",
            **{"stable rank": "mean over a layer's expert matrices and seeds, before factoring"},
            **{"layers whose stable rank falls by merging": f"{falls} of {len(before)}"},
        ),
        command="python reproductions/mc_smoe.py"
        + ("" if shown else " --model MODEL --calibration TEXT --evaluation HELD_OUT"),
    )
    for name, values in bench.losses.items():
        values = values if name != "original" else values * len(given.seeds)
        ranks = ", ".join(f"{r:.1f}" for r in mean_by_layer(bench.ranks[name])) if name in bench.ranks else ""
        row = (name, mean_and_spread(values)[0], *against(values, bench.losses[ALONE]), bench.bytes[name], ranks)
        result.rows.append(dict(zip(result.columns, row, strict=True)))
    word = told(against(bench.losses[BOTH], bench.losses[ALONE]))
    alike = abs(bench.bytes[BOTH] / bench.bytes[ALONE] - 1) < 0.02
    if word == "below" and alike and 2 * falls > len(before):
        result.verdict = "reproduced"
    elif word == "above" or 2 * falls < len(before):
        result.verdict = "not reproduced"
    result.show()
    print(f"kept in {result.save()}")


def mean_by_layer(runs: list[list[float]]) -> list[float]:
    """Of one figure for each layer, the mean over runs."""
    return [mean_and_spread(list(values))[0] for values in zip(*runs, strict=True)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
