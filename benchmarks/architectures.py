"""Which architectures work out of the box: every family of the installed transformers that has fused experts.

Each family is built tiny and random from its own config class, saved, pruned to half of its experts with
`coterie.compress` (REAP, streamed), loaded again with plain transformers and run; the result must equal the original
with the same experts sliced away in memory. Nothing is known here about a family but small values for common field
names. A family that fails is listed with the reason and the step it failed in: shrinking the config is this script's
own business ("cannot be made tiny"), everything after that is Coterie's or transformers'.

    python benchmarks/architectures.py [NAME ...] [--json benchmarks/results/architectures.json]

docs/architectures.md is generated from that file.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
warnings.filterwarnings("ignore")

import torch  # noqa: E402  (after the environment that silences it)
import transformers  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

import coterie  # noqa: E402
from coterie.anatomy import moe_layers, select  # noqa: E402
from coterie.anatomy.architectures import candidates, quirks_of  # noqa: E402
from coterie.errors import CoterieError  # noqa: E402

SMALL: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "o_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 8,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "num_local_experts": 8,
    "num_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "mamba_d_state": 8,
    "n_groups": 2,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "sliding_window": 32,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
SECONDS, MEMORY = 180, 16 * 2**30  # for one family
VISION: dict[str, Any] = {
    "depth": 2,
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_heads": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "out_hidden_size": 64,
}
# Families whose configs contradict the small values above: what they need besides, by part of the config.
TINY: dict[str, dict[str, dict[str, Any]]] = {
    "zaya": {"text_config": {"num_experts_per_tok": 1, "router_hidden_size": 32}},
    "qwen4_exp": {
        "text_config": {
            "head_dim": 16,
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
            "indexer_budget": 16,
            "indexer_compress_ratio": 4,
            "hc_lowrank": 8,
            "ngram_vocab_size_base": 97,
            "split_ngram_parts": 1,
        }
    },
    "glm5_next": {
        "text_config": {
            "index_kpool": 4,
            "qk_rope_head_dim": 0,
            "qk_nope_head_dim": 16,
            "linear_head_dim": 16,
            "linear_num_heads": 4,
        }
    },
    "glm4v_moe": {
        "text_config": {
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
            "head_dim": 16,
        }
    },
    "deepseek_ocr2": {
        "text_config": {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"], "num_experts_per_tok": 2},
        "vision_config": {
            "sam_config": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64},
            "encoder_config": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64},
        },
    },
    "dots3_note": {
        "vision_config": {"num_hidden_layers": 42, "adapter_in_dim": 32, "adapter_out_dim": 64},
        "audio_config": {"num_hidden_layers": 1, "adapter_out_dim": 64},
    },
    "ernie4_5_vl_moe": {
        "text_config": {
            "moe_intermediate_size": [24, 24],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]},
        }
    },
    "inkling2": {"vision_config": {"text_hidden_size": 64}},
    "muse_spark": {"audio_config": {"out_hidden_size": 64}, "text_config": {"moe_hidden_size": 32}},
}


@dataclass
class Outcome:
    """One family. `step` is where it failed; "" where it passed."""

    model_type: str
    model_class: str
    passed: bool
    step: str = ""
    reason: str = ""
    seconds: float = 0.0


def tiny_config(model_type: str, config_class: Any) -> Any:
    """The family's config with small sizes wherever it has fields of these names."""
    example, more = dict(quirks_of(model_type).example), TINY.get(model_type, {})
    subs = getattr(config_class, "sub_configs", {})
    if "text_config" not in subs:
        return config_class(**{**example, **_fields(config_class, SMALL), **more.get("text_config", {})})
    nested: dict[str, Any] = {}
    for name, sub in subs.items():
        values = SMALL if name == "text_config" else VISION
        if name == "text_config" or "vision" in name:
            sub = transformers.CONFIG_MAPPING[config_class().text_config.model_type] if sub is None else sub
            nested[name] = _fields(sub, values)
            nested[name].pop("head_dim", None)  # sections of multimodal rotary embeddings fit the default one
    nested["text_config"] |= {k: v for k, v in example.items() if k not in SMALL}
    for part, values in more.items():
        nested.setdefault(part, {}).update(values)
    return config_class(**nested)


