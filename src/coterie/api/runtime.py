"""Where and how models run, and the text they run on: what all functions of the API begin with."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from coterie.errors import UsageError
from coterie.streaming.checkpoint import Checkpoint, resolve
from coterie.streaming.model import StreamedModel
from coterie.text import TokenData, load_data, load_tokenizer, load_tokens

if TYPE_CHECKING:
    pass

SAMPLES, LENGTH = 128, 512


@dataclass(frozen=True)
class Runtime:
    """Where and how models run.

    device : "cpu" or "cuda". compute_dtype : "auto", "float32", "bfloat16", "float16". threads : 0 = all cores.
    offline : never ask the hub. memory : limit for waiting hidden states, e.g. "2GiB".
    """

    device: str = "cpu"
    compute_dtype: str = "auto"
    threads: int = 0
    offline: bool = False
    trust_remote_code: bool = False
    allow_nonfinite: bool = False
    memory: str = "2GiB"

    def open(self, model: str, *, planes: int | None = None) -> StreamedModel:
        """Open a checkpoint; every tensor's place and shape is checked, no weight is read.

        planes : of nested experts, only the base and so many planes are there (see `coterie.experts.nested`).
        """
        self.ready()
        return StreamedModel(
            Checkpoint.open(model, offline=self.offline),
            device=self.device,
            compute_dtype=self.compute_dtype,
            allow_nonfinite=self.allow_nonfinite,
            trust_remote_code=self.trust_remote_code,
            planes=planes,
        )

    def ready(self) -> None:
        """Check the device; apply threads and offline to this process. `open` does it by itself."""
        check_device(self.device)
        if self.threads:
            torch.set_num_threads(self.threads)
        if self.offline:
            os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
            for name in ("huggingface_hub.constants", "datasets.config"):  # read when transformers was imported
                if name in sys.modules:
                    sys.modules[name].HF_HUB_OFFLINE = True  # type: ignore[attr-defined]


def check_device(name: str) -> None:
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or not (number.isdecimal() or name == kind):
        raise UsageError(f"--device {name}: no such device", "Use cpu, cuda or cuda:1.")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {name}: this PyTorch sees no CUDA device", "Use --device cpu.")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        there = torch.cuda.device_count()
        raise UsageError(f"--device {name}: this machine has {there} CUDA device(s)", "They are counted from 0.")


def vocabulary_of(streamed: StreamedModel) -> int:
    return int(streamed.model.get_input_embeddings().weight.shape[0])


def calibration(
    model: str,
    data: Sequence[str] = (),
    *,
    tokens: str | TokenData | None = None,
    tokenizer: str | None = None,
    samples: int = SAMPLES,
    length: int = LENGTH,
    batch_size: int | None = None,
    pack: bool = True,
    demonstrations: int | None = None,
    seed: int = 0,
    runtime: Runtime | None = None,
) -> TokenData | None:
    """Samples from text files, folders, dataset names (`data`) or a file of token ids (`tokens`); None if neither.

    Samples made before may stand for `tokens`.

    demonstrations : that many of each domain's longest documents, one a sequence, instead of `samples` and `pack`.
    """
    runtime = runtime or Runtime()
    if demonstrations is not None and demonstrations < 1:
        raise UsageError(f"{demonstrations} demonstrations are none", "EASY-EP works with 5 to 25.")
    if tokens is not None and data:
        raise UsageError("--data and --tokens both say what to run on", "Give one of them.")
    if isinstance(tokens, TokenData):
        return tokens
    if tokens is not None:
        return load_tokens(Path(tokens), batch_size)
    if not data:
        return None
    folder = resolve(tokenizer or model, offline=runtime.offline)
    return load_data(
        [data] if isinstance(data, str) else data,
        load_tokenizer(folder, trust_remote_code=runtime.trust_remote_code),
        samples=demonstrations or samples,
        length=length,
        batch_size=batch_size,
        pack=pack and demonstrations is None,
        longest=demonstrations is not None,
        seed=seed,
    )
