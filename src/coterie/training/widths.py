"""Carry out `d2moe-router`: give every layer of nested experts a bit router, train these alone, and write them.

The equations are in `compression.quantizing.d2moe_router`, the forward pass in `experts.levels`; the training is
`beside` with a penalty on bits, towards the 16-bit model.
"""

# B batch, L sequence, T tokens, S slots per token, K widths

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coterie.anatomy import moe_layers
from coterie.anatomy.forms import empty_bit_router, form_of
from coterie.compression.compress import Result
from coterie.compression.forecast import Forecast
from coterie.compression.quantizing.d2moe_router import D2MoeRouter
from coterie.errors import UsageError
from coterie.experts.levels import NAME, BitRouter, Learning, attach, bit_router
from coterie.streaming.lockstep import Batch, Progress
from coterie.streaming.model import StreamedModel
from coterie.streaming.writer import DEFAULT_SHARD_BYTES
from coterie.text import TokenData
from coterie.training.beside import Equipped, Told, learn_beside, learn_beside_forecast, real_tokens, run_through
from coterie.training.heal import Distillation


def learn_widths(
    streamed: StreamedModel,
    out: Path,
    *,
    model: str,
    method: D2MoeRouter,
    name: str,
    data: TokenData,
    teacher: StreamedModel | None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    memory: int = 2 * 2**30,
    progress: Progress | None = None,
    seed: int = 0,
) -> Result:
    """Write a checkpoint with trained bit routers to `out`.

    Parameters
    ----------
    streamed : what d2moe wrote, freshly opened. It is used up. teacher : the 16-bit model.
    data : text to train on.

    The record tells, under "widths", how many bits the trained model runs on that text: overall, by layer, and which
    share of (token, expert) pairs runs at each width; padding left out. Raises UsageError without a teacher, ModelError
    where experts are not nested, and what `distil` raises.
    """
    if teacher is None:
        raise UsageError(f"{model} cannot teach itself how many bits it needs", "Say --set teacher=CHECKPOINT.")

    def equip(student: nn.Module) -> Equipped:
        routers = with_bit_routers(student, method)
        watching = student.register_forward_pre_hook(partial(_note_padding, routers), with_kwargs=True)

        def told() -> Told:
            watching.remove()
            for router in routers.values():
                router.learning = router.bits_T = router.level_TS = None
            ran = widths_run(student, data.batches)
            return Told(ran, {entry["layer"]: {"mean_bits": entry["mean_bits"]} for entry in ran["layers"]})

        return Equipped(method, BitPenalty(routers, method), [], told)

    return learn_beside(
        streamed,
        out,
        model=model,
        method=method,
        name=name,
        data=data,
        options=Distillation(
            steps=method.steps,
            rate=method.rate,
            batch_size=method.batch_size,
            temperature=method.temperature,
            top=method.top,
        ),
        child=NAME,
        section="widths",
        phase="bit routers",
        equip=equip,
        teacher=teacher,
        shard_bytes=shard_bytes,
        overwrite=overwrite,
        memory=memory,
        progress=progress,
        seed=seed,
    )


def learn_widths_forecast(
    out: Path,
    *,
    streamed: StreamedModel,
    model: str,
    method: D2MoeRouter,
    name: str,
    data: TokenData,
    teacher: StreamedModel | None,
    seed: int,
    memory: int,
) -> Forecast:
    """What `learn_widths` with the same arguments will need, activations aside; checks the request as it does."""
    if teacher is None:
        raise UsageError(f"{model} cannot teach itself how many bits it needs", "Say --set teacher=CHECKPOINT.")
    return learn_beside_forecast(out, streamed=streamed, method=method, data=data, memory=memory)


# -- the model in memory ----------------------------------------------------------------------------------------------


