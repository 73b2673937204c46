"""SMoE-Dropout: a frozen random router and ever more experts give a model for every budget (arXiv:2303.01610).

Claim: trained with a random router that never learns and a number of experts per token that grows from half to all, a
model gets better the more experts run, up to all of them ("self-slimmable"), and with all of them is no worse than the
dense model of the same size; a model with a learned router is best near the number it was trained with and gets worse
beyond (enwik8: 1.1776 bits per character with half of the experts, 1.1486 with all).

Here: a small decoder of 16 experts, each a sixteenth as wide as the dense model's layer, from scratch: SMoE-Dropout (8
to 16 experts, linear), a learned router with 2 experts (weights renormalised, balance loss 0.01), the same with 8, and
the dense model. After training each runs with 1, 2, 4, 8 and 16 experts.

    python reproductions/smoe_dropout.py
"""

from __future__ import annotations

import statistics
from typing import Any

from training import ROWS, base, columns, losses, options, setting, token_losses, trained

from common import Reproduction, against, told
from coterie.anatomy import any_moe_layers

DROPOUT, TWO, EIGHT, DENSE = "SMoE-Dropout", "learned, 2 experts", "learned, 8 experts", "dense"
COUNTS = (1, 2, 4, 8, 16)
NOISE = 0.005  # share of the loss by which a curve may rise
RULE = (
    "reproduced if with every seed the held-out loss of SMoE-Dropout rises nowhere by more than 0.5% from one number of"
    " experts to the next, and that of the model with a learned router and 2 experts is above its loss at 2, by more"
    " than 0.5%, with all 16; not reproduced if the first fails with every seed, or the second does; inconclusive"
    " otherwise"
)
RULE_DENSE = (
    "reproduced if with all experts SMoE-Dropout is not above the dense model of the same size by more than two"
    " standard errors of the paired difference over seeds; not reproduced if it is; inconclusive if there is one seed"
)


def config(router: dict[str, Any] | None, **more: Any) -> dict[str, Any]:
    layers: dict[str, Any] = {"num_experts": 16, "moe_intermediate_size": 32, "router": router}
    if router is None:
        layers = {"first_dense": 4, "intermediate_size": 16 * 32}
    return base(**layers, **more)


def main() -> None:
    given = options(__doc__, tokens=160_000).parse_args()
    curves: dict[tuple[str, int], list[float]] = {}

    def sweep(run: Any, model: Any, text: Any) -> None:
        routers = [layer.router for layer in any_moe_layers(model)]
        if routers:
            found = []
            for k in COUNTS:
                for router in routers:
                    router.dial(top_k=k)
                found.append(float(token_losses(model, text)[0].mean()))
            curves[run.name, run.seed] = found

    balancing = [{"name": "switch", "weight": 0.01}]
    growing = {"what": "router.top_k", "kind": "linear", "first": 8, "last": 16}
    learned = {"kind": "top-k", "combine": "renormalised"}
    configs = {
        DENSE: config(None),
        DROPOUT: config({"kind": "random", "top_k": 8}, dials=[growing]),
        TWO: config({**learned, "top_k": 2}, balancing=balancing),
        EIGHT: config({**learned, "top_k": 8}, balancing=balancing),
    }
    race = trained(configs, given, after=sweep)
    steady = [
        all(b <= a * (1 + NOISE) for a, b in zip(curves[DROPOUT, s], curves[DROPOUT, s][1:])) for s in given.seeds
    ]
    worse = [curves[TWO, s][-1] > curves[TWO, s][1] * (1 + NOISE) for s in given.seeds]
    common: dict[str, Any] = {
        "seeds": given.seeds,
        "setting": setting(given, experts="16 of width 32; the dense model's layers have width 512"),
        "command": "python reproductions/smoe_dropout.py",
    }
    first = Reproduction(
        slug="smoe-dropout",
        title="SMoE-Dropout: better with every expert more (arXiv:2303.01610)",
        claim="the loss falls with every expert more; with a learned router it rises beyond the trained number",
        published="enwik8 1.1776 to 1.1486 bits per character from half to all experts",
        rule=RULE,
        columns=["config", *(f"{k} experts" for k in COUNTS)],
        rows=[
            {
                "config": name,
                **{
                    f"{k} experts": statistics.fmean(curves[name, s][i] for s in given.seeds)
                    for i, k in enumerate(COUNTS)
                },
            }
            for name in (DROPOUT, TWO, EIGHT)
        ],
        verdict="reproduced"
        if all(steady + worse)
        else "not reproduced"
        if not any(steady) or not any(worse)
        else "inconclusive",
        **common,
    )
    compared = told(against(losses(race, DROPOUT), losses(race, DENSE)))
    second = Reproduction(
        slug="smoe-dropout-dense",
        title="SMoE-Dropout: no worse than dense (arXiv:2303.01610)",
        claim="with all experts it is no worse than the dense model of the same size, which costs more to train",
        published="ahead of dense beyond 10 million parameters; up to 37% less training time",
        rule=RULE_DENSE,
        columns=ROWS,
        rows=columns(race),
        verdict="inconclusive" if len(given.seeds) < 2 else "not reproduced" if compared == "above" else "reproduced",
        **common,
    )
    for result in (first, second):
        result.show()
        print(f"kept in {result.save()}\n")


if __name__ == "__main__":
    main()
