"""STUN: dropping alike experts first and zeroing weights after loses less than zeroing alone (arXiv:2409.06211).

Claim: at equal total sparsity, removing some experts and then zeroing single weights of the rest (OWL) beats zeroing
alone; a share in between is best. Published: Snowflake Arctic at 65 % total sparsity averages 62.67 with STUN and 56.68
with OWL alone (68.33 before); Mixtral-8x7B-Instruct 60.34 and 45.20.

Here: half of the weights of a small trained MoE's decoder layers gone in all, held-out loss averaged over domains, for
several draws of the calibration text. A quarter of the experts goes first; other shares, the reverse order, and random
or frequency-ranked experts at equal counts are tried beside it. Stage A alone is compared without zeroing anything.

    python reproductions/stun.py
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch

from common import Reproduction, arguments, mean_and_spread, workplace
from coterie import api
from coterie.compression.compress import Result
from coterie.compression.sites import sites

TOTAL = 0.5
MAIN = 0.75  # share of the experts that stays in STUN proper
SHARES = (0.875, 0.75, 0.625, 0.5)
RULE = (
    "differences are paired by seed; reproduced if STUN (three quarters of the experts stay, then OWL) loses less than"
    " the better of OWL alone and Wanda alone by more than two standard errors over seeds, and less than experts"
    " removed alone, and the best of the tried shares is neither none of the experts nor experts alone; not reproduced"
    " if it loses more than the better of OWL alone and Wanda alone by more than two standard errors; inconclusive"
    " otherwise"
)


class Bench:
    """Makes checkpoints in a folder and measures them; one per seed."""

    def __init__(self, given: Any, seed: int, model: str, calibration: list[str], evaluation: list[str], folder: Path):
        self.given, self.seed, self.model, self.folder = given, seed, model, folder
        self.calibration, self.evaluation = calibration, evaluation
        self.losses: dict[str, float] = {}
        self.kurtosis: dict[str, str] = {}

    def step(self, source: str, out: str, method: str, parameters: dict | None = None, **budget: Any) -> Result:
        return api.compress(
            source,
            str(self.folder / out),
            method=method,
            parameters=parameters or {},
            data=self.calibration,
            tokenizer=self.model,
            samples=self.given.samples,
            length=self.given.length,
            seed=self.seed,
            overwrite=True,
            **budget,
        )

    def drop(self, out: str, method: str, keep: float, parameters: dict | None = None, source: str = "") -> str:
        """Experts removed, the same number in all layers together."""
        done = self.step(source or self.model, out, method, parameters, keep=keep, scope="global")
        figures = [f for f in done.figures.values() if "kurtosis_before" in f]
        if figures and method == "stun":
            means = [statistics.mean(f[f"kurtosis_{n}"] for f in figures) for n in ("before", "after")]
            self.kurtosis[out] = f"{means[0]:.2f} -> {means[1]:.2f}"
        return str(self.folder / out)

    def zero(self, source: str, out: str, method: str = "owl", **parameters: float) -> str:
        summary = self.step(source, out, method, parameters).record["sparsity"]
        self.kurtosis[out] = f"{summary['kurtosis_before']:.2f} -> {summary['kurtosis_after']:.2f}"
        return str(self.folder / out)

    def measure(self, name: str, folder: str, kurtosis_of: str = "") -> None:
        given = self.given
        found = api.evaluate(
            [folder], self.evaluation, tokenizer=self.model, samples=given.evaluate, length=given.length
        )
        self.losses[name] = found[0].mean_loss
        if kurtosis_of:
            self.kurtosis[name] = self.kurtosis[kurtosis_of]
        print(f"seed {self.seed}: {name} {self.losses[name]:.4f}", flush=True)


def expert_weight_share(model: str) -> tuple[float, int]:
    """The routed experts' share of the weights that may be zeroed, and how many experts there are."""
    streamed = api.Runtime().open(model)
    found = [s for index in range(len(streamed.layers)) for s in sites(streamed, index)]
    routed = sum(s.weights for s in found if s.experts)
    return routed / sum(s.weights for s in found), sum(m.num_experts for m in streamed.moe.values())