def _fields(config_class: Any, values: dict[str, Any]) -> dict[str, Any]:
    """The values for which the class has a field of that name (not an alias of another)."""
    known = set(getattr(config_class, "__dataclass_fields__", {}))
    found = {name: value for name, value in values.items() if name in known}
    if "kv_lora_rank" in found:  # latent attention has as many key-value heads as heads
        found["num_key_value_heads"] = found["num_attention_heads"]
    return found


def steps(model_type: str, model_class: str, folder: Path) -> Iterator[str]:
    """Run one family; yields the name of each step before it is taken."""
    yield "cannot be made tiny"
    cls = getattr(transformers, model_class)
    config = tiny_config(model_type, cls.config_class)
    torch.manual_seed(0)
    model = cls(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.08)
        ids = torch.randint(1, 500, (4, 16))
        model(input_ids=ids, use_cache=False)
    model.save_pretrained(folder / "model")
    save_file({"input_ids": ids}, folder / "ids.safetensors")
    yield "compress"
    half = str(folder / "half")
    result = coterie.compress(
        str(folder / "model"), half, method="reap", keep=0.5, tokens=str(folder / "ids.safetensors")
    )
    yield "load"
    original = cls.from_pretrained(folder / "model", dtype=torch.float32).eval()
    loaded = cls.from_pretrained(half, dtype=torch.float32).eval()
    yield "compare"
    keeps = {plan.index: plan.keep for plan in result.plan.layers}
    for layer in moe_layers(original):
        select(layer, keeps[layer.index])
    with torch.no_grad():
        one = original(input_ids=ids, use_cache=False).logits
        two = loaded(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-3)


def examine(model_type: str, model_class: str) -> Outcome:
    """One family, from config to comparison."""
    began, step = time.monotonic(), ""
    with tempfile.TemporaryDirectory() as name:
        try:
            for step in steps(model_type, model_class, Path(name)):  # noqa: B007  (the last one is where it failed)
                pass
        except Exception as error:  # every family may fail in its own way; that is what is reported
            text = error.message if isinstance(error, CoterieError) else " ".join(str(error).split())
            reason = f"{type(error).__name__}: {text[:200]}"
            return Outcome(model_type, model_class, False, step, reason, time.monotonic() - began)
    return Outcome(model_type, model_class, True, "", "", time.monotonic() - began)


def apart(model_type: str, model_class: str) -> Outcome:
    """`examine` in a forked child with limits: a huge default vision tower must not take the rest along."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_limited, args=(sender, model_type, model_class))
    child.start()
    sender.close()
    try:
        if receiver.poll(SECONDS):
            outcome: Outcome = receiver.recv()
            return outcome
        reason = f"not finished after {SECONDS} s"
    except EOFError:
        reason = f"ended by signal or exit code {child.exitcode}"
    finally:
        child.kill()
        child.join()
    return Outcome(model_type, model_class, False, "limits of this script", reason, SECONDS)


def _limited(sender: Any, model_type: str, model_class: str) -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    torch.set_num_threads(1)
    sender.send(examine(model_type, model_class))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="model types; all by default")
    parser.add_argument("--json", type=Path, help="also write the outcomes here")
    given = parser.parse_args()
    outcomes = []
    for model_type, model_class in candidates():
        if given.names and model_type not in given.names:
            continue
        outcome = apart(model_type, model_class)
        outcomes.append(outcome)
        verdict = "ok" if outcome.passed else f"{outcome.step}: {outcome.reason}"
        print(f"{outcome.seconds:6.1f} s  {model_type:26s} {verdict}", flush=True)
    passed = sum(o.passed for o in outcomes)
    print(f"\ntransformers {transformers.__version__}: {passed} of {len(outcomes)} pass")
    if given.json:
        found = {"transformers": transformers.__version__, "outcomes": [asdict(o) for o in outcomes]}
        given.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
