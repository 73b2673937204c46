"""EvoMoE: first one expert, then many; first all of them, then one (arXiv:2112.14397).

Claim: a model that starts with one expert per layer, spawns the others from it, and then lets a Gumbel-softmax gate go
from all experts to one as its temperature falls, is better at the same number of steps than a top-1 router from the
start (Switch); both halves are needed.

Here: a small decoder of 8 experts, from scratch, all with top-1 in the end and balance losses of 0.01: Switch; EvoMoE
(one expert in the first tenth, half of each spawned expert's weights zero; temperature 2 to 0.3, linear, until the hard
switch at 60% of what is left); the gate without spawning; and spawning with top-1 at once. Operations per token are
told: the soft phase costs more.

    python reproductions/evomoe.py
"""

from __future__ import annotations

from typing import Any

from training import ROWS, base, columns, losses, options, setting, trained

from common import Reproduction, against, told

SWITCH, EVO, GATE, SPAWN = "top-1 (Switch)", "EvoMoE", "gate, no spawning", "spawning, then top-1"
RULE = (
    "reproduced if the final loss of EvoMoE is below that of Switch by more than two standard errors of the paired"
    " difference over seeds; not reproduced if it is above by as much; inconclusive otherwise"
)
RULE_PARTS = (
    "reproduced if the final loss of EvoMoE is below that of the gate without spawning and that of spawning with top-1,"
    " each by more than two standard errors of the paired difference over seeds; not reproduced if it is above either"
    " by as much; inconclusive otherwise"
)


def main() -> None:
    given = options(__doc__, tokens=160_000).parse_args()
    switch = {"kind": "top-k", "top_k": 1}
    gate = {"kind": "dts", "top_k": 1}
    falling = [
        {"what": "router.tau", "kind": "linear", "first": 2.0, "last": 0.3, "until": 0.6},
        {"what": "router.hard", "kind": "steps", "values": [0, 0, 0, 1, 1]},
    ]
    balance = [{"name": "switch", "weight": 0.01}]
    own = [{"name": "router", "key": "balance", "weight": 0.01}]
    grow = {"share": 0.1, "ratio": 0.5}

    def config(router: dict[str, Any], balancing: Any, *, spawned: bool, dials: Any = None) -> dict[str, Any]:
        told = base(router=router, balancing=balancing, dials=dials)
        return {**told, "grow": grow} if spawned else told

    configs = {
        SWITCH: config(switch, balance, spawned=False),
        EVO: config(gate, own, spawned=True, dials=falling),
        GATE: config(gate, own, spawned=False, dials=falling),
        SPAWN: config(switch, balance, spawned=True),
    }
    race = trained(configs, given)
    versus = {name: told(against(losses(race, EVO), losses(race, name))) for name in (SWITCH, GATE, SPAWN)}
    parts = {versus[GATE], versus[SPAWN]}
    common: dict[str, Any] = {
        "seeds": given.seeds,
        "setting": setting(given),
        "command": "python reproductions/evomoe.py",
        "columns": ROWS,
        "rows": columns(race),
    }
    first = Reproduction(
        slug="evomoe",
        title="EvoMoE: one expert first, then all, then one per token (arXiv:2112.14397)",
        claim="at equal steps EvoMoE ends at a lower loss than a top-1 router",
        published="ahead of Switch, BASE, Hash and StableMoE (GPT, RoBERTa, translation)",
        rule=RULE,
        verdict={"below": "reproduced", "above": "not reproduced"}.get(versus[SWITCH], "inconclusive"),
        **common,
    )
    second = Reproduction(
        slug="evomoe-parts",
        title="EvoMoE: both halves are needed (arXiv:2112.14397)",
        claim="without spawning, or with top-1 at once, the loss is higher",
        published="shown in ablations",
        rule=RULE_PARTS,
        verdict="reproduced" if parts == {"below"} else "not reproduced" if "above" in parts else "inconclusive",
        **common,
    )
    for result in (first, second):
        result.show()
        print(f"kept in {result.save()}\n")


if __name__ == "__main__":
    main()
