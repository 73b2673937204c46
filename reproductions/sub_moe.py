"""Sub-MoE: clusters by output cosine and a budget that layers share lose less than other merging (arXiv:2506.23266).

Claim: merging clusters of experts that put out the same, weighted by frequency, with two layers sharing their budget,
loses less than random clusters, router logits, uniform weights, dropping all but one, a budget for each layer, HC-SMoE
and frequency pruning. Published (Mixtral-8x7B): WikiText-2 perplexity at 4 of 8 experts frequency pruning 17.5, HC-SMoE
9.88, Sub-MoE 6.97 (3.98 before); at 6 of 8 random clusters 6.19, router logits 5.65, uniform 5.31, drop 5.53, window 1
5.47, Sub-MoE 5.16.

Here: half of the experts of a small trained MoE, held-out loss without any training; calibration and evaluation text
are disjoint, and the same for all. Then the merged matrices truncated to a common subspace, at equal rank with and
without whitening. Without truncation Sub-MoE's joint decomposition is the frequency-weighted mean exactly, so what is
compared before that is clustering and budgets.

    python reproductions/sub_moe.py
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from common import Reproduction, against, arguments, mean_and_spread, setting, told, workplace
from coterie import api
from coterie.compression.merging.sub_moe import SubMoe
from coterie.compression.methods import method
from coterie.profiling.profile import LayerProfile

EVEN, DROP, HC, PRUNED = "window 1", "drop", "HC-SMoE", "frequency pruning"
OURS, RANDOM, LOGITS, UNIFORM = "Sub-MoE (window 2)", "random clusters", "router logits", "uniform weights"
REDIRECTED = "frequency pruning, redirected"
ARMS = {
    OURS: "sub-moe",
    EVEN: "sub-moe:window=1",
    RANDOM: "sub-moe-random:window=1,seed={seed}",
    LOGITS: "sub-moe:window=1,similarity=router-logits",
    UNIFORM: "sub-moe:weights=uniform",
    DROP: "sub-moe:weights=leader",
    HC: "hc-smoe",
    REDIRECTED: "m-smoe:weights=leader,ratio=uniform",
    PRUNED: "frequency",
}
PLAIN, WHITE = "truncated", "truncated, whitened"
CLAIMS = (  # (a contender, the one it should be above)
    (RANDOM, EVEN),
    (LOGITS, EVEN),
    (UNIFORM, OURS),
    (DROP, UNIFORM),
    (EVEN, OURS),
    (HC, OURS),
    (REDIRECTED, OURS),
    (PRUNED, OURS),
    (PLAIN, WHITE),
)
RULE = (
    "every claim is one contender above another by more than two standard errors, paired by seed: random clusters and"
    " router logits above Sub-MoE, all at window 1; uniform weights above Sub-MoE; drop above uniform weights; window 1"
    " above window 2; HC-SMoE above Sub-MoE; frequency pruning, redirected or not, above Sub-MoE; truncation above"
    " whitened truncation at equal rank. Reproduced if all hold; not reproduced if random clusters, HC-SMoE or"
    " frequency pruning (not redirected) are below Sub-MoE by more than two standard errors; inconclusive otherwise"
)


@method("sub-moe-random", kind="control", paper="control")
class RandomClusters(SubMoe):
    """Sub-MoE whose clusters are drawn by lot, none of them empty."""

    def clusters(
        self, layer: LayerProfile, experts: Sequence[int], count: int, alone: Collection[int]
    ) -> list[list[int]]:
        draw = torch.Generator().manual_seed(1000 * self.seed + layer.index)
        order = [experts[i] for i in torch.randperm(len(experts), generator=draw).tolist()]
        found = [[expert] for expert in order[:count]]
        for expert in order[count:]:
            found[int(torch.randint(count, (), generator=draw))].append(expert)
        return [sorted(members) for members in found]


class Bench:
    """Losses of every contender, one a seed. Calibration and evaluation text are drawn anew for each seed."""

    def __init__(self, given: Any, model: str, calibration: list[str], evaluation: list[str], folder: Path) -> None:
        self.given, self.model, self.folder = given, model, folder
        self.calibration, self.evaluation = calibration, evaluation
        self.losses: dict[str, list[float]] = {}
        self.counts: list[str] = []
        self.largest: dict[str, list[int]] = {}

    def note(self, name: str, loss: float) -> None:
        self.losses.setdefault(name, []).append(loss)
        print(f"{name} {loss:.4f}", flush=True)

    def side_by_side(self, seed: int) -> None:
        """All contenders of one seed in two sweeps."""
        given, arms = self.given, {arm.format(seed=seed): name for name, arm in ARMS.items()}
        found = api.compare(
            self.model,
            self.calibration,
            methods=list(arms),
            keep=[0.5],
            eval_data=self.evaluation,
            eval_samples=given.evaluate,
            samples=given.samples,
            length=given.length,
            seed=seed,
        )
        self.note("original", found.original.mean_loss)
        for (_, name), contender in zip(arms.items(), found.contenders, strict=True):
            assert contender.quality is not None, contender.refused
            self.note(name, contender.quality.mean_loss)
            assert contender.plan is not None
            for layer in contender.plan.layers:
                clusters = layer.extra.get("clusters", {})
                self.largest.setdefault(name, []).append(max(map(len, clusters.values()), default=0))
            if name == OURS:
                self.counts.append("-".join(str(len(layer.keep)) for layer in contender.plan.layers))

    def truncated(self, seed: int) -> None:
        """Checkpoints whose merged matrices are factors, by the choice of their subspace."""
        given, out = self.given, str(self.folder / "truncated")
        text = {"length": given.length, "seed": seed}
        for name, whiten in ((PLAIN, False), (WHITE, True)):
            api.compress(
                self.model,
                out,
                method="sub-moe",
                parameters={"save": given.save, "whiten": whiten},
                data=self.calibration,
                samples=given.samples,
                keep=0.5,
                overwrite=True,
                **text,
            )
            found = api.evaluate([out], self.evaluation, tokenizer=self.model, samples=given.evaluate, **text)
            self.note(name, found[0].mean_loss)


def main() -> None:
    parser = arguments(__doc__, samples=8, evaluate=8)
    parser.add_argument("--save", type=float, default=0.25, help="share of a matrix's numbers that truncation saves")
    given = parser.parse_args()
    with workplace(given) as (model, calibration, evaluation, folder):
        bench = Bench(given, model, calibration, evaluation, folder)
        for seed in given.seeds:
            bench.side_by_side(seed)
            bench.truncated(seed)
    shown = given.model is None and given.calibration is None
    result = Reproduction(
        slug="sub-moe" if shown else "sub-moe-other-model",
        title=f"Sub-MoE on {'the pocket model' if shown else 'a small MoE and real text'} (arXiv:2506.23266)",
        claim="Clusters by output cosine, frequency weights and a shared budget lose less than other merging"
        " and pruning.",
        published="Mixtral-8x7B, WikiText-2 perplexity, 4 of 8 experts: frequency pruning 17.5, HC-SMoE 9.88, Sub-MoE"
        " 6.97; 6 of 8: random clusters 6.19, router logits 5.65, uniform 5.31, drop 5.53, window 1 5.47, Sub-MoE"
        " 5.16.",
        rule=RULE,
        columns=["contender", "loss", "against", "difference", "standard error", "is", "largest cluster"],
        seeds=given.seeds,
        setting=setting(
            given,
            kept="half of the experts, on average over two layers where the window is 2",
            truncated=f"Sub-MoE whose merged matrices are factors with {1 - given.save:.0%} of their numbers",
            **{"largest cluster": "experts in it, mean over layers and seeds"},
            **{"experts of the layers under window 2, each seed": ", ".join(bench.counts)},
        ),
        command="python reproductions/sub_moe.py"
        + ("" if shown else " --model MODEL --calibration TEXT --evaluation HELD_OUT"),
    )
    bases = dict.fromkeys(bench.losses, OURS) | dict(CLAIMS)
    for name, values in bench.losses.items():
        difference = against(values, bench.losses[bases[name]])
        word = "" if name == bases[name] else told(difference)
        size = float(mean_and_spread(bench.largest.get(name, [0]))[0])
        row = (name, mean_and_spread(values)[0], bases[name], *difference, word, size or "")
        result.rows.append(dict(zip(result.columns, row, strict=True)))
    words = {r["contender"]: r["is"] for r in result.rows}
    if "below" in (words[RANDOM], words[HC], words[PRUNED]):
        result.verdict = "not reproduced"
    elif all(words[name] == "above" for name, _ in CLAIMS):
        result.verdict = "reproduced"
    result.show()
    print(f"kept in {result.save()}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
