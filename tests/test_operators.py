"""Merge operators: means, replacement, a cluster's subspace against the textbook joint SVD, factors of a matrix."""

# ruff: noqa: E741
# O out, I in, H hidden, R rank, E experts, T tokens

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.anatomy import ExpertWeights, moe_layers
from coterie.compression.merging.operators import (
    MATRICES,
    OPERATORS,
    Factors,
    Moments,
    factorise,
    joint_gram,
    moments_of,
    rank_for,
    stable_rank,
    subspace,
    subspace_basis,
    weighted_mean,
)
from coterie.errors import UsageError
from coterie.profiling.profile import LayerProfile
from families import FEW, tiny

pytestmark = pytest.mark.usefixtures("one_thread")


def cluster(family, members=(1, 4, 6), dtype=torch.float32):
    bank = moe_layers(tiny(family, dtype))[0].bank
    return [bank.read(e) for e in members]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def glu(seed, H=10, inner=6):
    up, gate, down = (
        random(*shape, seed=7 * seed + i).float() for i, shape in enumerate([(inner, H)] * 2 + [(H, inner)])
    )
    return ExpertWeights(up, down, gate)


def mean_of(members, weights, name):
    total = sum(weights)
    return sum(getattr(m, name).double() * (w / total) for m, w in zip(members, weights, strict=True))


def textbook(members, weights, name, rank, roots=None):
    """Sub-MoE as it is written: joint SVD along columns, blocks split and averaged, three factors multiplied.

    roots : S_i of each member, or None for no whitening.
    """
    matrices = [getattr(m, name).double() for m in members]
    roots = roots or [torch.eye(w.shape[1], dtype=torch.float64) for w in matrices]
    u, sigma, v = torch.linalg.svd(
        torch.cat([w @ s for w, s in zip(matrices, roots, strict=True)], 1), full_matrices=False
    )
    blocks = v.chunk(len(matrices), dim=1)
    for w, s, block in zip(matrices, roots, blocks, strict=True):
        torch.testing.assert_close(u @ (sigma[:, None] * block), w @ s)  # W_i S_i = U Sigma V_i
    total = sum(weights)
    mean = sum(
        torch.linalg.solve_triangular(s.T, block.T, upper=True).T * (w / total)
        for block, s, w in zip(blocks, roots, weights, strict=True)
    )
    return u[:, :rank] @ (sigma[:rank, None] * mean[:rank])


# -- whole experts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FEW)
@pytest.mark.parametrize("operator", OPERATORS)
def test_identical_experts_merge_to_themselves(family, operator):
    first = cluster(family)[0]
    merged = OPERATORS[operator]([first, first, first], [5, 0, 2])
    for name in vars(first):
        if (own := getattr(first, name)) is not None:
            torch.testing.assert_close(getattr(merged, name), own, atol=1e-6, rtol=1e-6)


def test_frequency_weighs_mean_does_not_and_dominant_keeps_the_most_used():
    members, weights = [glu(i) for i in range(3)], [1, 6, 3]
    found = {name: merge(members, weights).up_IH for name, merge in OPERATORS.items()}
    up = [m.up_IH for m in members]
    torch.testing.assert_close(found["frequency"], 0.1 * up[0] + 0.6 * up[1] + 0.3 * up[2])
    torch.testing.assert_close(found["mean"], (up[0] + up[1] + up[2]) / 3)
    assert torch.equal(found["dominant"], up[1])
    assert torch.equal(OPERATORS["dominant"](members, [2, 2, 1]).up_IH, up[0])


def test_only_the_ratio_of_weights_counts_and_an_unused_cluster_is_no_zero_expert():
    members = [glu(i) for i in range(3)]
    one, two = (weighted_mean(members, [k * w for w in (1, 2, 5)]) for k in (1, 300))
    torch.testing.assert_close(one.down_HI, two.down_HI)
    unused = weighted_mean(members, [0, 0, 0])
    torch.testing.assert_close(unused.gate_IH, sum(m.gate_IH for m in members) / 3)


