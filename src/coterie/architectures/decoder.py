"""Coterie's own decoder: pre-norm, rotary, grouped-query attention, and MoE layers made of the toolkit's parts.

It is a `PreTrainedModel` of model type "coterie", so that `AutoModelForCausalLM` builds, loads, saves and generates it
once `coterie` is imported. Its MoE block follows the contract of all others (a router, fused experts, shared experts),
so everything in the toolkit that works on a model works on it. It keeps a record of every call (`routing.record`): so
routers see what happened in other layers, and balancing terms reach the loss.

What each layer is made of is the config's business, how tokens are routed the routers'.
"""

# B batch, L sequence, P + L = S with cached tokens, T = B*L tokens, H hidden, A heads, D head size, I intermediate,
# E experts, K experts per token, V vocabulary

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.integrations.moe import use_experts_implementation
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from coterie.architectures.config import CoterieConfig, LayerSettings
from coterie.architectures.head_loss import IGNORED, head_loss
from coterie.balancing.base import Balance
from coterie.experts import training
from coterie.experts.forward import experts_forward
from coterie.routing import record, residual
from coterie.routing.base import Router, router_class


class CoterieRMSNorm(nn.Module):
    """x / rms(x) * weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class CoterieRotary(nn.Module):
    """Cosines and sines [B, L, D] of rotary positions; sines of the first half are those of the other way round."""

    def __init__(self, config: CoterieConfig) -> None:
        super().__init__()
        self.pairs, self.theta = config.head_dim // 2, config.rope_theta

    def forward(self, x: Tensor, positions_BL: Tensor) -> tuple[Tensor, Tensor]:
        steps = torch.arange(self.pairs, dtype=torch.float32, device=x.device) / self.pairs
        angle_BLP = positions_BL[..., None].float() * self.theta**-steps
        cos_BLP, sin_BLP = angle_BLP.cos(), angle_BLP.sin()
        return torch.cat([cos_BLP, cos_BLP], -1).to(x.dtype), torch.cat([-sin_BLP, sin_BLP], -1).to(x.dtype)


def rotated(x_BALD: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Queries or keys, turned by their positions."""
    cos, sin = (t[:, None] for t in turn)
    return x_BALD * cos + x_BALD.roll(x_BALD.shape[-1] // 2, -1) * sin  # the halves change places


def eager_attention(
    module: CoterieAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention that tells its probabilities, [B, A, L, S]."""
    key, value = (t.repeat_interleave(module.num_key_value_groups, 1) for t in (key, value))
    score_BALS = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        score_BALS = score_BALS + attention_mask
    probability_BALS = score_BALS.softmax(-1, dtype=torch.float32).to(query.dtype)
    output = F.dropout(probability_BALS, dropout, module.training) @ value
    return output.transpose(1, 2), probability_BALS


class CoterieAttention(nn.Module):
    """Grouped-query attention over all tokens before, or over the last few."""

    def __init__(self, config: CoterieConfig, layer: LayerSettings, index: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.head_dim = config, index, config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling, self.is_causal = config.head_dim**-0.5, True
        self.sliding_window = config.sliding_window if layer.attention == "sliding" else None
        H, D = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(H, config.num_attention_heads * D, bias=False)
        self.k_proj = nn.Linear(H, config.num_key_value_heads * D, bias=False)
        self.v_proj = nn.Linear(H, config.num_key_value_heads * D, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * D, H, bias=False)
        if config.qk_norm:
            self.q_norm, self.k_norm = (CoterieRMSNorm(D, config.rms_norm_eps) for _ in range(2))

    def forward(
        self,
        hidden_states: Tensor,
        turn: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        B, L, _ = hidden_states.shape
        heads = (B, L, -1, self.head_dim)
        q, k, v = (p(hidden_states).view(heads) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = rotated(q.transpose(1, 2), turn), rotated(k.transpose(1, 2), turn), v.transpose(1, 2)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention
        )
        dropout = self.config.attention_dropout if self.training else 0.0
        output, probability = attend(
            self,
            q,
            k,
            v,
            attention_mask,
            dropout=dropout,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return self.o_proj(output.reshape(B, L, -1)), probability


class CoterieMLP(nn.Module):
    """A gated MLP: dense layers and shared experts."""

    def __init__(self, config: CoterieConfig, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


@use_experts_implementation
class CoterieExperts(nn.Module):
    """All routed experts of a layer in two tensors."""

    def __init__(self, config: CoterieConfig, experts: int, width: int) -> None:
        super().__init__()
        self.num_experts, self.hidden_dim, self.intermediate_dim = experts, config.hidden_size, width
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, config.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(experts, config.hidden_size, width))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return experts_forward(self, hidden_states, top_k_index, top_k_weights)


class CoterieMoE(nn.Module):
    """Router, routed experts, and perhaps shared ones."""

    _coterie_native = True  # the config says what it is made of

    def __init__(self, config: CoterieConfig, layer: LayerSettings, index: int) -> None:
        super().__init__()
        self.gate = router_class(layer.kind)(config.hidden_size, layer.experts, layer.router, layer=index)
        self.experts = CoterieExperts(config, layer.experts, layer.width)
        self.experts._is_expert_parallel = True  # type: ignore[assignment]  # transformers' own forwards then expect "no expert"
        self.shared_experts = CoterieMLP(config, layer.width * layer.shared) if layer.shared else None

    def forward(self, hidden_states: Tensor) -> Tensor:
        x_TH = hidden_states.view(-1, hidden_states.shape[-1])
        _, weight_TK, index_TK = self.gate(x_TH)
        y_TH = self.experts(x_TH, index_TK, weight_TK)
        if self.shared_experts is not None:
            y_TH = y_TH + self.shared_experts(x_TH)
        return y_TH.view(hidden_states.shape)  # type: ignore[no-any-return]


class CoterieDecoderLayer(GradientCheckpointingLayer):  # type: ignore[misc]
    def __init__(self, config: CoterieConfig, index: int) -> None:
        super().__init__()
        layer = config.settings_of(index)
        self.dropout = config.dropout
        self.self_attn = CoterieAttention(config, layer, index)
        self.mlp = CoterieMLP(config, config.intermediate_size) if layer.dense else CoterieMoE(config, layer, index)
        self.input_layernorm = CoterieRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = CoterieRMSNorm(config.hidden_size, config.rms_norm_eps)
        if isinstance(self.mlp, CoterieMoE):
            if router_class(layer.kind).needs_attention:
                record.watch_attention(self, index)
            if layer.residual is not None:
                order = sum(not config.settings_of(i).dense for i in range(index))
                rule = residual.Momentum(layer.residual, index, order)
                residual.attach(self.mlp, self.post_attention_layernorm, rule)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        x = hidden_states
        attended, _ = self.self_attn(self.input_layernorm(x), **kwargs)
        x = x + F.dropout(attended, self.dropout, self.training)
        return x + F.dropout(self.mlp(self.post_attention_layernorm(x)), self.dropout, self.training)


class CoteriePreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    config_class = CoterieConfig
    config: CoterieConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["CoterieDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = ["e_score_correction_bias"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": CoterieDecoderLayer, "attentions": CoterieAttention}

    @classmethod
    def is_custom_code(cls) -> bool:
        """No: else modules without tensors of their own are taken for initialised, and routers can be such."""
        return False

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """The fast one for training unless another is asked for."""
        found: str = super().get_correct_experts_implementation(requested_experts or training.NAME)
        return found

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """One that tells its probabilities where a router looks at them, unless another is asked for."""
        layers = [self.config.settings_of(index) for index in range(self.config.num_hidden_layers)]
        if requested_attention is None and any(router_class(layer.kind).needs_attention for layer in layers):
            requested_attention = "eager"
        found: str = super().get_correct_attn_implementation(requested_attention, is_init_check)
        return found

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, CoterieExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
        elif isinstance(module, CoterieRMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, Router):
            own = [*module.parameters(), *module.buffers()]
            if own and not all(getattr(t, "_is_hf_initialized", False) or t.device.type == "meta" for t in own):
                module.reset(std)


class CoterieModel(CoteriePreTrainedModel):
    """The decoder without a head."""

    def __init__(self, config: CoterieConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(CoterieDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = CoterieRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = CoterieRotary(config)
        self.gradient_checkpointing = False
        for index in range(config.num_hidden_layers):
            layer = config.settings_of(index)
            known = getattr(self, record.SHARED, {})
            if not layer.dense and layer.kind not in known:
                shared = router_class(layer.kind).shared_module(config.hidden_size, layer.router)
                if shared is not None:
                    record.share(self, layer.kind, shared)
        record.equip(self, self, list(self.layers))
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x_BLH = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            start = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = (torch.arange(x_BLH.shape[1], device=x_BLH.device) + start)[None]
        given: dict[str, Any] = {
            "config": self.config,
            "inputs_embeds": x_BLH,
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "position_ids": position_ids,
        }
        masks = {"full": create_causal_mask(**given)}
        if "sliding_attention" in self.config.layer_types:
            masks["sliding"] = create_sliding_window_causal_mask(**given)
        turn = self.rotary_emb(x_BLH, position_ids)
        seen: list[Tensor] = [x_BLH]
        for layer, kind in zip(self.layers, self.config.layer_types, strict=True):
            x_BLH = layer(
                x_BLH,
                turn=turn,
                attention_mask=masks[kind.removesuffix("_attention")],
                position_ids=position_ids,
                past_key_values=past_key_values,
                **{name: value for name, value in kwargs.items() if not name.startswith("output_")},
            )
            seen.append(x_BLH)
        x_BLH = self.norm(x_BLH)
        return MoeModelOutputWithPast(
            last_hidden_state=x_BLH,
            past_key_values=past_key_values,
            hidden_states=(*seen[:-1], x_BLH) if kwargs.get("output_hidden_states") else None,
        )


class CoterieForCausalLM(CoteriePreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """The decoder with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: CoterieConfig) -> None:
        super().__init__(config)
        self.model = CoterieModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        record.equip(self, self.model, [])
        if config.balancing:
            Balance.of(config.balancing).watch(self)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, L, V], and with labels [B, L] (-100: not predicted) the mean loss of the next tokens; in training
        the balancing terms are added to it. A model in training that is given labels makes no logits: its loss is
        computed chunk by chunk (`head_loss`), unless `logits_to_keep` asks for some."""
        loss_options = {k: kwargs.pop(k) for k in ("num_items_in_batch", "shift_labels") if k in kwargs}
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        x_BLH, logits_BLV, loss = output.last_hidden_state, None, None
        if labels is None or not self.training or logits_to_keep is not None:
            wanted = logits_to_keep or 0
            kept = slice(-wanted, None) if isinstance(wanted, int) else wanted
            logits_BLV = self.lm_head(x_BLH[:, kept])
        if labels is not None and logits_BLV is None:
            next_BL = loss_options.get("shift_labels")
            if next_BL is None:
                next_BL = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
            items = loss_options.get("num_items_in_batch")
            loss = head_loss(x_BLH, self.lm_head.weight, next_BL, items=items)
        elif labels is not None:
            loss = self.loss_function(logits_BLV, labels, self.config.vocab_size, **loss_options)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits_BLV,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
        )
