"""Graphs of tokens: tokens that are alike, or look at one another, choose experts together (arXiv:2505.00792).

Claims: averaging gates over similar tokens, or over those that attention looked at, leaves fewer tokens that still
change their expert late in training (up to 33% do with plain routers), surer gates, and no worse a loss; the model gets
less worse when words are swapped, and noise changes fewer routes. All of it with two experts per token.

Here: a thin decoder of 6 layers with 16 experts, two per token with renormalised weights, balance loss 0.01, constant
rate, from scratch, on the same tokens in the same order: plain routers; similarity-aware ones (learned full matrix, tau
3, since at 1 a token of this width hardly sees any other); attention-aware ones (posterior of the surest head, sigma
0.5); and, as a control, the plain mean over all tokens before. tau and sigma of the paper are not known. Late
fluctuation: held-out tokens whose first expert differs between the last two of eleven evaluations. Words: 2% of
held-out tokens replaced by one fixed token, losses and routes of the others. Noise: on what routers see, a tenth of its
root mean square.

    python reproductions/graph_of_tokens.py
"""

from __future__ import annotations

import statistics
from typing import Any

import corrupted
from training import ROWS, base, columns, losses, options, setting, trained

from common import Reproduction, against, told

PLAIN, ALIKE, ATTENDED, UNIFORM = "top-2", "similarity-aware", "attention-aware", "mean of all before (control)"
RULE = (
    "reproduced if for the similarity-aware and the attention-aware router late fluctuation and gate entropy are below"
    " those of top-2 by more than two standard errors of the paired difference over seeds, and the loss is not above by"
    " as much; not reproduced if for either of them any of the three is above by as much; inconclusive otherwise"
)
RULE_ROBUST = (
    "reproduced if for the similarity-aware and the attention-aware router the loss rises less with swapped words, and"
    " noise changes the first expert of fewer tokens, than for top-2, by more than two standard errors of the paired"
    " difference over seeds; not reproduced if for either of them any of the two is above by as much; inconclusive"
    " otherwise"
)
RISE, FLIPS = "rise with swaps", "flips with noise"
ROBUST = ["loss, as it is", "loss, words swapped", RISE, "flips with swaps", FLIPS, "rise with noise"]


def config(**router: Any) -> dict[str, Any]:
    return base(
        hidden_size=96,
        num_hidden_layers=6,
        num_experts=16,
        moe_intermediate_size=48,
        router={"top_k": 2, "combine": "renormalised", **router},
        balancing=[{"name": "switch", "weight": 0.01}],
        training={"schedule": "constant", "rate": 1e-3, "evaluate_samples": 24},
    )


def robustness(model: Any, text: Any) -> dict[str, float]:
    """Losses and routes of the trained model when its text, or what its routers see, is corrupted."""
    windows = corrupted.swapped(text)
    clean, swapped = (corrupted.loss(model, windows, clean=whether) for whether in (True, False))
    before, after = (corrupted.routes(model, windows, clean=whether) for whether in (True, False))
    with corrupted.noise(model):
        noisy = corrupted.loss(model, windows, clean=True)
    with corrupted.noise(model):
        routes = corrupted.routes(model, windows, clean=True)
    rises, flips = (swapped - clean, noisy - clean), [corrupted.flips(before, seen) for seen in (after, routes)]
    return dict(zip(ROBUST, [clean, swapped, rises[0], flips[0], flips[1], rises[1]], strict=True))


def verdict(compared: list[tuple[str, bool]]) -> str:
    """compared : a difference to top-2 in words, and whether it has to be below, or only not above."""
    if all(word == "below" or (not below and word != "above") for word, below in compared):
        return "reproduced"
    return "not reproduced" if any(word == "above" for word, _ in compared) else "inconclusive"


def main() -> None:
    given = options(__doc__, tokens=160_000).parse_args()
    found: dict[tuple[str, int], dict[str, float]] = {}

    def look(run: Any, model: Any, text: Any) -> None:
        found[run.name, run.seed] = robustness(model, text)

    configs = {
        PLAIN: config(kind="top-k"),
        ALIKE: config(kind="similarity", tau=3.0),
        ATTENDED: config(kind="attention", heads=4),
        UNIFORM: config(kind="similarity", form="identity", tau=1e6),
    }
    race = trained(configs, given, after=look)
    entropy = {name: [run.mean("entropy") for run in race.of(name)] for name in configs}
    moving = {name: [float(run.fluctuation or 0.0) for run in race.of(name)] for name in configs}
    compared = []
    for name in (ALIKE, ATTENDED):
        compared += [(told(against(by[name], by[PLAIN])), True) for by in (moving, entropy)]
        compared.append((told(against(losses(race, name), losses(race, PLAIN))), False))
    told_of = {row["name"]: row for row in race.table()}
    common: dict[str, Any] = {
        "seeds": given.seeds,
        "setting": setting(
            given,
            model="decoder, 6 layers, width 96, 16 experts of 48, top-2",
            equal="tokens, their order and active experts; the similarity-aware router has 3% more parameters; the"
            " averages themselves, about a tenth of all operations, are not counted",
        ),
        "command": "python reproductions/graph_of_tokens.py",
    }
    first = Reproduction(
        slug="graph-of-tokens",
        title="Graphs of tokens: steadier and surer routes (arXiv:2505.00792)",
        claim="fewer tokens change their expert late in training, gates are surer, the loss is no higher",
        published="lower fluctuation in all layers (plain routers: up to 33%), entropy below in all, lower perplexity",
        rule=RULE,
        columns=[*ROWS, "late fluctuation", "gate entropy", "parameters"],
        rows=[
            {
                **row,
                "late fluctuation": statistics.fmean(moving[row["config"]]),
                "gate entropy": statistics.fmean(entropy[row["config"]]),
                "parameters": told_of[row["config"]]["parameters"],
            }
            for row in columns(race)
        ],
        verdict=verdict(compared),
        **common,
    )
    by_seed = {(name, what): [found[name, s][what] for s in given.seeds] for name in configs for what in ROBUST}
    second = Reproduction(
        slug="graph-of-tokens-robust",
        title="Graphs of tokens: corrupted text and noise do less (arXiv:2505.00792)",
        claim="swapped words raise the loss less, and noise on the router's input changes fewer routes",
        published="better perplexity on WikiText-103 with swapped words; no figures that could be read",
        rule=RULE_ROBUST,
        columns=["config", *ROBUST],
        rows=[{"config": name, **{what: statistics.fmean(by_seed[name, what]) for what in ROBUST}} for name in configs],
        verdict=verdict(
            [
                (told(against(by_seed[name, what], by_seed[PLAIN, what])), True)
                for name in (ALIKE, ATTENDED)
                for what in (RISE, FLIPS)
            ]
        ),
        **common,
    )
    for result in (first, second):
        result.show()
        print(f"kept in {result.save()}\n")


if __name__ == "__main__":
    main()
