"""Attention-aware routing: a token decides with those its attention looked at (arXiv:2505.00792; see `token_graph`).

The attention of the same block is read as a chance: A_h[i, j], that head h of token i looks at token j. Having seen the
attention's output u_i (before residual and norm), the chance that it was j, whose value is v_hj, is a posterior:

    A'_h[i, j]  ~  A_h[i, j] exp(-||u_i - v_hj||^2 / (2 sigma^2))        v_hj = heads * O_h (value of j) + bias of O

with O_h the slice of the output projection, so that u_i is the mean over heads of attended v. `weights` "posterior" is
A', "raw" is A itself, the limit of a large sigma. Which heads:

    "lowest_entropy"   the one head h* whose rows are surest on average; the paper's choice, for its cost
    an index           that head
    "mean"             of the rows of all heads
    "all_posterior"    one posterior over heads and tokens together, all heads being as likely before

The posterior is one more softmax, of log A + (n O_h^T (u_i - b)) . value_j / sigma^2 - ||n O_h value_j||^2 /
(2 sigma^2): distances in the head's own small space, and no number of size H per pair. `sigma` is in units of the root
mean squared distance under A, so that one number fits all widths.

What depends on the text at large is learned while the model trains and then stands still, for a head that is chosen
from the text at hand would look at later tokens and at other sequences: running averages of the heads' entropies and
distances are buffers, h* too. A model that was never trained with this router has none; `settle` takes them from a few
batches of text. Gradients reach queries, keys and values through S; `detach` cuts that.

Needs probabilities: attn_implementation="eager". Latent attention (MLA) keeps no value per head: only "raw" works.
"""

# B batch, L sequence of this call, S tokens so far, R rows of a piece, H hidden, A heads, C chosen heads, D head size

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from coterie.errors import ModelError, UsageError
from coterie.routing.base import RouterSettings, entropy, router
from coterie.routing.record import Attention, Here
from coterie.routing.token_graph import GraphSettings, Piece, TokenGraph, Weights, stochastic

TINY = torch.finfo(torch.float32).tiny


