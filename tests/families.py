"""Tiny random models of many architectures, shared by all tests: milliseconds to build, real modelling code."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from coterie.assets import pocket

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
GQA = {"num_key_value_heads": 2}
MLA = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}
NO_SPECIAL = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}

# class name of the config -> its fields
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", {**GQA, "intermediate_size": 48, "num_local_experts": 8, "num_experts_per_tok": 2}),
    "qwen2-moe": (
        "Qwen2MoeConfig",
        {
            **GQA,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 64,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "intermediate_size": 96,
        },
    ),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        {
            **GQA,
            "head_dim": 16,
            "moe_intermediate_size": 32,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "intermediate_size": 96,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
    ),
    "qwen3-next": (
        "Qwen3NextConfig",
        {
            **GQA,
            "head_dim": 16,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "intermediate_size": 96,
            "num_hidden_layers": 4,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
        },
    ),
    "olmoe": ("OlmoeConfig", {**GQA, "intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2}),
    "phimoe": ("PhimoeConfig", {**GQA, "intermediate_size": 48, "num_local_experts": 8, "num_experts_per_tok": 2}),
    "deepseek-v2": (
        "DeepseekV2Config",
        {
            **MLA,
            "intermediate_size": 96,
            "moe_intermediate_size": 32,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
            "topk_method": "greedy",
        },
    ),
    "deepseek-v3": (
        "DeepseekV3Config",
        {
            **MLA,
            "intermediate_size": 96,
            "moe_intermediate_size": 32,
            "n_routed_experts": 16,
            "n_shared_experts": 1,
            "num_experts_per_tok": 4,
            "n_group": 4,
            "topk_group": 2,
            "first_k_dense_replace": 1,
        },
    ),
    "gpt-oss": (
        "GptOssConfig",
        {
            **GQA,
            "head_dim": 16,
            "intermediate_size": 32,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "glm4-moe": (
        "Glm4MoeConfig",
        {
            **GQA,
            "head_dim": 16,
            "intermediate_size": 96,
            "moe_intermediate_size": 32,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "granite-moe": (
        "GraniteMoeConfig",
        {**GQA, "intermediate_size": 32, "num_local_experts": 8, "num_experts_per_tok": 2},
    ),
    "ernie4.5-moe": (
        "Ernie4_5_MoeConfig",
        {
            **GQA,
            "intermediate_size": 96,
            "moe_intermediate_size": 32,
            "moe_num_experts": 8,
            "moe_num_shared_experts": 1,
            "moe_k": 2,
            "moe_layer_start_index": 1,
        },
    ),
    "minimax-m2": (
        "MiniMaxM2Config",
        {
            **GQA,
            "head_dim": 16,
            "intermediate_size": 32,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "rotary_dim": 8,
        },
    ),
    "hunyuan-v1-moe": (
        "HunYuanMoEV1Config",
        {**GQA, "head_dim": 16, "intermediate_size": 32, "num_experts": 8, "moe_topk": 2},
    ),
    "lfm2-moe": (
        "Lfm2MoeConfig",
        {
            **GQA,
            "intermediate_size": 96,
            "moe_intermediate_size": 32,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "num_dense_layers": 1,
            "layer_types": ["conv", "full_attention", "conv"],
        },
    ),
    "jamba": (
        "JambaConfig",
        {
            **GQA,
            "intermediate_size": 32,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 8,
            "use_mamba_kernels": False,
        },
    ),
}
FAMILIES = tuple(CONFIGS)
FEW = ("qwen3-moe", "mixtral", "deepseek-v3", "gpt-oss")


def config(family: str, **changes: Any) -> Any:
    name, fields = CONFIGS[family]
    return getattr(transformers, name)(**{**SIZES, **NO_SPECIAL, **fields, **changes})


def tiny(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
    """A random model whose routers have opinions: biases and all matrices are drawn wide enough to matter."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config(family, **changes)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.08)
        for name, tensor in [*model.named_buffers(), *model.named_parameters()]:
            if "correction_bias" in name or "expert_bias" in name or name.endswith("router.bias"):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.05)
    return model.to(dtype)


def saved(
    family: str, folder: Path, dtype: torch.dtype = torch.bfloat16, shard: str | None = None, **changes: Any
) -> Path:
    """A tiny model as a checkpoint folder with a tokenizer."""
    target = folder / family
    options = {"max_shard_size": shard} if shard else {}
    tiny(family, dtype, **changes).save_pretrained(target, **options)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(pocket() / name, target)
    return target


@functools.cache
def tokens(rows: int = 2, length: int = 24, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, SIZES["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(seed))


def resident(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The same checkpoint whole in memory, with the experts implementation that streaming uses."""
    import coterie.experts.forward

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    model.set_experts_implementation(coterie.experts.forward.NAME)
    return model


def run_cli(*arguments: object, check: bool = False, **options: Any) -> subprocess.CompletedProcess[str]:
    """The command line as a user calls it, in its own process."""
    command = [sys.executable, "-m", "coterie.cli.main", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


def token_file(path: Path, rows: int = 4, length: int = 32, seed: int = 0, padded: bool = False) -> Path:
    """Random token ids as `--tokens` takes them."""
    from safetensors.torch import save_file

    tensors = {"input_ids": tokens(rows, length, seed).clone()}
    if padded:
        mask = torch.ones_like(tensors["input_ids"])
        for row in range(rows):
            mask[row, length - 3 * row - 1 :] = 0
        tensors["attention_mask"] = mask
    save_file(tensors, path)
    return path


def each_tensor(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def edit_json(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))
