"""The one table of what the contract cannot say, and the list of architectures that follow the contract.

A row is needed only where a family keeps the number of experts under an unusual config name, or routes in a way that
has no meaning once experts are gone. Each row has a test. Everything else is found in the model itself.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Config fields that hold the number of routed experts, under all the names families use.
COUNT_FIELDS = (
    "num_local_experts",
    "num_experts",
    "n_routed_experts",
    "moe_num_experts",
    "num_routed_experts",
    "moe_num_routed_experts",
)


@dataclass(frozen=True)
class Quirks:
    """What the contract cannot say about one model type.

    unsliceable : why experts cannot be removed, or "".
    example : config fields without which a default config builds no MoE model; used only to examine the family.
    """

    unsliceable: str = ""
    example: tuple[tuple[str, Any], ...] = ()


QUIRKS: dict[str, Quirks] = {
    "deepseek_v4": Quirks(unsliceable="its first layers choose experts from a stored table of token ids, not by score"),
    "hunyuan_v1_moe": Quirks(example=(("num_experts", 16), ("moe_topk", 2), ("head_dim", 128))),
    "deepseek_v2": Quirks(example=(("num_experts_per_tok", 6),)),
    "lfm2_moe": Quirks(
        example=(("layer_types", ["conv", "full_attention"] * 2), ("num_hidden_layers", 4), ("num_dense_layers", 1))
    ),
    "dots1": Quirks(example=(("n_routed_experts", 16), ("num_experts_per_tok", 4), ("n_shared_experts", 1))),
    "gemma4": Quirks(
        example=(("enable_moe_block", True), ("num_experts", 16), ("top_k_experts", 4), ("moe_intermediate_size", 64))
    ),
}


def quirks_of(model_type: str) -> Quirks:
    """The row of `model_type`; most families need none."""
    return QUIRKS.get(model_type.removesuffix("_text"), Quirks())


@dataclass(frozen=True)
class Architecture:
    """One family of the installed transformers: does it follow the contract, and what was found in its default shape.

    verdict is "works", "read-only" (found, but experts cannot be removed) or "no", with the reason.
    """

    model_type: str
    model_class: str
    verdict: str
    reason: str = ""
    moe_layers: int = 0
    layers: int = 0
    experts: int = 0
    top_k: int = 0
    shared: bool = False
    groups: int = 1


def discover(progress: Callable[[str, int, int], None] = lambda name, done, total: None) -> Iterator[Architecture]:
    """Every architecture of the installed transformers that has fused experts, examined on the meta device.

    `progress(model_type, done, total)` is called before each. Nothing is downloaded or allocated.
    """
    names = list(candidates())
    for done, (model_type, model_class) in enumerate(names):
        progress(model_type, done, len(names))
        yield examine(model_type, model_class)


def candidates() -> Iterator[tuple[str, str]]:
    """(model_type, model class) of all generative families whose modelling file uses the fused-experts contract."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    mappings = (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    folder = Path(inspect.getfile(transformers)).parent / "models"
    seen: set[str] = set()
    for mapping in mappings:
        for model_type, names in mapping.items():
            model_class = names if isinstance(names, str) else names[0]
            owner = getattr(transformers, model_class, None)
            if owner is None or model_class in seen:
                continue
            file = folder / owner.__module__.split(".")[2] / f"{owner.__module__.rsplit('.', 1)[-1]}.py"
            if file.exists() and "use_experts_implementation" in file.read_text(encoding="utf-8"):
                seen.add(model_class)
                yield model_type, model_class


def examine(model_type: str, model_class: str) -> Architecture:
    """Build one family in its default shape on the meta device and look for its MoE layers."""
    import torch
    import transformers

    from coterie.anatomy.layers import moe_layers
    from coterie.errors import CoterieError

    cls = getattr(transformers, model_class)
    try:
        example = dict(quirks_of(model_type).example)
        config_class = cls.config_class
        composite = "text_config" in config_class.sub_configs
        config = config_class(**({} if composite else example))
        if composite:
            for name, value in example.items():
                setattr(config.get_text_config(decoder=True), name, value)
        with torch.device("meta"):
            model = cls(config)
        layers = moe_layers(model)
    except CoterieError as error:
        return Architecture(model_type, model_class, "no", error.message)
    except Exception as error:  # a default config that its own model cannot build; any exception is possible there
        return Architecture(model_type, model_class, "no", f"default config does not build: {type(error).__name__}")
    text = config.get_text_config(decoder=True)
    reason, first = quirks_of(text.model_type).unsliceable, layers[0]
    return Architecture(
        model_type,
        model_class,
        "read-only" if reason else "works",
        reason,
        moe_layers=len(layers),
        layers=text.num_hidden_layers,
        experts=first.num_experts,
        top_k=first.top_k,
        shared=bool(first.shared),
        groups=first.groups,
    )


def model_class_of(config: object) -> type:
    """The transformers class a checkpoint's config names, or the one its model type maps to for text generation."""
    transformers = importlib.import_module("transformers")
    for name in getattr(config, "architectures", None) or []:
        cls = getattr(transformers, name, None)
        if isinstance(cls, type):
            return cls
    cls = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if cls is None:
        from coterie.errors import ModelError

        raise ModelError(
            f"no text model in this transformers ({transformers.__version__}) for config {type(config).__name__}",
            "Name the model class under `architectures` in config.json, or install a newer transformers.",
        )
    return cls if isinstance(cls, type) else cls[0]
