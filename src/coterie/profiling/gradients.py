"""First-order sensitivity of neurons and head groups: what a loss would lose without them, |w * dL/dw| summed up.

    s(unit) = sum over sequences of sum over the unit's weights of | w * dL/dw |         (fisher: of (w * dL/dw)^2)

One backward pass per sequence, and the absolute value before anything is added up: signed sums cancel near an optimum,
over a neuron's weights as over text. L is the sum over a sequence's tokens of

    kd_top8   - sum_{v in top 8 of the teacher} q_v log p_v    q: teacher's probabilities of these 8, made to sum to 1
    lm        - log p(next token)                              p: the model's softmax over the whole vocabulary

kd_top8 has a gradient, p - q, even where model and teacher are the same: the teacher's tail is cut, the model's is not.
A full KL has none there.

The model is whole in memory, in float32, and runs as transformers runs it. Gradients are never stored: a hook reduces
each tensor's gradient to its units' sums the moment it is complete, and frees it. Peak memory: the weights, the largest
tensor's gradient, and one sequence's activations and logits. Padding has no part in any loss.
"""

# B batch, L sequence, T tokens, V vocabulary, H hidden, E owners, U units, C teacher's tokens kept (8)

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from coterie.anatomy.architectures import model_class_of
from coterie.anatomy.widths import Axis, Units
from coterie.errors import ModelError
from coterie.streaming.head import logits
from coterie.streaming.lockstep import Batch, Progress, States, sweep
from coterie.streaming.model import StreamedModel
from coterie.text import TokenData

TOP = 8
FLAT = 1e-6  # a length of w * dL/dw per token (see `Sensitivity.norm`) below which it is rounding


@dataclass
class Sensitivity:
    """scores : {units' name: [E, U], float64}. tokens : that a loss was taken on.

    norm : length of w * dL/dw over all units' weights, of a sequence, per token.
    """

    scores: dict[str, Tensor]
    norm: float = 0.0
    tokens: int = 0
    warnings: list[str] = field(default_factory=list)


@dataclass
class TopLogits:
    """A teacher's largest logits at every position. ids, values : one [L, C] per sequence, in the order of the data."""

    ids: list[Tensor]
    values: list[Tensor]


class UnitGradients:
    """Hooks that turn the gradients of a model's units into sums of |w * dL/dw|, and free them.

    Parameters
    ----------
    model : in memory. All its parameters are frozen but those of the units, until the end of the `with` block.
    units : what is summed over.
    square : sum (w * dL/dw)^2 instead.
    """

    def __init__(self, model: nn.Module, units: Sequence[Units], *, square: bool = False) -> None:
        self.model, self.units, self.square = model, units, square
        self.scores = {u.name: torch.zeros(u.owners, u.count, dtype=torch.float64) for u in units}
        self.squares = 0.0  # of w * dL/dw, all units

    def __enter__(self) -> UnitGradients:
        named = dict(self.model.named_parameters())
        self._before = {name: parameter.requires_grad for name, parameter in named.items()}
        for parameter in named.values():
            parameter.requires_grad_(False)
        self._hooks = []
        for unit in self.units:
            for axis in unit.axes:
                watched: Any = named[axis.name]
                watched.requires_grad_(True)
                self._hooks.append(watched.register_post_accumulate_grad_hook(self._reducer(unit, axis)))
        return self

    def __exit__(self, *exc: object) -> None:
        for hook in self._hooks:
            hook.remove()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._before[name])

    def _reducer(self, unit: Units, axis: Axis) -> Callable[[Tensor], None]:
        return lambda parameter: self._reduce(parameter, unit, axis)

    def _reduce(self, parameter: Tensor, unit: Units, axis: Axis) -> None:
        assert parameter.grad is not None
        product = parameter.grad.detach().mul_(parameter.detach())
        parameter.grad = None
        self.squares += float(torch.linalg.vector_norm(product, dtype=torch.float64)) ** 2
        self.scores[unit.name] += axis.totals(product.square_() if self.square else product.abs_()).cpu()


def resident(streamed: StreamedModel, device: str) -> nn.Module:
    """The same checkpoint whole in memory, in float32, as transformers loads it."""
    cls: Any = model_class_of(streamed.config)
    model: nn.Module = cls.from_pretrained(streamed.checkpoint.folder, dtype=torch.float32)
    return model.to(device).eval()


def sequences(data: TokenData) -> Iterator[tuple[Tensor, Tensor]]:
    """(ids [1, L], mask [1, L]) of every sequence, without its padding on the right."""
    for batch in data.batches:
        mask_BL = batch.mask_BL if batch.mask_BL is not None else torch.ones_like(batch.ids_BL, dtype=torch.bool)
        for ids_L, mask_L in zip(batch.ids_BL, mask_BL, strict=True):
            length = int(mask_L.nonzero().max()) + 1 if bool(mask_L.any()) else 1
            yield ids_L[None, :length], mask_L[None, :length]


