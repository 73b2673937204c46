"""The one table of what llama.cpp's loader expects of each family in a GGUF file, beside `architectures`.

Names of tensors come from the `gguf` package; this table holds what neither that package nor a config says: which
graph runs the file, what that graph takes for granted, and how it turns queries and keys. A family stands here only if
every number its graph needs is written, see `compression.gguf_export`. A row per model type; each has a test.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GgufFamily:
    """How one model type is stored in GGUF.

    arch : member of gguf.MODEL_ARCH. renormalized : the graph divides the weights of the chosen experts by their sum.
    pairs : it turns neighbouring numbers of a head, so rows of q and k are reordered; else both halves of a head.
    square : all heads together are as wide as the hidden state. ungrouped : as many key heads as query heads.
    own_output : the output matrix has to be in the file also where it is tied to the embeddings.
    dense_width : `feed_forward_length` is the config's intermediate_size, and experts have a width of their own.
    shared_width : config field with the width of the shared expert.
    """

    arch: str
    renormalized: bool
    pairs: bool = False
    square: bool = False
    ungrouped: bool = False
    own_output: bool = False
    dense_width: bool = False
    shared_width: str = ""


GGUF_FAMILIES: dict[str, GgufFamily] = {
    "mixtral": GgufFamily("LLAMA", renormalized=True, pairs=True),
    "olmoe": GgufFamily("OLMOE", renormalized=False, square=True, ungrouped=True, own_output=True),
    "qwen2_moe": GgufFamily(
        "QWEN2MOE",
        renormalized=False,
        square=True,
        own_output=True,
        dense_width=True,
        shared_width="shared_expert_intermediate_size",
    ),
    "qwen3_moe": GgufFamily("QWEN3MOE", renormalized=True, dense_width=True),
}
