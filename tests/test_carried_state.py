"""Streamed layer by layer, routers and residual rules that look beyond a layer or a token do as in a resident model.

And a sweep does not pretend to go on in the middle where hidden states are not all that layers hand on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import coterie.experts.forward
from calls import left_padded, right_padded
from coterie.anatomy.routers import put_residual, put_routers
from coterie.errors import ModelError
from coterie.evaluation.compare import logits
from coterie.routing.attention_aware import settle
from coterie.routing.record import Record, current
from coterie.streaming.checkpoint import Checkpoint
from coterie.streaming.lockstep import Batch, States, carries_state, sweep
from coterie.streaming.model import StreamedModel
from families import tiny, tokens

HOSTS = ("mixtral", "qwen3-moe", "deepseek-v3")
KINDS: dict[str, tuple[dict[str, Any], bool]] = {  # {name: (settings, carries state)}
    "rmoe": ({"size": 16}, True),
    "rmoe off": ({"size": 16, "passing": "off"}, False),
    "rmoe residual": ({"size": 16, "passing": "off", "residual": 0.5}, True),
    "similarity": ({"tau": 3.0, "rows": 5}, False),
    "attention": ({"weights": "raw"}, False),
    "top-k": ({}, False),
    "heavy-ball": ({"mu": 0.7}, True),
    "heavy-ball 0": ({"mu": 0.0}, False),
    "adam": ({"kappa": 0.5}, True),
    "robust": ({}, True),
}


def checkpoint(folder: Path, family: str, name: str) -> tuple[Path, Any]:
    """A saved model with such routers or rules, and the same resident."""
    model, (told, _), kind = tiny(family), KINDS[name], name.split()[0]
    more = {}
    if kind in ("heavy-ball", "adam", "robust"):
        put_residual(model, {"rule": kind, **told})
    else:
        if kind == "attention":
            model.set_attn_implementation("eager")
            more = {"attn_implementation": "eager"}
        put_routers(model, kind, told)
        if kind == "attention":
            settle(model, [tokens(3, 16, seed=7)])
    model.save_pretrained(folder)
    resident = AutoModelForCausalLM.from_pretrained(folder, **more).eval().requires_grad_(False)
    resident.set_experts_implementation(coterie.experts.forward.NAME)
    return folder, resident


def streamed_logits(folder: Path, batches: list[Batch], *, again: bool = False, **more: Any) -> list[Tensor]:
    streamed, hidden = StreamedModel(Checkpoint.open(folder), compute_dtype="float32"), {}
    for step in sweep(streamed, batches, finish=lambda n, b, h: hidden.__setitem__(n, h), **more):
        if again:
            step.run(last=False)
        step.run()
    streamed.load_head()
    return [logits(streamed, hidden[n]) for n in range(len(batches))]


@pytest.mark.parametrize("family", HOSTS)
@pytest.mark.parametrize("name", KINDS)
def test_streamed_logits_equal_resident_ones(family: str, name: str, tmp_path: Path) -> None:
    folder, model = checkpoint(tmp_path, family, name)
    ids = tokens(3, 13)
    batches = [
        Batch(ids),
        Batch(ids, left_padded(ids, (0, 2, 6)).bool()),
        Batch(tokens(2, 9, seed=3)),
        Batch(ids, right_padded(ids, (0, 2, 6)).bool()),
    ]
    found = streamed_logits(folder, batches, again=True)
    for one, batch in zip(found, batches, strict=True):
        mask = batch.mask_BL
        wanted = model(batch.ids_BL, attention_mask=None if mask is None else mask.long(), use_cache=False).logits
        real = torch.ones_like(batch.ids_BL, dtype=torch.bool) if mask is None else mask
        torch.testing.assert_close(one[real], wanted[real], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_it_is_known_what_hands_on_more_than_hidden_states(name: str, tmp_path: Path) -> None:
    folder, _ = checkpoint(tmp_path, "qwen3-moe", name)  # its layer 1 has no experts
    layers = StreamedModel(Checkpoint.open(folder)).layers
    assert carries_state(layers) == ([0, 2] if KINDS[name][1] else [])


@pytest.mark.parametrize("name", ["rmoe", "robust"])
def test_a_sweep_with_carried_state_keeps_nothing_and_starts_again(name: str, tmp_path: Path) -> None:
    folder, _ = checkpoint(tmp_path / "model", "mixtral", name)
    batches, kept = [Batch(tokens(seed=s)) for s in range(2)], tmp_path / "states"
    plain = streamed_logits(folder, batches)
    for step in sweep(StreamedModel(Checkpoint.open(folder)), batches, states=States(kept, durable=True)):
        if step.index == 2:
            break  # killed here
    states = States(kept, durable=True)
    assert states.kept() is None
    assert states.following(known=[0, 1], needed=[0, 1, 2]) == 0
    again = streamed_logits(folder, batches, states=states)
    assert all(torch.equal(one, two) for one, two in zip(plain, again, strict=True))


@pytest.mark.parametrize("name", ["rmoe", "robust"])
def test_going_on_in_the_middle_is_refused(name: str, tmp_path: Path) -> None:
    folder, _ = checkpoint(tmp_path, "mixtral", name)
    with pytest.raises(ModelError, match="cannot go on at layer 1: layer 0 hands more than hidden states"):
        next(sweep(StreamedModel(Checkpoint.open(folder)), [Batch(tokens())], first=1))


def test_without_carried_state_a_sweep_goes_on(tmp_path: Path) -> None:
    folder, _ = checkpoint(tmp_path / "model", "mixtral", "similarity")
    batches, kept = [Batch(tokens(seed=s)) for s in range(2)], tmp_path / "states"
    plain = streamed_logits(folder, batches)
    for step in sweep(StreamedModel(Checkpoint.open(folder)), batches, states=States(kept, durable=True)):
        if step.index == 2:
            break
    assert States(kept).kept() == 1
    again = streamed_logits(folder, batches, states=States(kept), first=2)
    assert all(torch.equal(one, two) for one, two in zip(plain, again, strict=True))


def test_a_deep_sweep_holds_the_state_of_two_layers(tmp_path: Path) -> None:
    model = tiny("mixtral", num_hidden_layers=6)
    put_routers(model, "rmoe", {"size": 16})
    put_residual(model, {"mu": 0.5})
    model.save_pretrained(tmp_path)
    streamed, seen = StreamedModel(Checkpoint.open(tmp_path)), []

    def look(module: Any, args: Any, output: Any) -> None:
        record = current()
        assert isinstance(record, Record)
        seen.append((len(record.states), len(record.routings)))

    for layer in streamed.layers:
        layer.mlp.register_forward_hook(look)
    for step in sweep(streamed, [Batch(tokens())]):
        step.run()
    assert seen[-1] == (4, 1)
