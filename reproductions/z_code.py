"""Z-code M3: who is dropped is drawn, experts of two runs make one model, unused experts can go (arXiv:2109.10465).

Claims, for top-1 routing with a capacity (factor 1):
- tokens that an overfull expert drops at random (RTS) make training converge better than dropping the last ones, whose
  positions then learn less;
- a model with the experts of two trained runs (aggregation of experts) learns faster than one of as many from scratch;
- of a trained model's experts, keeping the most used loses less than keeping random ones.

Here: a small decoder with top-1 and the Switch loss (0.01), capacity factor 1 in training and no capacity in use:
dropping at random, dropping the last, and no capacity. Then two runs of 8 experts are aggregated and go on, beside 16
experts from scratch, on the same text with the same schedule; and half of the experts of the first run are removed.

    python reproductions/z_code.py
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

from training import ROWS, base, columns, losses, options, setting, token_losses, trained

from common import Reproduction, against, told
from coterie import assets
from coterie.anatomy import moe_layers, select
from coterie.api.train import training_config
from coterie.conversion.aggregate import aggregate
from coterie.routing.record import listening
from coterie.training.stream import Windows
from coterie.training.train import build, read_text, run
from coterie.training.trainer import no_denormals

DRAWN, LAST, ALL = "drawn", "the last", "none dropped"
RULE = (
    "reproduced if the held-out loss with drawn dropping is below that of dropping the last by more than two standard"
    " errors of the paired difference over seeds; not reproduced if it is above by as much; inconclusive otherwise"
)
RULE_AGGREGATED = (
    "reproduced if after the same number of further tokens the loss of the aggregated model is below that of the one"
    " from scratch by more than two standard errors of the paired difference over seeds; not reproduced if it is above"
    " by as much; inconclusive otherwise"
)
RULE_PRUNED = (
    "reproduced if keeping the half of the experts that were used most loses less than keeping a random half, by more"
    " than two standard errors of the paired difference over seeds; not reproduced if more by as much; inconclusive"
    " otherwise"
)


def config(experts: int = 8, **router: Any) -> dict[str, Any]:
    return base(
        num_experts=experts,
        router={"kind": "top-k", "top_k": 1, **router},
        balancing=[{"name": "switch", "weight": 0.01}],
    )


def verdict(first: list[float], second: list[float]) -> str:
    """Is the first lower?"""
    return {"below": "reproduced", "above": "not reproduced"}.get(told(against(first, second)), "inconclusive")


def dropping(given: argparse.Namespace, common: dict[str, Any]) -> Reproduction:
    def capped(policy: str) -> dict[str, Any]:
        return config(capacity={"policy": policy, "factor": 1.0, "eval_factor": 8.0})

    race = trained({LAST: capped("position"), DRAWN: capped("random"), ALL: config()}, given)
    return Reproduction(
        slug="z-code-rts",
        title="Z-code M3: which tokens a full expert drops (arXiv:2109.10465)",
        claim="with a capacity, dropping drawn tokens trains better than dropping the last",
        published="described as better convergence; the figures were not available",
        rule=RULE,
        columns=ROWS,
        rows=columns(race),
        verdict=verdict(losses(race, DRAWN), losses(race, LAST)),
        **common,
    )


def aggregated(given: argparse.Namespace, common: dict[str, Any]) -> list[Reproduction]:
    """Aggregation and pruning, on the same trained runs."""
    warm, cold, most_used, any_half, untouched = [], [], [], [], []
    with tempfile.TemporaryDirectory(prefix="coterie-reproduction-") as name, no_denormals():
        folder = Path(name)
        data, held_out = given.data, given.held_out
        if data is None:
            data, held_out = ([str(place)] for place in assets.write_library_texts(folder / "library"))
        text = {"data": data, "evaluate": held_out or [], "settings": [f"training.tokens={given.tokens // 2}"]}
        eight, sixteen = (training_config(config(n), **text) for n in (8, 16))
        doubled = eight.model_copy(update={"training": eight.training.model_copy(update={"tokens": 2 * given.tokens})})
        known = read_text(doubled, None, folder, seed=0)
        windows = Windows(known.stream, eight.training.length)
        for seed in given.seeds:
            print(f"aggregation, seed {seed}", flush=True)

            def fit(told: Any, model: Any, part: str, order: int, seed: int = seed) -> Any:
                where = folder / f"{part}-{seed}"
                return run(told, model, windows, known.tests, folder=where, seed=order, checkpoints=False)

            parts = []
            for number in (0, 1):
                order = 100 * seed + number
                parts.append(fit(eight, build(eight, None, seed=order)[0], f"part{number}", order)[0].eval())
            one = parts[0]
            loss, kept = float(token_losses(one, known)[0].mean()), used(one, known)
            draw = random.Random(seed)
            halves = {layer: sorted(draw.sample(range(8), 4)) for layer in kept}
            untouched.append(loss)
            most_used.append(pruned_loss(one, kept, known))
            any_half.append(pruned_loss(one, halves, known))
            both = aggregate(parts, noise=0.0).train()
            later = 100 * seed + 2
            warm.append(fit(sixteen, both, "both", later)[1].losses["all"])
            cold.append(fit(sixteen, build(sixteen, None, seed=later)[0], "scratch", later)[1].losses["all"])
    first = Reproduction(
        slug="z-code-aggregation",
        title="Z-code M3: aggregation of experts (arXiv:2109.10465)",
        claim="experts of two runs, gathered in one model, are a better start than none",
        published="described as faster convergence; the figures were not available",
        rule=RULE_AGGREGATED,
        columns=["start", "loss"],
        rows=[
            {"start": "two runs of 8 experts, aggregated", "loss": statistics.fmean(warm)},
            {"start": "16 experts from scratch", "loss": statistics.fmean(cold)},
            {"start": "one of the runs before", "loss": statistics.fmean(untouched)},
        ],
        verdict=verdict(warm, cold),
        **common,
    )
    second = Reproduction(
        slug="z-code-pruning",
        title="Z-code M3: the experts that are used (arXiv:2109.10465)",
        claim="keeping the most used half of the experts loses less than keeping a random half",
        published="usage pruning beats random pruning; the figures were not available",
        rule=RULE_PRUNED,
        columns=["experts", "loss"],
        rows=[
            {"experts": "all 8", "loss": statistics.fmean(untouched)},
            {"experts": "the 4 most used", "loss": statistics.fmean(most_used)},
            {"experts": "4 at random", "loss": statistics.fmean(any_half)},
        ],
        verdict=verdict(most_used, any_half),
        **common,
    )
    return [first, second]


def used(model: Any, text: Any) -> dict[int, list[int]]:
    """The half of each layer's experts that held-out tokens picked most; counted before any was dropped."""
    load: dict[int, Any] = {}

    def count(record: Any) -> None:
        for layer, routing in record.routings.items():
            load[layer] = load.get(layer, 0) + routing.load_N()

    with listening(model, count):
        token_losses(model, text)
    return {layer: sorted(load_E.topk(len(load_E) // 2).indices.tolist()) for layer, load_E in load.items()}


def pruned_loss(model: Any, kept: dict[int, list[int]], text: Any) -> float:
    smaller = copy.deepcopy(model)
    for layer in moe_layers(smaller):
        select(layer, kept[layer.index])
    return float(token_losses(smaller, text)[0].mean())


def main() -> None:
    given = options(__doc__, tokens=160_000).parse_args()
    common: dict[str, Any] = {
        "seeds": given.seeds,
        "setting": setting(given, **{"tokens before and after aggregation": given.tokens // 2}),
        "command": "python reproductions/z_code.py",
    }
    for result in (dropping(given, common), *aggregated(given, common)):
        result.show()
        print(f"kept in {result.save()}\n")


if __name__ == "__main__":
    main()
