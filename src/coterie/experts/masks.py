"""Experts of which a small learned router lets each token run fewer (OTP of MC#, arXiv:2510.10962).

The model's router picks k experts as before, with weights w_1 >= ... >= w_k. A mask router looks at the token x and
these weights and chooses one of a few masks c_1 .. c_N in {0, 1}^k over the experts in that order:

    z = FC2 act([FC1 x, w_1, ..., w_k])                    N numbers
    using     m = c_r with the largest z_r                 what m leaves out is "no expert": it is not run
    training  m = sum_r y_r c_r,   y = softmax((log softmax(z) + g) / tau),  g Gumbel noise    all k run
    y(x) = sum_i m_i w_i E_i(x)

Every mask keeps the strongest expert, and the last one keeps all. "nested" has the k masks that keep the strongest
1, 2, ..., k; "subsets" all 2^(k-1) that keep the strongest. With `renormalise`, experts that stay take over the weight
of those that do not, so that a token's weights sum to what its router gave; else they stay as they are. It is the same
in training and in use. Slots that hold no expert already stay what they are, whatever the mask says.

It is a child of the experts module, `mask_router`, and works in front of any forward of it, for it only changes the ids
and weights that the module receives; before an expert map. Its weights are float32 and so is all it computes: a choice
must not depend on the dtype a model is run in.
"""

# T tokens, K slots per token, H hidden, N masks

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coterie.experts.forward import stored_experts
from coterie.experts.mapped import expert_map

Candidates = Literal["nested", "subsets"]
NAME = "mask_router"
MOST_SUBSETS = 10  # experts per token: 512 masks


@dataclass
class Sampling:
    """How masks are drawn while they are learned.

    tau : temperature. noise : draw (Gumbel) or only soften. straight_through : hard masks forward, soft gradients.
    """

    tau: float
    noise: bool = True
    straight_through: bool = False


