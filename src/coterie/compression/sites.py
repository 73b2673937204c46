"""The matrices of a decoder layer that are changed one by one, and what each of them receives on text.

A site is a linear layer, or one fused tensor of all experts. Never routers, gates with a single output, norms, biases,
embeddings or the head. What is done with them is not known here.
"""

# B batch, L sequence, T tokens, E experts, K slots per token, O outputs, I inputs of a matrix, R rows of one expert

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from coterie.errors import ModelError
from coterie.experts.forward import observe
from coterie.streaming.lockstep import Batch
from coterie.streaming.model import StreamedModel


@dataclass(frozen=True)
class Site:
    """One matrix, or the matrices of all experts of a layer.

    name : of the parameter. kind : experts, shared, or the part of the decoder layer it is in (self_attn, mlp, ...).
    experts : how many matrices are stacked; 0 for a linear layer. transposed : stored as [E, I, O].
    inputs : I. weights : numbers in all of them.
    """

    name: str
    kind: str
    module: nn.Module
    experts: int
    transposed: bool
    inputs: int
    weights: int


def sites(streamed: StreamedModel, index: int) -> list[Site]:
    """What is pruned of one decoder layer, in the order of its modules. The layer need not be in memory."""
    layer, prefix = streamed.layers[index], f"{streamed.prefix}.{index}"
    moe = streamed.moe.get(index)
    found = []
    for path, module in layer.named_modules():
        full = f"{prefix}.{path}"
        if moe is not None and module is moe.experts:
            for name in ("gate_up_proj" if moe.bank.has_gate else "up_proj", "down_proj"):
                weight = getattr(module, name)
                flipped = bool(module.is_transposed)
                inputs = weight.shape[1 if flipped else 2]
                found.append(
                    Site(f"{full}.{name}", "experts", module, weight.shape[0], flipped, inputs, weight.numel())
                )
        elif isinstance(module, nn.Linear) and module.out_features > 1:
            if moe is not None and (full == moe.router_name or full.startswith(f"{moe.router_name}.")):
                continue
            shared = moe is not None and any(full == s or full.startswith(f"{s}.") for s in moe.shared)
            kind = "shared" if shared else path.partition(".")[0]
            found.append(Site(f"{full}.weight", kind, module, 0, False, module.in_features, module.weight.numel()))
    return [site for site in found if streamed.keys_of([site.name])]


