"""Bit routers: how many bits an expert is computed with, token by token (dual routing of D2MoE, arXiv:2504.15299).

The model's router picks experts as before. For every expert e that a token x goes to, a second one chooses its width
among b_1 < ... < b_K, the levels of a nested expert:

    p(x) = softmax(R_e x + c_e),    using: level k* = argmax p,    y = E^(k*)(x)
    training: y has that value and one of two gradients,
        mixture   E^(k*)(x) + sum_k (p_k - stopgrad(p_k)) E^(k)(x)      what another width would have put out
        chosen    E^(k*)(x) p_k* / stopgrad(p_k*)                       whether what this width put out was of use
    and in a forward pass over T tokens at most floor(c_k T) of an expert's tokens run at level k; the others, drawn at
    random, do not run it

so that only R and c learn. All experts of a layer have one matrix R [E K, H]; its row e K + k is option k of expert e.
It is a child of the experts module, `bit_router`, float32 whatever the model around it is cast to: a choice must not
depend on the dtype a model is run in. Where fewer planes are held than it knows, the highest held stands for those
above. Interpretation: the paper does not say how gradients reach R, nor over which tokens T counts. Here T are the
tokens of the batch, or with `of_expert` those that the router sent to the expert; padding is in neither.
"""

# T tokens, S slots per token, H hidden, E experts, K levels, R routed (token, slot) pairs

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from coterie.experts.forward import Levels
from coterie.experts.masks import Wide

NAME = "bit_router"
Gradient = Literal["mixture", "chosen"]


@dataclass
class Learning:
    """How levels are chosen while routers learn.

    gradient : see above. capacity : c_k, or None: no limit. of_expert : T counts an expert's own tokens. real_T : which
    tokens of the batch are no padding; set before every forward pass, None: all are.
    """

    gradient: Gradient = "mixture"
    capacity: Sequence[float] | None = None
    of_expert: bool = False
    real_T: Tensor | None = None


class BitRouter(Wide):
    """Chooses at which level each of a token's experts computes it.

    Parameters
    ----------
    hidden, experts : H and E of the layer, as it stores experts.
    bits : b_1 .. b_K.

    Attributes
    ----------
    learning : how levels are chosen in training; None: the likeliest, nothing left out, which is what a loaded model
        does.
    bits_T, level_TS : after a forward pass in training, the expected bits of each token, a mean over its experts with
        its gradient, and the levels chosen, -1 for no expert. Tokens without an expert have no entry that counts.
    watch : called in use with the levels [T, S], -1 for no expert; None: nobody looks.
    """

    def __init__(
        self, hidden: int, experts: int, bits: Sequence[int], *, device: torch.device | str | None = None
    ) -> None:
        super().__init__(hidden, experts * len(bits), device=device, dtype=torch.float32)
        self.experts, self.bits = experts, tuple(bits)
        self.learning: Learning | None = None
        self.bits_T: Tensor | None = None
        self.level_TS: Tensor | None = None
        self.watch: Callable[[Tensor], None] | None = None

    @torch.no_grad()
    def reset(self, top: float = 0.9) -> None:
        """Weights of 0: every token takes the highest level, with about the probability `top`."""
        self.weight.zero_()
        others = max(len(self.bits) - 1, 1)
        self.bias.zero_()
        self.bias.view(self.experts, -1)[:, -1] = math.log(top * others / (1 - top))

    def choose(self, x_TH: Tensor, index_TS: Tensor, highest: int) -> tuple[Tensor, Levels]:
        """Ids of the experts that run, and their levels. highest : level, above which nothing is held."""
        T, E, K = len(x_TH), self.experts, len(self.bits)
        real_TS = index_TS < E
        expert_TS = index_TS.clamp(max=E - 1)
        z_TEK = self(x_TH).view(T, E, K)
        z_TSK = z_TEK.gather(1, expert_TS[..., None].expand(-1, -1, K))
        level_TS = z_TSK.argmax(-1)
        if self.learning is None:
            level_TS = level_TS.clamp(max=highest)
            if self.watch is not None:
                self.watch(level_TS.masked_fill(~real_TS, -1))
            return index_TS, Levels(level_TS)
        p_TSK = z_TSK.softmax(-1)
        bits_TS = (p_TSK @ p_TSK.new_tensor(self.bits)) * real_TS
        self.bits_T = bits_TS.sum(-1) / real_TS.sum(-1).clamp(min=1)
        self.level_TS = level_TS.masked_fill(~real_TS, -1)
        if self.learning.capacity is not None:
            over_TS = overflow(index_TS, level_TS, E, self.learning)
            index_TS = index_TS.masked_fill(over_TS, E)
        if self.learning.gradient == "mixture":
            return index_TS, Levels(level_TS, None, p_TSK - p_TSK.detach())
        p_TS = p_TSK.gather(-1, level_TS[..., None])[..., 0]
        return index_TS, Levels(level_TS, p_TS / p_TS.detach())


def overflow(index_TS: Tensor, level_TS: Tensor, experts: int, how: Learning) -> Tensor:
    """Which (token, slot) pairs are too many for their expert's level, drawn at random: [T, S] bool."""
    assert how.capacity is not None
    K, S = len(how.capacity), index_TS.shape[-1]
    counts_TS = index_TS < experts
    if how.real_T is not None:
        counts_TS = counts_TS & how.real_T[:, None]
    where_R = counts_TS.flatten().nonzero()[:, 0]
    where_R = where_R[torch.randperm(len(where_R)).to(where_R.device)]
    expert_R, level_R = index_TS.flatten()[where_R], level_TS.flatten()[where_R]
    key_R = expert_R * K + level_R
    order_R = key_R.argsort(stable=True)
    size_EK = torch.bincount(key_R, minlength=experts * K)
    start_EK = size_EK.cumsum(0) - size_EK
    rank_R = torch.empty_like(key_R)
    rank_R[order_R] = torch.arange(len(key_R), device=key_R.device) - start_EK[key_R[order_R]]
    if how.of_expert:
        tokens_R = size_EK.view(experts, K).sum(1)[expert_R]
    else:
        real = len(index_TS) if how.real_T is None else int(how.real_T.sum())
        tokens_R = torch.full_like(rank_R, real)
    share_R = torch.tensor(how.capacity, dtype=torch.float64, device=key_R.device)[level_R]
    limit_R = (share_R * tokens_R + 1e-9).floor()  # 0.3 * 10 is below 3
    over_S = torch.zeros(index_TS.numel(), dtype=torch.bool, device=index_TS.device)
    over_S[where_R[rank_R >= limit_R]] = True
    return over_S.view(-1, S)


# -- on an experts module ---------------------------------------------------------------------------------------------


def bit_router(module: nn.Module) -> BitRouter | None:
    """The bit router of an experts module, if there is one."""
    found = getattr(module, NAME, None)
    return found if isinstance(found, BitRouter) else None


def attach(module: nn.Module, router: BitRouter) -> None:
    """From now on `router` decides at which level this module's experts compute. Once a module."""
    if bit_router(module) is not None:
        raise ValueError("these experts have a bit router already")
    module.add_module(NAME, router)


def fill_missing(model: nn.Module) -> None:
    """Fresh weights for bit routers that the checkpoint just loaded does not hold: all planes are used."""
    for module in model.modules():
        if isinstance(module, BitRouter) and not getattr(module.weight, "_is_hf_initialized", False):
            module.reset()
