"""A uniform sample of the tokens that pass a layer, for what needs the tokens themselves and not their sums.

Every token draws a number; those with the smallest stay. So the sample depends on the seed and on the order of tokens,
not on how they were cut into batches, and its tokens come from all of the text.
"""

# T tokens, H hidden, K experts per token

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from coterie.profiling.observers import LayerShape, Observer, Routing

SEED = 0


class TokenSample:
    """Up to `size` rows of several tensors that have one row per token. `parts` holds them, in the order they came."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.parts: list[Tensor] = []
        self._random = np.random.default_rng(SEED)
        self._key_T = torch.zeros(0, dtype=torch.float64)

    def add(self, *new: Tensor) -> None:
        """Let the rows of one batch take part. Their memory is not shared."""
        key_T = torch.from_numpy(self._random.random(len(new[0]))).to(new[0].device)
        if self.parts:
            both = [torch.cat(pair) for pair in zip((self._key_T, *self.parts), (key_T, *new), strict=True)]
        else:
            both = [key_T, *(part.clone() for part in new)]
        if len(both[0]) > self.size:  # the smallest keys are a uniform sample of all tokens so far
            chosen_T = both[0] <= both[0].kthvalue(self.size).values
            both = [part[chosen_T] for part in both]
        self._key_T, *self.parts = both

    def take(self) -> list[Tensor]:
        """The sample, handed over: [] where no batch came."""
        parts, self.parts = self.parts, []
        return parts


def sample_names(tokens: int) -> tuple[str, str]:
    """Where `input_sample` puts inputs and ids."""
    return f"input_sample_t{tokens}_TH", f"input_sample_index_t{tokens}_TK"


@functools.cache
def input_sample(tokens: int) -> type[Observer]:
    """An observer of the inputs of up to `tokens` tokens of a layer, a uniform sample, and the ids they selected.

    input_sample_t<tokens>_TH: float32. input_sample_index_t<tokens>_TK: E means "no expert". For neurons to be matched
    by what they do. Memory: 4 H + 8 K bytes a token. To be used while the layer is in memory, not to be saved.
    """
    input_name, index_name = sample_names(tokens)

    class InputSample(Observer):
        fields = {input_name: "none", index_name: "none"}

        def __init__(self, shape: LayerShape) -> None:
            super().__init__(shape)
            self._sample = TokenSample(tokens)

        def see_routing(self, routing: Routing) -> None:
            self._sample.add(routing.x_TH.float(), routing.index_TK)

        def state(self) -> dict[str, Tensor]:
            nothing = [torch.zeros(0, self.shape.hidden), torch.zeros(0, self.shape.top_k, dtype=torch.int64)]
            return dict(zip((input_name, index_name), self._sample.parts or nothing, strict=True))

    return InputSample