class Inputs:
    """Second moments of what every matrix of one layer receives, padding left out. A tap and a set of hooks.

    full : sums of x x^T, I * I float32 for a matrix, instead of sums of squares. Linear layers that are given the same
    tensor, as the projections of an attention are, share one. Peak memory then: E * (H * H + I * I) float32 for the
    experts of a layer (H hidden, I intermediate): 2.5 GB for 128 experts of 2048 and 768.
    """

    def __init__(self, streamed: StreamedModel, index: int, found: list[Site], *, full: bool = False) -> None:
        self.moe, self.index, self.sites, self.full = streamed.moe.get(index), index, found, full
        self.squares: dict[str, Tensor] = {}  # [E, I] for experts, [1, I] else; float64
        self.grams: dict[str, Tensor] = {}  # [E, I, I] for experts, [1, I, I] else; float32
        self.counts: dict[str, Tensor] = {}  # tokens: [1], or [E]
        self.first_of: dict[str, str] = {}  # the linear layer whose moments one shares
        self._passing: list[tuple[Tensor, str]] = []  # inputs of this batch, and who was given them first
        for site in found:
            E = max(site.experts, 1)
            self.counts[site.name] = torch.zeros(E, dtype=torch.int64)
            if not full:
                self.squares[site.name] = torch.zeros(E, site.inputs, dtype=torch.float64)
            elif site.experts:
                self.grams[site.name] = torch.zeros(E, site.inputs, site.inputs)
        stacked = [site.name for site in found if site.experts]
        self._up, self._down = stacked if stacked else ("", "")
        self._batch: Batch | None = None

    def batch(self, number: int, batch: Batch) -> None:
        """The batch that passes next."""
        self._batch = batch
        self._passing.clear()

    def norm(self, site: Site, expert: int = 0) -> Tensor | None:
        """Root mean square of each input, [I] float32 on the CPU; None if no token came."""
        count = int(self.counts[site.name][expert])
        return (self.squares[site.name][expert] / count).sqrt().float() if count else None

    def gram(self, site: Site, expert: int = 0) -> Tensor | None:
        """Sum of x x^T over its tokens, [I, I] float32 on the CPU; None if no token came."""
        name = self.first_of.get(site.name, site.name)
        return self.grams[name][expert] if int(self.counts[name][expert]) else None

    def tokens(self, site: Site, expert: int = 0) -> int:
        """Tokens that reached it."""
        return int(self.counts[self.first_of.get(site.name, site.name)][expert])

    def __enter__(self) -> Inputs:
        self._stack = ExitStack()
        if self._up:
            assert self.moe is not None
            self._stack.enter_context(observe(self.moe.experts, self))
        for site in self.sites:
            if not site.experts:
                hook = site.module.register_forward_pre_hook(
                    lambda module, args, site=site: self._linear(site, args[0])
                )
                self._stack.callback(hook.remove)
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()
        self._passing.clear()

    def _real(self, device: torch.device) -> Tensor | None:
        assert self._batch is not None
        mask = self._batch.mask_BL
        return None if mask is None else mask.reshape(-1).to(device)

    def _add(self, name: str, expert: int, x_RI: Tensor) -> None:
        if self.full:
            self.grams[name][expert] += (x_RI.float().T @ x_RI.float()).cpu()
        else:
            self.squares[name][expert] += x_RI.float().square().sum(0, dtype=torch.float64).cpu()
        self.counts[name][expert] += len(x_RI)

    def _shares(self, site: Site, x: Tensor) -> bool:
        """Has a linear layer before it been given this very tensor? Then its moments are those of that one."""
        leader = next((name for tensor, name in self._passing if tensor is x), site.name)
        if leader == site.name:
            self._passing.append((x, site.name))
        if self.first_of.setdefault(site.name, leader) != leader:
            raise ModelError(
                f"{site.name} is given the inputs of {leader} in some batches only: their moments cannot be told apart",
                "Quantize without data: --set quantizer=hqq.",
            )
        if leader == site.name and site.name not in self.grams:
            self.grams[site.name] = torch.zeros(1, site.inputs, site.inputs)
        return leader != site.name

    def _linear(self, site: Site, x: Tensor) -> None:
        assert self._batch is not None
        if self.full and self._shares(site, x):
            return
        x_TI = x.detach().reshape(-1, x.shape[-1])
        real_T = self._real(x.device)
        if real_T is not None:
            if len(x_TI) != self._batch.ids_BL.numel():
                raise ModelError(
                    f"{site.name} received {len(x_TI)} rows of a batch of {self._batch.ids_BL.numel()} tokens: padding"
                    " cannot be told from text",
                    "Calibrate with packed text (--pack), which has no padding.",
                )
            x_TI = x_TI[real_T]
        self._add(site.name, 0, x_TI)

    # -- the tap of the experts forward

    def routed(self, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> bool:
        self._slots = index_TK.shape[-1]
        self._real_T = self._real(x_TH.device)
        return True

    def _rows(self, row_R: Tensor, x_RI: Tensor) -> Tensor:
        return x_RI.detach() if self._real_T is None else x_RI.detach()[self._real_T[row_R // self._slots]]

    def inner(self, expert: int, row_R: Tensor, inner_RI: Tensor) -> None:
        self._add(self._down, expert, self._rows(row_R, inner_RI))

    def expert(self, expert: int, row_R: Tensor, x_RH: Tensor, y_RH: Tensor) -> None:
        self._add(self._up, expert, self._rows(row_R, x_RH))

    def combined(self, sum_TH: Tensor) -> None:
        """Nothing to add up of the sum."""


def matrix(weight: Tensor, site: Site, expert: int) -> Tensor:
    """[O, I] view of one matrix of a site."""
    if not site.experts:
        return weight
    return weight[expert].T if site.transposed else weight[expert]
