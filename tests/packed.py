"""Tiny checkpoints in the packed forms others publish, made here with code of its own: no function of Coterie.

`fp8(...)` and `mxfp4(...)` write a tiny random model as block-scaled FP8 or MXFP4, and the same weights dequantized
beside it, in float32 or bfloat16, as a plain checkpoint.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from families import each_tensor, saved

FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
KEPT_WHOLE = re.compile(r"embed|norm|lm_head|\.gate\.|router|bias")


def fp8(
    family: str, folder: Path, block: tuple[int, int] = (8, 8), scales: torch.dtype = torch.float32, **changes: Any
) -> tuple[Path, Path]:
    """(packed, dequantized) folders. All matrices but routers, embeddings and the head are packed."""
    plain = saved(family, folder / "plain", torch.bfloat16, **changes)
    tensors, dense = {}, {}
    for key, weight in each_tensor(plain).items():
        if weight.dim() not in (2, 3) or KEPT_WHOLE.search(key) or (weight.dim() == 3 and "conv" in key):
            tensors[key], dense[key] = weight, weight.float()
            continue
        matrices = [weight] if weight.dim() == 2 else list(weight)
        pairs = [quantized(matrix.float(), block, scales) for matrix in matrices]
        values = [dequantized(q, scale, block) for q, scale in pairs]
        found = [torch.stack(each) if weight.dim() == 3 else each[0] for each in (*zip(*pairs, strict=True), values)]
        tensors[key], tensors[f"{key}_scale_inv"], dense[key] = found
    entry = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(block)}
    return _written(plain, folder, family, tensors, dense, entry)


def quantized(
    weight: torch.Tensor, block: tuple[int, int], scales: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = (-(-n // b) for n, b in zip(weight.shape, block, strict=True))
    q, scale = torch.empty(weight.shape, dtype=torch.float8_e4m3fn), torch.ones(rows, columns, dtype=scales)
    for r in range(rows):
        for c in range(columns):
            piece = weight[r * block[0] : (r + 1) * block[0], c * block[1] : (c + 1) * block[1]]
            scale[r, c] = piece.abs().max() / 448
            codes = (piece / scale[r, c].float()).clamp(-448, 448).to(torch.float8_e4m3fn)
            q[r * block[0] : (r + 1) * block[0], c * block[1] : (c + 1) * block[1]] = codes
    return q, scale


def dequantized(q: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    weight = q.float()
    for r in range(scale.shape[0]):
        for c in range(scale.shape[1]):
            weight[r * block[0] : (r + 1) * block[0], c * block[1] : (c + 1) * block[1]] *= scale[r, c].float()
    return weight


def mxfp4(folder: Path, **changes: Any) -> tuple[Path, Path]:
    """(packed, dequantized) folders of a tiny GPT-OSS. Only experts are packed."""
    plain = saved("gpt-oss", folder / "plain", torch.bfloat16, **changes)
    tensors, dense = {}, {}
    for key, weight in each_tensor(plain).items():
        if not key.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[key], dense[key] = weight, weight
            continue
        experts, inputs, outputs = weight.shape
        groups = weight.float().transpose(1, 2).reshape(experts, outputs, inputs // 32, 32)
        exponent = torch.floor(torch.log2(groups.abs().amax(-1))) - 2
        scaled = groups / torch.exp2(exponent)[..., None]
        code = (scaled.abs()[..., None] - FP4).abs().argmin(-1)
        sign = (scaled < 0).long()
        nibble = (code + 8 * sign).to(torch.uint8)
        tensors[f"{key}_blocks"] = nibble[..., 0::2] + 16 * nibble[..., 1::2]
        tensors[f"{key}_scales"] = (exponent + 127).to(torch.uint8)
        value = FP4[code] * (1 - 2 * sign) * torch.exp2(exponent)[..., None]
        dense[key] = value.reshape(experts, outputs, inputs).transpose(1, 2).contiguous().bfloat16()
    entry = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    return _written(plain, folder, "gpt-oss", tensors, dense, entry)


def _written(
    plain: Path, folder: Path, family: str, tensors: dict[str, Any], dense: dict[str, Any], entry: dict[str, Any]
) -> tuple[Path, Path]:
    packed, unpacked = folder / f"{family}-packed", folder / f"{family}-dequantized"
    for target, weights in ((packed, tensors), (unpacked, dense)):
        shutil.copytree(plain, target)
        save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps({**config, "quantization_config": entry}))
    return packed, unpacked
