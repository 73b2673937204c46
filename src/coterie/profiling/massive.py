"""Statistics of extremes: what super experts and massive activations are seen by (arXiv:2507.23279, arXiv:2402.17762).

Three things are watched while batches pass a decoder layer:

- experts: the largest |f_e(x)[c]| each routed expert puts out, before the gate, with its channel, per domain, and what
  its down projection received at that moment (`MassiveOutput`); shared experts beside them (`SharedPeak`);
- routers: how much of a sequence's first token, and of all others, each expert gets (`StartShare`);
- the residual stream: the largest entries behind every decoder layer (`LayerOutputs`, `HiddenPeaks`).

It does not know which of these numbers is large enough to matter.
"""

# B batch, L sequence, T tokens, H hidden, I expert intermediate, E experts, K experts per token, D domains,
# R rows routed to one expert

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from coterie.anatomy import MoELayer
from coterie.experts.forward import inner_activation
from coterie.profiling.observers import ExpertRows, LayerShape, Observer, Routing
from coterie.streaming.lockstep import Batch


class MassiveOutput(Observer):
    """output_max_DE: largest |f_e(x)[c]| over the tokens of each domain and all channels, before the gate.

    output_max_channel_E: the channel of the largest over all domains. inner_max_E, inner_max_channel_E: the largest
    |entry| of the down projection's input at that token, and which it is. An expert that received no token has 0, -1.
    Something that is not a number stays, so that it can be refused.
    """

    fields = {
        "output_max_DE": "max",
        "output_max_E": "max",
        "output_max_channel_E": "with output_max_E",
        "inner_max_E": "with output_max_E",
        "inner_max_channel_E": "with output_max_E",
    }
    watches_outputs = True

    def __init__(self, shape: LayerShape) -> None:
        super().__init__(shape)
        E = shape.experts
        self.output_max_DE = torch.zeros(shape.domains, E)
        self.output_max_E, self.inner_max_E = torch.zeros(E), torch.zeros(E)
        self.output_max_channel_E = torch.full((E,), -1, dtype=torch.int64)
        self.inner_max_channel_E = torch.full((E,), -1, dtype=torch.int64)
        self._extreme: dict[int, Tensor] = {}  # expert: the input [H] that made its largest output

    def see_routing(self, routing: Routing) -> None:
        self._domain_T = routing.domain_T

    def see_outputs(self, rows: ExpertRows) -> None:
        e = rows.expert
        peak_R, channel_R = rows.y_RH.float().abs().max(dim=1)
        domain_R = self._domain_T[rows.token_R].to(peak_R.device)
        peak_D = torch.zeros(self.shape.domains, device=peak_R.device).scatter_reduce_(0, domain_R, peak_R, "amax")
        self.output_max_DE[:, e] = torch.maximum(self.output_max_DE[:, e], peak_D.cpu())
        row = int(peak_R.argmax())
        if not float(peak_R[row]) <= float(self.output_max_E[e]):  # also when it is not a number
            self.output_max_E[e], self.output_max_channel_E[e] = peak_R[row].cpu(), channel_R[row].cpu()
            self._extreme[e] = rows.x_RH[row].clone()

    @torch.no_grad()
    def see_layer(self, layer: MoELayer) -> None:
        for e, x_H in self._extreme.items():
            inner_I = inner_activation(layer.experts, e, x_H[None])[0].float().abs()
            value, channel = inner_I.max(0)
            self.inner_max_E[e], self.inner_max_channel_E[e] = value.cpu(), channel.cpu()


class StartShare(Observer):
    """start_share_E: sum, over the first tokens of all sequences, of the share of the gate weight each expert got.

    rest_share_E: the same over all other tokens. starts: how many first tokens. A token's shares sum to 1.
    """

    fields = {"start_share_E": "sum", "rest_share_E": "sum", "starts": "sum"}

    def __init__(self, shape: LayerShape) -> None:
        super().__init__(shape)
        self.start_share_E = torch.zeros(shape.experts, dtype=torch.float64)
        self.rest_share_E = torch.zeros(shape.experts, dtype=torch.float64)
        self.starts = torch.zeros((), dtype=torch.int64)

    def see_routing(self, routing: Routing) -> None:
        E = self.shape.experts
        weight_TK = routing.weight_TK.double()
        share_TK = weight_TK / weight_TK.sum(-1, keepdim=True).clamp(min=1e-20)
        for total_E, here_T in ((self.start_share_E, routing.start_T), (self.rest_share_E, ~routing.start_T)):
            index = routing.index_TK[here_T].reshape(-1).clamp(max=E)
            total_E += torch.bincount(index, weights=share_TK[here_T].reshape(-1), minlength=E + 1)[:E].cpu()
        self.starts += int(routing.start_T.sum())


class StartScore(Observer):
    """start_score_E, rest_score_E: as `StartShare`, of the softmax of the router's logits over all experts."""

    fields = {"start_score_E": "sum", "rest_score_E": "sum"}
    needs_logits = True

    def __init__(self, shape: LayerShape) -> None:
        super().__init__(shape)
        self.start_score_E = torch.zeros(shape.experts, dtype=torch.float64)
        self.rest_score_E = torch.zeros(shape.experts, dtype=torch.float64)

    def see_routing(self, routing: Routing) -> None:
        if routing.logits_TE is not None:
            score_TE = routing.logits_TE.float().softmax(-1).double()
            self.start_score_E += score_TE[routing.start_T].sum(0).cpu()
            self.rest_score_E += score_TE[~routing.start_T].sum(0).cpu()


