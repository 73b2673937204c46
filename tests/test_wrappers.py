"""Decoders inside multimodal wrappers: found, streamed on text, pruned, with the rest of the checkpoint untouched."""

import json

import pytest
import torch
import transformers

import coterie
from coterie.anatomy import moe_layers, select
from coterie.evaluation.compare import logits
from coterie.experts.forward import NAME
from coterie.streaming.checkpoint import Checkpoint
from coterie.streaming.lockstep import Batch, sweep
from coterie.streaming.model import StreamedModel
from families import each_tensor, token_file, tokens

TEXT = {
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "moe_intermediate_size": 24,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
VISION = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "out_hidden_size": 64}
WRAPPERS = {
    "qwen3-vl-moe": (
        "Qwen3VLMoeForConditionalGeneration",
        "Qwen3VLMoeConfig",
        {
            "text_config": {
                **TEXT,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]},
            },
            "vision_config": {**VISION, "deepstack_visual_indexes": [0]},
        },
    ),
    "glm4v-moe": (
        "Glm4vMoeForConditionalGeneration",
        "Glm4vMoeConfig",
        {
            "text_config": {
                **{k: v for k, v in TEXT.items() if k != "num_experts"},
                "n_routed_experts": 8,
                "n_shared_experts": 1,
                "first_k_dense_replace": 1,
                "n_group": 1,
                "topk_group": 1,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e4,
                    "mrope_section": [2, 1, 1],
                    "partial_rotary_factor": 0.5,
                },
            },
            "vision_config": VISION,
        },
    ),
}


@pytest.fixture(params=WRAPPERS)
def wrapped(request, tmp_path):
    model_class, config_class, fields = WRAPPERS[request.param]
    config = getattr(transformers, config_class)(**fields)
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.08)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    return getattr(transformers, model_class), tmp_path / "model"


def test_text_through_a_wrapper_equals_the_resident_model(wrapped):
    cls, folder = wrapped
    model = cls.from_pretrained(folder, dtype=torch.float32).eval()
    model.set_experts_implementation(NAME)
    with torch.no_grad():
        expected = model(input_ids=tokens(), use_cache=False).logits
    streamed, hidden = StreamedModel(Checkpoint.open(folder)), {}
    for step in sweep(streamed, [Batch(tokens())], finish=lambda n, b, h: hidden.__setitem__(n, h)):
        step.run()
    streamed.load_head()
    assert torch.equal(logits(streamed, hidden[0]), expected)


def test_only_the_text_path_is_read(wrapped):
    _, folder = wrapped
    checkpoint = Checkpoint.open(folder)
    read = []
    streamed = StreamedModel(checkpoint)
    streamed.on_read = lambda key, tensor: read.append(key)
    for step in sweep(streamed, [Batch(tokens())]):
        step.run()
    assert read
    assert not [key for key in read if "visual" in key or "vision" in key]


def test_pruning_a_wrapper_changes_its_decoder_and_nothing_else(wrapped, tmp_path):
    cls, folder = wrapped
    ids = token_file(tmp_path / "ids.safetensors")
    result = coterie.compress(str(folder), str(tmp_path / "out"), method="reap", keep=0.5, tokens=str(ids))
    before, after = each_tensor(folder), each_tensor(tmp_path / "out")
    for key, tensor in before.items():
        if "expert" not in key and ".gate." not in key:
            assert torch.equal(tensor, after[key]), key
    sliced = cls.from_pretrained(folder, dtype=torch.float32).eval()
    keeps = {p.index: p.keep for p in result.plan.layers}
    for layer in moe_layers(sliced):
        select(layer, keeps[layer.index])
    loaded = cls.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        one, two = sliced(input_ids=tokens()).logits, loaded(input_ids=tokens()).logits
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert 4 in {config["text_config"].get(n) for n in ("num_experts", "num_local_experts", "n_routed_experts")}
