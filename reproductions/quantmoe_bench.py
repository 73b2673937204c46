"""QuantMoE-Bench: where do the extra bits go in an MoE model?

The paper (arXiv:2406.08155) finds that at two widths, 2 and 4 bits, attention deserves bits before experts, shared
experts before routed ones, experts used often before others, first blocks before last ones, and that its outlier score
and its block predictor choose better than chance (DeepSeek-MoE-16B, mean of six tasks: uniform 3 bits 64.30, its
combination at 3.06 bits 65.35; outliers up to +2.82 points over chance, blocks about +1).

Here every rule meets a control with the same mean bits, rounded by GPTQ on the same text, and is judged by held-out
loss. Random controls are drawn anew for every seed. A model without shared experts has no rule about them.

    python reproductions/quantmoe_bench.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from common import Reproduction, against, arguments, mean_and_spread, quantized, setting, told, workplace

RULE = (
    "for each pair the difference of loss, rule minus control, paired by seed; a rule holds where it is below zero by"
    " more than two standard errors, fails where it is above, and is not decided otherwise; pairs have the same mean"
    " bits to within 0.02"
)
NONE: dict[str, Any] = {"frequent": 0, "first_blocks": 0}  # of the heuristics


def contenders(blocks: int) -> dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]]:
    """{rule: (what wins in the paper, method, its parameters, the control's)}."""
    wide = {"attention_bits": 4}
    return {
        "attention": ("attention", "quantmoe-heuristics", {**NONE, **wide}, {"attention_bits": 2}),
        "frequent": ("the experts used most", "quantmoe-heuristics", {**NONE, **wide, "frequent": 4}, wide),
        "first": ("first blocks", "quantmoe-heuristics", {**NONE, **wide, "first_blocks": blocks}, {}),
        "outlier": ("outlier scores", "quantmoe-outlier", {**wide, "share": 0.25}, {**wide, "unit": "matrix"}),
        "predictor": ("foretold blocks", "quantmoe-blocks", {**wide, "blocks": blocks}, {**wide, "unit": "block"}),
        "measured": (
            "measured blocks",
            "quantmoe-blocks",
            {**wide, "blocks": blocks, "mode": "measured"},
            {**wide, "unit": "block"},
        ),
        "combined": (
            "all rules together",
            "quantmoe-heuristics",
            {"frequent": 16, "first_blocks": 99, "mean": 3.0},
            {},
        ),
        "gptq": ("GPTQ", "quantize", {"bits": 2, "attention_bits": 4}, {}),
    }


def model_mean(result: Any) -> float:
    """Mean bits of everything quantized, as the policies count."""
    facts = [layer.extra["facts"]["mean_bits_of_the_model"] for layer in result.plan.layers if "facts" in layer.extra]
    return facts[0] if facts else result.plan.expert_bits


def measured(
    given: Any, model: str, calibration: list[str], evaluation: list[str], folder: Path
) -> dict[str, dict[str, list[float]]]:
    """{rule: {"rule", "control", "bits", "control bits": one number a seed}}."""
    found: dict[str, dict[str, list[float]]] = {}
    text = (model, calibration, evaluation, given, folder)
    for seed in given.seeds:
        for name, (_, method, parameters, control) in contenders(given.blocks).items():
            grid = (
                {"group_size": given.group, "predictor_tokens": 8000}
                if "blocks" in method
                else {"group_size": given.group}
            )
            loss, result = quantized(*text, seed=seed, method=method, **grid, **parameters)
            bits = model_mean(result)
            grid = {"group_size": given.group}
            if name == "gptq":
                other, against_it = quantized(
                    *text, seed=seed, method="quantize", quantizer="rtn", **grid, **parameters
                )
            elif name == "combined":
                other, against_it = quantized(*text, seed=seed, method="quantize", bits=3, **grid)
            elif name == "first":
                last = {**NONE, "attention_bits": 4, "last_blocks": given.blocks}
                other, against_it = quantized(*text, seed=seed, method="quantmoe-heuristics", **grid, **last)
            else:
                drawn = {**control, "mean": round(bits + 1e-3, 4), "draw": seed}
                other, against_it = quantized(*text, seed=seed, method="quantmoe-random", **grid, **drawn)
            entry = found.setdefault(name, {"rule": [], "control": [], "bits": [], "control bits": []})
            for key, value in zip(entry, (loss, other, bits, model_mean(against_it)), strict=True):
                entry[key].append(value)
            print(f"seed {seed}: {name} {loss:.4f} at {bits:.3f} bits, control {other:.4f}", flush=True)
    return found


def main() -> None:
    parser = arguments(__doc__, samples=8, evaluate=8)
    parser.add_argument("--group", type=int, default=32, help="group size; the paper has 128 for wide layers")
    parser.add_argument("--blocks", type=int, default=1, help="blocks raised by the rules about blocks")
    given = parser.parse_args()
    with workplace(given) as (model, calibration, evaluation, folder):
        found = measured(given, model, calibration, evaluation, folder)
    shown = given.model is None and given.calibration is None
    result = Reproduction(
        slug="quantmoe-bench" if shown else "quantmoe-bench-other-model",
        title=f"QuantMoE-Bench on {'the pocket model' if shown else 'a small MoE and real text'}",
        claim="At equal mean bits, attention, frequently used experts, first blocks, matrices with outliers and blocks"
        " that turn their tokens deserve bits more than a random choice (last blocks for the first).",
        published="DeepSeek-MoE-16B, mean of six tasks: uniform 3 bits 64.30, combined rules at 3.06 bits 65.35;"
        " outlier score up to +2.82 over random; block predictor about +1.",
        rule=RULE,
        columns=["rule", "bits", "loss", "control", "control loss", "difference"],
        seeds=given.seeds,
        setting=setting(given, **{"group size": given.group, "blocks raised": given.blocks, "rounding": "GPTQ"}),
        command="python reproductions/quantmoe_bench.py"
        + ("" if shown else " --model MODEL --calibration TEXT --evaluation HELD_OUT"),
    )
    controls = {"first": "last blocks", "combined": "uniform 3 bits", "gptq": "round to nearest"}
    words = {"below": "holds", "above": "fails"}
    verdicts = []
    for name, entry in found.items():
        difference = against(entry["rule"], entry["control"])
        bits, other_bits = mean_and_spread(entry["bits"])[0], mean_and_spread(entry["control bits"])[0]
        word = words.get(told(difference), "not decided")
        equal = abs(bits - other_bits) <= 0.02 or name == "combined"
        verdicts.append(f"{name}: {word if equal else f'bits differ ({bits:.2f}, {other_bits:.2f})'}")
        row = (
            contenders(given.blocks)[name][0],
            bits,
            mean_and_spread(entry["rule"])[0],
            controls.get(name, "random, the same bits"),
            mean_and_spread(entry["control"])[0],
            f"{difference[0]:+.4f} +- {difference[1]:.4f}",
        )
        result.rows.append(dict(zip(result.columns, row, strict=True)))
    result.verdict = "; ".join(verdicts)
    result.show()
    print(f"kept in {result.save()}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
