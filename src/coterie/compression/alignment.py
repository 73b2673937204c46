"""Neurons of two experts, matched: which hidden neuron of one plays the part of which of the other.

Reordering the hidden neurons of an expert does not change what it computes, so experts can be compared, averaged or
decomposed only after their neurons stand in the same order. Two ways to find it, both a linear assignment problem:

- by weights: maximise the summed inner products of matched neurons' weights, gate with gate, up with up, down with down
  (biases count as one more input). Git Re-Basin (arXiv:2209.04836) for one hidden layer, M-SMoE (arXiv:2310.01334).
- by activations: maximise the summed correlations of what matched neurons do on the same tokens.

A gated neuron without biases computes the same with its up row and its down column negated; with `signs` matching may
do so. Inputs and outputs of experts are the residual stream, whose channels are never permuted.
"""

# I expert intermediate (neurons), T tokens, H hidden

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from coterie.anatomy import ExpertBank, ExpertWeights
from coterie.errors import ModelError
from coterie.experts.forward import inner_activation

_ROWS = ("up_IH", "gate_IH", "up_bias_I", "gate_bias_I")  # neurons along the first dimension


class Matching(NamedTuple):
    """order_I[i] is the neuron that stands for the reference's neuron i; sign_I how (1 or -1), None where all are 1."""

    order_I: Tensor
    sign_I: Tensor | None = None


def matching_II(reference: ExpertWeights, other: ExpertWeights) -> Tensor:
    """How well each neuron of `other` (column) fits each of `reference` (row). Shape [I, I], float32.

    Peak memory: two such matrices (1.6 GB for the 14336 neurons of a Mixtral expert). `match_weights` peaks at five
    (4.1 GB), as the assignment works on a copy in float64 and a negated copy of that.
    """
    total_II = reference.down_HI.float().T @ other.down_HI.float()
    _add_products(total_II, reference, other, _ROWS)
    return total_II


def _add_products(total_II: Tensor, reference: ExpertWeights, other: ExpertWeights, names: Iterable[str]) -> None:
    for name in names:
        mine, theirs = getattr(reference, name), getattr(other, name)
        if mine is not None:
            mine, theirs = mine.float(), theirs.float()
            total_II += torch.outer(mine, theirs) if mine.dim() == 1 else mine @ theirs.T


def correlation_II(reference_TI: Tensor, other_TI: Tensor) -> Tensor:
    """Correlation over tokens of each neuron of one expert (row) with each of another. Shape [I, I], float32.

    Both on the same tokens, see `hidden_activations`. A neuron that never changes has correlation 0 with all.
    """

    def standard(activation_TI: Tensor) -> Tensor:
        centred_TI = activation_TI.double() - activation_TI.double().mean(0)
        return torch.nn.functional.normalize(centred_TI, dim=0, eps=1e-300).float()

    return standard(reference_TI).T @ standard(other_TI)


def hidden_activations(experts: ExpertBank, expert: int, x_TH: Tensor) -> Tensor:
    """What an expert's down projection receives for these inputs, routed to it or not: act(gate x) * (up x). [T, I]."""
    with torch.no_grad():
        return inner_activation(experts.module, expert, x_TH)


def match_neurons(reference: ExpertWeights, other: ExpertWeights) -> Tensor:
    """The order [I] in which `other`'s neurons match the reference's: neuron order[i] stands for neuron i."""
    return match_weights(reference, other).order_I


def match_weights(reference: ExpertWeights, other: ExpertWeights, *, signs: bool = False) -> Matching:
    """Matching by weights. With `signs`, neurons may be negated: ModelError where that changes what they compute."""
    if not signs:
        return _assigned(matching_II(reference, other))
    _may_turn(other)
    total_II = reference.down_HI.float().T @ other.down_HI.float()
    _add_products(total_II, reference, other, ["up_IH"])
    negative_II = total_II < 0
    total_II.abs_()
    _add_products(total_II, reference, other, ["gate_IH"])
    return _assigned(total_II, negative_II)


def match_activations(reference_TI: Tensor, other_TI: Tensor, *, signs: bool = False) -> Matching:
    """Matching by what neurons do on the same tokens; fewer than two tokens say nothing and leave the order as it is.

    Whether neurons may be negated is not seen from here: `reordered` looks.
    """
    if len(reference_TI) < 2:
        return Matching(torch.arange(reference_TI.shape[1]))
    found_II = correlation_II(reference_TI, other_TI)
    return _assigned(found_II.abs(), found_II < 0) if signs else _assigned(found_II)


def _assigned(fit_II: Tensor, negative_II: Tensor | None = None) -> Matching:
    _, order = linear_sum_assignment(fit_II.cpu().numpy(), maximize=True)
    order_I = torch.as_tensor(order)
    if negative_II is None:
        return Matching(order_I)
    negative_I = negative_II.cpu()[torch.arange(len(order_I)), order_I]
    return Matching(order_I, torch.where(negative_I, -1.0, 1.0))


def reordered(expert: ExpertWeights, order_I: Tensor, sign_I: Tensor | None = None) -> ExpertWeights:
    """The same function with its neurons in another order, and those of sign -1 with up row and down column negated.

    Raises ModelError where negating would change the function.
    """
    rows = {name: None if (w := getattr(expert, name)) is None else w[order_I] for name in _ROWS}
    down_HI = expert.down_HI[:, order_I]
    if sign_I is not None:
        _may_turn(expert)
        assert rows["up_IH"] is not None
        rows["up_IH"] = rows["up_IH"] * sign_I.to(down_HI)[:, None]
        down_HI = down_HI * sign_I.to(down_HI)
    return ExpertWeights(**rows, down_HI=down_HI, down_bias_H=expert.down_bias_H)  # type: ignore[arg-type]


def _may_turn(expert: ExpertWeights) -> None:
    # without a gate the activation sits on up, which is not odd; with biases up is clamped and shifted (GPT-OSS)
    if expert.gate_IH is None or expert.up_bias_I is not None:
        raise ModelError(
            "negating neurons changes what experts with biases or without a gate compute", "Match without signs."
        )


def aligned(
    reference: ExpertWeights,
    other: ExpertWeights,
    *,
    by: Literal["weights", "activations"] = "weights",
    sample: tuple[Tensor, Tensor] | None = None,
    signs: bool = False,
) -> ExpertWeights:
    """`other` with its neurons in the reference's order.

    sample : for `by="activations"`, what both experts' neurons do on the same tokens, two [T, I].
    """
    if by == "activations":
        assert sample is not None
        matching = match_activations(*sample, signs=signs)
    else:
        matching = match_weights(reference, other, signs=signs)
    return reordered(other, *matching)
