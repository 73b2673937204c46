"""Activation gate: with an activation in the router, temperature and weights can both be learned (arXiv:2401.13875).

Claim: in a softmax gate with temperature over a linear router, estimates of temperature and router weights converge
slower than any polynomial of the sample size, because only their ratio matters; with an activation such as sigmoid or
tanh between linear layer and softmax all parameters converge at about n^(-1/2). The density does so with either.

Here: two Gaussian experts on a line, as many fitted as there are, x uniform on [-3, 3]; EM in float64 from the truth
plus noise of 0.1; 40 repetitions at each of 9 sizes from 500 to 32000, every size on samples of its own. Errors are
medians over repetitions, experts matched; slopes are of log error against log n, with 95% bootstrap intervals over
repetitions. "gate" is |d beta_1| + |d tau|, "ratio" |d (beta_1 / tau)|. Shown beside and not judged: GELU, and the
linear and the tanh gate from a start three times as far off, which tells a scale that was kept from one that was found.
The true parameters and the tolerances of the rule were chosen on trial runs.

    python reproductions/activation_dense_to_sparse_gate.py
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from common import Reproduction
from coterie.analysis.gaussian_moe import GaussianMoE, fit, generate, near
from coterie.analysis.identifiability import ACTIVATIONS, independence
from coterie.analysis.rates import errors, hellinger, slope, voronoi_loss

SIZES = [round(500 * 64 ** (i / 8)) for i in range(9)]
LINEAR, JUDGED = "identity", ("sigmoid", "tanh")
NOISE, FAR = 0.1, 0.3  # of the start
STUDIES = (*((n, NOISE) for n in (LINEAR, *JUDGED, "gelu")), (LINEAR, FAR), ("tanh", FAR))
QUANTITIES = ("gate", "tau", "beta", "ratio", "experts", "Voronoi loss", "density")
FAST, FAST_BY = -0.5, 0.2
FLAT_BY = 0.15

RULE = (
    "reproduced if the slope of the gate's error is within 0.2 of -0.5 for sigmoid and tanh and within 0.15 of 0 for"
    " the linear gate, the intervals of the former lie wholly below that of the latter, and the slopes of the experts"
    " and of the density are within 0.2 of -0.5 for all three and that of the ratio for the linear gate; not reproduced"
    " if the interval of an activation's gate lies wholly above -0.25 or that of the linear gate wholly below -0.25;"
    " inconclusive otherwise"
)
COLUMNS = ["gate", "error of", "n = 500", "n = 32000", "slope", "low", "high", "converged", "independence"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    found: dict[str, dict[str, tuple[float, float, float]]] = {}
    rows: list[dict[str, Any]] = []
    for name, noise in STUDIES:
        measured, converged = study(name, noise, given.repetitions, given.seed)
        slopes = {q: slope(SIZES, error_SR) for q, error_SR in measured.items()}
        found.setdefault(name, slopes)  # the near start comes first, and is the one judged
        singular = independence(ACTIVATIONS[name]).singular
        for q, error_SR in measured.items():
            ends = [float(error_SR[s].median()) for s in (0, -1)]
            gate = ("linear" if name == LINEAR else name) + (", far start" if noise == FAR else "")
            told = (f"{converged:.0%}", f"{singular:.1e}") if q == QUANTITIES[0] else ("", "")
            rows.append(dict(zip(COLUMNS, (gate, q, *ends, *slopes[q], *told), strict=True)))
    result = Reproduction(
        slug="activation-dense-to-sparse-gate",
        title="Activation dense-to-sparse gate: rates of temperature and router weights (arXiv:2401.13875)",
        claim="With an activation in the router its temperature and weights are estimated at about n^(-1/2); with a"
        " linear router they are not, though the density is.",
        published="Linear: slower than any polynomial, possibly 1/log n; activation: about n^(-1/2); density: about"
        " n^(-1/2) with either. The figures of the paper's simulations were not recovered.",
        rule=RULE,
        columns=COLUMNS,
        seeds=[given.seed],
        setting={
            "truth": "2 experts on a line, beta_1 1.5, beta_0 0.2, tau 0.5, lines 1 + x and -1 - x, nu 0.25 and 0.36",
            "samples": f"{given.repetitions} repetitions at {', '.join(map(str, SIZES))} points, x uniform on [-3, 3]",
            "fit": f"EM from the truth plus noise of {NOISE} (far start {FAR}), until an iteration gains less than"
            " 1e-11 a point",
        },
        command="python reproductions/activation_dense_to_sparse_gate.py",
        rows=rows,
        verdict=verdict(found),
    )
    result.show()
    print(f"kept in {result.save()}")


def true_model(name: str) -> GaussianMoE:
    numbers: tuple[Any, ...] = (
        [[[1.5], [0.0]]],
        [[0.2, 0.0]],
        [0.5],
        [[[1.0], [-1.0]]],
        [[1.0, -1.0]],
        [[0.25, 0.36]],
    )
    return GaussianMoE(ACTIVATIONS[name], *(torch.tensor(n, dtype=torch.float64) for n in numbers))


def study(name: str, noise: float, repetitions: int, seed: int) -> tuple[dict[str, Tensor], float]:
    """Errors [S, R] by quantity, and the share of the fits that ended by themselves."""
    truth, converged = true_model(name), []
    errors_SR: dict[str, list[Tensor]] = {q: [] for q in QUANTITIES}
    for s, points in enumerate(SIZES):
        draw = 1000 * seed + 2 * s
        x_RDT, y_RT = generate(truth, points, repetitions=repetitions, seed=draw)
        done = fit(near(truth, repetitions=repetitions, noise=noise, seed=draw + 1), x_RDT, y_RT)
        converged.append(float(done.converged_R.double().mean()))
        now = errors(done.model, truth)
        now |= {"Voronoi loss": voronoi_loss(done.model, truth), "density": hellinger(done.model, truth, seed=draw)}
        for q in QUANTITIES:
            errors_SR[q].append(now[q])
        told = ", ".join(f"{q} {float(now[q].median()):.4f}" for q in QUANTITIES)
        print(f"{name}, noise {noise}, n {points}: {told}; {len(done.likelihood_NR)} iterations", flush=True)
    return {q: torch.stack(each) for q, each in errors_SR.items()}, sum(converged) / len(converged)


def verdict(found: dict[str, dict[str, tuple[float, float, float]]]) -> str:
    """The rule, on the slopes and their intervals."""
    gates = {name: found[name]["gate"] for name in (LINEAR, *JUDGED)}
    if any(gates[name][1] > FAST / 2 for name in JUDGED) or gates[LINEAR][2] < FAST / 2:
        return "not reproduced"
    fast = [gates[name][0] for name in JUDGED]
    fast += [found[name][q][0] for name in gates for q in ("experts", "density")] + [found[LINEAR]["ratio"][0]]
    apart = all(gates[name][2] < gates[LINEAR][1] for name in JUDGED)
    as_claimed = all(abs(s - FAST) <= FAST_BY for s in fast) and abs(gates[LINEAR][0]) <= FLAT_BY
    return "reproduced" if apart and as_claimed else "inconclusive"


if __name__ == "__main__":
    main()
