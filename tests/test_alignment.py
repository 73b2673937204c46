"""Matching neurons of two experts by weights or by activations; nothing an expert computes may change by it."""

# I neurons, H hidden, T tokens

import copy
import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import NemotronHConfig
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from coterie.anatomy import ExpertBank, ExpertWeights, moe_layers
from coterie.compression.alignment import (
    aligned,
    correlation_II,
    hidden_activations,
    match_activations,
    match_weights,
    matching_II,
    reordered,
)
from coterie.compression.merging.operators import weighted_mean
from coterie.errors import ModelError
from coterie.experts.forward import expert_output
from families import FEW, tiny

pytestmark = pytest.mark.usefixtures("one_thread")
EVERY = (*FEW, "nemotron")  # gated, biased and interleaved (gpt-oss), two-layer without a gate (nemotron)
TURNING = ("qwen3-moe", "mixtral", "deepseek-v3")


@functools.cache
def _bank(family):
    if family != "nemotron":
        return moe_layers(tiny(family))[0].bank
    module = NemotronHExperts(NemotronHConfig(hidden_size=48, moe_intermediate_size=32, n_routed_experts=8))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.08)
    return ExpertBank(module)


def bank_of(family):
    """A bank that a test may write to; biases are not all zero."""
    bank = copy.deepcopy(_bank(family))
    if bank.has_bias:
        generator = torch.Generator().manual_seed(9)
        with torch.no_grad():
            for name, parameter in bank.module.named_parameters():
                if name.endswith("_bias"):
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return bank


def rows(bank, T=32, seed=3):
    return torch.randn(T, bank.hidden_size, generator=torch.Generator().manual_seed(seed))


def outputs(bank, expert, x_TH):
    with torch.no_grad():
        return expert_output(bank.module, expert, x_TH)


def shuffled(expert, seed, signs=False, noise=0.0):
    """Another order of the same neurons, and what it is."""
    generator, neurons = torch.Generator().manual_seed(seed), expert.up_IH.shape[0]
    order = torch.randperm(neurons, generator=generator)
    sign = torch.where(torch.rand(neurons, generator=generator) < 0.5, -1.0, 1.0) if signs else None
    found = reordered(expert, order, sign)
    if noise:
        for name in ("up_IH", "gate_IH", "down_HI"):
            if (weight := getattr(found, name)) is not None:
                noisy = weight + noise * weight.std() * torch.randn(weight.shape, generator=generator)
                setattr(found, name, noisy)
    return found, order


def same(one: ExpertWeights, two: ExpertWeights, atol=0.0):
    return all(w is None or torch.allclose(w, getattr(two, name), atol=atol, rtol=0) for name, w in vars(one).items())


# -- the function ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", EVERY)
@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31))
def test_reordering_neurons_changes_no_output(family, seed):
    bank = bank_of(family)
    x_TH = rows(bank)
    before = outputs(bank, 1, x_TH)
    bank.write(1, shuffled(bank.read(1), seed, signs=family in TURNING)[0])
    torch.testing.assert_close(outputs(bank, 1, x_TH), before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", EVERY)
def test_aligning_two_different_experts_changes_no_output(family):
    bank = bank_of(family)
    x_TH = rows(bank)
    before = outputs(bank, 1, x_TH)
    sample = tuple(hidden_activations(bank, e, x_TH) for e in (0, 1))
    for signs in (False, True) if family in TURNING else (False,):
        for by in ("weights", "activations"):
            changed = aligned(bank.read(0), bank.read(1), by=by, sample=sample, signs=signs)
            assert not same(changed, bank.read(1))
            other = bank_of(family)
            other.write(1, changed)
            torch.testing.assert_close(outputs(other, 1, x_TH), before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["gpt-oss", "nemotron"])
def test_signs_are_refused_where_they_would_change_the_function(family):
    bank = bank_of(family)
    sample = tuple(hidden_activations(bank, e, rows(bank)) for e in (0, 1))
    for by in ("weights", "activations"):
        with pytest.raises(ModelError, match="biases or without a gate"):
            aligned(bank.read(0), bank.read(1), by=by, sample=sample, signs=True)


def test_a_negated_neuron_of_an_expert_without_a_gate_is_another_function():
    """Why signs are refused there."""
    bank = bank_of("nemotron")
    x_TH, before = rows(bank), outputs(bank, 0, rows(bank))
    expert = bank.read(0)
    bank.write(0, ExpertWeights(-expert.up_IH.clone(), -expert.down_HI.clone()))
    assert not torch.allclose(outputs(bank, 0, x_TH), before, atol=1e-3)


# -- what is found ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["weights", "activations"])
@pytest.mark.parametrize("family", EVERY)
@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**31))
def test_a_planted_permutation_is_undone_exactly(family, by, seed):
    bank = bank_of(family)
    expert = bank.read(2)
    for signs in (False, True) if family in TURNING else (False,):
        planted, order = shuffled(expert, seed, signs)
        bank.write(3, planted)
        x_TH = rows(bank)
        a_TI, b_TI = (hidden_activations(bank, e, x_TH) for e in (2, 3))
        found = (
            match_weights(expert, planted, signs=signs)
            if by == "weights"
            else match_activations(a_TI, b_TI, signs=signs)
        )
        assert torch.equal(order[found.order_I], torch.arange(len(order)))
        assert same(aligned(expert, planted, by=by, sample=(a_TI, b_TI), signs=signs), expert)