# -- the subspace of a cluster ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FEW)
@pytest.mark.parametrize("weights", [(3, 1, 6), (0, 0, 0)])
def test_at_full_rank_the_merge_is_the_weighted_mean(family, weights):
    """Both the short cut and the textbook form, which is where scrambled blocks would show."""
    members = cluster(family)
    expected = weighted_mean(members, weights)
    for rank in (None, "full"):
        size = {name: min(getattr(members[0], name).shape) for name in MATRICES}
        merged = subspace(members, weights, rank=None if rank is None else size)
        for name in MATRICES:
            assert isinstance(merged[name], torch.Tensor)
            torch.testing.assert_close(merged[name], getattr(expected, name), atol=1e-5, rtol=0)
    for name in MATRICES if any(weights) else ():
        full = textbook(members, weights, name, 10**6)
        torch.testing.assert_close(full.float(), getattr(expected, name), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FEW)
@pytest.mark.parametrize("rank", [1, 7, 20])
def test_truncated_it_is_the_textbook_joint_svd_and_the_projection_of_the_mean(family, rank):
    members, weights = cluster(family), (3, 1, 6)
    merged = subspace(members, weights, rank=rank)
    for name in MATRICES:
        O, I = getattr(members[0], name).shape
        factors = merged[name]
        assert isinstance(factors, Factors)
        assert factors.left_OR.shape == (O, rank)
        assert factors.right_RI.shape == (rank, I)
        found = factors.product().double()
        torch.testing.assert_close(found, textbook(members, weights, name, rank), atol=2e-6, rtol=0)
        u = torch.linalg.svd(torch.cat([getattr(m, name).double() for m in members], 1))[0][:, :rank]
        torch.testing.assert_close(found, u @ (u.T @ mean_of(members, weights, name)), atol=2e-6, rtol=0)
        assert torch.linalg.matrix_rank(found, rtol=1e-5) == rank


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 4), st.integers(2, 9), st.integers(2, 9), st.integers(0, 99), st.sampled_from(["double", "float"])
)
def test_the_basis_is_orthonormal_and_reconstructs_every_member(n, O, I, seed, wide):
    matrices = [random(O, I, seed=seed + 13 * i) for i in range(n)]
    gram = joint_gram(matrices, dtype=torch.float64 if wide else torch.float32)
    basis = subspace_basis(gram, min(O, n * I)).double()
    torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1]).double(), atol=1e-5, rtol=0)
    for matrix in matrices:
        torch.testing.assert_close(basis @ (basis.T @ matrix), matrix, atol=1e-6 if wide else 2e-3, rtol=0)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(0, 99), st.booleans())
def test_the_error_never_grows_with_the_rank(n, seed, whitened):
    members = [glu(seed + i) for i in range(n)]
    weights = list(range(1, n + 1))
    moments = [moments_for(m, seed + i)[0] for i, m in enumerate(members)] if whitened else None
    for name in MATRICES:
        mean = mean_of(members, weights, name).float()
        errors = []
        for rank in range(1, 7):
            merged = subspace(members, weights, rank=rank, moments=moments)[name]
            errors.append(float((mean - (merged.product() if isinstance(merged, Factors) else merged)).norm()))
        assert all(b <= a + 1e-5 for a, b in itertools.pairwise(errors))
        assert errors[-1] < 1e-6


def test_energy_takes_the_least_rank_that_keeps_it():
    u, v = torch.linalg.qr(random(8, 8))[0], torch.linalg.qr(random(8, 8, seed=1))[0]
    matrix = u @ torch.diag(torch.tensor([3, 2, 1, 1, 0.5, 0.1, 0, 0], dtype=torch.float64)) @ v
    expert = ExpertWeights(matrix.float(), matrix.T.float())
    for energy, rank in [(0.55, 1), (0.6, 2), (0.86, 3), (0.93, 4), (0.9999, 6)]:  # squares: 9 4 1 1 .25 .01 of 15.26
        assert subspace([expert], [1], energy=energy)["up_IH"].rank == rank
        assert subspace([expert, expert], [1, 4], energy=energy)["up_IH"].rank == rank
    assert isinstance(subspace([glu(0)], [1], energy=1.0)["up_IH"], torch.Tensor)


