"""Which tokens of a batch are real, and which matter most to the others: what ODP protects (MC, arXiv:2410.06270).

With t_j the input of the MoE block at token j and A[i -> j] the attention that query i pays to key j, a mean over heads
of softmax probabilities of the same decoder layer,

    I_j = ||t_j||_1 * sum_{i >= j} A[i -> j] / (number of i >= j)            what j receives from itself and later ones

The most important tokens of a sequence are a share of its real tokens, rounded up. Queries and tokens that are padding
count nowhere. The authors' code sums A over keys, which is 1 for every query; this is the sum of the paper.

It asks for attention that shows its probabilities ("eager"): B N L L numbers of one layer in memory at once. Without a
share it only tells real tokens, which any attention allows. One query alone (a decoding step) has no later ones: there
nothing is protected. Modules are known by what they are given and return, not by name.
"""

# B batch, L queries, S keys, H hidden, N heads, T = B * L tokens

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from coterie.anatomy import MoELayer
from coterie.errors import ModelError, UsageError


class TokenWatch:
    """Watches one MoE layer's decoder layer, from its mixer to its MoE block.

    share : of each sequence's real tokens that are important.

    Attributes
    ----------
    real_T : which tokens of the block's present input are real; None where that is not known (nothing ran).
    important_T : which of them are the important ones; None for none.
    """

    def __init__(self, layer: MoELayer, share: float = 0.0) -> None:
        if not 0 <= share <= 1:
            raise UsageError(f"{share:g} is no share of tokens", "Use a number from 0 to 1; the paper has 0.02.")
        self.layer, self.share = layer, share
        self.real_T: Tensor | None = None
        self.important_T: Tensor | None = None
        self._mask: Tensor | None = None
        self._attention_BLS: Tensor | None = None

    def __enter__(self) -> TokenWatch:
        self._stack = ExitStack()
        for child in self.layer.decoder.children():
            if all(module is not self.layer.block for module in child.modules()):
                self._stack.callback(child.register_forward_pre_hook(self._given, with_kwargs=True).remove)
                self._stack.callback(child.register_forward_hook(self._returned).remove)
        self._stack.callback(self.layer.block.register_forward_pre_hook(self._entered, with_kwargs=True).remove)
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()
        self.taken()

    def taken(self) -> None:
        """Forget what was seen of this forward."""
        self.real_T = self.important_T = self._mask = self._attention_BLS = None

    def _given(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if "attention_mask" in kwargs:
            if self.share and getattr(kwargs.get("past_key_values"), "is_compileable", False):
                raise UsageError("tokens cannot be protected with a static cache", "Use the default, dynamic one.")
            self._mask = kwargs["attention_mask"]

    def _returned(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.share and isinstance(output, tuple) and len(output) > 1:
            probabilities = output[1]
            if isinstance(probabilities, Tensor) and probabilities.dim() == 4:
                self._attention_BLS = probabilities.detach().float().mean(1)

    def _entered(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        t_BLH = args[0] if args else kwargs["hidden_states"]
        B, L = t_BLH.shape[:2]
        real_BL = real_tokens(self._mask, B, L).to(t_BLH.device)
        self.real_T = real_BL.flatten()
        if not self.share or L == 1:
            return
        if self._attention_BLS is None:
            raise ModelError(
                f"layer {self.layer.index} has no attention that shows its probabilities, so no token can be protected",
                "Protect none, or leave the layer out with --skip-layers.",
            )
        important = importance(t_BLH.detach(), self._attention_BLS, real_BL)
        self.important_T = most_important(important, real_BL, self.share).flatten()


def real_tokens(mask: Tensor | None, batch: int, queries: int) -> Tensor:
    """Which queries are no padding, [B, L], from the mask a mixer is given: none, [B, S], or [B, 1, L, S] with 0 (or
    True) where a query sees a key. A real token sees itself."""
    if mask is None:
        return torch.ones(batch, queries, dtype=torch.bool)
    if mask.dim() == 2:
        return mask[:, -queries:].bool()
    own_BL = mask[:, 0].diagonal(mask.shape[-1] - queries, -2, -1)
    return (own_BL if mask.dtype == torch.bool else own_BL == 0).expand(batch, queries)


def importance(t_BLH: Tensor, attention_BLS: Tensor, real_BL: Tensor) -> Tensor:
    """I of every token, [B, L] float64; 0 for padding. Attention to keys from before these queries does not count."""
    L = real_BL.shape[1]
    paid_BLL = attention_BLS[:, :, -L:].double() * real_BL[:, :, None]
    later_BL = real_BL.double().flip(1).cumsum(1).flip(1)  # real queries from here on
    received_BL = paid_BLL.sum(1) / later_BL.clamp(min=1)
    return t_BLH.double().abs().sum(-1) * received_BL * real_BL


def most_important(importance_BL: Tensor, real_BL: Tensor, share: float) -> Tensor:
    """The tokens of largest importance, [B, L]: of each sequence this share of its real tokens, rounded up."""
    order_BL = importance_BL.masked_fill(~real_BL, -torch.inf).argsort(-1, descending=True)
    wanted_B1 = torch.tensor([[math.ceil(share * int(n))] for n in real_BL.sum(1)], device=real_BL.device)
    first_BL = torch.arange(real_BL.shape[1], device=real_BL.device) < wanted_B1
    return torch.zeros_like(real_BL).scatter(1, order_BL, first_BL)
