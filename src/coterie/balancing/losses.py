"""Auxiliary terms, one class each: what they ask of the router of a layer, and in whose normalisation.

All count what a router picked, before a capacity dropped any, leave padding out, and are computed for a layer apart.
Counts carry no gradient, probabilities (dense, over all N outputs) do:

    c_i  share of tokens that picked output i             f_i = N c_i / sum_j c_j         P_i  mean probability of i

With k picked outputs per token f_i is N / (k T) times the tokens of i, as DeepSeekMoE writes it, so that 1 is balance
for any k. A null expert is an output like any other.
"""

# T tokens, N router outputs, E experts, D devices, S sequences

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from coterie.balancing.base import Term, term
from coterie.errors import UsageError
from coterie.routing.base import Routing, entropy
from coterie.routing.record import Record


def load(routing: Routing) -> Tensor:
    """f, [N]: 1 in balance, 0 for outputs that no token picked. No gradient."""
    return _relative(routing.mean(routing.chosen_TN()))


def _relative(share: Tensor) -> Tensor:
    total = share.sum(-1, keepdim=True)
    return share.shape[-1] * share / torch.where(total > 0, total, 1.0)


@term("switch", paper="arXiv:2101.03961")
class Switch(Term):
    """sum_i f_i P_i: 1 in balance, N / k if all tokens are sure of the same k (Switch; expert loss of DeepSeekMoE).

    Parameters
    ----------
    scope : str
        "batch": f and P over all tokens; "sequence": over those of each sequence, then the mean over sequences, as in
        DeepSeek's code and DeepSeek-V3 (arXiv:2412.19437, weight 1e-4). Packed sequences count apart.
    count : str
        "slots": f as above. "tokens": N c in place of f, so that balance is the mean number of picked outputs per
        token, as top-p routing (arXiv:2403.07652) and transformers' own loss have it.
    unbiased : bool
        Count the k likeliest outputs, not those that a selection bias or groups led to, as DeepSeek-V3 does.
    """

    scope: Literal["batch", "sequence"] = "batch"
    count: Literal["slots", "tokens"] = "slots"
    unbiased: bool = False

    def of(self, routing: Routing, record: Record) -> Tensor | None:
        chosen_TN, N = routing.chosen_TN(), routing.outputs
        if self.unbiased:
            rank_TN = routing.probability_TN.detach().argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
            chosen_TN = (rank_TN < chosen_TN.sum(-1, keepdim=True)).to(chosen_TN.dtype)
        if self.scope == "sequence":
            sequence_T = _sequences(record, len(chosen_TN))
            share_SN, real_S = _means(chosen_TN, sequence_T, routing.mask_T)
            P_SN, _ = _means(routing.probability_TN, sequence_T, routing.mask_T)
        else:
            share_SN, P_SN = routing.mean(chosen_TN)[None], routing.mean(routing.probability_TN)[None]
            real_S = torch.ones_like(share_SN[:, 0])
        f_SN = _relative(share_SN) if self.count == "slots" else N * share_SN
        return (f_SN * P_SN).sum() / real_S.sum().clamp(min=1)


def _sequences(record: Record, tokens: int) -> Tensor:
    """The number of each token's sequence, [T]."""
    if record.shape is None or record.shape[0] * record.shape[1] != tokens:
        raise UsageError(f"which of {tokens} tokens make a sequence is not known in this call", "Say scope=batch.")
    rows_BL = torch.arange(record.shape[0])[:, None].expand(record.shape)
    if record.segment_BL is not None:
        segment_BL = record.segment_BL.cpu()
        rows_BL = rows_BL * (int(segment_BL.max()) + 1) + segment_BL
    return rows_BL.reshape(-1)


def _means(value_TN: Tensor, sequence_T: Tensor, mask_T: Tensor | None) -> tuple[Tensor, Tensor]:
    """Means over the tokens of each sequence [S, N], and which sequences have any, [S]."""
    sequence_T = sequence_T.to(value_TN.device)
    real_T = torch.ones_like(value_TN[:, 0]) if mask_T is None else mask_T.to(value_TN.dtype)
    S = int(sequence_T.max()) + 1
    count_S = real_T.new_zeros(S).index_add(0, sequence_T, real_T)
    sum_SN = value_TN.new_zeros(S, value_TN.shape[-1]).index_add(0, sequence_T, value_TN * real_T[:, None])
    return sum_SN / count_S.clamp(min=1)[:, None], count_S > 0


@term("gshard", paper="arXiv:2006.16668")
class GShard(Term):
    """N sum_i c_i P_i with c of first choices alone: 1 in balance.

    GShard writes the mean over experts without the factor N^2; with it, as in DeepSpeed's code, weights compare.
    """

    def of(self, routing: Routing, record: Record) -> Tensor | None:
        N = routing.outputs
        first_TN = F.one_hot(routing.index_TK[:, 0], N + 1)[:, :N].float()
        return N * (routing.mean(first_TN) * routing.mean(routing.probability_TN)).sum()


