"""The packed forms checkpoints may be stored in, by the `quant_method` of their config: one file each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from coterie.errors import CheckpointError
from coterie.streaming.stored.form import StoredForm
from coterie.streaming.stored.fp8 import BlockFP8
from coterie.streaming.stored.mxfp4 import MXFP4

FORMS: dict[str, type[StoredForm]] = {form.name: form for form in (BlockFP8, MXFP4)}


def form_of(entry: Any, name: str) -> StoredForm:
    """The form that a `quantization_config` describes. name : of the checkpoint, for messages.

    Raises CheckpointError for a form that cannot be read here, or an entry that makes no sense.
    """
    method = entry.get("quant_method", "unknown") if isinstance(entry, Mapping) else entry
    form = FORMS.get(method) if isinstance(method, str) else None
    if form is None or not isinstance(entry, Mapping):
        told = ", ".join(f"{form.name} ({form.told})" for form in FORMS.values())
        raise CheckpointError(
            f"{name} is quantized ({method}); of quantized checkpoints, only {told} can be streamed",
            "Start from the unquantized checkpoint and quantize the result.",
        )
    return form(entry)
