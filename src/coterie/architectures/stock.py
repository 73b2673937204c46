"""A decoder of ours as a stock architecture of transformers, when all its parts are stock: the same function.

    router                       shared, dense layers        norms of q and k    becomes
    top-k, renormalised          none                        no                  mixtral
    top-k, renormalised or raw   none; any dense layers      yes                 qwen3_moe
    top-k, renormalised          shared in all layers        no                  granitemoeshared
    sigmoid with bias            shared; dense layers first  either              glm4_moe

The result needs no Coterie and loads wherever that architecture does. What only training knows (noise, jitter, terms of
the loss) is left behind. Anything else is refused, saying which part has no place. Peak memory: the model twice.
"""

# E experts, H hidden, I expert intermediate

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coterie.architectures.config import CoterieConfig, LayerSettings
from coterie.errors import ModelError
from coterie.streaming.writer import Workspace, save_whole


@dataclass
class Stock:
    """What was written."""

    out: Path
    form: str
    bytes_before: int
    bytes_after: int
    notes: list[str]

    def describe(self) -> dict[str, Any]:
        return {**self.__dict__, "out": str(self.out)}


def stock_config(config: CoterieConfig) -> Any:
    """The config of the stock architecture that computes the same. Raises ModelError naming what has no place."""
    import transformers

    layers = [config.settings_of(index) for index in range(config.num_hidden_layers)]
    sparse = [layer for layer in layers if not layer.dense]
    if not sparse:
        raise ModelError("the model has no MoE layers")
    first = sparse[0]
    _same(layers, sparse, first)
    router: Any = first.router
    common: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": config.hidden_act,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tie_word_embeddings,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "num_experts_per_tok": router.top_k,
        **{name: getattr(config, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")},
    }
    dense = [index for index, layer in enumerate(layers) if layer.dense]
    windowed = first.attention == "sliding"
    if first.kind == "sigmoid":
        if not router.bias or windowed or dense != list(range(len(dense))) or not first.shared:
            raise _refused("a sigmoid router without its bias, sliding attention, dense layers that are not the first")
        return transformers.Glm4MoeConfig(
            **common,
            intermediate_size=config.intermediate_size,
            moe_intermediate_size=first.width,
            n_routed_experts=first.experts,
            n_shared_experts=first.shared,
            first_k_dense_replace=len(dense),
            norm_topk_prob=router.combine == "renormalised",
            routed_scaling_factor=router.scale,
            n_group=router.groups,
            topk_group=router.groups_used,
            use_qk_norm=config.qk_norm,
            attention_bias=False,
            partial_rotary_factor=1.0,
        )
    plain = router.groups == 1 and not router.bias and router.scale == 1.0
    if first.kind != "top-k" or not plain:
        raise _refused(f"the {first.kind} router with {router!r}")
    normal = router.combine == "renormalised"
    if config.qk_norm and not first.shared and not windowed and router.combine in ("raw", "renormalised"):
        return transformers.Qwen3MoeConfig(
            **common,
            intermediate_size=config.intermediate_size,
            moe_intermediate_size=first.width,
            num_experts=first.experts,
            norm_topk_prob=normal,
            mlp_only_layers=dense,
            decoder_sparse_step=1,
        )
    if dense or config.qk_norm or not normal:
        raise _refused("dense layers, norms of queries and keys, or weights that are not renormalised, all together")
    if first.shared:
        if windowed:
            raise _refused("sliding attention beside shared experts")
        return transformers.GraniteMoeSharedConfig(
            **{name: value for name, value in common.items() if name != "head_dim"},
            intermediate_size=first.width,
            shared_intermediate_size=first.width * first.shared,
            num_local_experts=first.experts,
            attention_multiplier=config.head_dim**-0.5,
        )
    return transformers.MixtralConfig(
        **common,
        intermediate_size=first.width,
        num_local_experts=first.experts,
        sliding_window=config.sliding_window if windowed else None,
    )


def _same(layers: list[LayerSettings], sparse: list[LayerSettings], first: LayerSettings) -> None:
    """Stock architectures have the same parts in every layer."""
    for what in ("kind", "router", "experts", "width", "shared"):
        if any(getattr(layer, what) != getattr(first, what) for layer in sparse):
            raise _refused(f"layers that differ in {what}")
    if any(layer.attention != layers[0].attention for layer in layers):
        raise _refused("layers that differ in attention")
    if any(layer.residual is not None for layer in sparse):
        raise _refused("momentum over depth")
    if first.router.capacity is not None:
        raise _refused("a capacity")


def _refused(what: str) -> ModelError:
    return ModelError(
        f"no stock architecture has {what}",
        "It can be used as it is: transformers loads it once coterie is imported.",
    )


@torch.no_grad()
def as_stock(model: nn.Module) -> Any:
    """A new model of a stock architecture with these weights. Raises ModelError where there is none."""
    from transformers import AutoModelForCausalLM

    config: Any = model.config
    told = stock_config(config)
    stock = AutoModelForCausalLM.from_config(told, dtype=next(model.parameters()).dtype).eval()
    ours = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    theirs = dict(stock.named_parameters(remove_duplicate=False)) | dict(stock.named_buffers())
    left = set(ours)
    for name, target in theirs.items():
        if "inv_freq" in name:
            continue
        source, value = _source(name, ours)
        if value is None or value.shape != target.shape:
            raise ModelError(f"{type(stock).__name__} has {name}, for which there is nothing in the model")
        target.copy_(value)
        left -= source
    if left := {name for name in left if "noise_weight" not in name}:
        raise ModelError(f"{type(stock).__name__} has no place for {', '.join(sorted(left)[:3])}")
    return stock


def _source(name: str, ours: dict[str, Tensor]) -> tuple[set[str], Tensor | None]:
    """What of ours a stock tensor is made of."""
    if name in ours:
        return {name}, ours[name]
    renamed = name.replace(".block_sparse_moe.", ".mlp.").replace("mlp.router.", "mlp.gate.")
    renamed = renamed.replace(".mlp.gate.layer.", ".mlp.gate.").replace(".shared_mlp.", ".mlp.shared_experts.")
    if renamed.endswith("shared_experts.input_linear.weight"):  # gate and up in one
        parts = [renamed.replace("input_linear", part) for part in ("gate_proj", "up_proj")]
        return set(parts), torch.cat([ours[part] for part in parts])
    renamed = renamed.replace("output_linear", "down_proj")
    return {renamed}, ours.get(renamed)


def export_stock(folder: Path, out: Path, *, overwrite: bool = False) -> Stock:
    """Write a decoder of ours as a stock checkpoint. Raises ModelError where there is no such architecture."""
    from transformers import AutoConfig

    from coterie.architectures.decoder import CoterieForCausalLM

    config = AutoConfig.from_pretrained(folder)
    if not isinstance(config, CoterieConfig):
        raise ModelError(f"{folder.name} is a {config.model_type} checkpoint", "--form stock is for decoders of ours.")
    told = stock_config(config)
    with Workspace(out, {"stock": config.to_dict()}, overwrite=overwrite) as work:
        stock = as_stock(CoterieForCausalLM.from_pretrained(folder).eval())
        names = save_whole(stock, folder, work.folder)
        sizes = [sum(f.stat().st_size for f in place.glob("*.safetensors")) for place in (folder, work.folder)]
        work.publish(names)
    return Stock(out, told.model_type, sizes[0], sizes[1], [])
