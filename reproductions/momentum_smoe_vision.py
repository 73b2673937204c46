"""MomentumSMoE on images: momentum over the depth of a vision mixture, clean and corrupted (arXiv:2410.14574).

Claim: with heavy-ball momentum a vision MoE is a little better on clean images and more so on corrupted ones; the
robust rule is best on corrupted ones; AdamSMoE learns fastest at first.

Here: scikit-learn's digits (8 x 8 pixels, 16 patches), a transformer of 6 MoE layers, top-2 of 8 experts, switch loss
0.01, the same data in the same order. Corruptions are of test images only: noise (standard deviation 0.4 of a range of
2), blur (the mean of 3 x 3 pixels), swap (two pairs of patches change places). Rules as in the paper: mu 0.7, gamma 1;
robust with condition number 10 at its fastest rate; adam in the first MoE layer. "early" is the mean training loss of
the first tenth of the steps; it is shown and not judged.

    python reproductions/momentum_smoe_vision.py
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

from common import Reproduction, against, mean_and_spread, told
from coterie.architectures.mixtures import ImageMixture
from coterie.balancing.base import Balance
from coterie.training.trainer import no_denormals

PLAIN = "plain"
RULES: dict[str, dict[str, Any] | None] = {
    PLAIN: None,
    "heavy-ball": {"rule": "heavy-ball", "mu": 0.7, "gamma": 1.0},
    "robust": {"rule": "robust", "condition": 10.0},
    "adam": {"rule": "adam", "mu": 0.7, "gamma": 1.0},
}
CORRUPTIONS = ("noise", "blur", "swap")
SIZE, PATCH, TRAIN = 8, 2, 1200

RULE = (
    "reproduced if the error of heavy-ball on clean images is not above the plain one, and the errors on corrupted"
    " images (mean of the three) of heavy-ball and of robust are below it; not reproduced if any of the three is above;"
    " inconclusive otherwise. Above and below: by more than two standard errors of the difference, paired by seed"
)
COLUMNS = ["rule", "early", "clean", *CORRUPTIONS, "corrupted", "clean to plain", "corrupted to plain"]


def corrupted(pixels: Tensor, how: str, seed: int) -> Tensor:
    """Test images [B, 1, 8, 8], changed."""
    g = torch.Generator().manual_seed(seed)
    if how == "noise":
        return pixels + 0.4 * torch.randn(pixels.shape, generator=g)
    if how == "blur":
        return F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, 1)
    if how == "swap":
        patches_BPL = F.unfold(pixels, PATCH, stride=PATCH)
        rows = torch.arange(len(pixels))
        picked_B4 = torch.rand(len(pixels), patches_BPL.shape[-1], generator=g).argsort(-1)[:, :4]
        order_BL = torch.arange(patches_BPL.shape[-1]).repeat(len(pixels), 1)
        for a, b in ((0, 1), (2, 3)):
            one, other = picked_B4[:, a], picked_B4[:, b]
            order_BL[rows, one], order_BL[rows, other] = other, one
        moved = patches_BPL.gather(-1, order_BL[:, None].expand_as(patches_BPL))
        return F.fold(moved, SIZE, PATCH, stride=PATCH)
    return pixels


def run(rule: str, steps: int, seed: int) -> dict[str, float]:
    """Errors by corruption, and the loss of the first steps."""
    found = load_digits()
    pixels = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1
    digit = torch.tensor(found.target)
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(digit), generator=g)
    train, test = order[:TRAIN], order[TRAIN:]
    torch.manual_seed(seed)
    router = {"kind": "top-k", "top_k": 2, "combine": "renormalised"}
    model = ImageMixture(SIZE, PATCH, 10, router=router, residual=RULES[rule], hidden=32, layers=6, width=32)
    Balance.of([{"name": "switch", "weight": 0.01}]).watch(model)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    early: list[float] = []
    for step in range(steps):
        row = train[torch.randint(0, TRAIN, (64,), generator=g)]
        optimizer.zero_grad(set_to_none=True)
        loss = model(pixels[row], labels=digit[row]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step < steps / 10:
            early.append(float(loss.detach()))
    model.eval()
    errors = {}
    with torch.no_grad():
        for how in ("clean", *CORRUPTIONS):
            guess = model(corrupted(pixels[test], how, seed)).told["classes"].argmax(-1)
            errors[how] = float((guess != digit[test]).float().mean())
    errors["corrupted"] = statistics.fmean(errors[how] for how in CORRUPTIONS)
    return {"early": statistics.fmean(early), **errors}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = parser.parse_args()
    made: dict[str, list[dict[str, float]]] = {rule: [] for rule in RULES}
    with no_denormals():
        for seed in given.seeds:
            for rule in RULES:
                made[rule].append(run(rule, given.steps, seed))
                print(f"seed {seed}, {rule}: {made[rule][-1]}", flush=True)

    def gap(rule: str, what: str) -> tuple[float, float]:
        return against(*([one[what] for one in made[name]] for name in (rule, PLAIN)))

    rows: list[dict[str, Any]] = []
    for rule, runs in made.items():
        row: dict[str, Any] = {"rule": rule}
        for what in ("early", "clean", *CORRUPTIONS, "corrupted"):
            row[what] = mean_and_spread([one[what] for one in runs])[0]
        for what in ("clean", "corrupted"):
            difference = gap(rule, what)
            row[f"{what} to plain"] = "" if rule == PLAIN else f"{difference[0]:+.4f} +- {2 * difference[1]:.4f}"
        rows.append(row)
    lower = [told(gap("heavy-ball", "corrupted")), told(gap("robust", "corrupted"))]
    sides = [told(gap("heavy-ball", "clean")), *lower]
    result = Reproduction(
        slug="momentum-smoe-vision",
        title="MomentumSMoE on images: clean and corrupted digits",
        claim="momentum over depth makes a vision mixture a little better on clean images and more so on corrupted"
        " ones, the robust rule most of all",
        published="V-MoE on ImageNet: a little above on clean images, above on ImageNet-A, C and R; robust is best",
        rule=RULE,
        columns=COLUMNS,
        seeds=list(given.seeds),
        setting={
            "data": f"scikit-learn's digits, {TRAIN} to train, the others to test; figures are error rates",
            "model": "6 MoE layers, width 32, top-2 of 8 experts",
            "steps of 64 images": given.steps,
        },
        command="python reproductions/momentum_smoe_vision.py",
        rows=rows,
        verdict="not reproduced" if "above" in sides else "reproduced" if set(lower) == {"below"} else "inconclusive",
    )
    result.show()
    print(result.save())


if __name__ == "__main__":
    main()
