"""Let observers watch MoE layers while a model runs, streamed or resident; one sweep fills a profile."""

# T tokens, H hidden, E experts, K experts per token, R rows routed to one expert

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from coterie.anatomy import MoELayer
from coterie.errors import ModelError
from coterie.experts import forward as experts_forward
from coterie.experts.mapped import expert_map
from coterie.profiling.dense import dense_outputs
from coterie.profiling.observers import ExpertRows, LayerShape, Observer, Routing
from coterie.profiling.profile import LayerProfile
from coterie.streaming.lockstep import Batch


class LayerObservation:
    """Watches one MoE layer and hands its observers what they ask for, without padding.

    Parameters
    ----------
    layer : MoELayer
    observers : observer classes
    domains : int
        Number of domains.
    """

    def __init__(self, layer: MoELayer, observers: Iterable[type[Observer]], domains: int) -> None:
        self.layer = layer
        multiplier = float(getattr(layer.decoder, "residual_multiplier", 1.0))
        bank = layer.bank
        shape = LayerShape(bank.num_experts, layer.top_k, bank.hidden_size, domains, multiplier, bank.intermediate_size)
        self.observers = [cls(shape) for cls in observers]
        self._with_outputs = [o for o in self.observers if o.watches_outputs]
        self._with_all = [o for o in self.observers if o.watches_all]
        self._with_sum = [o for o in self.observers if o.watches_sum]
        self._with_inner = [o for o in self.observers if o.watches_inner]
        self._with_block = [o for o in self.observers if o.watches_block]
        self._needs_residual = any(o.needs_residual for o in self.observers)
        self._normed: dict[int, tuple[Tensor, Tensor]] = {}  # output's address: (input, output) of a norm
        self.tokens = 0
        self._logits_missed = False
        self._batch: Batch | None = None
        self._logits_TE: Tensor | None = None

    def batch(self, batch: Batch) -> None:
        """The batch that passes next."""
        self._batch, self._logits_TE = batch, None
        self._normed.clear()

    def __enter__(self) -> LayerObservation:
        self._stack = ExitStack()
        for observer in self.observers:
            observer.begin(self.layer)
        self._stack.enter_context(experts_forward.observe(self.layer.experts, self))
        handle = self.layer.router.register_forward_hook(self._router_hook)
        self._stack.callback(handle.remove)
        if self._with_block:
            self._stack.callback(self.layer.block.register_forward_hook(self._block_hook).remove)
        if self._needs_residual:
            for module in self.layer.decoder.modules():
                if is_norm(module, self.layer.bank.hidden_size):
                    self._stack.callback(module.register_forward_hook(self._norm_hook).remove)
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def _norm_hook(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self._normed[output.data_ptr()] = (args[0], output)  # the output is held, so its address stays its own

    def _block_hook(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        block_BLH = output[0] if isinstance(output, tuple) else output
        block_TH = block_BLH.detach().reshape(-1, block_BLH.shape[-1])
        real_TH = block_TH if self._real_T is None else block_TH[self._real_T]
        for observer in self._with_block:
            observer.see_block(self._routing, real_TH)

    def _residual(self, x_TH: Tensor) -> Tensor | None:
        """The hidden state that a norm turned into the experts' inputs, [T, H]."""
        if not self._needs_residual:
            return None
        found = self._normed.get(x_TH.data_ptr())
        if found is None or found[0].numel() != x_TH.numel():
            raise ModelError(
                f"layer {self.layer.index}: no norm of the decoder layer makes the inputs of its experts",
                "Methods that compare the experts' outputs with the residual stream cannot judge this architecture.",
            )
        return found[0].detach().reshape(x_TH.shape)

    def _router_hook(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        logits = output[0] if isinstance(output, tuple) else output
        E = self.layer.num_experts
        shared = expert_map(self.layer.experts) is not None  # its outputs are not the experts that are observed
        if isinstance(logits, Tensor) and logits.shape[-1] == E and not shared:
            self._logits_TE = logits.detach().reshape(-1, E)

    # -- the tap of the experts forward ---------------------------------------------------------------------------

    def routed(self, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> bool:
        assert self._batch is not None
        T, ids = x_TH.shape[0], self._batch.ids_BL
        if index_TK.shape != weight_TK.shape or T != ids.numel():
            raise ModelError(
                f"layer {self.layer.index}: the experts received {T} tokens of a batch of {ids.numel()}, with"
                f" {tuple(index_TK.shape)} ids and {tuple(weight_TK.shape)} weights",
                "This architecture does not follow the router contract and cannot be profiled.",
            )
        mask = self._batch.mask_BL
        self._real_T = None if mask is None else mask.reshape(-1).to(x_TH.device)
        self._row_of_T = None if self._real_T is None else self._real_T.cumsum(0) - 1
        self._weight_TK = weight_TK.detach()
        total = self._weight_TK.float().sum(-1, keepdim=True).clamp(min=1e-20)
        self._share_TK = self._weight_TK.float() / total
        domain_B = self._batch.domain_B if self._batch.domain_B is not None else torch.zeros(ids.shape[0]).long()
        domain_T = domain_B.to(x_TH.device)[:, None].expand(ids.shape).reshape(-1)
        keep: Callable[[Tensor], Tensor] = (lambda t: t) if self._real_T is None else (lambda t: t[self._real_T])
        start_BL = torch.zeros(ids.shape, dtype=torch.bool, device=x_TH.device)
        start_BL[torch.arange(len(ids)), 0 if mask is None else mask.to(x_TH.device).int().argmax(1)] = True
        residual_TH = self._residual(x_TH)
        routing = Routing(
            x_TH=keep(x_TH.detach()),
            logits_TE=None if self._logits_TE is None else keep(self._logits_TE),
            weight_TK=keep(self._weight_TK),
            index_TK=keep(index_TK.detach()),
            domain_T=keep(domain_T),
            start_T=keep(start_BL.reshape(-1)),
            residual_TH=None if residual_TH is None else keep(residual_TH),
        )
        self._routing = routing
        self.tokens += routing.x_TH.shape[0]
        self._logits_missed |= routing.logits_TE is None
        for observer in self.observers:
            observer.see_routing(routing)
        if self._with_all:
            for _, y_ECH in dense_outputs(self.layer, routing.x_TH):
                for observer in self._with_all:
                    observer.see_dense(y_ECH)
        return bool(self._with_outputs or self._with_sum or self._with_inner)

    def inner(self, expert: int, row_R: Tensor, inner_RI: Tensor) -> None:
        if self._with_inner:
            if self._real_T is not None:
                inner_RI = inner_RI[self._real_T[row_R // self._weight_TK.shape[-1]]]
            for observer in self._with_inner:
                observer.see_inner(expert, inner_RI.detach())

    def expert(self, expert: int, row_R: Tensor, x_RH: Tensor, y_RH: Tensor) -> None:
        if not self._with_outputs:
            return
        K = self._weight_TK.shape[-1]
        token_R = row_R // K
        weight_R, share_R = self._weight_TK.reshape(-1)[row_R], self._share_TK.reshape(-1)[row_R]
        if self._real_T is not None and self._row_of_T is not None:
            real_R = self._real_T[token_R]
            if not bool(real_R.any()):
                return
            if not bool(real_R.all()):
                x_RH, y_RH, weight_R, share_R = x_RH[real_R], y_RH[real_R], weight_R[real_R], share_R[real_R]
                token_R = token_R[real_R]
            token_R = self._row_of_T[token_R]
        rows = ExpertRows(expert, x_RH.detach(), y_RH.detach(), weight_R, share_R, token_R)
        for observer in self._with_outputs:
            observer.see_outputs(rows)

    def combined(self, sum_TH: Tensor) -> None:
        if self._with_sum:
            real_TH = sum_TH if self._real_T is None else sum_TH[self._real_T]
            for observer in self._with_sum:
                observer.see_sum(self._routing, real_TH)

    def result(self) -> LayerProfile:
        """What was seen. The layer must still be in memory and whole.

        Raises ModelError if it never ran: a hook that missed must not look like zeros.
        """
        if self.tokens == 0 and any(o.needs_text for o in self.observers):
            raise ModelError(
                f"layer {self.layer.index} was never seen routing a token",
                "Its experts do not run through transformers' experts interface.",
            )
        stats: dict[str, Tensor] = {}
        for observer in self.observers:
            if not (observer.needs_logits and self._logits_missed):
                observer.see_layer(self.layer)
                stats |= observer.state()
        layer = self.layer
        return LayerProfile(layer.index, layer.name, layer.num_experts, layer.top_k, self.tokens, layer.groups, stats)


def is_norm(module: nn.Module, hidden: int) -> bool:
    """Does this module own one weight per channel and nothing else, as the norms of all families do?"""
    own = list(module.parameters(recurse=False))
    return 0 < len(own) <= 2 and all(p.shape == (hidden,) for p in own) and not list(module.children())


def unique(observers: Iterable[type[Observer]]) -> Sequence[type[Observer]]:
    """Each observer once, in order."""
    return list(dict.fromkeys(observers))
