"""Observers: one small class per statistic of one MoE layer.

An observer sees the routed tokens of one layer, padding already removed, and adds them up. Gates and expert ids are
what the experts module really received; nothing is re-derived from logits. Sums are kept in float64 and counts in
int64, so results do not depend on how the text was cut into batches (beyond the last bits of a float64 sum).

To add a statistic, write a class with `fields` and one of the `see_*` methods; a method names it in `observes`. One
with parameters is a function that makes such a class, with the parameters in the names of its fields, so that a
profile can hold several.
"""

# T tokens, H hidden, E experts, K experts per token, R rows routed to one expert, D domains

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from coterie.anatomy import MoELayer


@dataclass(frozen=True)
class LayerShape:
    """Sizes an observer needs: E experts, K per token, H hidden, D domains.

    residual_multiplier : what the decoder layer multiplies the block's output with before adding it (Granite), else 1.
    intermediate : I, neurons of an expert.
    """

    experts: int
    top_k: int
    hidden: int
    domains: int
    residual_multiplier: float = 1.0
    intermediate: int = 0


@dataclass(frozen=True)
class Routing:
    """One batch of tokens at the door of the experts.

    x_TH : their inputs. logits_TE : the router's raw scores (None where the router returns none).
    weight_TK, index_TK : applied gate weights and expert ids; id == E means "no expert", with weight 0.
    domain_T : domain of each token. start_T : True for the first token of each sequence.
    residual_TH : the hidden state before the norm that made x_TH; None unless an observer needs it.
    """

    x_TH: Tensor
    logits_TE: Tensor | None
    weight_TK: Tensor
    index_TK: Tensor
    domain_T: Tensor
    start_T: Tensor
    residual_TH: Tensor | None = None


@dataclass(frozen=True)
class ExpertRows:
    """The rows of one batch that one expert computed.

    x_RH : inputs. y_RH : raw outputs, before the gate weight. weight_R : applied gate weight.
    share_R : the weight divided by the sum over the token's selected experts. token_R : row of `Routing` it came from.
    """

    expert: int
    x_RH: Tensor
    y_RH: Tensor
    weight_R: Tensor
    share_R: Tensor
    token_R: Tensor


class Observer:
    """Adds up one statistic of one layer.

    fields : {name: "sum", "max", "same", "none" or "with <other>"}: how two profiles of one model are merged. "same" is
        for facts of the weights, "none" for what cannot be merged, "with max_E" means "from the side of larger max_E".
    watches_all : `see_dense` is wanted, for which every expert runs on every token: E / K times the usual cost.
    needs_logits : the statistic is left out, not zero, where the router shows no logits of all experts.
    needs_residual : `Routing.residual_TH` is wanted.
    needs_text : False for statistics of the weights alone, which need no token to pass. needs_experts : of those, False
        for statistics of the router alone, for which no expert is read.
    """

    fields: ClassVar[dict[str, str]] = {}
    watches_outputs: ClassVar[bool] = False
    watches_sum: ClassVar[bool] = False
    watches_all: ClassVar[bool] = False
    watches_inner: ClassVar[bool] = False
    watches_block: ClassVar[bool] = False
    needs_logits: ClassVar[bool] = False
    needs_residual: ClassVar[bool] = False
    needs_text: ClassVar[bool] = True
    needs_experts: ClassVar[bool] = True

    def __init__(self, shape: LayerShape) -> None:
        self.shape = shape

    def begin(self, layer: MoELayer) -> None:
        """Called once, before the first batch, while the layer is in memory."""

    def see_routing(self, routing: Routing) -> None:
        """Called once per batch."""

    def see_outputs(self, rows: ExpertRows) -> None:
        """Called once per expert and batch, only if `watches_outputs`."""

    def see_inner(self, expert: int, inner_RI: Tensor) -> None:
        """Called once per expert and batch, only if `watches_inner`: what its down projection receives."""

    def see_sum(self, routing: Routing, sum_TH: Tensor) -> None:
        """Called once per batch after all experts ran, only if `watches_sum`: the routed experts' weighted sum."""

    def see_block(self, routing: Routing, block_TH: Tensor) -> None:
        """Called once per batch after the block ran, only if `watches_block`: its output, shared experts included."""

    def see_dense(self, y_ETH: Tensor) -> None:
        """Called once per chunk of tokens, only if `watches_all`: f_e(x) of all experts, float32, before any gate.

        T counts up to all tokens of the text without padding. The tensor is the next chunk's, too: it must not be kept.
        """

    def see_layer(self, layer: MoELayer) -> None:
        """Called once, after the last batch, while the layer is still in memory and whole."""

    def state(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.fields}


