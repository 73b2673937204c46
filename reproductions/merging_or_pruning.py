"""Merging or pruning: which loses less, for the loss and for what the model writes?

Published results disagree: the authors of REAP (arXiv:2510.13999) find that pruning wins on generation, those of
HC-SMoE (arXiv:2410.08589) and Sub-MoE (arXiv:2506.23266) that merging wins on multiple choice and perplexity (HC-SMoE,
Mixtral-8x7B 8 to 4, mean of eight tasks: 0.588, best pruning 0.573; REAP: merging close on multiple choice, far behind
on code and mathematics).

Here: three pruning methods and four ways to merge, without training, at 75, 50 and 25 % of the experts of a small
trained MoE. Judged by held-out loss, and by what is written greedily: how many of 32 tokens are those that the original
writes behind the same 64 held-out tokens, how much of them repeats, and whether a number or a sum that stands in a
worked problem is copied where it must be (about all the arithmetic a model of this size can do).

    python reproductions/merging_or_pruning.py
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import Reproduction, against, arguments, mean_and_spread, resident, setting, workplace
from coterie import api
from coterie.anatomy import moe_layers
from coterie.assets import arithmetic
from coterie.comparison import as_planned
from coterie.compression.plan import Plan
from coterie.compression.planning import plan_method
from coterie.text import load_tokenizer

FAMILIES = {
    "pruning": ("reap", "frequency", "soft-frequency"),
    "merging": ("hc-smoe", "m-smoe", "sub-moe", "hc-smoe:router=reduced"),
}
BUDGETS = (0.75, 0.5, 0.25)
PROMPT, WRITTEN, NGRAM = 64, 32, 4
METRICS = {"loss": -1, "continuation": 1, "copied": 1}  # 1: more is better
RULE = (
    "for each share of experts and for each of loss, continuation and copied: the best method of each family by its"
    " mean over seeds; a family wins where its best is better by more than two standard errors of the difference paired"
    " by seed, otherwise neither does; the verdict names who wins where. Repetition is shown beside"
)


class Writing:
    """What a model in memory writes, scored against the original and against what must be copied."""

    def __init__(self, model: Any, tokenizer: Any, prompts_BL: Tensor, problems: int) -> None:
        self.model, self.tokenizer, self.prompts_BL = model, tokenizer, prompts_BL
        self.tasks = list(copying(problems))
        self.original_BL = self.continued()

    @torch.no_grad()
    def continued(self) -> Tensor:
        written_BL = self.model.generate(
            self.prompts_BL,
            attention_mask=torch.ones_like(self.prompts_BL),
            max_new_tokens=WRITTEN,
            min_new_tokens=WRITTEN,
            do_sample=False,
            pad_token_id=0,
        )
        found: Tensor = written_BL[:, self.prompts_BL.shape[1] :]
        return found

    @torch.no_grad()
    def copied(self) -> float:
        """Share of the tasks whose answer is written exactly; a number is not followed by a further digit."""
        rows = [self.tokenizer(prompt)["input_ids"] for prompt, _ in self.tasks]
        width, right = max(map(len, rows)), 0
        ids_BL = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        mask_BL = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        written_BL = self.model.generate(
            ids_BL, attention_mask=mask_BL, max_new_tokens=8, do_sample=False, pad_token_id=0
        )
        for row, (_, answer) in zip(written_BL[:, width:], self.tasks, strict=True):
            text = self.tokenizer.decode(row)
            longer = answer[-1].isdigit() and text[len(answer) :][:1].isdigit()
            right += text.startswith(answer) and not longer
        return right / len(self.tasks)

    def scores(self) -> dict[str, float]:
        written_BL = self.continued()
        same = float((written_BL == self.original_BL).double().mean())
        return {"continuation": same, "repetition": repetition(written_BL), "copied": self.copied()}


def repetition(written_BL: Tensor) -> float:
    """Share of the n-grams of a continuation that stood in it before."""
    shares = []
    for row in written_BL.tolist():
        grams = [tuple(row[i : i + NGRAM]) for i in range(len(row) - NGRAM + 1)]
        shares.append(1 - len(set(grams)) / len(grams))
    return mean_and_spread(shares)[0]


def copying(problems: int) -> Iterator[tuple[str, str]]:
    """(prompt, answer) pairs: the sum behind "<<" and the result behind ">>", in annotations as GSM8K has them."""
    for text in arithmetic.generate(11, 400 * problems)[:problems]:
        answer = text.index("\nAnswer:")
        found = re.search(r"(\d+(?: [-+*/] \d+)+) = (\d+)", text[answer:])
        assert found is not None, text
        before, compact = text[: answer + found.start(2)], found[1].replace(" ", "")
        yield before + "<<", compact + "="
        yield f"{before}<<{compact}={found[2]}>>", found[2]


@contextmanager
def planned(model: Any, plan: Plan) -> Iterator[None]:
    """Let a model in memory be, for a while, what a plan makes of it."""
    method, layers = plan_method(plan), {layer.index: layer for layer in plan.layers}
    with ExitStack() as stack:
        for moe in moe_layers(model):
            stack.enter_context(as_planned(moe, method, layers[moe.index], {}))
        yield


Scores = dict[str, list[float]]


def measured(given: Any, model: str, calibration: list[str], evaluation: list[str]) -> dict[tuple[str, float], Scores]:
    """{(method, share): {what: one number a seed}}; the original is ("original", 1)."""
    found: dict[tuple[str, float], Scores] = {}

    def note(key: tuple[str, float], quality: Any, written: dict[str, float]) -> None:
        entry = {"loss": quality.mean_loss, **written, **{f"loss on {d.domain}": d.loss for d in quality.domains}}
        for name, value in entry.items():
            found.setdefault(key, {}).setdefault(name, []).append(value)

    loaded = resident(model)
    prompts = api.calibration(model, evaluation, samples=given.prompts, length=PROMPT)
    assert prompts is not None
    prompts_BL = torch.cat([batch.ids_BL for batch in prompts.batches])
    writing = Writing(loaded, load_tokenizer(Path(model)), prompts_BL, given.problems)
    itself = writing.scores()
    for seed in given.seeds:
        contest = api.compare(
            model,
            calibration,
            methods=[name for names in FAMILIES.values() for name in names],
            keep=BUDGETS,
            eval_data=evaluation,
            eval_samples=given.evaluate,
            samples=given.samples,
            length=given.length,
            seed=seed,
        )
        note(("original", 1.0), contest.original, itself)
        names = [(name, share) for share in BUDGETS for names in FAMILIES.values() for name in names]
        for key, contender in zip(names, contest.contenders, strict=True):
            assert contender.plan is not None, contender.refused
            with planned(loaded, contender.plan):
                note(key, contender.quality, writing.scores())
            print(f"seed {seed}: {key} " + ", ".join(f"{k} {v[-1]:.4f}" for k, v in found[key].items()), flush=True)
    assert writing.scores() == itself, "the model is not as it was"
    return found


def duel(found: dict[tuple[str, float], Scores], share: float, metric: str) -> tuple[str, str]:
    """(who wins, the difference in words): the best of each family on one metric."""
    sign = METRICS[metric]
    best = {
        family: max(names, key=lambda n: sign * mean_and_spread(found[n, share][metric])[0])
        for family, names in FAMILIES.items()
    }
    ours, theirs = (found[best[family], share][metric] for family in ("pruning", "merging"))
    mean, error = against(ours, theirs)
    wins = "pruning" if sign * mean > 2 * error else "merging" if sign * mean < -2 * error else "neither"
    return wins, f"{mean:+.3f} +- {error:.3f} ({best['pruning']}, {best['merging']}): {wins}"


def main() -> None:
    parser = arguments(__doc__, samples=8, evaluate=6)
    parser.add_argument("--prompts", type=int, default=6, help="prompts of each domain to continue")
    parser.add_argument("--problems", type=int, default=32, help="problems to copy from, two answers each")
    given = parser.parse_args()
    with workplace(given) as (model, calibration, evaluation, _):
        found = measured(given, model, calibration, evaluation)
    shown = given.model is None and given.calibration is None
    domains = [name.removeprefix("loss on ") for name in found["original", 1.0] if name.startswith("loss on ")]
    result = Reproduction(
        slug="merging-or-pruning" if shown else "merging-or-pruning-other-model",
        title=f"Merging or pruning on {'the pocket model' if shown else 'a small MoE and real text'}",
        claim="Pruning wins on generation (REAP's authors); merging wins on multiple choice and perplexity (HC-SMoE's"
        " and Sub-MoE's).",
        published="HC-SMoE, Mixtral-8x7B 8 to 4, mean of eight tasks: 0.588, best pruning 0.573; Sub-MoE, WikiText-2"
        " perplexity: 6.97, frequency pruning 17.5; REAP: merging close on multiple choice, far behind on generation.",
        rule=RULE,
        columns=["contender", "experts", "loss", "continuation", "copied", "repetition", "loss by domain"],
        seeds=given.seeds,
        setting=setting(
            given,
            continuation=f"share of {WRITTEN} greedy tokens equal to the original's, {given.prompts} prompts"
            f" of {PROMPT} tokens per domain",
            copied=f"share of {2 * given.problems} sums and results copied exactly into annotations",
            repetition=f"share of {NGRAM}-grams of a continuation that stood in it before",
        ),
        command="python reproductions/merging_or_pruning.py"
        + ("" if shown else " --model MODEL --calibration TEXT --evaluation HELD_OUT"),
    )
    for (name, share), scores in found.items():
        mean = {what: mean_and_spread(values)[0] for what, values in scores.items()}
        by_domain = ", ".join(f"{d} {mean[f'loss on {d}']:.2f}" for d in domains)
        row = (name, f"{share:.0%}", *(mean[c] for c in result.columns[2:6]), by_domain)
        result.rows.append(dict(zip(result.columns, row, strict=True)))
    words = []
    for metric in METRICS:
        winners = {share: duel(found, share, metric)[0] for share in BUDGETS}
        words.append(f"{metric}: " + ", ".join(f"{who} at {share:.0%}" for share, who in winners.items()))
    for share in BUDGETS:
        cells = {metric: duel(found, share, metric)[1] for metric in METRICS}
        best = {"contender": "best pruning - best merging", "experts": f"{share:.0%}", **cells}
        result.rows.append(dict.fromkeys(result.columns, "") | best)
    result.verdict = "; ".join(words)
    result.show()
    print(f"kept in {result.save()}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