def moments_for(expert, seed, T=40):
    """Moments of T correlated inputs and of what the expert's down projection makes of them; also both inputs."""
    H = expert.up_IH.shape[1]
    x_TH = random(T, H, seed=seed) @ random(H, H, seed=seed + 1000) + 1
    a_TI = torch.nn.functional.silu(x_TH @ expert.gate_IH.double().T) * (x_TH @ expert.up_IH.double().T)
    y_TH = a_TI @ expert.down_HI.double().T
    return Moments(x_TH.T @ x_TH, y_TH.T @ y_TH, T), x_TH, a_TI


@pytest.mark.parametrize("damping", [0.0, 0.01, 1.0])
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_whitened_it_is_the_textbook_form_with_cholesky_factors(damping, rank):
    members, weights = [glu(i) for i in range(3)], [5, 1, 2]
    seen = [moments_for(m, i, T=40 + 20 * i) for i, m in enumerate(members)]
    merged = subspace(members, weights, rank=rank, moments=[m for m, _, _ in seen], damping=damping)
    for name in MATRICES:
        roots = []
        for member, (moments, x_TH, a_TI) in zip(members, seen, strict=True):
            inputs = a_TI if name == "down_HI" else x_TH
            level = (inputs.T @ inputs).diagonal().mean()
            if name == "down_HI":
                level = moments.output_HH.trace() / member.down_HI.double().square().sum()
            roots.append(torch.linalg.cholesky(inputs.T @ inputs + damping * level * torch.eye(inputs.shape[1])))
        expected = textbook(members, weights, name, rank, roots)
        torch.testing.assert_close(merged[name].product().double(), expected, atol=1e-5, rtol=1e-4)


def test_whitening_keeps_what_the_tokens_use():
    """At one rank the error on the tokens is smaller than without, for a single expert the smallest there is."""
    expert = glu(3)
    moments, x_TH, a_TI = moments_for(expert, 3)
    for name, inputs in (("up_IH", x_TH), ("gate_IH", x_TH), ("down_HI", a_TI)):
        errors = []
        for given_moments in ([moments], None):
            found = subspace([expert], [1], rank=3, moments=given_moments, damping=0.0)[name].product().double()
            errors.append(float((inputs @ (getattr(expert, name).double() - found).T).norm()))
        least = torch.linalg.svdvals(inputs @ getattr(expert, name).double().T)[3:].norm()
        assert errors[0] == pytest.approx(float(least), rel=1e-4)
        assert errors[0] < 0.99 * errors[1]


def test_of_an_expert_with_few_tokens_half_of_what_counts_for_down_are_its_weights():
    expert = glu(0)
    moments, _, _ = moments_for(expert, 0, T=5)  # of 6 neurons
    w = expert.down_HI.double()
    level = moments.output_HH.trace() / w.square().sum()
    gram = joint_gram([w], [moments], output=True)
    torch.testing.assert_close(gram, moments.output_HH + level * w @ w.T)
    assert float(gram.trace()) == pytest.approx(2 * float(moments.output_HH.trace()))
    enough, _, _ = moments_for(expert, 0, T=6)
    assert float(joint_gram([w], [enough], output=True).trace()) == pytest.approx(
        1.01 * float(enough.output_HH.trace())
    )


def test_a_cluster_without_tokens_is_factored_without_moments():
    members = [glu(i) for i in range(2)]
    none = [Moments(torch.eye(10), torch.zeros(10, 10), 0)] * 2
    plain, found = subspace(members, [0, 0], rank=3), subspace(members, [0, 0], rank=3, moments=none)
    assert all(torch.equal(plain[name].product(), found[name].product()) for name in MATRICES)


def test_an_expert_with_fewer_tokens_than_inputs_borrows_the_moment_of_all():
    count = torch.tensor([30, 4, 0, 16])
    x = [random(int(n), 10, seed=i) for i, n in enumerate(count)]
    stats = {
        "count_E": count,
        "input_moment_EHH": torch.stack([own.T @ own for own in x]),
        "output_moment_EHH": random(4, 10, 10),
    }
    layer = LayerProfile(0, "layer", 4, 1, 50, 1, stats)
    found = moments_of(layer, [1, 3, 2])
    every = torch.cat(x)
    torch.testing.assert_close(found[0].input_HH, every.T @ every * 4 / 50)
    torch.testing.assert_close(found[1].input_HH, x[3].T @ x[3])
    torch.testing.assert_close(found[2].input_HH, every.T @ every / 50)
    assert [m.tokens for m in found] == [4, 16, 0]
    assert torch.equal(found[0].output_HH, stats["output_moment_EHH"][1])