@term("z", paper="arXiv:2202.08906")
class RouterZ(Term):
    """Mean over tokens of log(sum_i exp z_i)^2: keeps logits small (ST-MoE, weight 1e-3)."""

    weight: float = Field(default=0.001, ge=0)

    def of(self, routing: Routing, record: Record) -> Tensor | None:
        return routing.mean(routing.logits_TN.logsumexp(-1).square())


class _Devices(Term):
    """Experts stand in so many equal groups of neighbours, one per device. Null experts stand nowhere."""

    devices: int = Field(default=4, ge=1)

    def groups(self, value: Tensor, routing: Routing) -> Tensor:
        """[..., N] -> [..., D, E / D]. Raises UsageError for experts that do not split."""
        E, D = routing.experts, self.devices
        if E % D:
            raise UsageError(f"{self.name}: {E} experts cannot stand in {D} equal groups")
        return value[..., :E].reshape(*value.shape[:-1], D, E // D)


@term("device", paper="arXiv:2401.06066")
class DeviceBalance(_Devices):
    """sum_d f'_d P'_d, with f'_d the mean of f and P'_d the sum of P over the experts of device d (DeepSeekMoE).

    1 in balance; with a device for each expert the switch term, with one device constant.

    Parameters
    ----------
    devices : int
        D; experts stand in so many equal groups of neighbours.
    """

    weight: float = Field(default=0.05, ge=0)

    def of(self, routing: Routing, record: Record) -> Tensor | None:
        f_D = self.groups(load(routing), routing).mean(-1)
        P_D = self.groups(routing.mean(routing.probability_TN), routing).sum(-1)
        return (f_D * P_D).sum()


@term("communication", paper="arXiv:2405.04434")
class Communication(_Devices):
    """sum_d f''_d P'_d, with f''_d = D / M times the share of tokens that go to device d (DeepSeek-V2).

    1 if tokens go to M devices each and to all alike.

    Parameters
    ----------
    devices : int
        D; experts stand in so many equal groups of neighbours.
    reach : int
        M, the most devices a token may go to (`groups_used` of the router).
    """

    weight: float = Field(default=0.02, ge=0)
    reach: int = Field(default=3, ge=1)

    @model_validator(mode="after")
    def _fits(self) -> Communication:
        if self.reach > self.devices:
            raise ValueError(f"a token cannot reach {self.reach} of {self.devices} devices")
        return self

    def of(self, routing: Routing, record: Record) -> Tensor | None:
        sent_TD = self.groups(routing.chosen_TN(), routing).amax(-1)
        f_D = self.devices / self.reach * routing.mean(sent_TD)
        P_D = self.groups(routing.mean(routing.probability_TN), routing).sum(-1)
        return (f_D * P_D).sum()


@term("mutual-information", paper="arXiv:2306.04640")
class MutualInformation(Term):
    """-H(e) + H(e|x), minus the mutual information of experts and tokens, in nats (Mod-Squad, ModuleFormer).

    -log N if every token is sure and all experts are as likely; 0 if all tokens have the same probabilities, be they
    uniform or collapsed. Gradients flow through both entropies.
    """

    weight: float = Field(default=0.001, ge=0)

    def of(self, routing: Routing, record: Record) -> Tensor | None:
        probability_TN = routing.probability_TN
        return routing.mean(entropy(probability_TN)) - entropy(routing.mean(probability_TN))


@term("null", paper="arXiv:2406.13233")
class NullBalance(Term):
    """N sum_i c~_i P_i, where null experts share the mean of their c: their mass counts, not who has it (AdaMoE).

    In balance the value is k, the slots per token, as the paper has it. Without nulls, or with one, it is k times the
    switch term. The paper starts with a weight of 0.02 and goes down to 1e-4: scale it by a schedule.
    """

    weight: float = Field(default=0.02, ge=0)

    def of(self, routing: Routing, record: Record) -> Tensor | None:
        share_N, E = routing.mean(routing.chosen_TN()), routing.experts
        if routing.outputs > E:
            share_N = torch.cat([share_N[:E], share_N[E:].mean().expand(routing.outputs - E)])
        return routing.outputs * (share_N * routing.mean(routing.probability_TN)).sum()


@term("entropy", paper="arXiv:2403.07652")
class Entropy(Term):
    """Mean over tokens of the entropy of their probabilities, in nats: log N to 0 (the L_d of top-p routing)."""

    weight: float = Field(default=1e-4, ge=0)

    def of(self, routing: Routing, record: Record) -> Tensor | None:
        return routing.mean(entropy(routing.probability_TN))


@term("router")
class Own(Term):
    """A term that routers compute themselves (`Routing.terms`); layers whose router has none of this name are left out.

    Parameters
    ----------
    key : str
        Its name, like "balance" of the dense-to-sparse gate.
    """

    key: str

    @property
    def label(self) -> str:
        return f"router.{self.key}"

    def of(self, routing: Routing, record: Record) -> Tensor | None:
        return routing.terms.get(self.key)
