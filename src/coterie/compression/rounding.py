"""How much a layer's output changes when one of its experts is rounded to few bits, the others left as they are.

Only tokens that selected the expert see a difference, so of the whole layer's output Z and Z_q

    || Z - Z_q ||_F^2 = sum over tokens t of expert e of || w_e(t) (f_e(x_t) - f_e^q(x_t)) ||^2

with the weights w_e(t) that the model applied. The expert is rounded in place, run, and put back bit by bit.
"""

# E experts, N widths, R rows routed to one expert, H hidden

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from coterie.anatomy import MoELayer
from coterie.compression.quantizers import Spec, rtn
from coterie.experts import packing
from coterie.experts.forward import expert_output
from coterie.profiling.observers import ExpertRows, LayerShape, Observer

_ROWS = 32768  # rows that wait, over all experts, before an expert is rounded again for them


class RoundingError(Observer):
    """Sums of squared differences of one layer's output, by expert and width; see `rounding_error`."""

    watches_outputs = True
    widths: tuple[int, ...] = ()
    group: int = 128
    name: str = ""

    def __init__(self, shape: LayerShape) -> None:
        super().__init__(shape)
        setattr(self, self.name, torch.zeros(shape.experts, len(self.widths), dtype=torch.float64))
        self._waiting: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}
        self._rows = 0

    def begin(self, layer: MoELayer) -> None:
        self._layer = layer

    def see_outputs(self, rows: ExpertRows) -> None:
        self._waiting.setdefault(rows.expert, []).append((rows.x_RH, rows.y_RH, rows.weight_R))
        self._rows += len(rows.x_RH)
        if self._rows >= _ROWS:
            self._settle()

    def see_layer(self, layer: MoELayer) -> None:
        self._settle()
        del self._layer

    @torch.no_grad()
    def _settle(self) -> None:
        """Compare the rows that wait, and forget them."""
        error_EN = getattr(self, self.name)
        bank = self._layer.bank
        for expert, parts in self._waiting.items():
            x_RH, y_RH, weight_R = (torch.cat(part) for part in zip(*parts))
            before = bank.read(expert)
            kept = [w.clone() for w in (before.up_IH, before.down_HI)]
            kept_gate = None if before.gate_IH is None else before.gate_IH.clone()
            for n, bits in enumerate(self.widths):
                rounded = bank.read(expert)
                rounded.up_IH, rounded.down_HI = (_rounded(w, bits, self.group) for w in kept)
                rounded.gate_IH = None if kept_gate is None else _rounded(kept_gate, bits, self.group)
                bank.write(expert, rounded)
                off_RH = (expert_output(self._layer.experts, expert, x_RH) - y_RH).double() * weight_R[:, None].double()
                error_EN[expert, n] += off_RH.square().sum().cpu()
            before.up_IH, before.down_HI, before.gate_IH = kept[0], kept[1], kept_gate
            bank.write(expert, before)
        self._waiting.clear()
        self._rows = 0


def _rounded(weight: Tensor, bits: int, group: int) -> Tensor:
    spec = Spec(bits, group, False, packing.scale_dtype(weight.dtype))
    return rtn(weight.float(), spec).dense()


@functools.cache
def rounding_error(widths: tuple[int, ...], group: int) -> type[RoundingError]:
    """An observer of || Z - Z_q ||^2, [E, N] float64, for each expert rounded to each of these widths alone.

    Rounding is to the nearest on asymmetric grids, as in MC (arXiv:2410.06270). Costs as many runs of every expert on
    its tokens as there are widths. The norms there are summed over batches; here the squares are, which does not depend
    on how the text was cut. Memory: some 32,768 rows of inputs and outputs.
    """
    name = error_name(widths, group)
    fields: dict[str, Any] = {"fields": {name: "sum"}, "widths": widths, "group": group, "name": name}
    label = f"RoundingError_{'_'.join(map(str, widths))}_in_groups_of_{group}"
    return type(label, (RoundingError,), {**fields, "__doc__": f"{name}: see `rounding_error`."})


def error_name(widths: tuple[int, ...], group: int) -> str:
    """The statistic's name in a profile."""
    return f"rounding_error_{'_'.join(map(str, widths))}_group_{group}_EN"
