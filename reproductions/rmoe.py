"""RMoE: a recurrent cell carries a token's routing from layer to layer (arXiv:2408.06793).

Claims: routers that share a GRU over depth give a lower loss at the same number of steps, for less than one percent of
parameters more; the gain is in what goes from layer to layer, forward and backward, not in the larger router: without
passing the state on (NP) it shrinks, without its gradient (detach) the model is worse than with plain routers. Routes
of layers then tell more of one another, and gates are flatter (8 layers on enwik8: 1.128 bits per character with plain
routers, 1.116 with RMoE, 1.123 NP, 1.133 detached).

Here: a thin decoder of 8 layers with 16 experts, two per token with renormalised weights, balance loss 0.01, from
scratch, on the same tokens in the same order: plain routers, RMoE with a state of 32 numbers (a third of the width, as
in the paper), NP and detached, which have its parameters and operations. Figures of routing are from held-out text
after training: mutual information of two layers' gates (mean over pairs), the median of the highest probability over
the second (inner balance), of what the two highest hold (outer balance), and the mean entropy of a token's gate.

    python reproductions/rmoe.py
"""

from __future__ import annotations

import statistics
from typing import Any

from training import ROWS, base, columns, losses, options, setting, trained

from common import Reproduction, against, told
from coterie.analysis.routing import gate_entropy, inner_balance, mutual_information, outer_balance, routed

PLAIN, RMOE, ALONE, DETACHED = "top-2", "RMoE", "RMoE, state not passed", "RMoE, state detached"
RULE = (
    "reproduced if the final loss of RMoE is below that of top-2 by more than two standard errors of the paired"
    " difference over seeds; not reproduced if it is above by as much; inconclusive otherwise"
)
RULE_RECURRENCE = (
    "reproduced if the final loss of RMoE is below that of RMoE without passing the state on, and below that with the"
    " state detached, each by more than two standard errors of the paired difference over seeds; not reproduced if it"
    " is above either by as much; inconclusive otherwise"
)
RULE_SCORES = (
    "reproduced if with RMoE mutual information of layers is higher than with top-2, inner and outer balance are lower"
    " and gate entropy is higher, each by more than two standard errors of the paired difference over seeds; not"
    " reproduced if any goes the other way by as much; inconclusive otherwise"
)
SCORES = {  # what the paper says of RMoE against plain routers
    "mutual information": "above",
    "inner balance": "below",
    "outer balance": "below",
    "gate entropy": "above",
}
CHOICES = "mutual information of choices"
THIN = {
    "hidden_size": 96,
    "num_hidden_layers": 8,
    "num_experts": 16,
    "moe_intermediate_size": 48,
}


def config(**router: Any) -> dict[str, Any]:
    told = {"top_k": 2, "combine": "renormalised", **router}
    return base(**THIN, router=told, balancing=[{"name": "switch", "weight": 0.01}])


def figures(model: Any, text: Any) -> dict[str, float]:
    """Of the routers of a trained model on held-out text, mean over layers, or over pairs of them."""
    seen = routed(model, [batch.ids_BL for data in text.tests.values() for batch in data.batches])
    upper = [(i, j) for j in range(len(seen)) for i in range(j)]
    shared, of_choices = (mutual_information(seen, of=what) for what in ("probability", "choice"))
    layers = seen.values()
    return {
        "mutual information": statistics.fmean(float(shared[pair]) for pair in upper),
        CHOICES: statistics.fmean(float(of_choices[pair]) for pair in upper),
        "inner balance": statistics.fmean(map(inner_balance, layers)),
        "outer balance": statistics.fmean(map(outer_balance, layers)),
        "gate entropy": statistics.fmean(map(gate_entropy, layers)),
    }


def main() -> None:
    given = options(__doc__, tokens=160_000).parse_args()
    found: dict[tuple[str, int], dict[str, float]] = {}

    def look(run: Any, model: Any, text: Any) -> None:
        found[run.name, run.seed] = figures(model, text)

    recurrent = {"kind": "rmoe", "size": 32}
    configs = {
        PLAIN: config(kind="top-k"),
        RMOE: config(**recurrent),
        ALONE: config(**recurrent, passing="off"),
        DETACHED: config(**recurrent, passing="detach"),
    }
    race = trained(configs, given, after=look)
    versus = {name: told(against(losses(race, RMOE), losses(race, name))) for name in (PLAIN, ALONE, DETACHED)}
    parts = {versus[ALONE], versus[DETACHED]}
    told_of = {row["name"]: row for row in race.table()}
    rows = [
        {
            **row,
            "loss at equal operations": told_of[row["config"]]["loss_at_equal_flops"],
            "parameters": told_of[row["config"]]["parameters"],
        }
        for row in columns(race)
    ]
    shown = [*ROWS, "loss at equal operations", "parameters"]
    common: dict[str, Any] = {
        "seeds": given.seeds,
        "setting": setting(
            given,
            model="decoder, 8 layers, width 96, 16 experts of 48, top-2; state of 32",
            equal="tokens, their order and active experts; RMoE's router adds 1% of parameters and 7% of operations"
            " (the model is thin), the variants as many",
        ),
        "command": "python reproductions/rmoe.py",
    }
    first = Reproduction(
        slug="rmoe",
        title="RMoE: a recurrent router over layers (arXiv:2408.06793)",
        claim="at equal tokens RMoE ends at a lower loss than plain top-2 routers",
        published="enwik8 1.128 to 1.116 bits per character, WikiText-103 perplexity 33.06 to 32.87 (8 layers)",
        rule=RULE,
        columns=shown,
        rows=rows,
        verdict={"below": "reproduced", "above": "not reproduced"}.get(versus[PLAIN], "inconclusive"),
        **common,
    )
    second = Reproduction(
        slug="rmoe-recurrence",
        title="RMoE: the gain is in the state and its gradient (arXiv:2408.06793)",
        claim="RMoE ends at a lower loss than the same router that passes no state on, or passes it without gradient",
        published="enwik8 1.116 bits per character, 1.123 not passed, 1.133 detached",
        rule=RULE_RECURRENCE,
        columns=shown,
        rows=rows,
        verdict="reproduced" if parts == {"below"} else "not reproduced" if "above" in parts else "inconclusive",
        **common,
    )
    names = [*SCORES, CHOICES]
    by_seed = {(name, what): [found[name, s][what] for s in given.seeds] for name in configs for what in names}
    agrees = [told(against(by_seed[RMOE, what], by_seed[PLAIN, what])) for what in SCORES]
    other = [{"above": "below", "below": "above"}[way] for way in SCORES.values()]
    third = Reproduction(
        slug="rmoe-scores",
        title="RMoE: layers tell more of one another, gates are flatter (arXiv:2408.06793)",
        claim="mutual information of layers and gate entropy are higher than of plain routers, both balances lower",
        published="inner balance 34.7 to 2.0, outer balance 0.915 to 0.573; mutual information and entropy as pictures",
        rule=RULE_SCORES,
        columns=["config", *names],
        rows=[{"config": name, **{what: statistics.fmean(by_seed[name, what]) for what in names}} for name in configs],
        verdict="reproduced"
        if agrees == list(SCORES.values())
        else "not reproduced"
        if any(one == way for one, way in zip(agrees, other, strict=True))
        else "inconclusive",
        **common,
    )
    for result in (first, second, third):
        result.show()
        print(f"kept in {result.save()}\n")


if __name__ == "__main__":
    main()
