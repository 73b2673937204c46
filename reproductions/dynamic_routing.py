"""Dynamic routing: tokens that are hard take more experts (arXiv:2403.07652).

Claim: a token that runs the smallest set of experts whose probabilities reach p = 0.4, trained with a small loss on the
entropy of these probabilities, is better than two experts for every token while it runs fewer than two on average
(42.3 against 41.6 in accuracy, 1.76 experts; 100B tokens); without the entropy loss the number of experts drifts up;
hard tokens and early layers run more.

Here: a small decoder of 16 experts, from scratch: one or two experts for every token (weights as they are), p = 0.4
with the paper's losses (balance 0.01, entropy 0.0001), and the same without the entropy loss.

    python reproductions/dynamic_routing.py
"""

from __future__ import annotations

import statistics
from typing import Any

from scipy.stats import spearmanr
from training import ROWS, base, columns, losses, options, setting, token_losses, trained

from common import Reproduction, against, mean_and_spread, told

TWO, ONE, DYNAMIC, FLAT = "2 for every token", "1 for every token", "p = 0.4", "p = 0.4, no entropy loss"
RULE = (
    "reproduced if with p = 0.4 a token runs fewer than 2 experts on average, and the loss is not above that of 2 for"
    " every token by more than two standard errors of the paired difference over seeds, and below that of 1 by as much;"
    " not reproduced if it is above that of 2 by more, or 2 or more experts run; inconclusive otherwise"
)
RULE_HARD = (
    "reproduced if, with every seed, the rank correlation of a token's loss and its number of experts (mean over"
    " layers) is positive with p < 0.001 and the first layer runs more experts than the last; not reproduced if neither"
    " holds with any seed; inconclusive otherwise"
)
RULE_ENTROPY = (
    "reproduced if without the entropy loss more experts run, by more than two standard errors of the paired difference"
    " over seeds; not reproduced if fewer do by as much; inconclusive otherwise"
)


def config(router: dict[str, Any], entropy: float = 0.0) -> dict[str, Any]:
    balancing = [{"name": "switch", "weight": 0.01}]
    if entropy:
        balancing.append({"name": "entropy", "weight": entropy})
    return base(num_experts=16, router=router, balancing=balancing)


def main() -> None:
    given = options(__doc__, tokens=160_000).parse_args()
    hard: dict[int, tuple[float, float, float, float]] = {}

    def probe(run: Any, model: Any, text: Any) -> None:
        if run.name == DYNAMIC:
            loss_T, ran = token_losses(model, text)
            experts_T = sum(ran.values()) / len(ran)
            found = spearmanr(loss_T.numpy(), experts_T.numpy())
            by_layer = [float(ran[layer].mean()) for layer in sorted(ran)]
            hard[run.seed] = (float(found.statistic), float(found.pvalue), by_layer[0], by_layer[-1])

    dynamic = {"kind": "top-p", "p": 0.4}
    configs = {
        TWO: config({"kind": "top-k", "top_k": 2}),
        ONE: config({"kind": "top-k", "top_k": 1}),
        DYNAMIC: config(dynamic, 1e-4),
        FLAT: config(dynamic),
    }
    race = trained(configs, given, after=probe)
    rows = columns(race)
    ran = next(row["experts per token"] for row in rows if row["config"] == DYNAMIC)
    versus = {name: told(against(losses(race, DYNAMIC), losses(race, name))) for name in (TWO, ONE)}
    good = ran < 2 and versus[TWO] != "above" and versus[ONE] == "below"
    common: dict[str, Any] = {
        "seeds": given.seeds,
        "setting": setting(given, experts="16 of width 128"),
        "command": "python reproductions/dynamic_routing.py",
    }
    first = Reproduction(
        slug="dynamic-routing",
        title="Dynamic routing: the smallest set of experts that reaches p (arXiv:2403.07652)",
        claim="p = 0.4 runs fewer than two experts and is at least as good as two for every token",
        published="accuracy 42.3 against 41.6 with 1.76 experts (3.5B parameters, 100B tokens)",
        rule=RULE,
        columns=ROWS,
        rows=rows,
        verdict="reproduced" if good else "not reproduced" if versus[TWO] == "above" or ran >= 2 else "inconclusive",
        **common,
    )
    positive = [rank > 0 and p < 1e-3 for rank, p, _, _ in hard.values()]
    falling = [first_ > last for _, _, first_, last in hard.values()]
    second = Reproduction(
        slug="dynamic-routing-hard-tokens",
        title="Dynamic routing: harder tokens take more experts (arXiv:2403.07652)",
        claim="experts per token grow with the token's loss, and are most in early layers",
        published="harder tasks 1.87 experts against 1.72; about 4 in the first layer, 1 in the last",
        rule=RULE_HARD,
        columns=["seed", "rank correlation with loss", "experts, first layer", "experts, last layer"],
        rows=[
            {
                "seed": seed,
                "rank correlation with loss": rank,
                "experts, first layer": early,
                "experts, last layer": late,
            }
            for seed, (rank, _, early, late) in hard.items()
        ],
        verdict="reproduced"
        if all(positive + falling)
        else "not reproduced"
        if not any(positive + falling)
        else "inconclusive",
        **common,
    )
    counts = {name: [run.mean("experts_per_token") for run in race.of(name)] for name in (DYNAMIC, FLAT)}
    more = told(against(counts[FLAT], counts[DYNAMIC]))
    third = Reproduction(
        slug="dynamic-routing-entropy",
        title="Dynamic routing: the entropy loss keeps experts few (arXiv:2403.07652)",
        claim="without the entropy loss tokens run more experts",
        published="described as the reason for the loss; no figures",
        rule=RULE_ENTROPY,
        columns=["config", "experts per token", "standard deviation"],
        rows=[
            {
                "config": name,
                "experts per token": statistics.fmean(found),
                "standard deviation": mean_and_spread(found)[1],
            }
            for name, found in counts.items()
        ],
        verdict={"above": "reproduced", "below": "not reproduced"}.get(more, "inconclusive"),
        **common,
    )
    for result in (first, second, third):
        result.show()
        print(f"kept in {result.save()}\n")


if __name__ == "__main__":
    main()