@pytest.mark.parametrize("by", ["weights", "activations"])
@pytest.mark.parametrize("family", EVERY)
def test_a_noisy_plant_is_recovered(family, by):
    bank = bank_of(family)
    expert = bank.read(2)
    planted, order = shuffled(expert, 5, noise=0.3)
    bank.write(3, planted)
    x_TH = rows(bank, T=400)
    sample = [hidden_activations(bank, e, x_TH) for e in (2, 3)]
    found = match_weights(expert, planted) if by == "weights" else match_activations(*sample)
    assert torch.equal(order[found.order_I], torch.arange(len(order)))


@pytest.mark.parametrize("family", EVERY)
def test_matched_neurons_fit_at_least_as_well_as_those_of_the_same_number(family):
    bank = bank_of(family)
    x_TH = rows(bank)
    for i, j in ((0, 1), (4, 7)):
        one, two = bank.read(i), bank.read(j)
        fit, order = matching_II(one, two), match_weights(one, two).order_I
        assert float(fit[torch.arange(len(order)), order].sum()) > float(fit.diagonal().sum())
        sample = [hidden_activations(bank, e, x_TH) for e in (i, j)]
        fit, order = correlation_II(*sample), match_activations(*sample).order_I
        assert float(fit[torch.arange(len(order)), order].sum()) > float(fit.diagonal().sum())


@pytest.mark.parametrize("family", EVERY)
def test_a_matching_by_weights_minimises_the_distance(family):
    """The summed inner products are half of what the squared distance lacks to both norms."""
    one, two = bank_of(family).read(0), bank_of(family).read(1)

    def distance(a, b):
        parts = [(getattr(a, n), getattr(b, n)) for n in ("up_IH", "gate_IH", "down_HI", "up_bias_I", "gate_bias_I")]
        return sum(float((x.double() - y.double()).square().sum()) for x, y in parts if x is not None)

    best = distance(one, aligned(one, two))
    assert best < distance(one, two)
    assert all(best < distance(one, shuffled(two, seed)[0]) for seed in range(20))
    if family in TURNING:
        assert distance(one, aligned(one, two, signs=True)) < best


@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize("by", ["weights", "activations"])
def test_an_expert_merged_with_its_permuted_copies_is_itself(family, by):
    bank = bank_of(family)
    expert, x_TH = bank.read(2), rows(bank)
    before = outputs(bank, 2, x_TH)
    signs, parts, unaligned = family in TURNING, [expert], [expert]
    for member in (3, 4):
        bank.write(member, shuffled(expert, member, signs)[0])
        sample = tuple(hidden_activations(bank, e, x_TH) for e in (2, member))
        parts.append(aligned(expert, bank.read(member), by=by, sample=sample, signs=signs))
        unaligned.append(bank.read(member))
    assert same(weighted_mean(parts, [3, 1, 5]), expert, atol=1e-6)
    bank.write(5, weighted_mean(parts, [3, 1, 5]))
    torch.testing.assert_close(outputs(bank, 5, x_TH), before, atol=1e-5, rtol=1e-5)
    bank.write(5, weighted_mean(unaligned, [3, 1, 5]))
    assert not torch.allclose(outputs(bank, 5, x_TH), before, atol=1e-2 * float(before.abs().max()))


# -- activations -----------------------------------------------------------------------------------------------------


def test_correlations_are_those_of_numpy_and_zero_for_a_neuron_that_never_changes():
    a_TI, b_TI = (torch.randn(30, 5, generator=torch.Generator().manual_seed(s)) + 2 for s in (0, 1))
    a_TI[:, 3] = 7.0
    expected = torch.corrcoef(torch.cat((a_TI, b_TI), 1).T)[:5, 5:]
    found = correlation_II(a_TI, b_TI)
    keep = [0, 1, 2, 4]
    torch.testing.assert_close(found[keep], expected[keep], atol=1e-5, rtol=0)
    assert bool((found[3] == 0).all())


@pytest.mark.parametrize("T", [0, 1])
def test_fewer_than_two_tokens_leave_the_order_as_it_is(T):
    bank = bank_of("mixtral")
    sample = tuple(hidden_activations(bank, e, rows(bank, T)) for e in (0, 1))
    assert same(aligned(bank.read(0), bank.read(1), by="activations", sample=sample), bank.read(1))


@pytest.mark.parametrize("family", FEW)
def test_hidden_activations_are_what_down_receives(family):
    bank = bank_of(family)
    x_TH = rows(bank)
    expert = bank.read(1)
    down_TH = hidden_activations(bank, 1, x_TH) @ expert.down_HI.T
    expected = outputs(bank, 1, x_TH) - (0 if expert.down_bias_H is None else expert.down_bias_H)
    torch.testing.assert_close(down_TH, expected, atol=1e-5, rtol=1e-5)
