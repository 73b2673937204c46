"""The dense pass: every expert of a layer on every token, whatever the router chose.

What an expert would have said to tokens it never got is what output-based similarity compares. The pass runs experts
as the model does (`expert_output`), one at a time in the dtype of the activations, and is cut into chunks of tokens, so
that outputs of all experts never exist for more than `CHUNK_BYTES`. It costs E / K times the experts' usual work.
"""

# T tokens, C tokens of one chunk, H hidden, E experts

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from coterie.anatomy import MoELayer
from coterie.experts.forward import expert_output

CHUNK_BYTES = 256 * 2**20  # of expert outputs held at a time


def chunk_tokens(experts: int, hidden: int) -> int:
    """Tokens whose float32 outputs of all experts fit `CHUNK_BYTES`, at least 1."""
    return max(1, CHUNK_BYTES // (experts * hidden * 4))


@torch.no_grad()
def dense_outputs(layer: MoELayer, x_TH: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(rows of x, f_e(x) of these rows for every expert as [E, C, H] float32) for all of `x_TH`, in order.

    The tensor is valid until the next one is asked for. The layer must be in memory; its router is not asked.
    Peak memory: one such tensor, at most 256 MiB (or one token of it), beside what one expert needs for C rows.
    """
    E, (T, H) = layer.num_experts, x_TH.shape
    size = chunk_tokens(E, H)
    y_ECH = torch.empty(E, min(size, T), H, dtype=torch.float32, device=x_TH.device)
    for start in range(0, T, size):
        x_CH = x_TH[start : start + size]
        for expert in range(E):
            y_ECH[expert, : len(x_CH)] = expert_output(layer.experts, expert, x_CH)
        yield slice(start, start + len(x_CH)), y_ECH[:, : len(x_CH)]