def sensitivity(
    model: nn.Module,
    units: Sequence[Units],
    data: TokenData,
    criterion: str,
    *,
    teacher: TopLogits | None = None,
    progress: Progress | None = None,
) -> Sensitivity:
    """Scores of `units` on `data`.

    Parameters
    ----------
    model : from `resident`.
    criterion : "kd_top8", "lm" or "fisher" (lm, squared).
    teacher : its top logits, for kd_top8; None where the model is its own teacher.

    Raises ModelError if a loss is not finite. `warnings` says where the total gradient is close to zero, so that the
    scores are noise.
    """
    progress = progress or Progress()
    progress.start("sequences", data.samples)
    device = next(model.parameters()).device
    result = Sensitivity({})
    torch.set_flush_denormal(True)  # denormals slow CPU matrix products several times and carry nothing
    try:
        with UnitGradients(model, units, square=criterion == "fisher") as watch, torch.enable_grad():
            for number, (ids_BL, mask_BL) in enumerate(sequences(data)):
                given = {"input_ids": ids_BL.to(device), "use_cache": False}
                if not bool(mask_BL.all()):
                    given["attention_mask"] = mask_BL.long().to(device)
                logits_LV = model(**given).logits[0].float()
                if criterion == "kd_top8":
                    loss, tokens = _top_loss(logits_LV, mask_BL[0], teacher, number)
                else:
                    loss, tokens = _next_loss(logits_LV, ids_BL[0], mask_BL[0])
                if not bool(torch.isfinite(loss)):
                    raise ModelError(f"the loss of calibration sequence {number} is {float(loss)}")
                if tokens:
                    watch.squares = 0.0
                    loss.backward()  # type: ignore[no-untyped-call]
                    result.norm += watch.squares**0.5
                result.tokens += tokens
                progress.tokens(tokens)
                progress.layer(number)
    finally:
        torch.set_flush_denormal(False)
        progress.done()
    result.scores = watch.scores
    result.norm /= max(result.tokens, 1)
    if result.norm < FLAT:
        result.warnings.append(
            f"the gradient of {criterion} is close to zero ({result.norm:.1e} per token): its scores say little"
        )
    return result


def _top_loss(logits_LV: Tensor, mask_L: Tensor, teacher: TopLogits | None, number: int) -> tuple[Tensor, int]:
    """Cross-entropy with the teacher's renormalised top tokens, summed over real positions."""
    if teacher is None:
        value_LC, index_LC = logits_LV.detach().topk(min(TOP, logits_LV.shape[-1]), dim=-1)
    else:
        index_LC = teacher.ids[number][: len(logits_LV)].long().to(logits_LV.device)
        value_LC = teacher.values[number][: len(logits_LV)].to(logits_LV.device)
    loss_L = top_cross_entropy(logits_LV, index_LC, value_LC)
    real_L = mask_L.to(loss_L.device)
    return loss_L[real_L].sum(), int(mask_L.sum())


def top_cross_entropy(logits_TV: Tensor, index_TC: Tensor, value_TC: Tensor) -> Tensor:
    """- sum_v q_v log p_v over the teacher's tokens `index_TC`, whose logits are `value_TC`. Shape [T].

    q sums to 1 over these tokens; p is the softmax of `logits_TV` over all.
    """
    share_TC = value_TC.float().softmax(-1)
    return -(share_TC * logits_TV.log_softmax(-1).gather(-1, index_TC)).sum(-1)


def _next_loss(logits_LV: Tensor, ids_L: Tensor, mask_L: Tensor) -> tuple[Tensor, int]:
    """Cross-entropy of the next token, summed where it and its predecessor are real."""
    real_L = mask_L[:-1] & mask_L[1:]
    loss_L = nn.functional.cross_entropy(logits_LV[:-1], ids_L[1:].to(logits_LV.device), reduction="none")
    return loss_L[real_L.to(loss_L.device)].sum(), int(real_L.sum())


def top_logits(
    streamed: StreamedModel,
    data: TokenData,
    *,
    count: int = TOP,
    memory: int = 2 * 2**30,
    progress: Progress | None = None,
) -> TopLogits:
    """A teacher's `count` largest logits at every position of every sequence, in one sweep over its checkpoint.

    Peak memory: one layer, the waiting hidden states up to `memory`, the head and one sequence's logits.
    """
    found: dict[int, list[tuple[Tensor, Tensor]]] = {}
    loaded = False

    def finish(number: int, batch: Batch, hidden_BLH: Tensor) -> None:
        nonlocal loaded
        if not loaded:
            streamed.load_head()
            loaded = True
        rows = []
        for hidden_LH in hidden_BLH:
            logits_LV = logits(streamed, hidden_LH[None])[0]
            value_LC, index_LC = logits_LV.topk(min(count, logits_LV.shape[-1]), dim=-1)
            rows.append((index_LC.int().cpu(), value_LC.cpu()))
        found[number] = rows

    for step in sweep(streamed, data.batches, finish=finish, states=States(limit=memory), progress=progress):
        step.run()
    streamed.free_outer()
    rows = [row for number in sorted(found) for row in found[number]]
    return TopLogits([ids for ids, _ in rows], [values for _, values in rows])