def with_bit_routers(model: nn.Module, method: D2MoeRouter) -> dict[int, BitRouter]:
    """Give every MoE layer a fresh bit router that learns, and let nothing else learn. Returns them by layer."""
    model.requires_grad_(False)
    routers = {}
    for layer in moe_layers(model):
        grid = form_of(layer).nested
        assert grid is not None
        router = empty_bit_router(layer, grid.base, grid.planes + 1)
        router.reset(method.top_start)
        router.learning = Learning(method.gradient, method.capacities(grid.planes + 1), of_expert=method.of_expert)
        attach(layer.experts, router)
        routers[layer.index] = router
    return routers


def _note_padding(
    routers: Mapping[int, BitRouter], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Tell the routers which tokens of the batch that comes are padding."""
    mask_BL = kwargs.get("attention_mask")
    for router in routers.values():
        if router.learning is not None:
            router.learning.real_T = None if mask_BL is None else mask_BL.bool().flatten()


class BitPenalty:
    """What bits cost: alpha times the expected ones, or mu (mean bits of what runs - b)^2; over real tokens."""

    def __init__(self, routers: Mapping[int, BitRouter], method: D2MoeRouter) -> None:
        self.routers, self.method = routers, method

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        real_T = inputs["attention_mask"].bool().flatten()
        expected, run = [], []
        for router in self.routers.values():
            assert router.bits_T is not None
            assert router.level_TS is not None
            runs_TS = (router.level_TS >= 0) & real_T[:, None]
            real = runs_TS.any(-1)
            expected.append(router.bits_T[real].mean())
            bits_TS = (router.level_TS + router.bits[0]).float() * runs_TS
            run.append((bits_TS.sum(-1)[real] / runs_TS.sum(-1)[real]).mean())
        mean = torch.stack(expected).mean()
        if self.method.mean_bits is None:
            return self.method.alpha * mean
        now = torch.stack(run).mean() + mean - mean.detach()
        return self.method.hold * (now - self.method.mean_bits).square()


@torch.no_grad()
def widths_run(model: nn.Module, batches: Sequence[Batch]) -> dict[str, Any]:
    """How many bits a model with bit routers runs on a text, padding left out.

    {"mean_bits", "shares": {bits: share of (token, expert) pairs}, "layers": [{"layer", "mean_bits", "shares",
    "spread": standard deviation, over tokens, of the mean bits of a token's experts}]}
    """
    routers = {layer.index: router for layer in moe_layers(model) if (router := bit_router(layer.experts)) is not None}
    seen: dict[int, list[Tensor]] = {index: [] for index in routers}
    for batch in batches:
        real_T = real_tokens(batch).flatten()
        for index, router in routers.items():

            def look(level_TS: Tensor, found: list[Tensor] = seen[index], real_T: Tensor = real_T) -> None:
                found.append(level_TS.cpu()[real_T])

            router.watch = look
        try:
            run_through(model, batch)
        finally:
            for router in routers.values():
                router.watch = None
    told, total_K = [], torch.zeros(1, dtype=torch.float64)
    for index, router in routers.items():
        level_TS = torch.cat(seen[index])
        runs_TS = level_TS >= 0
        count_K = torch.bincount(level_TS[runs_TS], minlength=len(router.bits)).double()
        total_K = total_K + count_K
        mean_T = (level_TS.double() * runs_TS).sum(-1) / runs_TS.sum(-1).clamp(min=1)
        spread = float(mean_T[runs_TS.any(-1)].std(correction=0))
        told.append({"layer": index, **_shares(count_K, router.bits), "spread": spread})
    bits = next(iter(routers.values())).bits
    return {**_shares(total_K, bits), "layers": told}


def _shares(count_K: Tensor, bits: Sequence[int]) -> dict[str, Any]:
    share_K = count_K / count_K.sum()
    mean = float(share_K @ torch.tensor(bits, dtype=torch.float64))
    return {"mean_bits": mean, "shares": {str(b): float(s) for b, s in zip(bits, share_K, strict=True)}}
