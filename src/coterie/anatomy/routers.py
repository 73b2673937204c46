"""Put any router, and any residual rule, into any MoE model; say what was put, and rebuild it.

A block calls its router and takes (logits, weights, index) from it: ours answers the same, so it takes the place of the
one that was there. What a token's outputs are called "no expert" (see `routing.base`) costs nothing in any experts
implementation. A changed model is saved by plain `save_pretrained` after `remember`, and rebuilt by plain
`from_pretrained` once `coterie` is imported, as the header in its config.json describes it:

    "layers": {"3": {"router": {"kind": "adamoe", "settings": {"top_k": 3, "nulls": 8}},
                     "residual": {"rule": "heavy-ball", "mu": 0.7}}}

Which router is good for what is not known here.
"""

# T tokens, H hidden, E experts, K experts per token

from __future__ import annotations

import importlib.metadata
from collections.abc import Collection, Mapping
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from coterie.anatomy.layers import MoELayer, any_moe_layers, decoder_layers, moe_layers
from coterie.anatomy.slicing import slice_names
from coterie.errors import CheckpointError, UsageError
from coterie.experts.mapped import expert_map
from coterie.routing import record
from coterie.routing.base import Router, RouterSettings, checked, router_class
from coterie.routing.permuted import Permuted
from coterie.routing.residual import Momentum, Residual, addition, attach, feeding_norm, momentum


class RouterForm(BaseModel):
    """The router of one layer. settings : what differs from the defaults of its kind."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    kind: str
    settings: dict[str, Any] = {}


class ResidualForm(BaseModel):
    """The residual rule of one layer. norm : child of the decoder layer that feeds the experts, for rules that look at
    it. scale : what the decoder layer multiplies before it adds."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    settings: dict[str, Any] = {}
    norm: str | None = None
    scale: float = 1.0


# -- by users ----------------------------------------------------------------------------------------------------------


def put_routers(
    model: nn.Module,
    kind: str,
    settings: Mapping[str, Any] | None = None,
    *,
    layers: Collection[int] | None = None,
    seed: int = 0,
) -> list[str]:
    """Give MoE layers of a model in memory another router. Returns notes on what could not be carried over.

    Parameters
    ----------
    kind : str
        Name of a router, see `coterie methods`.
    settings : mapping, optional
        Of the router. Where they do not say it, the layer's own `top_k` stays, and for routers that can start as the
        one that was there, how its weights are combined.
    layers : collection of int, optional
        Decoder layers; None: all with experts.
    seed : int
        Of fresh weights.

    Raises UsageError for settings that are wrong or do not fit, ModelError for layers that have no experts.
    """
    notes: list[str] = []
    chosen = _chosen(model, layers)
    cls = router_class(kind)
    _forget_shared(model, chosen)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in chosen:
            told = {**_as_before(model, layer, cls), **(settings or {})}
            old = layer.router
            router = place_router(model, layer, RouterForm(kind=kind, settings=told))
            router.reset(_spread(model))
            weight_EH = getattr(old, "weight", None)
            adopted = isinstance(weight_EH, Tensor) and weight_EH.shape == (layer.router_size, router.hidden_dim)
            if not (adopted and router.adopt(weight_EH.detach())):  # type: ignore[union-attr]
                notes.append(f"layer {layer.index}: the {kind} router starts from fresh weights")
            notes += _biases(layer, old, router)
            router.train(model.training)
    _equip(model)
    remember(model)
    return notes


def put_residual(
    model: nn.Module, settings: Mapping[str, Any] | Residual, *, layers: Collection[int] | None = None
) -> None:
    """Let the MoE layers of a model in memory add their outputs with momentum over depth. Once a layer.

    How layers add is found by running single tokens, which every router of the model must be able to route by then.
    Raises UsageError for settings that are wrong, ModelError where a rule needs a norm that a layer does not have, or
    where layers do not simply add what their experts give.
    """
    told = settings if isinstance(settings, Residual) else checked("residual", Residual, dict(settings))
    chosen = _chosen(model, layers)
    if had := [layer.index for layer in chosen if momentum(layer.block) is not None]:
        raise UsageError(
            f"layers {', '.join(map(str, had))} have momentum already",
            "Change it with momentum(block).dial(mu=...), then remember(model).",
        )
    scales = [addition(model, layer.decoder, layer.block, layer.index) for layer in chosen]
    _equip(model)
    for order, (layer, scale) in enumerate(zip(chosen, scales, strict=True)):
        rule = Momentum(told, layer.index, order, scale)
        norm = feeding_norm(model, layer.decoder, layer.block) if rule.looks_at_stream else None
        attach(layer.block, norm, rule)
    remember(model)


