"""Read a checkpoint's config and choose how to compute, refusing what cannot be right before anything is built."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoConfig

from coterie.anatomy.uneven import check_header, is_coterie
from coterie.errors import CheckpointError, CoterieError, UsageError
from coterie.streaming.checkpoint import Checkpoint
from coterie.streaming.stored import form_of
from coterie.streaming.stored.form import StoredForm

COMPUTE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_compute_dtype(name: str, device: str, stored: torch.dtype) -> torch.dtype:
    """The dtype activations are computed in.

    "auto" is float32 on a CPU (narrow matrix products are slower there, see benchmarks/cpu_choices.py, and a plan
    must not depend on a timing) and the checkpoint's own dtype on an accelerator.
    """
    if name == "auto":
        return torch.float32 if torch.device(device).type == "cpu" else stored
    if name not in COMPUTE_DTYPES:
        raise UsageError(f"unknown compute dtype {name!r}", f"Choose one of auto, {', '.join(COMPUTE_DTYPES)}.")
    return COMPUTE_DTYPES[name]


def read_config(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> Any:
    """The checkpoint's config as transformers reads it. Raises CheckpointError where that fails or makes no sense."""
    raw = checkpoint.raw_config
    if raw.get("auto_map") and not trust_remote_code:
        known = str(raw.get("model_type")) in _known_model_types()
        if not known:
            raise CheckpointError(
                f"{checkpoint.folder.name} needs code that comes with the checkpoint",
                "Read that code first; pass --trust-remote-code if you trust it.",
            )
    stored_form(checkpoint)
    for depth in _entries(raw, "num_hidden_layers"):
        _check_depth(depth, checkpoint)  # before config classes make lists of that length
    try:
        config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=trust_remote_code)
        depth = config.get_text_config(decoder=True).num_hidden_layers
    except CoterieError:
        raise
    except Exception as error:  # config classes raise anything from KeyError to their own validation errors
        raise CheckpointError(f"config.json cannot be used: {one_line(error)}") from error
    _check_depth(depth, checkpoint)
    return config


def stored_form(checkpoint: Checkpoint) -> StoredForm | None:
    """The packed form that config.json says weights are stored in; None for ordinary numbers.

    Raises CheckpointError for a quantization that cannot be read, and for an unusable header of our own.
    """
    for entry in _entries(checkpoint.raw_config, "quantization_config"):
        if isinstance(entry, dict) and is_coterie(entry):
            check_header(entry)
            entry = entry.get("packed")
        if entry:
            return form_of(entry, checkpoint.folder.name)
    return None


def _entries(raw: dict[str, Any], name: str) -> Iterator[Any]:
    """Values of `name` in a raw config and in the configs nested in it, as multimodal checkpoints have them."""
    if raw.get(name) is not None:
        yield raw[name]
    for key, nested in raw.items():
        if key.endswith("_config") and key != name and isinstance(nested, dict) and nested.get(name) is not None:
            yield nested[name]


def _check_depth(depth: Any, checkpoint: Checkpoint) -> None:
    if not isinstance(depth, int) or not 0 < depth <= len(checkpoint.tensors):
        raise CheckpointError(
            f"config.json claims {depth} layers, the checkpoint has {len(checkpoint.tensors)} tensors",
            "Config and weights do not belong together.",
        )


def _known_model_types() -> set[str]:
    from transformers import CONFIG_MAPPING

    return set(CONFIG_MAPPING.keys())


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"
