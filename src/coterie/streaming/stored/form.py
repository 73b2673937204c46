"""What a packed form of weights is: which tensors of the files make up one weight, and how to come and go.

Everything above the checkpoint sees weights: one tensor with a shape and a dtype, computed when it is read. A form
says which tensors of the files belong together, makes the weight of them and, where a weight is to be stored that is
not the one it was read as, makes such tensors again. It knows no model, and nothing of files.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from coterie.errors import CheckpointError
from coterie.streaming.checkpoint import TensorInfo


class StoredForm(ABC):
    """One way to store weights in fewer bits.

    Parameters
    ----------
    entry : the checkpoint's `quantization_config`. Raises CheckpointError for one that makes no sense.

    Attributes
    ----------
    name : the `quant_method` it answers to. told : in words. shown : the same, with the numbers of this checkpoint.
    """

    name: ClassVar[str]
    told: ClassVar[str]
    shown: str

    @abstractmethod
    def __init__(self, entry: Mapping[str, Any]) -> None: ...

    @abstractmethod
    def weights(self, stored: Mapping[str, TensorInfo], dtype: torch.dtype) -> dict[str, TensorInfo]:
        """The weights that the tensors `stored` hold, in the same order: packed ones as `PackedInfo`, others as they
        are. dtype : what packed ones are read as, unless a narrower one holds them exactly.

        Raises CheckpointError for parts that are missing, left over, or of other shapes or dtypes than they must be.
        """

    @abstractmethod
    def unpack(self, parts: Sequence[Tensor], out: Tensor) -> None:
        """Fill `out`, contiguous, with the weight that `parts` hold."""

    @abstractmethod
    def pack(self, weight: Tensor, like: Sequence[tuple[torch.dtype, tuple[int, ...]]]) -> list[Tensor]:
        """Parts that hold `weight` as well as the form can. like : (dtype, shape) of each, as `layout` gives them."""

    @abstractmethod
    def repack(self, weight: Tensor, before: Sequence[Tensor]) -> list[Tensor]:
        """As `pack`, for a weight that came from the parts `before`: blocks in which no number changed, but for some
        that became zero, keep their bytes and scales (a zero has a code under every scale)."""

    @abstractmethod
    def layout(self, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Shapes of the parts of a weight of that shape. Raises ModelError for one the form cannot hold."""


def partner(stored: Mapping[str, TensorInfo], key: str, of: str) -> TensorInfo:
    """The tensor `key` that must lie beside `of`. Raises CheckpointError if it does not."""
    if key not in stored:
        raise CheckpointError(
            f"{of} has no {key.rpartition('.')[2]} beside it",
            "The checkpoint is incomplete, or its config names another form than its weights have.",
        )
    return stored[key]


def nothing_packed(form: StoredForm) -> CheckpointError:
    return CheckpointError(
        f"config.json says that weights are stored as {form.name}, and none is",
        "Config and weights do not belong together; without its quantization_config this is a plain checkpoint.",
    )