@router("attention", paper="arXiv:2505.00792")
class AttentionAware(TokenGraph):
    """Gates averaged over the tokens that attention looked at."""

    class Settings(GraphSettings):
        """Parameters of the attention-aware router.

        Parameters
        ----------
        weights : str
            "posterior" or "raw".
        head : str or int
            "lowest_entropy", "mean", "all_posterior", or a head's index.
        sigma : float, > 0
            In units of the root mean squared distance of outputs and attended values.
        decay : float, 0 to 1
            Of the running averages, per call in training.
        detach : bool
            No gradient through S.
        heads : int, >= 1
            Heads of the block's attention; filled in when a router is put into a model.
        """

        weights: Literal["posterior", "raw"] = "posterior"
        head: Literal["lowest_entropy", "mean", "all_posterior"] | Annotated[int, Field(ge=0)] = "lowest_entropy"
        sigma: float = Field(default=0.5, gt=0)
        decay: float = Field(default=0.99, ge=0, lt=1)
        detach: bool = False
        heads: int = Field(default=1, ge=1)

        @model_validator(mode="after")
        def _heads_fit(self) -> Any:
            if self.head == "all_posterior" and self.weights == "raw":
                raise ValueError("raw weights have no posterior over heads: say head=mean")
            if isinstance(self.head, int) and self.head >= self.heads:
                raise ValueError(f"there is no head {self.head} of {self.heads}")
            return self

    needs_attention = True
    rowless = ("head_entropy", "head_distance", "best_head")

    def __init__(self, hidden: int, experts: int, settings: RouterSettings, **more: Any) -> None:
        super().__init__(hidden, experts, settings, **more)
        self.settling = False
        self.head_entropy = nn.Buffer(torch.zeros(self.settings.heads, device=self.how["device"]))
        self.head_distance = nn.Buffer(torch.zeros(self.settings.heads, device=self.how["device"]))
        self.best_head = nn.Buffer(torch.full((1,), -1, dtype=torch.int64, device=self.how["device"]))

    @torch.no_grad()
    def reset(self, std: float = 0.02) -> None:
        super().reset(std)
        self.head_entropy.zero_()
        self.head_distance.zero_()
        self.best_head.fill_(-1)

    def weights(self, x_BLH: Tensor, known: int, here: Here) -> tuple[Weights, int]:
        told, seen = self.settings, here.attention
        A = seen.probability_BALS.shape[1]
        if told.heads != A:
            raise ModelError(
                f"the attention of layer {self.layer} has {A} heads, its router was made for {told.heads}",
                f"Put the router there with heads={A}.",
            )
        posterior = _Posterior.of(seen, self.layer, told.detach) if told.weights == "posterior" else None
        chosen, square_C = here.once("heads", lambda: self._chosen(seen, posterior, here.mask_T))
        probability_BCLS = seen.probability_BALS[:, chosen].float()
        if told.detach:
            probability_BCLS = probability_BCLS.detach()
        query_BCLD = value_BCSD = half_BCS = None
        if posterior is not None:
            query_BCLD, value_BLCD, square_BLC = posterior.of_heads(chosen)
            value_BCSD = here.growing("value", value_BLCD).transpose(1, 2)
            half_BCS = here.growing("square", square_BLC).transpose(1, 2) / 2
        S = min(probability_BCLS.shape[-1], known)  # a window sees fewer, a static cache has places for more
        probability_BCLS = probability_BCLS[..., :S]

        def rows(piece: Piece) -> Tensor:
            row_BCRS = probability_BCLS[:, :, piece.rows]
            log_BCRS = row_BCRS.clamp(min=TINY).log().masked_fill(row_BCRS == 0, -torch.inf)
            if query_BCLD is not None and value_BCSD is not None and half_BCS is not None:
                nearness_BCRS = query_BCLD[:, :, piece.rows] @ value_BCSD[:, :, -S:].mT - half_BCS[:, :, None, -S:]
                log_BCRS = log_BCRS + nearness_BCRS / (told.sigma**2 * square_C[:, None, None])
            if told.head == "all_posterior":
                return stochastic(log_BCRS.logsumexp(1), piece)
            return stochastic(log_BCRS, piece).mean(1)

        return rows, S

    def _chosen(self, seen: Attention, posterior: _Posterior | None, mask_T: Tensor | None) -> tuple[list[int], Tensor]:
        """The heads that count and the mean squared distance of each, after the running averages were updated."""
        told, learning = self.settings, self.training or self.settling
        mask_BL = None if mask_T is None else mask_T.view(seen.output_BLH.shape[:2])
        with torch.no_grad():
            if learning and told.head == "lowest_entropy":
                first = int(self.best_head) < 0
                self._update(self.head_entropy, row_entropy(seen.probability_BALS, mask_BL), first)
                self.best_head.fill_(int(self.head_entropy.argmin()))
            if told.head == "lowest_entropy":
                chosen = [int(self.best_head)]
            else:
                chosen = [told.head] if isinstance(told.head, int) else list(range(told.heads))
            if posterior is not None and learning and chosen[0] >= 0:
                square_C = posterior.distance(chosen, seen.probability_BALS, mask_BL)
                for head, square in zip(chosen, square_C, strict=True):
                    self._update(self.head_distance[head : head + 1], square[None], bool(self.head_distance[head] == 0))
        if chosen[0] < 0 or (posterior is not None and bool((self.head_distance[chosen] == 0).any())):
            raise UsageError(
                f"the attention router of layer {self.layer} does not know its heads yet: it learns them in training",
                "Train the model, call coterie.routing.attention_aware.settle(model, batches), or use weights=raw with"
                " a head that you name.",
            )
        return chosen, self.head_distance[chosen].float().clone()

    def _update(self, average: Tensor, now: Tensor, first: bool) -> None:
        average.copy_(now) if first else average.lerp_(now.to(average), 1 - self.settings.decay)