class Wide(nn.Linear):
    """A linear layer that is float32 and computes in float32, whatever the model around it is cast to."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float(), self.bias.float())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def wide(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return tensor.to(result.device) if result.dtype.itemsize < tensor.dtype.itemsize else result

        return super()._apply(wide, recurse)  # type: ignore[no-untyped-call]


class MaskRouter(nn.Module):
    """Chooses which of a token's experts run.

    Parameters
    ----------
    hidden, slots, inner : H, K and the width of FC1.
    candidates, renormalise : see above.

    Attributes
    ----------
    sampling : how masks are drawn; None: the best one is used, which is what a loaded model does.
    mass_T : after a forward with `sampling`, |m|_1 / k of each token, with its gradient.
    watch : called in use with the slots [T, K] that hold an expert, and those of them that run; None: nobody looks.
    """

    def __init__(
        self,
        hidden: int,
        slots: int,
        inner: int,
        *,
        candidates: Candidates = "nested",
        renormalise: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.slots, self.inner, self.candidates, self.renormalise = slots, inner, candidates, renormalise
        how: dict[str, Any] = {"device": device, "dtype": torch.float32}
        self.fc1 = Wide(hidden, inner, **how)
        self.fc2 = Wide(inner + slots, len(masks(candidates, slots)), **how)
        self.sampling: Sampling | None = None
        self.mass_T: Tensor | None = None
        self.watch: Callable[[Tensor, Tensor], None] | None = None

    @torch.no_grad()
    def reset(self, seed: int = 0, keep_all: float = 0.9) -> None:
        """Fresh weights: "keep all" has about the probability `keep_all` for every token."""
        generator = torch.Generator().manual_seed(seed)
        for layer, spread in ((self.fc1, self.fc1.in_features**-0.5), (self.fc2, 0.01)):
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) * spread)
            layer.bias.zero_()
        others = max(len(self.fc2.bias) - 1, 1)
        self.fc2.bias[-1] = math.log(keep_all * others / (1 - keep_all))

    def forward(self, x_TH: Tensor, weight_TK: Tensor) -> Tensor:
        """z [T, N] float32 for tokens and their weights in falling order."""
        return self.fc2(F.silu(torch.cat([self.fc1(x_TH), weight_TK.float()], -1)))  # type: ignore[no-any-return]

    def choose(self, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor, experts: int) -> tuple[Tensor, Tensor]:
        """Ids and weights of what shall run. `experts` : the smallest id that means "no expert"."""
        real_TK = index_TK < experts
        order_TK = strongest_first(real_TK, weight_TK)
        z_TN = self(x_TH, torch.where(real_TK, weight_TK, 0.0).gather(-1, order_TK))
        c_NK = masks(self.candidates, self.slots).to(z_TN.device)
        hard_TK = c_NK[z_TN.argmax(-1)]
        if self.sampling is None:
            kept_TK = torch.zeros_like(real_TK).scatter(-1, order_TK, hard_TK.bool()) & real_TK
            if self.watch is not None:
                self.watch(real_TK, kept_TK)
            kept_weight_TK = weight_TK.masked_fill(~kept_TK, 0.0)
            index_TK = index_TK.masked_fill(~kept_TK, experts)
        else:
            soft_TK = drawn(z_TN, self.sampling) @ c_NK
            kept_TK = torch.zeros_like(soft_TK).scatter(-1, order_TK, soft_TK) * real_TK
            self.mass_T = kept_TK.sum(-1) / self.slots
            kept_weight_TK = (weight_TK * kept_TK).to(weight_TK.dtype)
        if not self.renormalise:
            return index_TK, kept_weight_TK
        return index_TK, taken_over(weight_TK, kept_weight_TK, (kept_TK != real_TK).any(-1, keepdim=True))


def drawn(z_TN: Tensor, how: Sampling) -> Tensor:
    """Shares of the masks, [T, N], summing to one."""
    z_TN = z_TN.log_softmax(-1)
    if how.noise:
        uniform_TN = torch.rand_like(z_TN).clamp(min=torch.finfo(z_TN.dtype).tiny)
        z_TN = z_TN - (-uniform_TN.log()).clamp(min=torch.finfo(z_TN.dtype).tiny).log()
    soft_TN = (z_TN / how.tau).softmax(-1)
    if not how.straight_through:
        return soft_TN
    return F.one_hot(soft_TN.argmax(-1), soft_TN.shape[-1]) + soft_TN - soft_TN.detach()


def masks(candidates: Candidates, slots: int) -> Tensor:
    """The masks over slots in falling order of weight, [N, K] float32; the last one keeps all."""
    if candidates == "nested":
        return torch.ones(slots, slots).tril()
    if slots > MOST_SUBSETS:
        raise ValueError(f"{slots} experts per token have {2 ** (slots - 1)} subsets")
    return torch.tensor([(1.0, *rest) for rest in itertools.product((0.0, 1.0), repeat=slots - 1)])


def strongest_first(real_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """Slots in falling order of weight, [T, K]; of equal ones the earlier first, those without an expert last."""
    key_TK = torch.where(real_TK, weight_TK.detach().double(), -torch.inf)
    return torch.argsort(key_TK, dim=-1, descending=True, stable=True)


def taken_over(weight_TK: Tensor, kept_TK: Tensor, changed_T1: Tensor) -> Tensor:
    """`kept_TK` scaled to the sum of the weights before, where something changed; elsewhere not a bit differs."""
    total_T1, left_T1 = (w.float().sum(-1, keepdim=True) for w in (weight_TK, kept_TK))
    scale_T1 = torch.where(changed_T1, total_T1 / torch.where(left_T1 == 0, 1.0, left_T1), 1.0)
    return (kept_TK * scale_T1).to(weight_TK.dtype)


# -- on an experts module ---------------------------------------------------------------------------------------------


def mask_router(module: nn.Module) -> MaskRouter | None:
    """The mask router in front of an experts module, if there is one."""
    found = getattr(module, NAME, None)
    return found if isinstance(found, MaskRouter) else None


def attach(module: nn.Module, router: MaskRouter) -> None:
    """From now on `router` decides which of a token's experts this module runs. Once a module."""
    if mask_router(module) is not None:
        raise ValueError("these experts have a mask router already")
    module.add_module(NAME, router)
    module._is_expert_parallel = True  # type: ignore[assignment]  # transformers' own forwards then expect "no expert"
    module.register_forward_pre_hook(_masked, with_kwargs=True, prepend=True)  # it knows router ids, not stored experts


def _masked(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    router, names = mask_router(module), ("hidden_states", "top_k_index", "top_k_weights")
    assert router is not None
    given = {**dict(zip(names, args)), **kwargs}
    target = expert_map(module)
    experts = stored_experts(module) if target is None else len(target)
    hidden_TH, index_TK, weight_TK = (given.pop(name) for name in names)
    return (hidden_TH, *router.choose(hidden_TH, index_TK, weight_TK, experts), *args[3:]), given


def fill_missing(model: nn.Module) -> None:
    """Fresh weights for mask routers that the checkpoint just loaded does not hold: all experts run."""
    for module in model.modules():
        if isinstance(module, MaskRouter) and not getattr(module.fc1.weight, "_is_hf_initialized", False):
            module.reset()