def _hits_TE(index_TK: Tensor, E: int) -> Tensor:
    """One where a token selected an expert, [T, E] float32; the sentinel column is dropped."""
    hits = torch.zeros(index_TK.shape[0], E + 1, device=index_TK.device)
    return hits.scatter_(1, index_TK.clamp(max=E), 1.0)[:, :E]


class SelectionCount(Observer):
    """count_E: how many tokens selected each expert."""

    fields = {"count_E": "sum"}

    def __init__(self, shape: LayerShape) -> None:
        super().__init__(shape)
        self.count_E = torch.zeros(shape.experts, dtype=torch.int64)

    def see_routing(self, routing: Routing) -> None:
        E = self.shape.experts
        self.count_E += torch.bincount(routing.index_TK.reshape(-1).clamp(max=E), minlength=E + 1)[:E].cpu()


class DomainCount(Observer):
    """count_DE: how many tokens of each domain selected each expert. tokens_D: tokens of each domain."""

    fields = {"count_DE": "sum", "tokens_D": "sum"}

    def __init__(self, shape: LayerShape) -> None:
        super().__init__(shape)
        self.count_DE = torch.zeros(shape.domains, shape.experts, dtype=torch.int64)
        self.tokens_D = torch.zeros(shape.domains, dtype=torch.int64)

    def see_routing(self, routing: Routing) -> None:
        D, E = self.count_DE.shape
        self.tokens_D += torch.bincount(routing.domain_T, minlength=D).cpu()
        joint_TK = routing.domain_T[:, None] * (E + 1) + routing.index_TK.clamp(max=E)
        self.count_DE += torch.bincount(joint_TK.reshape(-1), minlength=D * (E + 1)).view(D, E + 1)[:, :E].cpu()


class GateMass(Observer):
    """gate_mass_E: sum of the gate weights the model applied. gate_share_E: the same with each token's summing to 1."""

    fields = {"gate_mass_E": "sum", "gate_share_E": "sum"}

    def __init__(self, shape: LayerShape) -> None:
        super().__init__(shape)
        self.gate_mass_E = torch.zeros(shape.experts, dtype=torch.float64)
        self.gate_share_E = torch.zeros(shape.experts, dtype=torch.float64)

    def see_routing(self, routing: Routing) -> None:
        E = self.shape.experts
        weight_TK = routing.weight_TK.double()
        share_TK = weight_TK / weight_TK.sum(-1, keepdim=True).clamp(min=1e-20)
        index = routing.index_TK.reshape(-1).clamp(max=E)
        for total_E, value_TK in ((self.gate_mass_E, weight_TK), (self.gate_share_E, share_TK)):
            total_E += torch.bincount(index, weights=value_TK.reshape(-1), minlength=E + 1)[:E].cpu()


class ScoreMass(Observer):
    """score_mass_E: sum over tokens of the softmax of the router's logits, all experts, selected or not."""

    fields = {"score_mass_E": "sum"}
    needs_logits = True

    def __init__(self, shape: LayerShape) -> None:
        super().__init__(shape)
        self.score_mass_E = torch.zeros(shape.experts, dtype=torch.float64)

    def see_routing(self, routing: Routing) -> None:
        if routing.logits_TE is not None:
            self.score_mass_E += routing.logits_TE.float().softmax(-1).double().sum(0).cpu()


class CoActivation(Observer):
    """coactivation_EE: how many tokens selected both experts; the diagonal is the selection count."""

    fields = {"coactivation_EE": "sum"}

    def __init__(self, shape: LayerShape) -> None:
        super().__init__(shape)
        self.coactivation_EE = torch.zeros(shape.experts, shape.experts, dtype=torch.int64)

    def see_routing(self, routing: Routing) -> None:
        hits = _hits_TE(routing.index_TK, self.shape.experts).double()  # exact up to 2^53 tokens
        self.coactivation_EE += (hits.T @ hits).long().cpu()