@torch.no_grad()
def fold_permutations(model: nn.Module) -> list[int]:
    """Let experts change places, so that `permuted` routers need no permutation: their inner routers then stand in the
    model, which does what it did. Returns the layers where that was so.

    To be done once the search is over; afterwards there is nothing to search for any more.
    """
    folded: list[int] = []
    for layer in moe_layers(model):
        if not isinstance(layer.router, Permuted):
            continue
        inner, order = layer.router.fold()
        if (target := expert_map(layer.experts)) is not None:
            layer.experts._coterie_map = [target[e] for e in order]  # type: ignore[assignment]
        else:
            tensors = dict([*model.named_parameters(), *model.named_buffers()])
            for name, dim in slice_names(layer).items():
                if name.startswith(f"{layer.experts_name}."):
                    tensor = tensors[name]
                    tensor.copy_(tensor.index_select(dim, torch.tensor(order, device=tensor.device)))
        layer.block.set_submodule(layer.router_name.rpartition(".")[2], inner)
        shared = getattr(_base(model), record.SHARED, {})
        if Permuted.kind in shared and inner.kind not in shared:
            record.share(_base(model), inner.kind, shared[Permuted.kind])
        folded.append(layer.index)
    if Permuted.kind in (shared := getattr(_base(model), record.SHARED, {})):
        del shared[Permuted.kind]
    remember(model)
    return folded


def remember(model: nn.Module) -> None:
    """Write routers and residual rules, as they are now, into the model's config, so that `save_pretrained` saves them.

    Done by `put_routers` and `put_residual`; needed again after settings were changed in use (`Router.dial`).
    """
    from coterie.anatomy.forms import form_of
    from coterie.anatomy.uneven import marked

    config: Any = model.config
    held: Any = getattr(config, "quantization_config", None)
    entry = held.to_dict() if hasattr(held, "to_dict") else held
    found = any_moe_layers(model)
    if hasattr(config, "remember"):  # a decoder of ours says in its own config what it is made of
        ours = {layer.index: layer.router for layer in found if isinstance(layer.router, Router)}
        rules = {layer.index: rule for layer in found if (rule := momentum(layer.block)) is not None}
        config.remember(
            {index: {"kind": router.kind, **_told(router.settings)} for index, router in ours.items()},
            {index: _told(rule.residual) for index, rule in rules.items()},
        )
    layers = {str(layer.index): told for layer in found if (told := form_of(layer).describe())}
    if not layers:
        return
    config.quantization_config = {**marked(entry, importlib.metadata.version("coterie")), "layers": layers}


def placed_routers(model: nn.Module) -> dict[int, Router]:
    """Our routers in a model, by decoder layer."""
    return {layer.index: layer.router for layer in moe_layers(model) if isinstance(layer.router, Router)}


# -- by the header -----------------------------------------------------------------------------------------------------


def router_form(layer: MoELayer) -> RouterForm | None:
    """What describes the router of a layer; None for one that belongs to the architecture."""
    router = layer.router
    if not isinstance(router, Router) or getattr(layer.block, "_coterie_native", False):
        return None
    return RouterForm(kind=router.kind, settings=_told(router.settings))


def residual_form(layer: MoELayer) -> ResidualForm | None:
    """What describes the residual rule of a layer; None for the plain one or that of the architecture."""
    rule = momentum(layer.block)
    if rule is None or getattr(layer.block, "_coterie_native", False):
        return None
    norm = None
    if rule.looks_at_stream:
        hooks = {n: [getattr(h, "rule", None) for h in m._forward_pre_hooks.values()] for n, m in _children(layer)}
        norm = next(n for n, rules in hooks.items() if any(r is rule for r in rules))
    return ResidualForm(settings=_told(rule.residual), norm=norm, scale=rule.scale)


