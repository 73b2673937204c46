"""Streamed equals resident, bit by bit, on every family; nothing of that depends on how it was streamed."""

import pytest
import torch

from coterie.evaluation.compare import logits
from coterie.streaming.checkpoint import Checkpoint
from coterie.streaming.lockstep import Batch, States, sweep
from coterie.streaming.model import StreamedModel
from families import FAMILIES, FEW, resident, saved, tokens


def streamed_logits(folder, batches, states=None, compute_dtype="float32", again=False):
    streamed = StreamedModel(Checkpoint.open(folder), compute_dtype=compute_dtype)
    hidden = {}
    for step in sweep(streamed, batches, finish=lambda n, b, h: hidden.__setitem__(n, h), states=states):
        if again:
            step.run(last=False)
        step.run()
    streamed.load_head()
    return [logits(streamed, hidden[n]) for n in range(len(batches))]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_streamed_logits_equal_resident_logits_bit_by_bit(family, stored, tmp_path):
    folder = saved(family, tmp_path, stored)
    model = resident(folder).requires_grad_(False)  # torch multiplies weights that learn in another way
    ids = [tokens(2, 17), tokens(2, 24, seed=1), tokens(1, 9, seed=2)]
    with torch.no_grad():
        expected = [model(i, use_cache=False).logits for i in ids]
    found = streamed_logits(folder, [Batch(i) for i in ids])
    for one, two, batch in zip(found, expected, ids, strict=True):
        if not torch.equal(one, two):
            assert rounds_by_address(model, batch), "the same weights at the same addresses gave other logits"
            torch.testing.assert_close(one, two, atol=5e-6, rtol=1e-5)


@torch.no_grad()
def rounds_by_address(model, ids):
    """Does the resident model itself give other last bits when its weights lie elsewhere? So do some BLAS builds on
    some CPUs, for some shapes: there, equal bits cannot be asked of a model that is loaded in another way."""
    first = model(ids, use_cache=False).logits
    for shift in (16, 32, 48):  # float32 numbers behind an address that is a multiple of 256 bytes
        for parameter in model.parameters():
            buffer = torch.empty(parameter.numel() + 128, dtype=parameter.dtype)
            start = -(buffer.data_ptr() // parameter.element_size()) % 64 + shift
            parameter.data = buffer[start : start + parameter.numel()].view_as(parameter).copy_(parameter)
        if not torch.equal(model(ids, use_cache=False).logits, first):
            return True
    return False


@pytest.mark.parametrize("family", FEW)
def test_padding_is_masked_as_in_the_resident_model(family, tmp_path):
    folder = saved(family, tmp_path)
    ids, mask = tokens(3, 20), torch.ones(3, 20, dtype=torch.bool)
    mask[1, 13:] = False
    mask[2, 5:] = False
    with torch.no_grad():
        expected = resident(folder)(ids, attention_mask=mask.long(), use_cache=False).logits
    (found,) = streamed_logits(folder, [Batch(ids, mask)])
    assert torch.equal(found[mask], expected[mask])


@pytest.mark.parametrize("family", FEW)
def test_spilling_and_second_passes_change_nothing(family, tmp_path):
    folder = saved(family, tmp_path)
    batches = [Batch(tokens(2, 24, seed=s)) for s in range(3)]
    plain = streamed_logits(folder, batches)
    states = States(limit=0)
    spilled = streamed_logits(folder, batches, states, again=True)
    assert states.bytes_spilled > 0
    assert all(torch.equal(a, b) for a, b in zip(plain, spilled, strict=True))


@pytest.mark.parametrize("family", FEW)
def test_bfloat16_compute_equals_the_resident_model_in_bfloat16(family, tmp_path):
    folder = saved(family, tmp_path)
    with torch.no_grad():
        expected = resident(folder, torch.bfloat16)(tokens(), use_cache=False).logits
    (found,) = streamed_logits(folder, [Batch(tokens())], compute_dtype="bfloat16")
    assert torch.equal(found, expected.float())


def test_layers_are_on_meta_before_and_after_their_turn(tmp_path):
    streamed = StreamedModel(Checkpoint.open(saved("qwen3-moe", tmp_path)))
    for step in sweep(streamed, [Batch(tokens())]):
        resident_layers = [
            i for i, layer in enumerate(streamed.layers) if not any(p.is_meta for p in layer.parameters())
        ]
        assert resident_layers == [step.index]
        step.run()
    assert all(p.is_meta for layer in streamed.layers for p in layer.parameters())


def test_each_byte_of_the_decoder_is_read_once_per_sweep(tmp_path):
    checkpoint = Checkpoint.open(saved("qwen3-moe", tmp_path))
    streamed = StreamedModel(checkpoint)
    for step in sweep(streamed, [Batch(tokens(seed=s)) for s in range(3)]):
        step.run()
    head = checkpoint.tensors["lm_head.weight"].nbytes
    assert checkpoint.bytes_read == checkpoint.nbytes - head


@pytest.mark.parametrize("family", FEW)
def test_a_sweep_goes_on_from_kept_states_with_the_same_result(family, tmp_path):
    folder, kept = saved(family, tmp_path), tmp_path / "states"
    batches = [Batch(tokens(seed=s)) for s in range(2)]
    plain = streamed_logits(folder, batches)
    streamed = StreamedModel(Checkpoint.open(folder))
    for step in sweep(streamed, batches, states=States(kept, durable=True)):
        step.run()
        if step.index == 1:
            break
    first = States(kept).kept() + 1
    assert first == 1  # layer 1 was interrupted before its outputs were kept
    streamed, hidden = StreamedModel(Checkpoint.open(folder)), {}
    steps = sweep(streamed, batches, finish=lambda n, b, h: hidden.__setitem__(n, h), states=States(kept), first=first)
    assert [step.index for step in steps] == list(range(first, len(streamed.layers)))
    streamed.load_head()
    assert all(torch.equal(logits(streamed, hidden[n]), plain[n]) for n in range(2))
