"""DeepSeekMoE: fine-grained experts with some always on beat few large ones at equal cost (arXiv:2401.06066).

Claim: with the same total and active parameters, cutting each expert into m and running m times as many, with one of
them always on outside of the router, lowers the loss: 16 experts of which 2 run (GShard) 1.867, 64 of which 8 run, one
of them always (DeepSeekMoE) 1.808 (Pile, 2B, 100B tokens). And experts are less redundant: taking the best routed
experts away from every token hurts more, and the expert that is always on cannot be replaced by one more routed one.

Here: a small decoder in four forms of the same size and cost, by which only granularity and isolation differ; all with
the paper's balance loss (0.01). Then, on the trained models, each token's likeliest routed experts are taken away (one
sixteenth of them), and the expert that is always on is exchanged for one more routed expert.

    python reproductions/deepseekmoe.py
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from training import ROWS, base, columns, losses, options, reversed_by, setting, token_losses, trained

from common import Reproduction
from coterie.anatomy import moe_layers

GSHARD, ONE, TWO, FOUR = "16, 2 run", "1 + 15, 1 runs", "1 + 31, 3 run", "1 + 63, 7 run"
RULE = (
    "reproduced if the loss of 1 + 63 is below that of 16 by more than two standard errors of the paired difference"
    " over seeds; not reproduced if it is above by as much; inconclusive otherwise"
)
RULE_PROBES = (
    "reproduced if, with every seed, taking away each token's likeliest sixteenth of the routed experts raises the loss"
    " of 1 + 63 more than that of 16, and exchanging the expert that is always on for one more routed one raises it"
    " more than taking one routed expert away does; not reproduced if neither holds with any seed; inconclusive"
    " otherwise"
)


def config(pieces: int, shared: int) -> dict[str, Any]:
    """16 experts of width 128 of which 2 run, cut into pieces, some of them always on."""
    return base(
        num_experts=16 * pieces - shared,
        moe_intermediate_size=128 // pieces,
        num_shared_experts=shared,
        router={"kind": "top-k", "top_k": 2 * pieces - shared},
        balancing=[{"name": "switch", "weight": 0.01}],
    )


@contextmanager
def without_best(model: Any, share: float) -> Any:
    """Each token's likeliest routed experts cannot be picked."""
    routers = [layer.router for layer in moe_layers(model)]

    def masked(router: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        def picked(score_TE: torch.Tensor) -> torch.Tensor:
            taken = max(1, round(share * router.num_experts))
            best_TK = score_TE.topk(taken, dim=-1).indices
            return score_TE.detach().scatter(-1, best_TK, -torch.inf).topk(router.top_k, dim=-1).indices

        return picked

    for router in routers:
        router.picked = masked(router)
    try:
        yield
    finally:
        for router in routers:
            del router.picked


@contextmanager
def without_shared(model: Any) -> Any:
    """The expert that is always on is off, one more routed expert runs."""
    kept = [(layer.block, layer.block.shared_experts, layer.router) for layer in moe_layers(model)]
    for block, _, router in kept:
        block.shared_experts = None
        router.dial(top_k=router.top_k + 1)
    try:
        yield
    finally:
        for block, shared, router in kept:
            block.shared_experts = shared
            router.dial(top_k=router.top_k - 1)


@contextmanager
def one_less(model: Any) -> Any:
    """One routed expert less runs."""
    routers = [layer.router for layer in moe_layers(model)]
    for router in routers:
        router.dial(top_k=router.top_k - 1)
    try:
        yield
    finally:
        for router in routers:
            router.dial(top_k=router.top_k + 1)


def main() -> None:
    given = options(__doc__, tokens=160_000).parse_args()
    probes: dict[tuple[str, int], dict[str, float]] = {}

    def probe(run: Any, model: Any, text: Any) -> None:
        def loss(change: Any) -> float:
            with change:
                return float(token_losses(model, text)[0].mean())

        if run.name in (GSHARD, FOUR):
            whole = float(token_losses(model, text)[0].mean())
            told = {"best away": loss(without_best(model, 1 / 16)) - whole}
            if run.name == FOUR:
                told |= {"shared away": loss(without_shared(model)) - whole, "one less": loss(one_less(model)) - whole}
            probes[run.name, run.seed] = told

    configs = {GSHARD: config(1, 0), ONE: config(1, 1), TWO: config(2, 1), FOUR: config(4, 1)}
    race = trained(configs, given, after=probe)
    compared = reversed_by(losses(race, FOUR), losses(race, GSHARD))
    verdicts = {"below": "reproduced", "above": "not reproduced"}
    common: dict[str, Any] = {
        "seeds": given.seeds,
        "setting": setting(given, experts="16 of width 128 of which 2 run, or pieces of them"),
        "command": "python reproductions/deepseekmoe.py",
    }
    first = Reproduction(
        slug="deepseekmoe",
        title="DeepSeekMoE: fine-grained experts, some always on (arXiv:2401.06066)",
        claim="at equal total and active parameters, 1 + 63 experts of which 1 + 7 run beat 16 of which 2 run",
        published="Pile loss 1.867 to 1.808 (2B parameters, 100B tokens)",
        rule=RULE,
        columns=ROWS,
        rows=columns(race),
        verdict=verdicts.get(compared, "inconclusive"),
        **common,
    )
    names = ("best away", "shared away", "one less")
    rows = []
    for name in (GSHARD, FOUR):
        found = {what: [probes[name, s][what] for s in given.seeds if what in probes[name, s]] for what in names}
        rows.append({"config": name, **{what: statistics.fmean(v) if v else "" for what, v in found.items()}})
    more = [probes[FOUR, s]["best away"] > probes[GSHARD, s]["best away"] for s in given.seeds]
    worse = [probes[FOUR, s]["shared away"] > probes[FOUR, s]["one less"] for s in given.seeds]
    second = Reproduction(
        slug="deepseekmoe-redundancy",
        title="DeepSeekMoE: experts are less redundant (arXiv:2401.06066)",
        claim="without their likeliest experts fine-grained models lose more; the expert that is always on is needed",
        published="steeper curve than GShard; Pile loss 1.808 to 2.414 without the shared expert",
        rule=RULE_PROBES,
        columns=["config", *names],
        rows=rows,
        verdict="reproduced" if all(more + worse) else "not reproduced" if not any(more + worse) else "inconclusive",
        **common,
    )
    for result in (first, second):
        result.show()
        print(f"kept in {result.save()}\n")


if __name__ == "__main__":
    main()