def run(bench: Bench) -> None:
    """Every contender of one seed."""
    model, drop, zero, measure = bench.model, bench.drop, bench.zero, bench.measure
    share, experts = expert_weight_share(model)
    alone = round(experts * (1 - TOTAL / share)) / experts  # experts that stay if only they go
    for name, method in (("magnitude alone", "magnitude"), ("Wanda alone", "wanda"), ("OWL alone", "owl")):
        measure(name, zero(model, method, method, sparsity=TOTAL), method)
    for keep in SHARES:
        kept = drop(f"stun-{keep}", "stun", keep)
        name = "STUN" if keep == MAIN else f"STUN, {keep:.1%} of the experts stay"
        measure(name, zero(kept, "both", total=TOTAL), "both")
    measure("experts alone", drop("experts", "stun", alone), "experts")
    quarter = str(bench.folder / f"stun-{MAIN}")
    removed = share * (1 - MAIN)
    sparse = zero(model, "sparse", sparsity=(TOTAL - removed) / (1 - removed))
    measure("reverse order", drop("reversed", "stun", MAIN, source=sparse))
    measure("STUN with Wanda", zero(quarter, "both", "wanda", total=TOTAL), "both")
    measure("stage A alone", quarter, f"stun-{MAIN}")
    bench.step(model, "even", "stun", keep=MAIN)
    measure("stage A alone, even layers", str(bench.folder / "even"))
    controls: dict[str, tuple[str, dict]] = {
        "co-selection": ("stun", {"source": "coactivation"}),
        "complete linkage": ("stun", {"linkage": "complete"}),
        "random experts": ("random", {"seed": bench.seed}),
        "frequency": ("frequency", {}),
    }
    for name, (method, parameters) in controls.items():
        kept = drop("control", method, MAIN, parameters)
        measure(f"stage A alone, {name}", kept)
        measure(f"STUN, {name}", zero(kept, "both", total=TOTAL))


def main() -> None:
    given = arguments(__doc__, samples=8, evaluate=16).parse_args()
    losses: dict[str, list[float]] = {}
    kurtosis: dict[str, str] = {}
    shown = given.model is None and given.calibration is None
    with workplace(given) as (model, calibration, evaluation, folder):
        for seed in given.seeds:
            bench = Bench(given, seed, model, calibration, evaluation, folder)
            run(bench)
            kurtosis = {**bench.kurtosis, **kurtosis}
            for name, value in bench.losses.items():
                losses.setdefault(name, []).append(value)
        full = api.evaluate([model], evaluation, samples=given.evaluate, length=given.length)[0]
    result = Reproduction(
        slug="stun" if shown else "stun-other-model",
        title=f"STUN on {'the pocket model' if shown else 'a small MoE and real text'} (arXiv:2409.06211)",
        claim="Dropping alike experts first and zeroing weights after loses less than zeroing alone at equal sparsity.",
        published="Arctic, 65 % total: STUN 62.67, OWL 56.68, original 68.33; Mixtral-8x7B-Instruct, 65 %: STUN 60.34,"
        " OWL 45.20.",
        rule=RULE,
        columns=["method", "loss", "against STUN", "standard error", "kurtosis of experts"],
        seeds=given.seeds,
        setting={
            "model": "the pocket model" if given.model is None else "a trained Qwen3-MoE, 11 M parameters",
            "domains": ", ".join(d.domain for d in full.domains),
            "calibration windows per domain": given.samples,
            "evaluation windows per domain": given.evaluate,
            "tokens per window": given.length,
            "total sparsity": f"{TOTAL:.0%} of the weights in decoder layers, except where it says stage A alone",
            "stage A": f"{MAIN:.0%} of the experts stay, except where it says otherwise",
            "kurtosis": "of an expert's nonzero weights, mean over experts and layers, before -> after; first seed",
        },
        command="python reproductions/stun.py"
        + ("" if shown else " --model MODEL --calibration TEXT --evaluation HELD_OUT"),
    )
    base = losses["STUN"]
    result.rows.append(row("original", full.mean_loss, full.mean_loss - statistics.mean(base), 0.0, ""))
    for name, values in losses.items():
        difference, spread = mean_and_spread([v - b for v, b in zip(values, base, strict=True)])
        error = spread / len(values) ** 0.5
        result.rows.append(row(name, statistics.mean(values), difference, error, kurtosis.get(name, "")))
    rows = {r["method"]: r for r in result.rows}
    unstructured = min((rows["OWL alone"], rows["Wanda alone"]), key=lambda r: r["loss"])
    inside = [r for name, r in rows.items() if name == "STUN" or name.endswith("of the experts stay")]
    ends = (rows["OWL alone"], rows["experts alone"])
    interior = min(r["loss"] for r in inside) < min(r["loss"] for r in ends)
    margin = 2 * unstructured["standard error"]
    if unstructured["against STUN"] > margin and rows["experts alone"]["against STUN"] > 0 and interior:
        result.verdict = "reproduced"
    elif unstructured["against STUN"] < -margin:
        result.verdict = "not reproduced"
    result.show()
    print(f"kept in {result.save()}")


def row(name: str, loss: float, against: float, error: float, kurtosis: str) -> dict:
    values = (name, loss, against, error, kurtosis)
    return dict(zip(("method", "loss", "against STUN", "standard error", "kurtosis of experts"), values, strict=True))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
