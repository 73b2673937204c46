"""Fine-grained experts out of big ones: every expert is cut into m, exactly (the algebra of DeepSeekMoE, 2401.06066).

    E_i(x) = sum_{j < m} D_ij act(G_ij x) * (U_ij x)              G, U cut by rows, D by columns

Each of the m pieces gets a copy of its parent's router row, and a token picks m K of the m E experts: copies score
alike, so that all pieces of a chosen parent are chosen, and no others. A softmax over m E experts, or over the chosen
ones, gives a piece 1/m of its parent's weight (a sigmoid score stays): the pieces' outputs are multiplied with what is
missing, by which the model computes the same function, parameters and operations, with far more ways to combine them
once it is trained on. The paper trains such models from scratch; this is where to start from a checkpoint.
"""

# E experts, K experts per token, H hidden, I expert intermediate, T tokens

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from coterie.anatomy import moe_layers
from coterie.conversion.rebuild import built, router_rows, state, with_experts
from coterie.errors import ModelError, UsageError


@torch.no_grad()
def segment(model: Any, pieces: int) -> Any:
    """A new model with `pieces` experts in place of each, which computes the same.

    Raises UsageError for a number that does not divide the experts' width, ModelError for experts or routers that
    cannot be cut without changing the function (it is tried on random tokens).
    """
    layers = moe_layers(model)
    wide = layers[0].bank.intermediate_size
    if pieces < 2 or wide % pieces:
        raise UsageError(f"experts of {wide} neurons cannot be cut into {pieces} equal pieces")
    if any(layer.bank.factored or layer.bank.packed for layer in layers):
        raise ModelError("the experts are stored as factors or codes", "Cut those of a dense checkpoint.")
    first = layers[0]
    config = with_experts(model, first.num_experts * pieces, top_k=first.top_k * pieces, width=wide // pieces)
    known, rows = state(model), router_rows(model)

    def tensor(name: str, target: Tensor) -> Tensor | None:
        if any(name.startswith(f"{layer.experts_name}.") for layer in layers):
            return None
        value = known[name]
        return value.repeat_interleave(pieces, rows[name]) if name in rows else value

    made = built(model, config, tensor)
    for old, new in zip(layers, moe_layers(made), strict=True):
        factor = _missing(old, new, pieces)
        for expert in range(old.num_experts):
            whole = old.bank.read(expert)
            for piece in range(pieces):
                part = slice(piece * wide // pieces, (piece + 1) * wide // pieces)
                cut: dict[str, Any] = {
                    name: None if value is None else value[part]
                    for name in ("up_IH", "gate_IH", "up_bias_I", "gate_bias_I")
                    for value in [getattr(whole, name)]
                }
                bias_H = whole.down_bias_H
                new.bank.write(
                    expert * pieces + piece,
                    replace(
                        whole,
                        **cut,
                        down_HI=whole.down_HI[:, part] * factor,
                        down_bias_H=None if bias_H is None else bias_H * (factor / pieces),
                    ),
                )
    _check(model, made)
    return made


def _missing(old: Any, new: Any, pieces: int) -> float:
    """What a piece's output is multiplied with: its parent's weight over its own, the same for all tokens."""
    generator = torch.Generator().manual_seed(0)
    like = next(old.router.parameters())
    x_TH = torch.randn(32, old.bank.hidden_size, generator=generator).to(like)
    was_T, is_T = (router(x_TH)[1].float().sum(-1) for router in (old.router, new.router))
    factor_T = pieces * was_T / is_T
    if (factor_T - factor_T.mean()).abs().max() > 1e-3 * factor_T.mean():
        raise ModelError(
            f"the router of layer {old.index} weighs copies of an expert in no fixed proportion",
            "Experts of such a router cannot be cut without changing the model.",
        )
    return round(float(factor_T.mean()), 4)


def _check(model: Any, made: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.get_text_config(decoder=True).vocab_size, (1, 16), generator=generator)
    training = model.training
    one, two = (m.eval()(input_ids=ids.to(m.device), use_cache=False).logits.float() for m in (model, made))
    for m in (model, made):
        m.train(training)
    wide = 1e-3 if model.dtype == torch.float32 else 5e-2
    if (one - two).abs().max() > wide * one.abs().max().clamp(min=1):
        raise ModelError(
            "cut into pieces, the experts of this model do not compute the same",
            "A router that scores groups of experts by their two best finds copies there: such a model cannot be cut.",
        )
