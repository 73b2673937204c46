"""What the matrices of a layer receive: second moments of routed tokens, padding left out, shared where inputs are."""

from __future__ import annotations

import pytest
import torch

from coterie.anatomy import moe_layers
from coterie.api.runtime import Runtime, calibration
from coterie.compression.sites import Inputs, sites
from coterie.experts.forward import inner_activation
from coterie.streaming.lockstep import sweep
from families import FEW, resident, saved, token_file

pytestmark = pytest.mark.usefixtures("one_thread")


def measured(source, ids, batch_size):
    """{parameter: (grams, counts)} of the first MoE layer."""
    streamed = Runtime().open(str(source))
    data = calibration(str(source), tokens=str(ids), batch_size=batch_size)
    index = next(iter(streamed.moe))
    for step in sweep(streamed, data.batches):
        if step.index != index:
            step.run()
            continue
        found = sites(streamed, index)
        with Inputs(streamed, index, found, full=True) as inputs:
            step.run(before=inputs.batch)
        return index, found, inputs
    raise AssertionError


def expected(source, ids):
    """The same from a resident model with hooks and loops over tokens."""
    from safetensors.torch import load_file

    text = load_file(ids)
    mask_T = text["attention_mask"].bool().reshape(-1)
    model = resident(source)
    layer = next(iter(moe_layers(model)))
    seen = {}

    def keep(module, args, kwargs):
        seen["args"] = [*args, *kwargs.values()]

    def keep_q(module, args):
        seen["q"] = args[0].reshape(-1, args[0].shape[-1])

    attention = next(m for n, m in layer.decoder.named_modules() if n.endswith(("q_proj", "q_a_proj")))
    attention.register_forward_pre_hook(keep_q)
    layer.experts.register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():
        model(text["input_ids"], attention_mask=text["attention_mask"])
        x_TH, index_TK = seen["args"][0], seen["args"][1]
        E = layer.num_experts
        up = [x_TH[(index_TK == e).any(-1) & mask_T] for e in range(E)]
        down = [inner_activation(layer.experts, e, up[e]) for e in range(E)]
    return up, down, seen["q"][mask_T]


@pytest.mark.parametrize("family", FEW)
def test_moments_are_those_of_the_tokens_routed_to_each_expert_without_padding(family, tmp_path):
    source = saved(family, tmp_path, torch.float32)
    ids = token_file(tmp_path / "ids.safetensors", padded=True)
    index, found, inputs = measured(source, ids, 4)
    up, down, q_TI = expected(source, ids)
    upper, lower = [site for site in found if site.experts]
    for e in range(len(up)):
        for site, rows in ((upper, up[e]), (lower, down[e])):
            assert inputs.tokens(site, e) == len(rows)
            gram = inputs.gram(site, e)
            if not len(rows):
                assert gram is None
                continue
            torch.testing.assert_close(gram, rows.T @ rows, atol=1e-4, rtol=1e-4)
    first = next(site for site in found if site.name.endswith(("q_proj.weight", "q_a_proj.weight")))
    torch.testing.assert_close(inputs.gram(first), q_TI.T @ q_TI, atol=1e-3, rtol=1e-4)
    assert index in Runtime().open(str(source)).moe


def test_projections_that_are_given_one_tensor_share_their_moments(tmp_path):
    source = saved("mixtral", tmp_path, torch.float32)
    ids = token_file(tmp_path / "ids.safetensors", padded=True)
    _, found, inputs = measured(source, ids, 2)
    by_name = {site.name.split(".")[-2]: site for site in found if not site.experts}
    assert inputs.gram(by_name["k_proj"]) is not None
    assert inputs.gram(by_name["q_proj"]).data_ptr() == inputs.gram(by_name["k_proj"]).data_ptr()
    assert inputs.gram(by_name["o_proj"]).data_ptr() != inputs.gram(by_name["q_proj"]).data_ptr()
    assert inputs.tokens(by_name["v_proj"]) == inputs.tokens(by_name["q_proj"]) > 0


def test_moments_do_not_depend_on_how_text_is_batched(tmp_path):
    source = saved("qwen3-moe", tmp_path, torch.float32)
    ids = token_file(tmp_path / "ids.safetensors", padded=True)
    _, found, one = measured(source, ids, 1)
    _, _, four = measured(source, ids, 4)
    for site in found:
        for e in range(max(site.experts, 1)):
            assert one.tokens(site, e) == four.tokens(site, e)
            if one.tokens(site, e):
                torch.testing.assert_close(one.gram(site, e), four.gram(site, e), atol=1e-4, rtol=1e-4)
