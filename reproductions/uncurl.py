"""UNCURL: tuned on a task, merged clusters recover further than its most used experts do (arXiv:2409.01483).

Claim: after fine-tuning on the task, a model pruned by UNCURL beats one that kept its most used experts; what is lost
against the unpruned model grows with the factor. Published (SuperGLUE, 354M backbone): 32 to 8 experts 66.48 / 69.13 /
58.96 on RTE / BoolQ / COPA for UNCURL and 64.86 / 66.71 / 58.12 for greedy pruning; 64 to 32 67.14 and 66.36 on RTE.

Here: a small trained MoE, one domain as the task, everything fine-tuned equally long on it (routers first, then all),
held-out loss of that domain. Controls: greedy pruning by frequency with the same fine-tuning, UNCURL calibrated on
another domain, the unpruned model fine-tuned alike, and UNCURL with mean router rows before any tuning. The paper
routes each token to one expert and trains for 50 epochs; here it is as many as the model uses, and a few dozen steps.
At which factor a model trained from scratch would be better is not asked: it needs a pretraining for each size.

    python reproductions/uncurl.py
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

from common import Reproduction, arguments, files_by_domain, mean_and_spread, workplace
from coterie import api

RULE = (
    "reproduced if, after equal fine-tuning, UNCURL is below frequency pruning at factor 2 and at the largest factor by"
    " more than two standard errors of the paired difference over seeds, its gap to the unpruned model grows with the"
    " factor, and calibration on the task beats calibration on another domain; not reproduced if UNCURL is above"
    " frequency pruning by more than two standard errors at either factor; inconclusive otherwise"
)


def main() -> None:
    parser = arguments(__doc__, samples=32, evaluate=24)
    parser.add_argument("--task", help="domain to prune and tune for (default: the second one found)")
    parser.add_argument("--other", help="domain to calibrate on wrongly (default: the first one found)")
    parser.add_argument("--steps", type=int, default=60, help="steps of full fine-tuning; half as many for routers")
    parser.add_argument("--keep", type=int, nargs="+", default=[8, 4], help="experts per layer, largest first")
    parser.add_argument("--train", type=int, default=192, help="windows of the task to fine-tune on")
    parser.add_argument("--rate", type=float, default=5e-5)
    parser.set_defaults(length=128)
    given = parser.parse_args()
    with workplace(given) as (model, calibration, evaluation, folder):
        files, tests = files_by_domain(calibration), files_by_domain(evaluation)
        names = sorted(files)
        other, task = given.other or names[0], given.task or names[1]
        table = Table(given, model, files, tests[task], task, folder)
        for seed in given.seeds:
            table.tuned("original", None, seed)
            for keep in given.keep:
                table.tuned(f"frequency, {keep} kept", table.pruned("frequency", keep, task, seed), seed)
                table.tuned(f"UNCURL, {keep} kept", table.pruned("uncurl", keep, task, seed), seed)
            keep = given.keep[0]
            table.tuned(f"UNCURL on {other}, {keep} kept", table.pruned("uncurl", keep, other, seed), seed)
            mean = table.pruned("uncurl", keep, task, seed, router="mean")
            table.note(f"UNCURL, {keep} kept, mean router, no tuning", mean, seed)
    result = Reproduction(
        slug="uncurl" if given.model is None else "uncurl-other-model",
        title=f"UNCURL on {'the pocket model' if given.model is None else 'a small MoE and real text'}"
        " (arXiv:2409.01483)",
        claim="After fine-tuning on the task, merged clusters beat the most used experts.",
        published="SuperGLUE, 354M backbone, 32 to 8 experts, RTE / BoolQ / COPA: UNCURL 66.48 / 69.13 / 58.96, greedy"
        " 64.86 / 66.71 / 58.12.",
        rule=RULE,
        columns=["model", "before tuning", "routers tuned", "tuned", "standard error"],
        seeds=given.seeds,
        setting={
            "model": "the pocket model" if given.model is None else "a trained Qwen3-MoE, 11 M parameters",
            "task": task,
            "calibration windows": given.samples,
            "fine-tuning": f"{given.steps // 2} router steps, {given.steps} steps, {given.train} windows",
            "evaluation windows": given.evaluate,
            "tokens per window": given.length,
        },
        command="python reproductions/uncurl.py"
        + ("" if given.model is None else " --model MODEL --calibration TEXT --evaluation HELD_OUT"),
    )
    result.rows = table.rows()
    result.verdict = verdict(table.losses, given.keep, other)
    result.show()
    result.save()


class Table:
    """Losses of every contender and seed, on held-out text of the task."""

    def __init__(self, given: Any, model: str, files: dict[str, str], test: str, task: str, folder: Path) -> None:
        self.given, self.model, self.files, self.test, self.folder = given, model, files, test, folder
        self.task = task
        self.losses: dict[str, list[dict[str, float]]] = {}

    def pruned(self, method: str, keep: int, domain: str, seed: int, **parameters: Any) -> str:
        out = str(self.folder / "pruned")
        seeded = {"seed": seed} if method == "uncurl" else {}
        api.compress(
            self.model,
            out,
            method=method,
            parameters={**seeded, **parameters},
            data=[self.files[domain]],
            samples=self.given.samples,
            length=self.given.length,
            keep_experts=keep,
            seed=seed,
            overwrite=True,
        )
        return out

    def loss(self, model: str) -> float:
        found = api.evaluate(
            [model], [self.test], tokenizer=self.model, samples=self.given.evaluate, length=self.given.length
        )
        return found[0].mean_loss

    def tuned(self, name: str, model: str | None, seed: int) -> None:
        routers = self.given.steps // 2 if model is not None else 0
        before, out = self.loss(model or self.model), str(self.folder / "tuned")
        done = api.finetune(
            model or self.model,
            out,
            [self.files[self.task]],
            router_steps=routers,
            steps=self.given.steps + (0 if routers else self.given.steps // 2),
            rate=self.given.rate,
            samples=self.given.train,
            length=self.given.length,
            seed=seed,
            overwrite=True,
        )
        entry = {"before": before, "tuned": self.loss(out)}
        if routers:
            entry["routers"] = before + done.losses["routers"] - done.losses["before"]
        self.losses.setdefault(name, []).append(entry)
        print(f"seed {seed}: {name} {before:.4f} -> {entry['tuned']:.4f}", flush=True)

    def note(self, name: str, model: str, seed: int) -> None:
        self.losses.setdefault(name, []).append({"before": self.loss(model)})

    def rows(self) -> list[dict[str, Any]]:
        rows = []
        for name, runs in self.losses.items():
            row: dict[str, Any] = {"model": name}
            for column, key in (("before tuning", "before"), ("routers tuned", "routers"), ("tuned", "tuned")):
                row[column] = mean_and_spread([r[key] for r in runs])[0] if key in runs[0] else ""
            spread = mean_and_spread([r.get("tuned", r["before"]) for r in runs])[1]
            rows.append({**row, "standard error": spread / len(runs) ** 0.5})
        return rows


def verdict(losses: dict[str, list[dict[str, float]]], keeps: list[int], other: str) -> str:
    """The rule, on the numbers."""
    wins, lost, gaps = [], [], []
    for keep in keeps:
        ours = [r["tuned"] for r in losses[f"UNCURL, {keep} kept"]]
        theirs = [r["tuned"] for r in losses[f"frequency, {keep} kept"]]
        mean, spread = mean_and_spread([a - b for a, b in zip(ours, theirs, strict=True)])
        error = spread / len(ours) ** 0.5
        wins.append(mean < -2 * error)
        lost.append(mean > 2 * error)
        gaps.append(mean_and_spread(ours)[0])
    wrong = mean_and_spread([r["tuned"] for r in losses[f"UNCURL on {other}, {keeps[0]} kept"]])[0]
    if any(lost):
        return "not reproduced"
    grows = all(a < b for a, b in pairwise(gaps))
    return "reproduced" if all(wins) and grows and gaps[0] < wrong else "inconclusive"


if __name__ == "__main__":
    main()
