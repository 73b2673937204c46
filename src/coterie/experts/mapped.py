"""Experts that several of a router's outputs share: an expert map between router and experts.

A router may name more experts than are stored (merged experts, M-SMoE arXiv:2310.01334): it keeps all its outputs, and
`map[e]` says which stored expert stands for the expert e it names. Weights pass as they are: where two of a token's
experts share one stored expert, its output is added twice. Ids beyond the map ("no expert") stay no expert.

It works in front of any experts implementation, for it only changes the ids that an experts module receives.
"""

# T tokens, K slots per token, E stored experts

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def expert_map(module: nn.Module) -> list[int] | None:
    """The stored expert of each router output, or None where they are the same."""
    return getattr(module, "_coterie_map", None)


def redirect(module: nn.Module, target: Sequence[int]) -> None:
    """From now on id e is run by the stored expert target[e]. Once a module; its weights must already fit."""
    if expert_map(module) is not None:
        raise ValueError("these experts have a map already")
    module._coterie_map = [int(e) for e in target]  # type: ignore[assignment]
    module.register_forward_pre_hook(_mapped, with_kwargs=True)


def mapped_ids(target: Sequence[int], index_TK: Tensor) -> Tensor:
    """Ids of stored experts for ids of router outputs; whatever lies beyond the map becomes "no expert"."""
    stored = max(target) + 1
    table = torch.tensor([*target, stored], device=index_TK.device, dtype=index_TK.dtype)
    return table[index_TK.clamp(max=len(target))]


def _mapped(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    target = expert_map(module)
    assert target is not None
    if "top_k_index" in kwargs:
        return args, {**kwargs, "top_k_index": mapped_ids(target, kwargs["top_k_index"])}
    hidden, index_TK, *rest = args
    return (hidden, mapped_ids(target, index_TK), *rest), kwargs
