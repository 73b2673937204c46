"""The activation gate: which activations make temperature and weights estimable, and the fits that show it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from coterie.analysis.gaussian_moe import GaussianMoE, _gate_step, fit, generate, moved, near, scores
from coterie.analysis.identifiability import ACTIVATIONS, independence, largest_weight, value_and_slope
from coterie.analysis.rates import errors, hellinger, slope, voronoi_loss
from coterie.errors import UsageError

pytestmark = pytest.mark.usefixtures("one_thread")


def truth(activation="tanh"):
    """Two experts on a line, far enough apart to be told apart."""
    numbers = ([[[1.5], [0.0]]], [[0.2, 0.0]], [0.5], [[[1.0], [-1.0]]], [[1.0, -1.0]], [[0.25, 0.36]])
    return GaussianMoE(ACTIVATIONS[activation], *(torch.tensor(n, dtype=torch.float64) for n in numbers))


def anywhere(activation="tanh", repetitions=3, experts=4, inputs=2, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(repetitions, *shape, generator=generator, dtype=torch.float64)

    model = GaussianMoE(
        ACTIVATIONS[activation],
        normal(experts, inputs),
        normal(experts),
        normal().exp(),
        normal(experts, inputs),
        normal(experts),
        normal(experts).exp(),
    )
    return moved(model, torch.zeros(repetitions, (experts - 1) * (inputs + 1) + 1, dtype=torch.float64))


def points(repetitions=3, inputs=2, count=50, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(repetitions, inputs, count, generator=generator, dtype=torch.float64)


def scaled(model, c):
    return GaussianMoE(model.activation, c * model.beta_RED, c * model.bias_RE, c * model.tau_R,
                       model.line_RED, model.offset_RE, model.variance_RE)  # fmt: skip


# ---- activations ----


@pytest.mark.parametrize("name", ["sigmoid", "tanh", "gelu", "silu", "softplus", "elu", "sin"])
def test_activations_that_make_the_gate_estimable_are_accepted(name):
    found = independence(ACTIVATIONS[name])
    assert found.independent
    assert found.singular > 5e-3


@pytest.mark.parametrize(
    "activation",
    [
        ACTIVATIONS["identity"],
        F.relu,
        F.leaky_relu,
        lambda z: z**2,
        lambda z: z**3,
        lambda z: F.relu(z) ** 2,
        lambda z: 3 * z.abs(),
        torch.ones_like,
    ],
)
def test_homogeneous_and_constant_activations_are_rejected(activation):
    found = independence(activation)
    assert not found.independent
    assert found.singular < 1e-12


@given(st.integers(1, 4), st.integers(2, 4), st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_the_verdict_does_not_hang_on_the_draw(inputs, experts, seed):
    size = {"inputs": inputs, "experts": experts, "points": 2000, "seed": seed}
    assert not independence(F.relu, **size).independent
    assert not independence(lambda z: z, **size).independent


def test_the_verdict_does_not_hang_on_the_scale_of_the_activation():
    assert independence(lambda z: 1e-9 * z.tanh()).singular == pytest.approx(independence(torch.tanh).singular)


def test_too_few_points_are_refused():
    with pytest.raises(UsageError, match="cannot tell 12 functions apart"):
        independence(torch.tanh, points=11)


def test_values_that_are_not_finite_are_refused():
    with pytest.raises(UsageError, match="not finite"):
        independence(torch.sqrt)


def test_value_and_slope_are_those_of_the_activation():
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)
    value, rise = value_and_slope(torch.tanh, z)
    torch.testing.assert_close(value, z.tanh())
    torch.testing.assert_close(rise, 1 - z.tanh() ** 2)


@pytest.mark.parametrize(("tau", "weight"), [(1, 0.15), (0.5, 0.33), (0.25, 0.78), (0.1, 0.999)])
def test_the_largest_weight_of_a_sigmoid_gate_over_16_experts(tau, weight):
    assert largest_weight(1, tau, 16) == pytest.approx(weight, abs=5e-3)


@pytest.mark.parametrize(("name", "width"), [("sigmoid", 1.0), ("tanh", 2.0)])
def test_no_input_gets_past_the_bound_on_the_largest_weight(name, width):
    logit_TE = 30 * torch.randn(2000, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    top = float((ACTIVATIONS[name](logit_TE) / 0.3).softmax(-1).max())
    bound = largest_weight(width, 0.3, 8)
    assert top <= bound + 1e-12
    assert top > 0.95 * bound


def test_an_unbounded_activation_has_no_bound():
    assert largest_weight(math.inf, 1.0, 16) == 1.0


def test_a_temperature_that_is_not_positive_is_refused():
    with pytest.raises(UsageError, match="temperature 0"):
        largest_weight(1, 0.0, 4)


# ---- the model ----


def test_weights_sum_to_one_and_the_density_to_its_parts():
    model, x_RDT = anywhere(), points()
    torch.testing.assert_close(model.log_weights(x_RDT).exp().sum(1), torch.ones(3, 50, dtype=torch.float64))
    grid = torch.linspace(-60, 60, 24001, dtype=torch.float64).expand(3, -1)
    density = model.log_joint(x_RDT[:, :, :1].expand(-1, -1, 24001), grid).logsumexp(1).exp()
    torch.testing.assert_close(torch.trapezoid(density, grid), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("c", [0.1, 3.0])
def test_scaling_weights_bias_and_temperature_together_leaves_the_linear_gate_as_it_is(c):
    model, x_RDT = anywhere("identity"), points()
    torch.testing.assert_close(scaled(model, c).log_weights(x_RDT), model.log_weights(x_RDT))


@pytest.mark.parametrize("name", ["tanh", "sigmoid"])
def test_scaling_changes_a_gate_with_an_activation(name):
    model, x_RDT = anywhere(name), points()
    assert float((scaled(model, 3.0).log_weights(x_RDT) - model.log_weights(x_RDT)).abs().max()) > 0.1


@pytest.mark.parametrize(("name", "flat"), [("identity", True), ("tanh", False), ("sigmoid", False)])
def test_the_likelihood_has_no_slope_along_the_scaling_of_the_linear_gate_only(name, flat):
    tensors = ("beta_RED", "bias_RE", "tau_R")
    model = anywhere(name)
    leaves = {t: getattr(model, t).clone().requires_grad_() for t in tensors}
    model = GaussianMoE(model.activation, **leaves, line_RED=model.line_RED, offset_RE=model.offset_RE,
                        variance_RE=model.variance_RE)  # fmt: skip
    grads = torch.autograd.grad(model.log_likelihood(points(), points()[:, 0]).sum(), tuple(leaves.values()))
    along = sum(float((leaf.detach() * grad).sum()) for leaf, grad in zip(leaves.values(), grads))
    assert (abs(along) < 1e-12) == flat


@pytest.mark.parametrize("name", ["identity", "tanh", "gelu"])
def test_the_gradient_of_the_gate_matches_finite_differences_temperature_included(name):
    model, x_RDT = anywhere(name), points()
    share_RET = anywhere(name, seed=5).log_weights(x_RDT).exp()
    gradient_RP, _ = scores(model, share_RET, x_RDT)
    for p in range(gradient_RP.shape[1]):
        delta_RP = torch.zeros_like(gradient_RP)
        delta_RP[:, p] = 1e-5
        up, down = ((share_RET * moved(model, s * delta_RP).log_weights(x_RDT)).sum((1, 2)) for s in (1, -1))
        torch.testing.assert_close(gradient_RP[:, p], (up - down) / 2e-5, rtol=1e-6, atol=1e-6)


def test_the_curvature_is_the_covariance_of_the_scores():
    model, x_RDT = anywhere(), points(count=6)
    _, curvature_RPP = scores(model, model.log_weights(x_RDT).exp(), x_RDT)
    expected_RPP = torch.zeros_like(curvature_RPP)
    weight_RET = model.log_weights(x_RDT).exp()
    for t in range(6):
        for e in range(4):
            one_RE1 = F.one_hot(torch.full((3,), e), 4).double().unsqueeze(-1)
            score_RP, _ = scores(model, one_RE1, x_RDT[:, :, t : t + 1])
            expected_RPP += weight_RET[:, e, t, None, None] * score_RP[:, :, None] * score_RP[:, None]
    torch.testing.assert_close(curvature_RPP, expected_RPP)


def test_moves_keep_the_temperature_positive_and_the_last_gate_fixed():
    model = anywhere()
    after = moved(model, torch.full((3, 10), -50.0, dtype=torch.float64))
    assert (after.tau_R > 0).all()
    assert torch.equal(after.beta_RED[:, -1], model.beta_RED[:, -1])
    assert torch.equal(after.bias_RE[:, -1], model.bias_RE[:, -1])


def test_samples_have_the_moments_of_the_model():
    model = truth()
    x_RDT, y_RT = generate(model, 200_000, repetitions=1, seed=0)
    assert float(x_RDT.abs().max()) <= 3
    weight_RET = model.log_weights(x_RDT).exp()
    mean_RT = (weight_RET * (model.line_RED @ x_RDT + model.offset_RE.unsqueeze(-1))).sum(1)
    for part in (x_RDT[:, 0] < -1, x_RDT[:, 0] > 1):
        assert float(y_RT[part].mean()) == pytest.approx(float(mean_RT[part].mean()), abs=0.03)


# ---- fits ----


@pytest.mark.parametrize("name", ["identity", "sigmoid", "tanh", "gelu"])
@pytest.mark.parametrize("experts", [2, 3])
def test_no_iteration_lowers_the_likelihood(name, experts):
    x_RDT, y_RT = generate(truth(name), 400, repetitions=6, seed=0)
    start = near(truth(name), repetitions=6, noise=0.6, experts=experts, seed=1)
    likelihood_NR = fit(start, x_RDT, y_RT, iterations=60).likelihood_NR
    gain = likelihood_NR.diff(dim=0)
    assert float(gain[~gain.isnan()].min()) > -1e-12
    assert float(gain[0].min()) > 1e-3


def test_a_full_step_of_the_gate_can_overshoot_and_is_halved():
    generator = torch.Generator().manual_seed(3)
    x_RDT = points(40, 1, 30)
    share_RET = torch.rand(40, 2, 30, generator=generator, dtype=torch.float64)
    share_RET = share_RET / share_RET.sum(1, keepdim=True)
    model = anywhere("tanh", 40, 2, 1)
    gradient_RP, curvature_RPP = scores(model, share_RET, x_RDT)
    full = moved(model, torch.linalg.solve(curvature_RPP, gradient_RP.unsqueeze(-1)).squeeze(-1))
    before, whole, taken = (
        (share_RET * m.log_weights(x_RDT)).sum((1, 2)) for m in (model, full, _gate_step(model, share_RET, x_RDT))
    )
    over = ~(whole >= before)
    assert over.any()
    assert (taken >= before).all()
    assert (taken > before)[over].all()


def test_a_fit_ends_where_the_likelihood_is_flat():
    x_RDT, y_RT = generate(truth(), 2000, repetitions=3, seed=0)
    found = fit(near(truth(), repetitions=3, seed=1), x_RDT, y_RT, tolerance=1e-14)
    assert found.converged_R.all()
    names = ("beta_RED", "bias_RE", "tau_R", "line_RED", "offset_RE", "variance_RE")
    leaves = [getattr(found.model, n).clone().requires_grad_() for n in names]
    value = GaussianMoE(torch.tanh, *leaves).log_likelihood(x_RDT, y_RT).sum()
    grads = dict(zip(names, torch.autograd.grad(value, leaves)))
    grads["beta_RED"][:, -1] = grads["bias_RE"][:, -1] = 0
    assert max(float(g.abs().max()) for g in grads.values()) < 1e-6


def test_repetitions_do_not_touch_each_other():
    x_RDT, y_RT = generate(truth(), 300, repetitions=4, seed=0)
    start = near(truth(), repetitions=4, seed=1)
    together = fit(start, x_RDT, y_RT).model
    alone = fit(start.only(torch.tensor([2])), x_RDT[2:3], y_RT[2:3]).model
    torch.testing.assert_close(together.tau_R[2:3], alone.tau_R, rtol=1e-6, atol=0)
    torch.testing.assert_close(together.line_RED[2:3], alone.line_RED, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["identity", "sigmoid", "tanh"])
def test_the_density_is_recovered_whatever_the_gate(name):
    start = near(truth(name), repetitions=4, seed=1)
    found = fit(start, *generate(truth(name), 4000, repetitions=4, seed=0)).model
    assert float(hellinger(start, truth(name)).min()) > 0.05
    assert float(hellinger(found, truth(name)).max()) < 0.04


def test_the_linear_gate_keeps_the_scale_it_started_with_and_an_activation_finds_it():
    far = {}
    for name in ("identity", "tanh"):
        start = truth(name).only(torch.zeros(8, dtype=torch.long))
        start = scaled(start, 1.5)
        far[name] = errors(fit(start, *generate(truth(name), 8000, repetitions=8, seed=0)).model, truth(name))
    assert float(far["identity"]["gate"].median()) > 0.5
    assert float(far["identity"]["ratio"].median()) < 0.3
    assert float(far["tanh"]["gate"].median()) < 0.3


@pytest.mark.parametrize("experts", [2, 4])
def test_a_start_is_off_in_every_free_parameter_and_leaves_the_last_gate(experts):
    start = near(truth(), repetitions=3, experts=experts, seed=0)
    assert start.beta_RED.shape == (3, experts, 1)
    assert (start.beta_RED[:, -1] == 0).all()
    assert (start.bias_RE[:, -1] == 0).all()
    assert (start.beta_RED[:, -2] != 1.5).all()
    assert (start.tau_R > 0).all()
    assert not torch.isin(start.line_RED, truth().line_RED).any()


def test_a_start_with_fewer_experts_than_the_truth_is_refused():
    with pytest.raises(UsageError, match="1 experts cannot start near 2"):
        near(truth(), repetitions=1, experts=1, seed=0)


# ---- losses and rates ----


def test_the_truth_has_no_loss_in_any_order_of_experts():
    model = truth()
    swapped = GaussianMoE(model.activation, *(t.flip(1) if t.ndim > 1 else t for t in (
        model.beta_RED, model.bias_RE, model.tau_R, model.line_RED, model.offset_RE, model.variance_RE)))  # fmt: skip
    assert float(voronoi_loss(swapped, model)) == pytest.approx(0, abs=1e-12)
    assert {k: float(v) for k, v in errors(swapped, model).items()} == dict.fromkeys(errors(model, model), 0.0)


def test_the_loss_of_known_errors():
    model = truth()
    off = GaussianMoE(model.activation, model.beta_RED + torch.tensor([[0.1], [0.0]]).double(), model.bias_RE,
                      model.tau_R, model.line_RED, model.offset_RE - 0.2, model.variance_RE)  # fmt: skip
    assert float(voronoi_loss(off, model)) == pytest.approx(math.exp(0.4) * 0.3 + 0.2, abs=1e-7)


def test_a_gate_bias_alone_that_is_off_counts_by_the_mass_it_moves():
    model = truth()
    off = GaussianMoE(model.activation, model.beta_RED, model.bias_RE + torch.tensor([0.1, 0.0]).double(),
                      model.tau_R, model.line_RED, model.offset_RE, model.variance_RE)  # fmt: skip
    assert float(voronoi_loss(off, model)) == pytest.approx(math.exp(0.6) - math.exp(0.4))


def test_an_expert_split_in_two_without_error_has_no_loss_and_its_errors_count_by_higher_powers():
    model = truth()
    index = torch.tensor([0, 0, 1])
    half = model.bias_RE[:, index] - torch.tensor([1.0, 1.0, 0.0]).double() * float(model.tau_R) * math.log(2)
    parts = [model.beta_RED[:, index], half, model.tau_R, model.line_RED[:, index], model.offset_RE[:, index],
             model.variance_RE[:, index]]  # fmt: skip
    assert float(voronoi_loss(GaussianMoE(model.activation, *parts), model)) == pytest.approx(0, abs=1e-12)
    parts[4] = parts[4] + torch.tensor([0.1, 0.0, 0.0]).double()
    expected = math.exp(0.4) / 2 * 0.1**4
    assert float(voronoi_loss(GaussianMoE(model.activation, *parts), model)) == pytest.approx(expected, rel=1e-6)


def test_errors_need_as_many_experts_as_there_are():
    with pytest.raises(UsageError, match="do not match 2 one to one"):
        errors(near(truth(), repetitions=1, experts=3, seed=0), truth())


def test_the_slope_of_known_errors_and_its_interval():
    sizes = [100, 200, 400, 800, 1600]
    noise_SR = (0.2 * torch.randn(5, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).exp()
    exact = torch.tensor(sizes).double().pow(-0.5).unsqueeze(1).expand(-1, 30)
    assert slope(sizes, exact) == pytest.approx((-0.5, -0.5, -0.5))
    middle, low, high = slope(sizes, exact * noise_SR)
    assert low < -0.5 < high
    assert low < middle < high
    assert high - low < 0.3
