"""AdaMoE: null experts let each token run as many experts as it needs (arXiv:2406.13233).

Claim: fine-tuning a trained MoE with null experts beside the true ones, more slots per token and a balance loss that
sees all nulls as one, lowers the experts per token (Mixtral: 2 to 1.66, about 15% of all operations) without a loss of
quality, and better than running fewer experts for every token; balancing nulls one by one is worse.

Here: the pocket model (16 experts of which 4 run) is fine-tuned in four ways on the same text: as it is; with null
experts (16 nulls, 6 slots: 3 experts if all are equally likely), the weight of the null-aware loss loosened as in the
paper (0.02, then 0.0001 from half of the training on); the same with nulls balanced one by one; and with 3 experts for
every token.

    python reproductions/adamoe.py
"""

from __future__ import annotations

from typing import Any

from training import ROWS, columns, losses, options, reversed_by, setting, token_losses, trained

from common import Reproduction, against, mean_and_spread
from coterie import assets

PLAIN, ADA, APART, FEWER = "4 for every token", "null experts", "nulls one by one", "3 for every token"
LEAST, MOST, WORSE = 0.6, 0.95, 0.01  # experts per token relative to before; loss
RULE = (
    "reproduced if with null experts a token runs on average 60% to 95% of the experts it ran before, at a loss at most"
    " 1% above that of fine-tuning without them, and below that of 3 experts for every token by more than two standard"
    " errors of the paired difference over seeds; not reproduced if the loss is more than 1% above, or above that of 3"
    " experts by as much; inconclusive otherwise"
)
RULE_APART = (
    "reproduced if the loss with nulls balanced one by one is above that with nulls as one by more than two standard"
    " errors of the paired difference over seeds; not reproduced if it is below by as much; inconclusive otherwise"
)


def config(router: dict[str, Any], term: str) -> dict[str, Any]:
    loosened = {"what": f"balance.{term}", "kind": "steps", "values": [1.0, 0.005]}
    return {
        "init": str(assets.pocket()),
        "router": router,
        "balancing": [{"name": term, "weight": 0.02}],
        "dials": [loosened],
        "training": {"batch_size": 8, "length": 128, "rate": 3e-4, "evaluate_every": 0.25, "evaluate_samples": 12},
    }


def main() -> None:
    given = options(__doc__, tokens=80_000).parse_args()
    spread: dict[int, list[float]] = {}

    def varies(run: Any, model: Any, text: Any) -> None:
        if run.name == ADA:
            _, ran = token_losses(model, text)
            spread[run.seed] = [float(ran_T.std()) for ran_T in ran.values()]

    nulls = {"kind": "adamoe", "nulls": 16, "top_k": 6}
    configs = {
        PLAIN: config({"kind": "top-k"}, "switch"),
        ADA: config(nulls, "null"),
        APART: config(nulls, "switch"),
        FEWER: config({"kind": "top-k", "top_k": 3}, "switch"),
    }
    race = trained(configs, given, after=varies)
    rows = columns(race)
    ran = next(row["experts per token"] for row in rows if row["config"] == ADA)
    plain, ada = (mean_and_spread(losses(race, name))[0] for name in (PLAIN, ADA))
    against_fewer = reversed_by(losses(race, ADA), losses(race, FEWER))
    held = LEAST * 4 <= ran <= MOST * 4 and ada <= plain * (1 + WORSE)
    failed = ada > plain * (1 + WORSE) or against_fewer == "above"
    common: dict[str, Any] = {
        "seeds": given.seeds,
        "setting": setting(given, model="the pocket model", spread=f"experts per token, by layer: {spread}"),
        "command": "python reproductions/adamoe.py",
        "columns": ROWS,
        "rows": rows,
    }
    first = Reproduction(
        slug="adamoe",
        title="AdaMoE: null experts (arXiv:2406.13233)",
        claim="with null experts tokens run fewer experts at no loss, better than fewer experts for every token",
        published="Mixtral: 2 to 1.66 experts, SIQA 80.9 to 81.3; 15% fewer operations",
        rule=RULE,
        verdict="reproduced" if held and against_fewer == "below" else "not reproduced" if failed else "inconclusive",
        **common,
    )
    apart = against(losses(race, APART), losses(race, ADA))
    second = Reproduction(
        slug="adamoe-one-bucket",
        title="AdaMoE: nulls are balanced as one (arXiv:2406.13233)",
        claim="balancing null experts one by one is worse than as one",
        published="RTE 56.7 against 67.5, COLA 83.7 against 85.0 (Llama2-7B with LoRA experts)",
        rule=RULE_APART,
        verdict={True: "reproduced", False: "not reproduced"}[apart[0] > 0]
        if abs(apart[0]) > 2 * apart[1]
        else "inconclusive",
        **common,
    )
    for result in (first, second):
        result.show()
        print(f"kept in {result.save()}\n")


if __name__ == "__main__":
    main()