def test_experts_are_read_as_they_are_stored_and_never_changed():
    members = cluster("gpt-oss", dtype=torch.bfloat16)  # strided views: transposed and interleaved
    before = [m.up_IH.clone() for m in members]
    wide = [ExpertWeights(*(None if w is None else w.float() for w in vars(m).values())) for m in members]
    narrow = subspace(members, [1, 2, 3], rank=5)
    assert all(torch.equal(m.up_IH, own) for m, own in zip(members, before, strict=True))
    expected = subspace(wide, [1, 2, 3], rank=5)
    assert all(torch.equal(narrow[n].product(), expected[n].product()) for n in MATRICES)


def test_experts_without_a_gate_have_two_matrices():
    expert = ExpertWeights(random(6, 10).float(), random(10, 6).float())
    assert set(subspace([expert, expert], [1, 1], rank=2)) == {"up_IH", "down_HI"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank 0 of a 6 x 10 matrix"),
        ({"rank": 7}, "rank 7 of a 6 x 10 matrix"),
        ({"rank": {"gate_IH": 3, "up_IH": 3, "down_HI": 9}}, "rank 9 of a 10 x 6 matrix"),
        ({"energy": 0.0}, "an energy of 0"),
        ({"energy": 1.5}, r"an energy of 1\.5"),
        ({"rank": 2, "energy": 0.5}, "each decides alone"),
    ],
)
def test_ranks_and_energies_out_of_range_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        subspace([glu(0)], [1], **options)


# -- factors of one matrix ----------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 300), st.integers(2, 300), st.floats(0, 0.99))
def test_factors_of_the_rank_for_a_ratio_hold_no_more_than_is_left(O, I, ratio):
    budget = (1 - ratio) * O * I
    if budget < O + I:
        with pytest.raises(UsageError, match="asks for rank 0"):
            rank_for(ratio, O, I)
    else:
        rank = rank_for(ratio, O, I)
        assert rank * (O + I) <= budget + 1e-6
        assert (rank + 1) * (O + I) > budget - 1e-6


def test_ratios_that_no_rank_can_have_are_refused_with_the_sizes():
    assert rank_for(0.1, 14336, 4096) == 2867
    for ratio in (-2.0, 1.0, 0.999):
        with pytest.raises(UsageError, match="of a 64 x 32 matrix asks for rank"):
            rank_for(ratio, 64, 32)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 99), st.data())
def test_factors_are_the_truncated_svd_with_the_singular_values_shared(O, I, seed, data):
    rank, deficient = data.draw(st.integers(1, min(O, I))), data.draw(st.booleans())
    weight = random(O, I, seed=seed)
    if deficient:
        weight[O // 2 :] = 0
    factors = factorise(weight.float(), rank)
    a, s, b = torch.linalg.svd(weight.float().double(), full_matrices=False)
    torch.testing.assert_close(factors.product().double(), (a[:, :rank] * s[:rank]) @ b[:rank], atol=1e-5, rtol=1e-5)
    for side in (factors.left_OR.T @ factors.left_OR, factors.right_RI @ factors.right_RI.T):
        torch.testing.assert_close(side.double(), torch.diag(s[:rank]), atol=1e-3, rtol=1e-3)


def test_stable_rank_is_the_ratio_of_the_squares():
    u, v = torch.linalg.qr(random(9, 5))[0], torch.linalg.qr(random(7, 5, seed=1))[0]
    matrix = u @ torch.diag(torch.tensor([2, 1, 1, 1, 0], dtype=torch.float64)) @ v.T
    assert stable_rank(matrix) == pytest.approx(7 / 4)
    assert stable_rank(matrix.T.float()) == pytest.approx(7 / 4, rel=1e-5)
    assert stable_rank(torch.eye(6)) == pytest.approx(6)
    assert stable_rank(torch.zeros(3, 4)) == 0
