"""M-SMoE: merging around the most used experts, then recovery, beats pruning them away (arXiv:2310.01334).

Claim: at equal size and after the same distillation, experts merged along router logits, by frequency, neurons aligned
and with a ratio that differs between layers lose less than pruning the others or averaging without these. Published
(switch-base-32, 8 of 32 experts on average, COPA / SQuAD EM): M-SMoE 68 / 65.66, pruning 63 / 64.80, uniform weights
64 / 64.55, no permutation 66 / 64.73, uniform ratio 63 / 64.36, random groups 62 / 64.97.

Here: half of the experts of a small trained MoE stay, held-out loss before and after a short recovery with the routers
frozen; the same text, steps and seeds for all. Pruning keeps the dominant experts as they are and redirects to them.
Where experts have a common origin their neurons may stand in the same order by themselves: alignment is also measured
on the same model with the neurons of every expert permuted at random, which computes the same.

    python reproductions/m_smoe.py
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from common import Reproduction, against, arguments, mean_and_spread, setting, told, workplace
from coterie import api
from coterie.anatomy import moe_layers
from coterie.compression.alignment import reordered
from coterie.compression.merging.m_smoe import MSmoe
from coterie.compression.methods import method
from coterie.profiling.profile import LayerProfile
from coterie.text import load_tokenizer

OURS, PRUNED, RANDOM = "M-SMoE", "pruned, redirected", "random groups"
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    OURS: ("m-smoe", {}),
    PRUNED: ("m-smoe", {"weights": "leader"}),
    "uniform weights": ("m-smoe", {"weights": "uniform"}),
    "no alignment": ("m-smoe", {"align": "none"}),
    "uniform ratio": ("m-smoe", {"ratio": "uniform"}),
    RANDOM: ("m-smoe-random", {}),
}
ALIGNED, UNALIGNED = "permuted model: M-SMoE", "permuted model: no alignment"
RULE = (
    "differences are paired by seed and after recovery; reproduced if M-SMoE is below pruning with redirection and"
    " below random groups, and without alignment the permuted model is above M-SMoE on it, each by more than two"
    " standard errors, and no variant (uniform weights, no alignment, uniform ratio) is below M-SMoE by more than two"
    " standard errors; not reproduced if pruning with redirection or random groups are below M-SMoE by more than two"
    " standard errors; inconclusive otherwise"
)


@method("m-smoe-random", kind="control", paper="control")
class RandomGroups(MSmoe):
    """M-SMoE whose dominant experts get their groups by lot."""

    def _around(
        self, layer: LayerProfile, dominant: Sequence[int], alone: Collection[int], experts: Sequence[int] | None = None
    ) -> list[list[int]]:
        draw = torch.Generator().manual_seed(1000 * self.seed + layer.index)
        groups = {expert: [expert] for expert in dominant}
        for expert in set(range(layer.experts)) - set(dominant):
            groups[dominant[int(torch.randint(len(dominant), (), generator=draw))]].append(expert)
        return [sorted(group) for group in groups.values()]


def permuted(model: str, out: Path, seed: int) -> str:
    """A checkpoint that computes the same, the neurons of every expert in another order."""
    shutil.rmtree(out, ignore_errors=True)
    loaded, _ = api.load(model)
    draw = torch.Generator().manual_seed(seed)
    for layer in moe_layers(loaded):
        bank = layer.bank
        for expert in range(layer.num_experts):
            bank.write(expert, reordered(bank.read(expert), torch.randperm(bank.intermediate_size, generator=draw)))
    loaded.save_pretrained(out)
    load_tokenizer(Path(model)).save_pretrained(out)
    return str(out)


class Bench:
    """Losses of every arm and seed: (before, after recovery)."""

    def __init__(self, given: Any, model: str, calibration: list[str], evaluation: list[str], folder: Path) -> None:
        self.given, self.model, self.folder = given, model, folder
        self.calibration, self.evaluation = calibration, evaluation
        self.losses: dict[str, list[tuple[float, float]]] = {}
        self.original: list[float] = []

    def run(self, seed: int, model: str, arms: dict[str, tuple[str, dict[str, Any]]]) -> None:
        """Compress, heal and measure; the teacher is always the model as it was trained."""
        given = self.given
        text = {"samples": given.samples, "length": given.length, "seed": seed}
        seen = api.profile(model, self.calibration, methods=["m-smoe"], **text)
        for name, (chosen, parameters) in arms.items():
            small, healed = str(self.folder / "small"), str(self.folder / "healed")
            extra = {"seed": seed} if chosen == "m-smoe-random" else {}
            api.compress(
                model, small, method=chosen, parameters={**parameters, **extra}, profile=seen, keep=0.5, overwrite=True
            )
            api.heal(
                small,
                healed,
                self.calibration,
                teacher=self.model,
                train="experts",
                steps=given.steps,
                rate=given.rate,
                kd_weight=0.2,
                lm_weight=1.0,
                temperature=2.0,
                samples=given.train,
                held_out_samples=1,
                length=given.length // 2,
                cache=str(self.folder / f"teacher-{seed}"),
                seed=seed,
                overwrite=True,
            )
            before, after = self.measure([small, healed])
            self.losses.setdefault(name, []).append((before, after))
            print(f"seed {seed}: {name} {before:.4f} -> {after:.4f}", flush=True)

    def measure(self, models: list[str]) -> list[float]:
        given = self.given
        found = api.evaluate(models, self.evaluation, tokenizer=self.model, samples=given.evaluate, length=given.length)
        return [result.mean_loss for result in found]


def verdict(losses: dict[str, list[tuple[float, float]]]) -> str:
    """The rule, on the numbers."""
    after = {name: [b for _, b in runs] for name, runs in losses.items()}
    word = {name: told(against(values, after[OURS])) for name, values in after.items()}
    permuted_word = told(against(after[UNALIGNED], after[ALIGNED]))
    if "below" in (word[PRUNED], word[RANDOM]):
        return "not reproduced"
    variants = [word[name] for name in ("uniform weights", "no alignment", "uniform ratio")]
    wins = word[PRUNED] == word[RANDOM] == permuted_word == "above" and "below" not in variants
    return "reproduced" if wins else "inconclusive"


def main() -> None:
    parser = arguments(__doc__, samples=8, evaluate=8)
    parser.add_argument("--steps", type=int, default=40, help="steps of recovery, 8 windows of half the length each")
    parser.add_argument("--train", type=int, default=48, help="windows of each domain to recover on")
    parser.add_argument("--rate", type=float, default=3e-4)
    given = parser.parse_args()
    with workplace(given) as (model, calibration, evaluation, folder):
        bench = Bench(given, model, calibration, evaluation, folder)
        for seed in given.seeds:
            bench.run(seed, model, ARMS)
            other = permuted(model, folder / "permuted", seed)
            bench.run(seed, other, {ALIGNED: ("m-smoe", {}), UNALIGNED: ("m-smoe", {"align": "none"})})
        bench.original = bench.measure([model, other])
    shown = given.model is None and given.calibration is None
    result = Reproduction(
        slug="m-smoe" if shown else "m-smoe-other-model",
        title=f"M-SMoE on {'the pocket model' if shown else 'a small MoE and real text'} (arXiv:2310.01334)",
        claim="After the same recovery, merging along router hints loses less than pruning and than plainer merging.",
        published="switch-base-32, 8 of 32 experts, COPA / SQuAD EM: M-SMoE 68 / 65.66, pruning 63 / 64.80, uniform"
        " weights 64 / 64.55, no permutation 66 / 64.73, uniform ratio 63 / 64.36, random groups 62 / 64.97.",
        rule=RULE,
        columns=["model", "before recovery", "against M-SMoE", "error", "recovered", "against", "standard error"],
        seeds=given.seeds,
        setting=setting(
            given,
            kept="half of the experts, on average over layers",
            recovery=f"{given.steps} steps of 8 windows of {given.length // 2} tokens, rate {given.rate:g},"
            " experts only, CE + 0.2 KL at temperature 2",
            against="M-SMoE, paired by seed; on the permuted model M-SMoE there",
        ),
        command="python reproductions/m_smoe.py"
        + ("" if shown else " --model MODEL --calibration TEXT --evaluation HELD_OUT"),
    )
    for name, loss in zip(("original", "original, permuted"), bench.original, strict=True):
        result.rows.append(row(name, loss))
    for name, runs in bench.losses.items():
        base = bench.losses[ALIGNED if name.startswith("permuted") else OURS]
        before, after = ([r[i] for r in runs] for i in (0, 1))
        first = against(before, [b for b, _ in base])
        last = against(after, [b for _, b in base])
        result.rows.append(row(name, mean_and_spread(before)[0], *first, mean_and_spread(after)[0], *last))
    result.verdict = verdict(bench.losses)
    result.show()
    print(f"kept in {result.save()}")


def row(name: str, *values: float) -> dict[str, Any]:
    names = ("before recovery", "against M-SMoE", "error", "recovered", "against", "standard error")
    return {"model": name, **dict.fromkeys(names, ""), **dict(zip(names, values, strict=False))}


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