class RouterGram(Observer):
    """router_gram_EE: sum over tokens of logits^T logits. router_sum_E: sum of logits."""

    fields = {"router_gram_EE": "sum", "router_sum_E": "sum"}
    needs_logits = True

    def __init__(self, shape: LayerShape) -> None:
        super().__init__(shape)
        self.router_gram_EE = torch.zeros(shape.experts, shape.experts, dtype=torch.float64)
        self.router_sum_E = torch.zeros(shape.experts, dtype=torch.float64)

    def see_routing(self, routing: Routing) -> None:
        if routing.logits_TE is not None:
            logits = routing.logits_TE.double()
            self.router_gram_EE += (logits.T @ logits).cpu()
            self.router_sum_E += logits.sum(0).cpu()


class OutputNorm(Observer):
    """output_norm_E: sum over routed tokens of ||f_e(x)||_2, before the gate. output_norm_max_E: the largest."""

    fields = {"output_norm_E": "sum", "output_norm_max_E": "max"}
    watches_outputs = True

    def __init__(self, shape: LayerShape) -> None:
        super().__init__(shape)
        self.output_norm_E = torch.zeros(shape.experts, dtype=torch.float64)
        self.output_norm_max_E = torch.zeros(shape.experts, dtype=torch.float32)

    def see_outputs(self, rows: ExpertRows) -> None:
        norm_R = rows.y_RH.float().norm(dim=-1)
        self.output_norm_E[rows.expert] += norm_R.double().sum().cpu()
        self.output_norm_max_E[rows.expert] = max(self.output_norm_max_E[rows.expert], norm_R.max().cpu())


class WeightedOutputNorm(Observer):
    """weighted_norm_E: sum over routed tokens of g * ||f_e(x)||_2 with the applied weight g.

    shared_norm_E: the same with g divided by the sum over the token's selected experts (REAP's renormalised gate).
    """

    fields = {"weighted_norm_E": "sum", "shared_norm_E": "sum"}
    watches_outputs = True

    def __init__(self, shape: LayerShape) -> None:
        super().__init__(shape)
        self.weighted_norm_E = torch.zeros(shape.experts, dtype=torch.float64)
        self.shared_norm_E = torch.zeros(shape.experts, dtype=torch.float64)

    def see_outputs(self, rows: ExpertRows) -> None:
        norm_R = rows.y_RH.float().norm(dim=-1)
        self.weighted_norm_E[rows.expert] += (rows.weight_R.float() * norm_R).double().sum().cpu()
        self.shared_norm_E[rows.expert] += (rows.share_R.float() * norm_R).double().sum().cpu()


class MeanOutput(Observer):
    """output_sum_EH: sum over routed tokens of f_e(x), before the gate."""

    fields = {"output_sum_EH": "sum"}
    watches_outputs = True

    def __init__(self, shape: LayerShape) -> None:
        super().__init__(shape)
        self.output_sum_EH = torch.zeros(shape.experts, shape.hidden, dtype=torch.float64)

    def see_outputs(self, rows: ExpertRows) -> None:
        self.output_sum_EH[rows.expert] += rows.y_RH.double().sum(0).cpu()


class InputMoment(Observer):
    """input_square_EH: sum over routed tokens of x^2, per channel (diagonal of the inputs' second moment)."""

    fields = {"input_square_EH": "sum"}
    watches_outputs = True

    def __init__(self, shape: LayerShape) -> None:
        super().__init__(shape)
        self.input_square_EH = torch.zeros(shape.experts, shape.hidden, dtype=torch.float64)

    def see_outputs(self, rows: ExpertRows) -> None:
        self.input_square_EH[rows.expert] += rows.x_RH.double().square().sum(0).cpu()


class MaxActivation(Observer):
    """output_max_E: largest |f_e(x)[c]| over routed tokens and channels, before the gate; its channel c."""

    fields = {"output_max_E": "max", "output_max_channel_E": "with output_max_E"}
    watches_outputs = True

    def __init__(self, shape: LayerShape) -> None:
        super().__init__(shape)
        self.output_max_E = torch.zeros(shape.experts, dtype=torch.float32)
        self.output_max_channel_E = torch.full((shape.experts,), -1, dtype=torch.int64)

    def see_outputs(self, rows: ExpertRows) -> None:
        peak_H = rows.y_RH.float().abs().amax(0)
        value, channel = peak_H.max(0)
        if value.cpu() > self.output_max_E[rows.expert]:
            self.output_max_E[rows.expert] = value.cpu()
            self.output_max_channel_E[rows.expert] = channel.cpu()


