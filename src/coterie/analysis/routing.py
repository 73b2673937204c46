"""What routers do with text: how sure, how balanced and how steady they are, and what layers tell of one another.

    seen = routed(model, batches)                  # {layer: Routing} of all tokens that are no padding
    gate_entropy(seen[3]), inner_balance(seen[3]), outer_balance(seen[3])
    mutual_information(seen)                       # [layers, layers]
    fluctuation(seen[3], later[3])                 # the same text through a later checkpoint

Sources: mutual information across layers, balance of scores and likeness of experts of RMoE (arXiv:2408.06793);
fluctuation of routes between checkpoints and the entropy of gates of arXiv:2505.00792. All are functions of what
`routing.base.Routing` holds; which router decided is not known here. The model must have routers of ours
(`put_routers(model, "top-k")` makes the usual ones so).
"""

# T tokens, K slots per token, N router outputs, E experts, L MoE layers

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from coterie.anatomy.layers import MoELayer, moe_layers
from coterie.anatomy.routers import placed_routers
from coterie.errors import DataError, ModelError, UsageError
from coterie.routing.base import Routing, entropy
from coterie.routing.record import Record, listening


class Fluctuation(NamedTuple):
    """Shares of tokens, 0 to 1: `first`, whose strongest expert is another one; `sets`, 1 - Jaccard of all chosen."""

    first: float
    sets: float


@torch.no_grad()
def routed(model: nn.Module, batches: Iterable[Tensor | Mapping[str, Tensor]]) -> dict[int, Routing]:
    """Where a model in use sends these tokens. Raises ModelError for a model without routers of ours.

    batches : token ids [B, L], or what the model takes, with an attention mask.
    """
    if not placed_routers(model):
        raise ModelError(
            f"{type(model).__name__} has only its architecture's routers, which keep no record",
            'Give it the same ones as ours first: put_routers(model, "top-k").',
        )
    records: list[Record] = []
    training = model.training
    model.eval()
    try:
        with listening(model, records.append):
            for batch in batches:
                model(**{"use_cache": False, **(batch if isinstance(batch, Mapping) else {"input_ids": batch})})
    finally:
        model.train(training)
    return joined(records)


def joined(records: Iterable[Record]) -> dict[int, Routing]:
    """All tokens of these calls that are no padding, as one Routing a layer."""
    parts: dict[int, list[Routing]] = {}
    for record in records:
        for layer, routing in record.routings.items():
            parts.setdefault(layer, []).append(without_padding(routing))
    found = {}
    for layer, several in sorted(parts.items()):
        tensors: dict[str, Any] = {
            field.name: torch.cat([getattr(part, field.name) for part in several])
            for field in fields(Routing)
            if field.name.endswith(("_TN", "_TK")) and isinstance(getattr(several[0], field.name), Tensor)
        }
        found[layer] = replace(several[0], **tensors, terms={})
    return found


def without_padding(routing: Routing) -> Routing:
    """The same without tokens that are padding."""
    mask_T = routing.mask_T
    if mask_T is None:
        return routing
    values: dict[str, Any] = {name: getattr(routing, name)[mask_T] for name in _TABLES}
    kept_TK = None if routing.kept_TK is None else routing.kept_TK[mask_T]
    return replace(routing, **values, kept_TK=kept_TK, mask_T=None)


_TABLES = ("logits_TN", "probability_TN", "index_TK", "weight_TK")


# -- of one layer ------------------------------------------------------------------------------------------------------


def gate_entropy(routing: Routing) -> float:
    """Mean entropy of a token's probabilities, in nats: 0 for a router that is sure, log N for one that is not."""
    return float(routing.mean(entropy(routing.probability_TN)))


def load_entropy(routing: Routing) -> float:
    """Entropy of how the choices spread over the outputs, in nats: log N where all are chosen as often."""
    load_N = routing.load_N().double()
    return float(entropy(load_N / load_N.sum().clamp(min=1)))


def inner_balance(routing: Routing) -> float:
    """Median of the highest probability over the second highest (RMoE's IB): 1 where two experts share a token."""
    top_T2 = without_padding(routing).probability_TN.topk(2, dim=-1).values
    return float((top_T2[:, 0] / top_T2[:, 1].clamp(min=1e-20)).median())


def outer_balance(routing: Routing) -> float:
    """Median of the probability that the K likeliest outputs hold together (RMoE's OB): 1 where none is left over."""
    routing = without_padding(routing)
    return float(routing.probability_TN.topk(routing.index_TK.shape[-1], dim=-1).values.sum(-1).median())


def dropped(routing: Routing) -> float:
    """Share of the chosen experts that had no place left for the token. 0 without a capacity."""
    routing = without_padding(routing)
    chosen_TK = routing.index_TK < routing.experts
    if routing.kept_TK is None:
        return 0.0
    return float((chosen_TK & ~routing.kept_TK).sum() / chosen_TK.sum().clamp(min=1))


