"""Compressed experts: half of a token's experts run, small vectors stand in for the others (arXiv:2503.00634).

With the router's k choices in order of weight, the first k - k_a run and the last k_a only scale their inputs:

    t = sum_aux a_j theta_j,   a_j = w_j / sum_aux w        theta_j = [gate H, up H, down I], ones at first
    y = sum_main w_m down_m( t_down * act(gate_m(t_gate * x)) * up_m(t_up * x) )

This writes the checkpoint with its theta; they do nothing until everything is fine-tuned together on a task
(`coterie finetune`). All experts stay, so that the checkpoint shrinks in compute and not in size. The forward pass is
in `experts.compressed`. Halving is what the paper recommends; deeper cuts are not recovered.

Differs from the authors' code: theta has room for any intermediate size (theirs cuts the third vector to H numbers);
main and auxiliary are told apart by the weights applied, also where the router selects by something else.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from coterie.anatomy import MoELayer
from coterie.compression.methods import Keeper, method
from coterie.errors import ModelError, UsageError
from coterie.experts.compressed import division, reduced, refuse, theta_shape
from coterie.experts.forward import Slot


@method("compressed-experts", kind="editing", paper="arXiv:2503.00634")
class CompressedExperts(Keeper):
    """Run only the strongest of a token's experts; trainable vectors stand in for the others."""

    auxiliary: int | None = Field(
        None, ge=1, description="Experts per token that are only stood in for; by default half of those picked."
    )
    mode: str = Field(
        "three", pattern="^(three|single)$", description="three: a vector for gate, up and down. single: one for all."
    )
    renormalize_main: bool = Field(False, description="Let the experts that run take over the weight of the others.")

    def main(self, moe: MoELayer) -> int:
        """k_m: how many of a token's experts run."""
        return moe.top_k - (moe.top_k // 2 if self.auxiliary is None else self.auxiliary)

    def check_model(self, moe: Mapping[int, MoELayer]) -> None:
        for index, layer in moe.items():
            try:
                refuse(layer.experts)
            except ModelError as error:
                raise ModelError(f"layer {index}: {error.message}", error.hint) from error
            if layer.top_k < 2:
                raise ModelError(
                    f"the router of layer {index} picks one expert per token: there is none to stand in for"
                )
            if self.main(layer) < 1:
                raise UsageError(
                    f"auxiliary={self.auxiliary}: the router of layer {index} picks {layer.top_k} experts per token,"
                    " and at least one must run",
                    f"Use at most {layer.top_k - 1}.",
                )

    def reform(self, moe: MoELayer) -> dict[str, Any]:
        flags = {"single": self.mode == "single", "renormalize_main": self.renormalize_main}
        return {"main": self.main(moe), **{name: True for name, value in flags.items() if value}}

    def added(self, moe: MoELayer) -> dict[str, Tensor]:
        return {"theta": torch.ones(theta_shape(moe.experts, single=self.mode == "single"))}

    def slot(self, moe: MoELayer) -> Slot:
        return partial(_without_auxiliaries, self.main(moe), moe.num_experts, self.renormalize_main)

    def active(self, moe: MoELayer) -> int:
        return self.main(moe)

    def notes(self) -> list[str]:
        return [
            "the new vectors are ones: until it is fine-tuned (coterie finetune), the checkpoint is a plain reduction"
            " of the experts per token"
        ]


def _without_auxiliaries(
    main: int, experts: int, renormalize: bool, index_TK: Tensor, weight_TK: Tensor
) -> tuple[Tensor, Tensor]:
    """What fresh vectors come to: only the main experts."""
    main_TK, aux_TK = division(index_TK, weight_TK, main, experts)
    return reduced(index_TK, weight_TK, main_TK, aux_TK, experts, renormalize=renormalize)