RATIO_BINS = 2000  # over [0, 1]


class GateRatio(Observer):
    """gate_ratio_RB: tokens by w_i / w_1, in 2000 equal bins of [0, 1], for the ranks i = 2, 3, ...

    What dynamic skipping is calibrated on (NAEE, arXiv:2402.14800). w_1 >= w_2 >= ... are the weights the model
    applied to a token's experts, sorted. gate_ratio_sum_R: sum of the ratios. Tokens with fewer than i experts are not
    counted at rank i.
    """

    fields = {"gate_ratio_RB": "sum", "gate_ratio_sum_R": "sum"}

    def __init__(self, shape: LayerShape) -> None:
        super().__init__(shape)
        ranks = max(shape.top_k - 1, 0)
        self.gate_ratio_RB = torch.zeros(ranks, RATIO_BINS, dtype=torch.int64)
        self.gate_ratio_sum_R = torch.zeros(ranks, dtype=torch.float64)

    def see_routing(self, routing: Routing) -> None:
        real_TK = routing.index_TK < self.shape.experts
        weight_TK = torch.where(real_TK, routing.weight_TK.double(), -torch.inf)
        weight_TK, order_TK = weight_TK.sort(-1, descending=True)
        real_TR = real_TK.gather(-1, order_TK)[:, 1:] & (weight_TK[:, :1] > 0)
        ratio_TR = torch.where(real_TR, weight_TK[:, 1:] / weight_TK[:, :1], 0.0).clamp(0, 1)
        bin_TR = (ratio_TR * RATIO_BINS).long().clamp(max=RATIO_BINS - 1)
        for rank in range(ratio_TR.shape[1]):
            bin_T = bin_TR[:, rank][real_TR[:, rank]]
            self.gate_ratio_RB[rank] += torch.bincount(bin_T, minlength=RATIO_BINS).cpu()
        self.gate_ratio_sum_R += ratio_TR.sum(0).cpu()


class DenseOutput(Observer):
    """dense_output_sum_EH: sum of f_e(x) over all tokens that enter the layer, routed to e or not, before the gate."""

    fields = {"dense_output_sum_EH": "sum"}
    watches_all = True

    def __init__(self, shape: LayerShape) -> None:
        super().__init__(shape)
        self.dense_output_sum_EH = torch.zeros(shape.experts, shape.hidden, dtype=torch.float64)

    def see_dense(self, y_ETH: Tensor) -> None:
        for part in torch.split(y_ETH, 16, dim=1):  # few at a time: they are widened to float64
            self.dense_output_sum_EH += part.double().sum(1).cpu()


class OutputCosine(Observer):
    """output_cosine_EE: sum of cos(f_i(x), f_j(x)) over all tokens that enter the layer, routed to i and j or not.

    The diagonal counts the tokens, but for those that an expert answers with zeros, which have no cosine and add 0.
    """

    fields = {"output_cosine_EE": "sum"}
    watches_all = True

    def __init__(self, shape: LayerShape) -> None:
        super().__init__(shape)
        self.output_cosine_EE = torch.zeros(shape.experts, shape.experts, dtype=torch.float64)

    def see_dense(self, y_ETH: Tensor) -> None:
        for part in torch.split(y_ETH, 16, dim=1):  # few at a time: they are widened to float64
            unit_EX = torch.nn.functional.normalize(part.double(), dim=-1, eps=1e-300).flatten(1)
            self.output_cosine_EE += (unit_EX @ unit_EX.T).cpu()


OBSERVERS: dict[str, type[Observer]] = {
    cls.__name__: cls
    for cls in (
        SelectionCount,
        DomainCount,
        GateMass,
        ScoreMass,
        CoActivation,
        RouterGram,
        OutputNorm,
        WeightedOutputNorm,
        MeanOutput,
        InputMoment,
        MaxActivation,
        GateRatio,
        DenseOutput,
        OutputCosine,
    )
}
