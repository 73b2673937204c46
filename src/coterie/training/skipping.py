"""Carry out OTP: give every MoE layer a mask router, train these alone, and write them beside the unchanged weights.

The equations are in `compression.skipping.otp`, the forward pass in `experts.masks`; the training is `beside` with a
penalty on what runs. The teacher is the checkpoint itself, with all experts: a mask changes what later layers see.
"""

# B batch, L sequence, T tokens, K slots per token, R experts that run

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from coterie.anatomy import moe_layers
from coterie.anatomy.forms import empty_mask_router
from coterie.compression.compress import Result
from coterie.compression.forecast import Forecast
from coterie.compression.skipping.otp import Otp
from coterie.experts.masks import NAME, MaskRouter, Sampling, attach, mask_router
from coterie.streaming.lockstep import Batch, Progress
from coterie.streaming.model import StreamedModel
from coterie.streaming.writer import DEFAULT_SHARD_BYTES
from coterie.text import TokenData
from coterie.training.beside import Equipped, Told, learn_beside, learn_beside_forecast, real_tokens, run_through
from coterie.training.heal import Distillation

TOP = 64  # of the teacher's tokens that are kept; all others are one bucket
SAME_SUM = 1e-3  # weights of tokens whose sums differ by less, relatively, are made to sum to one number


def learn_masks(
    streamed: StreamedModel,
    out: Path,
    *,
    model: str,
    method: Otp,
    name: str,
    data: TokenData,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    memory: int = 2 * 2**30,
    progress: Progress | None = None,
    seed: int = 0,
) -> Result:
    """Write a checkpoint with trained mask routers to `out`.

    Parameters
    ----------
    streamed : the source, freshly opened. It is used up.
    data : text to train on.

    The record tells, under "skipping", how many experts per token the trained model runs on that text: overall, by
    layer, and which share of tokens runs 1, 2, ... of them; padding left out. Raises ModelError where routers pick one
    expert or a mask router is there already, and what `distil` raises.
    """

    def equip(student: nn.Module) -> Equipped:
        chosen = method
        if chosen.renormalise is None:
            chosen = chosen.model_copy(update={"renormalise": renormalises(student, data.batches[0])})
        routers = with_mask_routers(student, chosen, seed)

        def told() -> Told:
            for router in routers.values():
                router.sampling = router.mass_T = None
            ran = experts_run(student, data.batches)
            active = {entry["layer"]: entry["experts_per_token"] for entry in ran["layers"]}
            return Told(ran, {index: {"experts_per_token": mean} for index, mean in active.items()}, active)

        return Equipped(chosen, Penalty(routers, chosen), [Cooling(routers, chosen)], told)

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
            top=TOP,
        ),
        child=NAME,
        section="skipping",
        phase="mask routers",
        equip=equip,
        shard_bytes=shard_bytes,
        overwrite=overwrite,
        memory=memory,
        progress=progress,
        seed=seed,
    )


def learn_masks_forecast(
    out: Path,
    *,
    streamed: StreamedModel,
    model: str,
    method: Otp,
    name: str,
    data: TokenData,
    seed: int,
    memory: int,
) -> Forecast:
    """What `learn_masks` with the same arguments will need, activations aside; checks the model as it does."""
    return learn_beside_forecast(out, streamed=streamed, method=method, data=data, memory=memory)


# -- the model in memory ----------------------------------------------------------------------------------------------


def with_mask_routers(model: nn.Module, method: Otp, seed: int = 0) -> dict[int, MaskRouter]:
    """Give every MoE layer a fresh mask router, and let nothing else learn. Returns them by layer."""
    model.requires_grad_(False)
    routers = {}
    for layer in moe_layers(model):
        router = empty_mask_router(layer, method.form)
        router.reset(seed * 1009 + layer.index, method.keep_all)
        attach(layer.experts, router)
        routers[layer.index] = router
    return routers


@torch.no_grad()
def renormalises(model: nn.Module, batch: Batch) -> bool:
    """Do this model's routers make the weights of every token sum to the same number? Seen on the batch's real tokens.

    Read off what they put out, so that no family has to be known.
    """
    sums: dict[int, list[Tensor]] = {layer.index: [] for layer in moe_layers(model)}
    real_T = real_tokens(batch).flatten()

    def look(index: int) -> Callable[[nn.Module, Any], None]:
        return lambda module, args: sums[index].append(args[2].float().sum(-1).cpu()[real_T])

    handles = [layer.experts.register_forward_pre_hook(look(layer.index)) for layer in moe_layers(model)]
    try:
        run_through(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    found = [torch.cat(seen) for seen in sums.values()]
    return all(bool(s_T.max() - s_T.min() < SAME_SUM * s_T.mean()) for s_T in found)


class Cooling(TrainerCallback):  # type: ignore[misc]
    """Lowers the temperature of the masks, step by step."""

    def __init__(self, routers: Mapping[int, MaskRouter], method: Otp) -> None:
        self.routers, self.method = routers, method

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        tau = self.method.tau(state.global_step)
        for router in self.routers.values():
            router.sampling = Sampling(tau, straight_through=self.method.straight_through)


class Penalty:
    """What running experts costs: lambda mean(|m|_1 / k), or mu (mean(|m|_1 / k) - rho)^2; over real tokens."""

    def __init__(self, routers: Mapping[int, MaskRouter], method: Otp) -> None:
        self.routers, self.method = routers, method

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        real_T = inputs["attention_mask"].bool().flatten()
        shares = []
        for router in self.routers.values():
            assert router.mass_T is not None
            shares.append(router.mass_T[real_T].mean())
        share = torch.stack(shares).mean()
        if self.method.ratio is None:
            return self.method.lam * share
        return self.method.hold * (share - self.method.ratio).square()


@torch.no_grad()
def experts_run(model: nn.Module, batches: Sequence[Batch]) -> dict[str, Any]:
    """How many experts per token a model with mask routers runs on a text, padding left out.

    {"share", "experts_per_token", "picked_per_token", "layers": [{"layer", "experts_per_token", "tokens_by_experts":
    share of tokens that run 0, 1, ..., k}]}
    """
    layers = {layer.index: layer for layer in moe_layers(model)}
    routers = {index: router for index, layer in layers.items() if (router := mask_router(layer.experts)) is not None}
    count_R = {index: torch.zeros(router.slots + 1, dtype=torch.int64) for index, router in routers.items()}
    for batch in batches:
        real_T = real_tokens(batch).flatten()

        def count(slots_TK: Tensor, kept_TK: Tensor, count_R: Tensor, real_T: Tensor = real_T) -> None:
            count_R += torch.bincount(kept_TK.sum(-1).cpu()[real_T], minlength=len(count_R))

        for index, router in routers.items():
            router.watch = partial(count, count_R=count_R[index])
        try:
            run_through(model, batch)
        finally:
            for router in routers.values():
                router.watch = None
    told: list[dict[str, Any]] = []
    for index, counts in count_R.items():
        share_R = counts.double() / counts.sum()
        mean = float(share_R @ torch.arange(len(share_R), dtype=torch.float64))
        told.append({"layer": index, "experts_per_token": mean, "tokens_by_experts": share_R.tolist()})
    ran = sum(entry["experts_per_token"] for entry in told)
    picked = sum(router.slots for router in routers.values())
    return {
        "share": ran / picked,
        "experts_per_token": ran / len(told),
        "picked_per_token": picked / len(told),
        "layers": told,
    }