def place_router(model: nn.Module, layer: MoELayer, form: RouterForm) -> Router:
    """Stand a router, without weights of its own yet, where the layer's router is.

    Raises UsageError for settings that are wrong or do not fit the layer.
    """
    cls = router_class(form.kind)
    told = checked(form.kind, cls.Settings, dict(form.settings))
    how: dict[str, Any] = {"device": layer.router_like.device, "dtype": layer.router_like.dtype}
    router = cls(layer.bank.hidden_size, layer.router_size, told, layer=layer.index, **how)
    layer.block.set_submodule(layer.router_name.rpartition(".")[2], router)
    layer.experts._is_expert_parallel = True  # type: ignore[assignment]  # transformers' own forwards then expect "no expert"
    module = cls.shared_module(layer.bank.hidden_size, told, **how)
    if module is not None:
        _share(model, layer, form.kind, module)
    if cls.needs_attention:
        record.watch_attention(layer.decoder, layer.index)
    else:
        record.let_attention_be(layer.decoder)
    text: Any = model.config.get_text_config(decoder=True)  # type: ignore[union-attr,operator]
    if hasattr(text, "output_router_logits"):  # the architecture's own balance loss expects its own routers
        text.output_router_logits = False
    return router


def apply_routing(model: nn.Module, routers: Mapping[int, RouterForm], residuals: Mapping[int, ResidualForm]) -> None:
    """Rebuild routers and residual rules of a freshly built model. Raises CheckpointError where they do not fit."""
    layers = {layer.index: layer for layer in moe_layers(model)}
    try:
        for index, form in routers.items():
            place_router(model, layers[index], form)
        for order, (index, rule) in enumerate(sorted(residuals.items())):
            told = checked("residual", Residual, dict(rule.settings))
            children = dict(_children(layers[index]))
            if rule.norm is not None and rule.norm not in children:
                raise CheckpointError(f"config.json: layer {index} has no part {rule.norm!r}")
            norm = None if rule.norm is None else children[rule.norm]
            attach(layers[index].block, norm, Momentum(told, index, order, rule.scale))
    except UsageError as error:
        raise CheckpointError(f"config.json: {error.message}", error.hint) from error
    if routers or residuals:
        _equip(model)


def _share(model: nn.Module, layer: MoELayer, kind: str, module: nn.Module) -> None:
    """Hang `module` beside the layers, unless there is such a one already. Raises UsageError where it does not fit."""
    base = _base(model)
    shared = getattr(base, record.SHARED, None)
    if shared is None or kind not in shared:
        with torch.no_grad():
            _reset(module, _spread(model))
        record.share(base, kind, module)
        return
    found, wanted = ({n: tuple(p.shape) for n, p in m.named_parameters()} for m in (shared[kind], module))
    if found != wanted:
        raise UsageError(
            f"the {kind} routers of a model share one part; layer {layer.index} needs another one ({wanted}) than the"
            f" layers before it ({found})",
            "Give all layers the same sizes.",
        )


def _forget_shared(model: nn.Module, chosen: Collection[MoELayer]) -> None:
    """Drop what only routers shared that are about to be replaced."""
    base = _base(model)
    shared = getattr(base, record.SHARED, None)
    if shared is None:
        return
    replaced = {layer.index for layer in chosen}
    kinds = {router.kind for index, router in placed_routers(model).items() if index not in replaced}
    for kind in set(shared) - kinds:
        del shared[kind]


def show_attention(model: nn.Module) -> None:
    """Choose the attention that tells its probabilities, where a router of the model looks at them."""
    if any(isinstance(module, Router) and module.needs_attention for module in model.modules()):
        model.set_attn_implementation("eager")  # type: ignore[operator]


def check_loaded(model: nn.Module) -> None:
    """Raise CheckpointError if the checkpoint just loaded did not hold all weights of our routers: nobody could tell
    from the outputs that they are random."""
    base = _base(model)
    owners: dict[str, nn.Module] = {f"layer {index}": router for index, router in placed_routers(model).items()}
    owners |= {f"shared by {kind}": module for kind, module in getattr(base, record.SHARED, nn.ModuleDict()).items()}
    for where, module in owners.items():
        for name, tensor in module.state_dict(keep_vars=True).items():
            if not getattr(tensor, "_is_hf_initialized", False):
                raise CheckpointError(
                    f"the checkpoint lacks {name} of the router ({where})",
                    "Its header names a router whose weights are not in its files: fetch it again.",
                )


def _children(layer: MoELayer) -> list[tuple[str, nn.Module]]:
    return list(layer.decoder.named_children())


def _told(settings: BaseModel) -> dict[str, Any]:
    return settings.model_dump(mode="json", exclude_defaults=True)


