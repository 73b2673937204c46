"""Groups of attention heads that can be taken out: one key and value head with all query heads that read it.

Found by shape, not by model: a decoder layer's attention must be four linear layers, of which the query projection has
heads * head_dim rows, key and value have kv_heads * head_dim, and the output projection takes what query heads give.
Whatever else lies in the module must belong to single heads. Everything that does not fit is refused with the reason,
because a wrong guess would give a model that runs and is wrong. Decoder layers without attention (convolutions, state
spaces) have no such groups and stay as they are.
"""

# H hidden, D head dimension

from __future__ import annotations

from torch import nn

from coterie.anatomy.layers import decoder_layers
from coterie.anatomy.widths import Axis, Units
from coterie.errors import ModelError

_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def head_groups(model: nn.Module) -> dict[int, Units]:
    """{decoder layer: its groups of heads}. Raises ModelError where attention is built in another way."""
    prefix, layers = decoder_layers(model)
    config = model.config.get_text_config(decoder=True)  # type: ignore[union-attr,operator]
    heads = int(config.num_attention_heads)
    groups = getattr(config, "num_key_value_heads", None) or heads
    found = {}
    for index, layer in enumerate(layers):
        modules = {f"{prefix}.{index}.{path}": m for path, m in layer.named_modules() if _is_attention(m)}
        if len(modules) > 1:
            raise ModelError(f"decoder layer {index} has {len(modules)} attentions: {', '.join(modules)}", _HINT)
        for path, module in modules.items():
            found[index] = _groups(path, module, index, heads, int(groups), int(config.hidden_size))
    if not found:
        raise ModelError(f"{type(model).__name__} has no attention with key and value heads in its layers", _HINT)
    return found


_HINT = "Leave kv_heads out: experts can be narrowed without."


def _is_attention(module: nn.Module) -> bool:
    return hasattr(module, "num_key_value_groups") or all(hasattr(module, name) for name in _PROJECTIONS)


def _groups(path: str, module: nn.Module, index: int, heads: int, groups: int, hidden: int) -> Units:
    def refuse(reason: str) -> ModelError:
        return ModelError(f"groups of heads of {path} cannot be removed: {reason}", _HINT)

    linear = {name: child for name, child in module.named_children() if isinstance(child, nn.Linear)}
    if any("kv_a_proj" in name or "kv_b_proj" in name for name, _ in module.named_children()):
        raise refuse("it is a latent attention (MLA), whose heads share one compressed key and value")
    if missing := [name for name in _PROJECTIONS if name not in linear]:
        raise refuse(f"it has no {', '.join(missing)}")
    rest = [name for name in linear if name not in _PROJECTIONS]
    if len(rest) != 1:
        raise refuse(f"one projection was expected beside query, key and value, not {len(rest)}")
    if heads % groups:
        raise refuse(f"{heads} query heads do not divide into {groups} groups")
    out, size = rest[0], heads // groups
    D = int(getattr(module, "head_dim", 0) or linear["k_proj"].out_features // groups)
    wanted = {"q_proj": (heads * D, hidden), "k_proj": (groups * D, hidden), "v_proj": (groups * D, hidden)}
    wanted[out] = (hidden, heads * D)
    for name, shape in wanted.items():
        if tuple(linear[name].weight.shape) != shape:
            raise refuse(f"{name} has shape {list(linear[name].weight.shape)} instead of {list(shape)}")
    axes = []
    for name in _PROJECTIONS:
        block = (size if name == "q_proj" else 1) * D
        axes += [
            Axis(f"{path}.{name}.{tensor}", 0, groups, block=block) for tensor, _ in linear[name].named_parameters()
        ]
    axes.append(Axis(f"{path}.{out}.weight", 1, groups, block=size * D))
    for name, parameter in module.named_parameters():
        owner = name.partition(".")[0]
        if owner in linear:
            continue
        if "." not in name and parameter.shape == (heads,):  # one number per head, as GPT-OSS's sinks
            axes.append(Axis(f"{path}.{name}", 0, groups, block=size))
        elif parameter.numel() != D:  # norms of single heads are shared by all heads, and stay
            raise refuse(f"{name} works on all heads together, so that dropping some would change what the others do")
    return Units("heads", index, path, 1, groups, tuple(axes))