# -- of two ------------------------------------------------------------------------------------------------------------


def fluctuation(before: Routing, after: Routing) -> Fluctuation:
    """How many tokens go elsewhere, between two checkpoints, or with and without noise, on the same text.

    Raises DataError where the two did not see the same number of tokens.
    """
    before, after = without_padding(before), without_padding(after)
    if before.index_TK.shape[0] != after.index_TK.shape[0]:
        raise DataError(
            f"routes of {before.index_TK.shape[0]} and of {after.index_TK.shape[0]} tokens cannot be compared",
            "Run the same batches through both.",
        )
    strongest = [r.index_TK.gather(1, r.weight_TK.argmax(1, keepdim=True)) for r in (before, after)]
    one_TN, two_TN = before.chosen_TN(), after.chosen_TN()
    both_T, either_T = (one_TN * two_TN).sum(1), torch.maximum(one_TN, two_TN).sum(1)
    jaccard_T = torch.where(either_T > 0, both_T / either_T.clamp(min=1), 1.0)
    return Fluctuation(float((strongest[0] != strongest[1]).float().mean()), float(1 - jaccard_T.mean()))


def mutual_information(routings: Mapping[int, Routing], of: Literal["probability", "choice"] = "probability") -> Tensor:
    """What the route in one layer tells of the route in another, in nats: [L, L], float64, layers in order.

    With g_i(t) the gate of layer i, P_ij[a, b] = mean over t of g_i(t)[a] g_j(t)[b], and
    MI_ij = sum over a, b of P_ij log(P_ij / (P_i P_j)).

    of : "probability": g is the dense gate, as RMoE's; "choice": the chosen experts, equally.
    Raises UsageError for another word. The estimate is too high by about N^2 / (2 T) nats with "choice" and few tokens.
    """
    if of not in ("probability", "choice"):
        raise UsageError(f"mutual information of {of!r} is not known", 'Say "probability" or "choice".')
    gates = []
    for _, routing in sorted(routings.items()):
        routing = without_padding(routing)
        gate_TN = routing.probability_TN if of == "probability" else routing.chosen_TN()
        gates.append(gate_TN.double() / gate_TN.double().sum(-1, keepdim=True).clamp(min=1e-20))
    if len({gate.shape[0] for gate in gates}) > 1:
        raise DataError("the layers did not see the same tokens")
    found = torch.zeros(len(gates), len(gates), dtype=torch.float64)
    for i, one_TN in enumerate(gates):
        for j, two_TM in enumerate(gates[: i + 1]):
            joint_NM = one_TN.T @ two_TM / one_TN.shape[0]
            apart_NM = torch.outer(joint_NM.sum(1), joint_NM.sum(0))
            found[i, j] = found[j, i] = torch.special.xlogy(joint_NM, joint_NM / apart_NM.clamp(min=1e-300)).sum()
    return found


# -- of experts and gradients ------------------------------------------------------------------------------------------


@torch.no_grad()
def expert_similarity(layer: MoELayer) -> float:
    """Mean cosine of the weights of two experts of a layer, all matrices in one row; about 0 for fresh experts."""
    E, gram_EE = layer.num_experts, None
    for parameter in layer.experts.parameters():
        if parameter.dim() == 3 and parameter.shape[0] == E:
            row_EX = parameter.detach().flatten(1).float()
            gram_EE = row_EX @ row_EX.T if gram_EE is None else gram_EE + row_EX @ row_EX.T
    if gram_EE is None or E < 2:
        raise ModelError(f"layer {layer.index} has no two experts with matrices of their own")
    norm_E = gram_EE.diagonal().clamp(min=1e-20).sqrt()
    cosine_EE = gram_EE / torch.outer(norm_E, norm_E)
    return float((cosine_EE.sum() - cosine_EE.diagonal().sum()) / (E * (E - 1)))


def router_gradients(model: nn.Module, parts: Mapping[str, Tensor]) -> dict[str, float]:
    """Norm of the gradient that each part of a loss has in all routers together, and what they share.

    parts : e.g. {"text": loss, "balance": term}, of one call, still with their graph, which is kept.
    """
    parameters = [p for layer in moe_layers(model) for p in layer.router.parameters() if p.requires_grad]
    shared = [p for n, p in model.named_parameters() if ".routing_shared." in f".{n}" and p.requires_grad]
    found = {}
    for name, value in parts.items():
        gradients = torch.autograd.grad(value, [*parameters, *shared], retain_graph=True, allow_unused=True)
        squares = [g.double().square().sum() for g in gradients if g is not None]
        found[name] = float(torch.stack(squares).sum().sqrt()) if squares else 0.0
    return found
