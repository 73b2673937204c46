"""SlimMoE: experts made narrower in stages beat experts made so at once, dropped or merged (arXiv:2506.18349).

Claim: at a small part of the expert parameters and equal training, pruning and distilling in several stages beats
doing it once, and keeping every expert with fewer neurons beats dropping and merging experts (the paper's SEER-MoE and
M-SMoE). Further: a longer first stage beats a shorter one; the neurons are chosen by sensitivity of the distillation
loss; the original, not the text, is what is learned from. Published: 41.9B to 7.6B parameters, 400B tokens, MMLU 78.36
to 70.68; the ablations are known by their direction alone.

Here: a small trained MoE at a quarter of each expert's width (or of its experts), held-out loss averaged over domains.
Every arm is trained on the same windows in the same order with the same number of steps; two stages share them. The
teacher is the original in every stage, the loss is cross-entropy with its top 8, a cosine schedule with 10% warm-up
begins anew in each stage. The rate and the shares of the stages were chosen beforehand and not tuned. Time per token is
processor time of one thread that reads windows, and decides nothing. Whether a model of that size trained from scratch
is worse is not asked: it needs a pretraining. The paper trains on millions of times as many tokens.

    python reproductions/slimmoe.py
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from torch.utils.data import SequentialSampler

from common import Reproduction, arguments, mean_and_spread, narrowed_losses, workplace
from coterie import api
from coterie.compression.sizes import measure
from coterie.streaming.lockstep import Batch
from coterie.text import TokenData
from coterie.training.heal import Distillation, distil
from coterie.training.teacher import write_cache
from coterie.training.trainer import PlainTrainer, learning, write_trained

TOP = 8
ONE, TWO = "one stage", "two stages, 1/3 of the steps first"
LONG, SHORT = "two stages, 1/2 of the steps first", "two stages, 1/6 of the steps first"
DROPPED, MERGED = "experts dropped (REAP)", "experts merged (M-SMoE)"
TEXT = "two stages, 1/3 of the steps first, text alone"
STAGES = {TWO: 1 / 3, LONG: 1 / 2, SHORT: 1 / 6, TEXT: 1 / 3}
CRITERIA = ("kd_top8", "lm", "fisher", "activation", "magnitude", "random")

# (part, the arm that is claimed to be better, the arm it is claimed to beat, column); the first three decide
CLAIMS = [
    ("a", TWO, ONE, "healed"),
    ("b", TWO, DROPPED, "healed"),
    ("b", TWO, MERGED, "healed"),
    ("b2", LONG, SHORT, "healed"),
    ("c", TWO, TEXT, "healed"),
    *(("d", "cut by kd_top8", f"cut by {other}", "cut") for other in ("magnitude", "activation", "random")),
]
DECIDE = 3

RULE = (
    "a comparison holds if the mean over seeds of the paired difference in held-out loss is below zero by more than"
    " two standard errors, is contradicted if it is above zero by more than two, and is open otherwise; reproduced if,"
    " after equal healing, two stages (1/3 and 2/3 of the steps) against one stage (a), and against expert dropping and"
    " expert merging at equal expert parameters (b), all hold; not reproduced if one of the three is contradicted;"
    " inconclusive otherwise; a longer against a shorter first stage (b2), distillation against text alone (c) and"
    " kd_top8 against magnitude, activation and random neurons before healing (d) are reported in the same words and"
    " decide nothing, nor does time per token"
)


def main() -> None:
    parser = arguments(__doc__, samples=12, evaluate=16)
    parser.add_argument("--steps", type=int, default=120, help="of training, in all stages of an arm together")
    parser.add_argument("--batch", type=int, default=4, help="windows per step")
    parser.add_argument("--train", type=int, default=1024, help="windows per domain to train on, if there are so many")
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.set_defaults(length=128)
    given = parser.parse_args()
    with workplace(given) as (model, calibration, evaluation, folder), in_order():
        table = Table(given, model, calibration, evaluation, folder)
        for seed in given.seeds:
            table.run(seed)
        table.time()
        sizes = table.sizes()
    pocket = given.model is None and given.calibration is None
    result = Reproduction(
        slug="slimmoe" if pocket else "slimmoe-other-model",
        title=f"SlimMoE on {'the pocket model' if pocket else 'a small MoE and real text'} (arXiv:2506.18349)",
        claim="At equal expert parameters and equal distillation, slimming experts in two stages beats slimming them at"
        " once, dropping experts and merging experts.",
        published="Phi-3.5-MoE (41.9B) to Phi-mini-MoE (7.6B, 15% of the expert width), 400B tokens: MMLU 78.36 to"
        " 70.68. Ablations by direction: several stages > one; longer first stage > shorter; > SEER-MoE and > M-SMoE at"
        " aggressive ratios.",
        rule=RULE,
        columns=["part", "model", "cut", "healed", "against", "difference", "standard error", "claim", "time"],
        seeds=given.seeds,
        setting={
            "model": "the pocket model" if given.model is None else "a trained Qwen3-MoE, 11 M parameters",
            "text": "the demo texts"
            if given.calibration is None
            else "encyclopaedia, reviews, arithmetic, news, Spanish, Dutch, Python",
            "domains": len(table.test.domains),
            "kept": f"{table.width // 4} of {table.width} neurons of every expert, or a quarter of the experts",
            "expert parameters": sizes,
            "healing": f"{given.steps} steps of {given.batch} windows, rate {given.rate:g}, from"
            f" {table.pool.samples} windows",
            "calibration windows per domain": given.samples,
            "evaluation windows per domain": given.evaluate,
            "tokens per window": given.length,
            "cut": "loss after the last cut, before the healing that follows it",
            "difference": "of the better by claim (the row) to the one it is held against",
            "time": "processor time per token, reading, as a share of the original's",
            "left out": "the same size trained from scratch",
        },
        command="python reproductions/slimmoe.py"
        + ("" if given.steps == parser.get_default("steps") else f" --steps {given.steps}")
        + ("" if pocket else " --model MODEL --calibration TEXT --evaluation HELD_OUT"),
    )
    result.rows = table.rows()
    result.verdict = verdict(table.losses)
    result.show()
    result.save()


@contextmanager
def in_order() -> Iterator[None]:
    """Training takes windows in the order they are given, so that arms can share one stream of them."""
    with patch.object(PlainTrainer, "_get_train_sampler", lambda trainer, rows=None: SequentialSampler(rows)):
        yield


class Table:
    """Losses of every arm and seed, on held-out text."""

    def __init__(self, given: Any, model: str, calibration: list[str], evaluation: list[str], folder: Path) -> None:
        self.given, self.model, self.calibration, self.folder = given, model, calibration, folder
        opened = api.Runtime().open(model)
        self.width = next(iter(opened.moe.values())).bank.intermediate_size
        pool = api.calibration(model, calibration, samples=given.train, length=given.length)
        test = api.calibration(model, evaluation, samples=given.evaluate, length=given.length)
        assert pool is not None
        assert test is not None
        self.pool, self.test = pool, test
        self.windows = torch.cat([batch.ids_BL for batch in pool.batches])
        used = sorted({n for seed in given.seeds for n in self.stream(seed)})
        self.told = write_cache(opened, self.data(used), folder / "teacher", k=TOP)
        self.losses: dict[str, list[dict[str, float]]] = {"original": []}
        self.original = self.loss(model)
        self.times: dict[str, float] = {}

    def stream(self, seed: int) -> list[int]:
        """The windows that every arm of this seed is trained on, in order: whole passes, each in another order."""
        wanted, order = self.given.steps * self.given.batch, random.Random(seed)
        numbers: list[int] = []
        while len(numbers) < wanted:
            numbers += order.sample(range(len(self.windows)), len(self.windows))
        return numbers[:wanted]

    def data(self, numbers: list[int]) -> TokenData:
        batches = [Batch(self.windows[numbers], None, torch.zeros(len(numbers), dtype=torch.int64))]
        return TokenData(batches, ["text"], f"windows {numbers}", {"text": self.windows[numbers].numel()})

    def loss(self, model: Any) -> float:
        """Mean over domains, of a checkpoint or a model in memory."""
        loaded = api.load(model, dtype="float32")[0] if isinstance(model, str) else model
        return mean_and_spread(narrowed_losses(loaded, self.test))[0]

    def note(self, name: str, seed: int, **losses: float) -> None:
        self.losses.setdefault(name, []).append(losses)
        print(f"seed {seed}: {name} " + " ".join(f"{key} {value:.4f}" for key, value in losses.items()), flush=True)

    def cut(self, source: str, name: str, seed: int, method: str = "slimmoe", **options: Any) -> str:
        out = str(self.folder / name)
        data = [] if options.get("parameters", {}).get("criterion") in ("magnitude", "random") else self.calibration
        text = {"data": data, "samples": self.given.samples, "length": self.given.length}
        api.compress(source, out, method=method, seed=seed, overwrite=True, **text, **options)
        return out

    def slimmed(self, source: str, name: str, seed: int, part: int, **parameters: Any) -> str:
        """One over `part` of the original width, whatever that is a multiple of."""
        neurons = {"neurons": self.width // part, "multiple_of": self.width // 4}
        return self.cut(source, name, seed, parameters={**neurons, **parameters})

    def healed(self, student: str, numbers: list[int], seed: int, out: str = "", *, text: bool = False) -> Any:
        """Trained on these windows of the stream; written to `out` if that is named."""
        loaded, _ = api.load(student, dtype="float32")
        options = Distillation(
            steps=len(numbers) // self.given.batch,
            rate=self.given.rate,
            batch_size=self.given.batch,
            schedule="cosine",
            warmup=0.1,
            loss="cross-entropy",
            top=TOP,
            kd_weight=0.0 if text else 1.0,
            lm_weight=1.0 if text else 0.0,
        )
        with TemporaryDirectory(dir=self.folder) as scratch:
            distil(loaded, self.data(numbers), self.told, options, folder=Path(scratch), seed=seed)
        if out:
            Path(out).mkdir(exist_ok=True)
            write_trained(loaded, learning(loaded), api.Runtime().open(student), Path(out))
        return loaded

    def run(self, seed: int) -> None:
        """All arms of a seed."""
        given, stream = self.given, self.stream(seed)
        self.note("original", seed, cut=self.original, healed=self.original)
        for criterion in CRITERIA:
            slim = self.slimmed(self.model, f"quarter-{criterion}", seed, 4, criterion=criterion)
            self.note(f"cut by {criterion}", seed, cut=self.loss(slim))
        whole = {
            ONE: str(self.folder / "quarter-kd_top8"),
            DROPPED: self.cut(self.model, "dropped", seed, "reap", keep=0.25),
            MERGED: self.cut(self.model, "merged", seed, "m-smoe", keep=0.25),
        }
        for name, student in whole.items():
            self.note(name, seed, cut=self.loss(student), healed=self.loss(self.healed(student, stream, seed)))
        half = self.slimmed(self.model, "half", seed, 2)
        for name, share in STAGES.items():
            first, middle = round(given.steps * share) * given.batch, str(self.folder / "middle")
            self.healed(half, stream[:first], seed, middle, text=name == TEXT)
            last = self.slimmed(middle, "last", seed, 4, teacher=self.model)
            before = self.loss(last)
            done = self.healed(last, stream[first:], seed, text=name == TEXT)
            self.note(name, seed, cut=before, healed=self.loss(done))

    def time(self) -> None:
        """Seconds of one thread per token, of the last seed's checkpoints, in turns; the fastest of them counts."""
        names = {"original": self.model, "half of the width": str(self.folder / "half")}
        names |= {ONE: "quarter-kd_top8", DROPPED: "dropped", MERGED: "merged"}
        models = {name: api.load(str(self.folder / where), dtype="float32")[0] for name, where in names.items()}
        ids_BL = self.test.batches[0].ids_BL[:8]
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        for _ in range(9):
            for name, model in models.items():
                began = time.process_time()
                with torch.no_grad():
                    model(input_ids=ids_BL, use_cache=False)
                passed = (time.process_time() - began) / ids_BL.numel()
                self.times[name] = min(passed, self.times.get(name, passed))
        torch.set_num_threads(threads)

    def sizes(self) -> str:
        """Parameters of the routed experts."""
        told = {"original": self.model, "slimmed": "quarter-kd_top8", "dropped": "dropped", "merged": "merged"}
        size = {name: measure(api.Runtime().open(str(self.folder / where))) for name, where in told.items()}
        return ", ".join(f"{name} {s.experts_total * s.parameters_of_expert}" for name, s in size.items())

    def rows(self) -> list[dict[str, Any]]:
        """One row per arm, then one per comparison."""
        rows = []
        nothing = dict.fromkeys(
            ("part", "against", "difference", "standard error", "claim", "cut", "healed", "time"), ""
        )
        for name, runs in self.losses.items():
            row = {**nothing, "model": name}
            row |= {key: mean_and_spread([run[key] for run in runs])[0] for key in runs[0]}
            rows.append(row)
        rows.append({**nothing, "model": "half of the width"})
        for row in rows:
            if row["model"] in self.times:
                row["time"] = self.times[row["model"]] / self.times["original"]
        for part, better, worse, column in CLAIMS:
            difference, error = compared(self.losses, better, worse, column)
            found = {"difference": difference, "standard error": error, "claim": outcome(difference, error)}
            rows.append({**nothing, "part": part, "model": better, "against": worse, **found})
        return rows


def compared(losses: dict[str, list[dict[str, float]]], better: str, worse: str, column: str) -> tuple[float, float]:
    """Mean and standard error of the paired difference over seeds."""
    pairs = zip(losses[better], losses[worse], strict=True)
    mean, spread = mean_and_spread([a[column] - b[column] for a, b in pairs])
    return mean, spread / len(losses[better]) ** 0.5


def outcome(difference: float, error: float) -> str:
    if difference < -2 * error:
        return "holds"
    return "contradicted" if difference > 2 * error else "open"


def verdict(losses: dict[str, list[dict[str, float]]]) -> str:
    """The rule, on the numbers."""
    found = [outcome(*compared(losses, *claim[1:])) for claim in CLAIMS[:DECIDE]]
    if "contradicted" in found:
        return "not reproduced"
    return "reproduced" if all(f == "holds" for f in found) else "inconclusive"


if __name__ == "__main__":
    main()
