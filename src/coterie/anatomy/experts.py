"""One expert, whatever the layout: reading and writing the experts of a fused transformers v5 experts module.

A fused module holds all experts of a layer in 3-D tensors and says with flags how to read them: gate and up
concatenated or interleaved, weights transposed or not, with biases or without, with a gate or without. `ExpertBank`
turns that into one canonical expert: rows of `up_IH` and `gate_IH` and columns of `down_HI` are neurons.

It does not know which experts matter, what a router is, or where the weights came from.
"""

# E experts, I expert intermediate (neurons), H hidden, P = 2I (gate and up together)

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from coterie.errors import ModelError
from coterie.experts.factored import is_factored
from coterie.experts.forward import stored_experts
from coterie.experts.packed import is_packed


@dataclass
class ExpertWeights:
    """The weights of one routed expert in canonical orientation.

    up_IH, gate_IH : rows are neurons; `gate_IH` is None for experts without a gate.
    down_HI : columns are neurons.
    up_bias_I, gate_bias_I, down_bias_H : None where the family has no biases.
    """

    up_IH: Tensor
    down_HI: Tensor
    gate_IH: Tensor | None = None
    up_bias_I: Tensor | None = None
    gate_bias_I: Tensor | None = None
    down_bias_H: Tensor | None = None


def is_experts_module(module: nn.Module) -> bool:
    """True for a module that follows the fused-experts contract (3-D weights and the flags that describe them)."""
    flags = all(hasattr(module, flag) for flag in ("is_transposed", "is_concatenated", "has_bias", "has_gate"))
    down = getattr(module, "down_proj", None)
    return flags and (hasattr(module, "dense") or (isinstance(down, Tensor) and down.dim() == 3))


class ExpertBank:
    """View of one fused experts module.

    Parameters
    ----------
    module : nn.Module
        A module for which `is_experts_module` holds. It is edited in place by `write`.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @property
    def num_experts(self) -> int:
        return stored_experts(self.module)

    @property
    def factored(self) -> bool:
        """Are its experts kept as low-rank factors? They can be read, but not written in place."""
        return is_factored(self.module)

    @property
    def packed(self) -> bool:
        """Are its experts quantized and kept packed? They can be read, but not written in place."""
        return is_packed(self.module)

    @property
    def has_gate(self) -> bool:
        return bool(self.module.has_gate)

    @property
    def has_bias(self) -> bool:
        return bool(self.module.has_bias)

    @property
    def hidden_size(self) -> int:
        if hasattr(self.module, "shape_of"):
            return int(self.module.shape_of("down")[0])  # type: ignore[operator]
        return int(self._tensor("down_proj").shape[2 if self.module.is_transposed else 1])

    @property
    def intermediate_size(self) -> int:
        if hasattr(self.module, "shape_of"):
            return int(self.module.shape_of("down")[1])  # type: ignore[operator]
        return int(self._tensor("down_proj").shape[1 if self.module.is_transposed else 2])

    @property
    def parameters_per_expert(self) -> int:
        """Numbers one expert consists of, biases included."""
        E = self.num_experts
        return sum(p.numel() // E for p in self.module.parameters(recurse=False) if p.dim() and p.shape[0] == E)

    def read(self, expert: int, dtype: torch.dtype | None = None) -> ExpertWeights:
        """Expert `expert` in canonical orientation: views of the stored tensors, or copies if `dtype` differs or
        they are stored as factors or codes."""
        up_name = "gate_up_proj" if self.has_gate else "up_proj"
        gate_IH: Tensor | None
        if hasattr(self.module, "dense"):
            module: Any = self.module
            up_IH, down_HI = module.dense("up", expert), module.dense("down", expert)
            gate_IH = module.dense("gate", expert) if self.has_gate else None
        else:
            first = self._oriented(up_name, expert)  # [P, H] or [I, H]
            down_HI = self._oriented("down_proj", expert)
            gate_IH, up_IH = self._split(first) if self.has_gate else (None, first)
        gate_bias_I = up_bias_I = down_bias_H = None
        if self.has_bias:
            bias = self._tensor(f"{up_name}_bias")[expert]
            gate_bias_I, up_bias_I = self._split(bias) if self.has_gate else (None, bias)
            down_bias_H = self._tensor("down_proj_bias")[expert]
        weights = (up_IH, down_HI, gate_IH, up_bias_I, gate_bias_I, down_bias_H)
        return ExpertWeights(*(None if w is None else w.detach().to(dtype or w.dtype) for w in weights))  # type: ignore[arg-type]

    @torch.no_grad()
    def write(self, expert: int, weights: ExpertWeights) -> None:
        """Store `weights` as expert `expert`, cast to the stored dtype. Raises ModelError for factors or codes."""
        if hasattr(self.module, "dense"):
            stored = "low-rank factors" if self.factored else "packed codes"
            raise ModelError(f"the experts are stored as {stored} and cannot be edited as matrices")
        target = self.read(expert)
        for name in ("up_IH", "down_HI", "gate_IH", "up_bias_I", "gate_bias_I", "down_bias_H"):
            view, value = getattr(target, name), getattr(weights, name)
            if (view is None) != (value is None):
                raise ValueError(f"{name} is {'absent' if view is None else 'required'} in this experts module")
            if view is not None:
                view.copy_(value)

    def _tensor(self, name: str) -> Tensor:
        tensor = getattr(self.module, name)
        assert isinstance(tensor, Tensor)
        return tensor.detach()

    def _oriented(self, name: str, expert: int) -> Tensor:
        """[out, in] view of one expert's projection."""
        weight = self._tensor(name)[expert]
        return weight.T if self.module.is_transposed else weight

    def _split(self, fused: Tensor) -> tuple[Tensor, Tensor]:
        """Views of the gate and up halves of dimension 0."""
        if self.module.is_concatenated:
            half = fused.shape[0] // 2
            return fused[:half], fused[half:]
        return fused[0::2], fused[1::2]