def shared_experts(layer: MoELayer) -> list[nn.Module]:
    """The shared experts of a block, without the gates that some families multiply them with."""
    named = {path.rpartition(".")[2]: layer.block.get_submodule(path.rpartition(".")[2]) for path in layer.shared}
    return [module for name, module in named.items() if "gate" not in name]


class SharedPeak:
    """Largest |output| of a block's shared experts over real tokens, before any gate, and its channel.

    Used as a context manager around the layer's pass; `batch` names the batch that passes next.
    """

    def __init__(self, layer: MoELayer) -> None:
        self.modules = shared_experts(layer)
        self.value, self.channel = 0.0, -1
        self._stack = ExitStack()
        self._batch: Batch | None = None

    def batch(self, batch: Batch) -> None:
        self._batch = batch

    def __enter__(self) -> SharedPeak:
        for module in self.modules:
            self._stack.callback(module.register_forward_hook(self._see).remove)
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def _see(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        assert self._batch is not None
        y_TH = output.detach().reshape(self._batch.ids_BL.numel(), -1).float().abs()
        if self._batch.mask_BL is not None:
            y_TH = y_TH[self._batch.mask_BL.reshape(-1).to(y_TH.device)]
        value, channel = y_TH.amax(0).max(0)
        if not float(value) <= self.value:
            self.value, self.channel = float(value), int(channel)


class LayerOutputs:
    """Hands the hidden states behind every decoder layer to `see(layer, hidden)` while a sweep runs.

    Must be entered before the sweep begins: a batch that waits at a layer's door is already inside its call. The
    sweep needs a `finish`, or it ends before the last layer returns. `see` gets index -1 for what enters layer 0, in
    the order of batches.
    """

    def __init__(self, layers: nn.ModuleList, see: Callable[[int, Tensor], None]) -> None:
        self.layers, self.see = layers, see
        self._stack = ExitStack()

    def __enter__(self) -> LayerOutputs:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.see(-1, (args[0] if args else kwargs["hidden_states"]).detach())

        self._stack.callback(self.layers[0].register_forward_pre_hook(before, with_kwargs=True).remove)
        for index, layer in enumerate(self.layers):

            def after(module: nn.Module, args: tuple[Any, ...], output: Any, index: int = index) -> None:
                self.see(index, (output if isinstance(output, Tensor) else output[0]).detach())

            self._stack.callback(layer.register_forward_hook(after).remove)
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()


@dataclass(frozen=True, order=True)
class Peak:
    """One entry of the residual stream: its magnitude, and the sample, position and channel it stands at."""

    value: float
    sample: int
    position: int
    channel: int


@dataclass
class HiddenPeaks:
    """The largest entries behind one decoder layer.

    peaks : the three largest. median : median over sequences of each sequence's median |entry|.
    massive : entries above 100 and above 1000 times their own sequence's median (the definition of arXiv:2402.17762).
    massive_max : the largest of them.
    """

    peaks: list[Peak] = field(default_factory=list)
    massive: int = 0
    massive_max: float = 0.0
    _medians: list[float] = field(default_factory=list)

    LARGE = 100.0
    TIMES_MEDIAN = 1000.0

    @property
    def largest(self) -> float:
        return self.peaks[0].value if self.peaks else 0.0

    @property
    def median(self) -> float:
        return float(torch.tensor(self._medians, dtype=torch.float64).median()) if self._medians else 0.0

    def see(self, hidden: Tensor, batch: Batch, first_sample: int) -> None:
        """`hidden` [B, L, ...]; everything behind L counts as channels."""
        for row in range(len(batch.ids_BL)):
            real = None if batch.mask_BL is None else batch.mask_BL[row].to(hidden.device)
            size_LH = hidden[row].flatten(1).float().abs()
            position = torch.arange(len(size_LH), device=hidden.device)
            if real is not None:
                size_LH, position = size_LH[real], position[real]
            median = float(size_LH.median())
            value, place = size_LH.flatten().topk(min(3, size_LH.numel()))
            found = []
            for v, at in zip(value.tolist(), place.tolist(), strict=True):
                line, channel = divmod(at, size_LH.shape[1])
                found.append(Peak(v, first_sample + row, int(position[line]), channel))
            self.peaks = sorted([*self.peaks, *found], key=lambda p: (-p.value, p.sample, p.position))[:3]
            self._medians.append(median)
            limit = max(self.LARGE, self.TIMES_MEDIAN * median)
            if value[0] > limit:
                self.massive += int((size_LH > limit).sum())
                self.massive_max = max(self.massive_max, float(value[0]))


def first_samples(batches: Sequence[Batch]) -> list[int]:
    """The number of each batch's first sample."""
    sizes = [len(batch.ids_BL) for batch in batches]
    return [sum(sizes[:n]) for n in range(len(sizes))]