def _chosen(model: nn.Module, layers: Collection[int] | None) -> list[MoELayer]:
    found = moe_layers(model)
    known = {layer.index for layer in found}
    if layers is not None and (wrong := sorted(set(layers) - known)):
        raise UsageError(
            f"layers {', '.join(map(str, wrong))} have no experts", f"Layers with experts: {sorted(known)}."
        )
    return [layer for layer in found if layers is None or layer.index in layers]


def _base(model: nn.Module) -> nn.Module:
    """The module that holds the list of decoder layers."""
    prefix, _ = decoder_layers(model)
    return model.get_submodule(prefix.rpartition(".")[0])


def _equip(model: nn.Module) -> None:
    _, layers = decoder_layers(model)
    record.equip(model, _base(model), list(layers))


def _spread(model: nn.Module) -> float:
    """Standard deviation of fresh weights."""
    text: Any = model.config.get_text_config(decoder=True)  # type: ignore[union-attr,operator]
    return float(getattr(text, "initializer_range", None) or 0.02)


def _reset(module: nn.Module, std: float) -> None:
    """Matrices are drawn, biases start at 0."""
    for name, parameter in module.named_parameters():
        if parameter.device.type == "meta":
            continue
        if "bias" in name:
            parameter.zero_()
        else:
            parameter.normal_(0.0, std)


@torch.no_grad()
def _as_before(model: nn.Module, layer: MoELayer, cls: type[Router]) -> dict[str, Any]:
    """What the router that is replaced says about itself: by its attributes and by what it does with random tokens."""
    fields = cls.Settings.model_fields
    found: dict[str, Any] = {}
    if "top_k" in fields and "most" not in fields:
        found["top_k"] = layer.top_k
    text: Any = model.config.get_text_config(decoder=True)  # type: ignore[union-attr,operator]
    if "vocabulary" in fields:
        found["vocabulary"] = int(text.vocab_size)
    if "heads" in fields:
        found["heads"] = int(text.num_attention_heads)
    if "groups" in fields and layer.groups > 1:
        found |= {"groups": layer.groups, "groups_used": layer.groups_used}
    if "scale" in fields and "combine" in fields and isinstance(layer.router, Router):
        before = layer.router.settings
        if cls.adopt is not Router.adopt or before.combine == "renormalised":
            found |= {n: getattr(before, n) for n in ("combine", "scale") if hasattr(before, n)}
    elif "scale" in fields and "combine" in fields:
        parameter = layer.router_like
        if parameter.device.type != "meta" and expert_map(layer.experts) is None:
            generator = torch.Generator().manual_seed(0)
            x_TH = torch.randn(64, layer.bank.hidden_size, generator=generator).to(parameter)
            try:
                sum_T = layer.router(x_TH)[1].float().sum(-1)
            except TypeError:  # families whose block hands its router more than tokens
                return found
            if (sum_T - sum_T.mean()).abs().max() < 1e-2 * sum_T.mean():
                found |= {"combine": "renormalised", "scale": round(float(sum_T.mean()), 3)}
            elif cls.adopt is not Router.adopt:
                found["combine"] = "raw"
    return found


@torch.no_grad()
def _biases(layer: MoELayer, old: nn.Module, router: Router) -> list[str]:
    """Carry a selection bias over; tell of other numbers per expert that the new router has no place for."""
    name = "e_score_correction_bias"
    before, after = getattr(old, name, None), getattr(router, name, None)
    if isinstance(before, Tensor) and isinstance(after, Tensor) and before.shape == after.shape:
        after.copy_(before)
        before = None
    tensors = [*old.named_parameters(), *old.named_buffers(), *layer.block.named_parameters(recurse=False)]
    tensors += layer.block.named_buffers(recurse=False)
    left = [n for n, p in tensors if n not in ("weight", name) and p.numel() == layer.router_size and bool(p.any())]
    if any(isinstance(b, Tensor) and bool(b.any()) for b in (before, getattr(layer.block, name, None))):
        left.append(name)
    return [f"layer {layer.index}: {', '.join(left)} of its router is not carried over"] if left else []


__all__ = [
    "Momentum",
    "Residual",
    "RouterSettings",
    "apply_routing",
    "fold_permutations",
    "place_router",
    "placed_routers",
    "put_residual",
    "put_routers",
    "remember",
    "residual_form",
    "router_form",
]