class _Posterior:
    """What distances between an attention's output and its heads' values need."""

    def __init__(self, output_BLH: Tensor, value_BLGD: Tensor, weight_HAD: Tensor) -> None:
        self.output_BLH, self.value_BLGD, self.weight_HAD = output_BLH, value_BLGD, weight_HAD

    @classmethod
    def of(cls, seen: Attention, layer: int, detach: bool) -> _Posterior:
        """Raises ModelError where the attention keeps no values per head or no plain output projection."""
        weight = getattr(seen.projection, "weight", None)
        A = seen.probability_BALS.shape[1]
        if seen.value_BLM is None or not isinstance(weight, Tensor) or not weight.is_floating_point():
            missing = "no projection of values" if seen.value_BLM is None else "no plain output projection"
            raise ModelError(
                f"the attention of layer {layer} has {missing} (latent and fused attentions have not), which the"
                " posterior of the attention router needs",
                "Use weights=raw.",
            )
        D = weight.shape[1] // A
        output_BLH, bias = seen.output_BLH.float(), getattr(seen.projection, "bias", None)
        if isinstance(bias, Tensor):
            output_BLH = output_BLH - bias.float()
        value_BLGD = seen.value_BLM.float().reshape(*seen.value_BLM.shape[:2], -1, D)
        parts = [output_BLH, value_BLGD, A * weight.float().reshape(-1, A, D)]
        return cls(*[part.detach() for part in parts] if detach else parts)

    def of_heads(self, chosen: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Query [B, C, L, D], value [B, L, C, D] and squared length of the value in H, [B, L, C].

        ||u - v||^2 = ||u||^2 - 2 query . value + squared length.
        """
        group = self.weight_HAD.shape[1] // self.value_BLGD.shape[2]  # query heads that share a key and value head
        weight_HCD = self.weight_HAD[:, chosen]
        value_BLCD = self.value_BLGD[:, :, [head // group for head in chosen]]
        query_BCLD = torch.einsum("blh,hcd->bcld", self.output_BLH, weight_HCD)
        gram_CDD = torch.einsum("hcd,hce->cde", weight_HCD, weight_HCD)
        return query_BCLD, value_BLCD, torch.einsum("blcd,cde,blce->blc", value_BLCD, gram_CDD, value_BLCD)

    def distance(self, chosen: list[int], probability_BALS: Tensor, mask_BL: Tensor | None) -> Tensor:
        """Mean over tokens, and over what they look at in this call, of the squared distance. [C]"""
        query_BCLD, value_BLCD, square_BLC = self.of_heads(chosen)
        L = square_BLC.shape[1]
        row_BCLL = probability_BALS[:, chosen, :, -L:].float()
        row_BCLL = row_BCLL / row_BCLL.sum(-1, keepdim=True).clamp(min=TINY)
        cross_BCL = (query_BCLD * (row_BCLL @ value_BLCD.transpose(1, 2))).sum(-1)
        square_BCL = (row_BCLL @ square_BLC.transpose(1, 2)[..., None])[..., 0]
        found_BCL = self.output_BLH.square().sum(-1)[:, None] - 2 * cross_BCL + square_BCL
        return _mean(found_BCL, mask_BL).clamp(min=1e-12)


def row_entropy(probability_BALS: Tensor, mask_BL: Tensor | None = None) -> Tensor:
    """Entropy of attention rows, mean over tokens that are no padding, [A], in nats."""
    row_BALS = probability_BALS.float()
    row_BALS = row_BALS / row_BALS.sum(-1, keepdim=True).clamp(min=TINY)
    return _mean(entropy(row_BALS), mask_BL)


def _mean(value_BCL: Tensor, mask_BL: Tensor | None) -> Tensor:
    if mask_BL is None:
        return value_BCL.mean((0, 2))
    weight_BL = mask_BL.to(value_BCL.dtype)
    return (value_BCL * weight_BL[:, None]).sum((0, 2)) / weight_BL.sum().clamp(min=1)


@torch.no_grad()
def settle(model: nn.Module, batches: Iterable[Tensor | Mapping[str, Tensor]]) -> None:
    """Let the attention-aware routers of a model learn their heads from text, without training anything.

    batches : token ids [B, L], or what the model takes. Raises UsageError for a model without such routers.
    """
    found = [module for module in model.modules() if isinstance(module, AttentionAware)]
    if not found:
        raise UsageError(f"{type(model).__name__} has no attention-aware router")
    try:
        for one in found:
            one.settling = True
        for batch in batches:
            model(**{"use_cache": False, **(batch if isinstance(batch, Mapping) else {"input_ids": batch})})
    finally:
        for one in found:
            one.settling = False
