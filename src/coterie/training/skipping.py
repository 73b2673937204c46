"""Carry out OTP: give every MoE layer a mask router, train these alone, and write them beside the unchanged weights.

The equations are in `compression.skipping.otp`, the forward pass in `experts.masks`; the training is `distil` with a
penalty on what runs. The teacher is the checkpoint itself, with all experts, read once layer by layer before. The
student is whole in memory, in float32 (packed experts as they are stored); nothing of it has a gradient but the mask
routers, yet the activations of all layers are held, for a mask changes what later layers see. A killed run goes on from
its last checkpoint.
"""

# B batch, L sequence, T tokens, K slots per token, R experts that run

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, TrainerCallback

from coterie.anatomy import moe_layers
from coterie.anatomy.forms import empty_mask_router
from coterie.compression.apply import Output
from coterie.compression.compress import Result
from coterie.compression.forecast import Forecast, forecast
from coterie.compression.plan import LayerPlan, Plan
from coterie.compression.records import record_of, versions
from coterie.compression.sizes import measure, measure_written
from coterie.compression.skipping.otp import Otp
from coterie.errors import ModelError
from coterie.experts.masks import NAME, MaskRouter, Sampling, attach, mask_router
from coterie.streaming.lockstep import Batch, Progress
from coterie.streaming.model import StreamedModel, all_finite
from coterie.streaming.writer import DEFAULT_SHARD_BYTES, Workspace
from coterie.text import TokenData
from coterie.training.heal import Distillation, distil
from coterie.training.teacher import TeacherCache, vocabulary, write_cache
from coterie.training.trainer import Kept, shown_on

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
    method.check_model(streamed.moe)
    bar, digest, before = progress or Progress(), streamed.checkpoint.digest(), measure(streamed)
    job = {
        "otp": method.model_dump(mode="json"),
        "checkpoint": digest,
        "data": data.digest,
        "compute": [str(streamed.compute_dtype), torch.device(streamed.device).type, torch.get_num_threads()],
        "shard_bytes": shard_bytes,
        "seed": seed,
        "versions": versions(),
    }
    options = Distillation(
        steps=method.steps,
        rate=method.rate,
        batch_size=method.batch_size,
        temperature=method.temperature,
        top=TOP,
    )
    with Workspace(out, job, overwrite=overwrite) as work:
        place = work.folder / "teacher"
        if not (place / "cache.json").exists():
            try:
                k = min(TOP, vocabulary(streamed))
                write_cache(streamed, data, place, k=k, temperature=method.temperature, memory=memory, progress=bar)
            finally:
                if place.exists() or place.with_name(f"{place.name}.partial").exists():
                    work.record({"teacher": "read, or partly"})  # an interrupted run keeps it
        torch.manual_seed(seed)
        student = AutoModelForCausalLM.from_pretrained(streamed.checkpoint.folder, dtype=torch.float32).eval()
        if method.renormalise is None:
            method = method.model_copy(update={"renormalise": renormalises(student, data.batches[0])})
        routers = with_mask_routers(student, method, seed)
        done = distil(
            student,
            data,
            TeacherCache(place),
            options,
            folder=work.folder / "training",
            callbacks=[Cooling(routers, method), Kept(work)],
            penalty=Penalty(routers, method),
            device=streamed.device,
            seed=seed,
            phase="mask routers",
            on_log=shown_on(bar),
        )
        bar.done()
        for router in routers.values():
            router.sampling = router.mass_T = None
        trained = learned_tensors(student)
        told = experts_run(student, data.batches)
        del student
        plan = Plan(
            model=model,
            model_digest=digest,
            method=name,
            parameters=method.model_dump(mode="json"),
            data_digest=data.digest,
            layers=[
                LayerPlan(index=i, name=layer.name, experts=layer.num_experts, keep=list(range(layer.num_experts)))
                for i, layer in streamed.moe.items()
            ],
        )
        counts = {index: layer.num_experts for index, layer in streamed.moe.items()}
        output = Output(streamed, work.folder, counts, method, shard_bytes)
        active = {entry["layer"]: entry["experts_per_token"] for entry in told["layers"]}
        after = measure_written(streamed, output.specs, output.fresh_of, counts, active)
        try:
            for index, fresh in output.fresh.items():
                output.write({name: trained[name] for name in fresh if name.startswith(streamed.moe[index].name)})
            output.copy_rest(output.through)
            output.writer.sync()
            record = record_of(
                plan,
                streamed,
                data=data,
                seed=seed,
                before=before,
                after=after,
                figures={entry["layer"]: {"experts_per_token": entry["experts_per_token"]} for entry in told["layers"]},
                notes=method.notes(),
                sweeps=1,
                forms=True,
                skipping=told,
                training={**asdict(options), "seconds": round(done.seconds, 3)},
            )
            names = output.finish(plan, record)
        finally:
            output.writer.close()
        read, written = streamed.checkpoint.bytes_read, output.writer.bytes_written
        work.publish(names)
    return Result(work.out, plan, before, after, 1, read, written, work.resumed, record, warnings=method.notes())


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
    method.check_model(streamed.moe)
    size = measure(streamed)
    ahead = forecast(streamed, size, 1.0, out, data, memory, 1)
    return replace(ahead, memory_bytes=ahead.memory_bytes + max(4 * size.parameters, size.bytes))


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
    real_T = _real(batch).flatten()

    def look(index: int) -> Callable[[nn.Module, Any], None]:
        return lambda module, args: sums[index].append(args[2].float().sum(-1).cpu()[real_T])

    handles = [layer.experts.register_forward_pre_hook(look(layer.index)) for layer in moe_layers(model)]
    try:
        _forward(model, batch)
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


def learned_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The weights of all mask routers, by name. Raises ModelError if one is no number."""
    found = {n: p.detach().cpu() for n, p in model.named_parameters() if f".{NAME}." in n}
    for name, tensor in found.items():
        if not all_finite(tensor):
            raise ModelError(f"{name} is no number after training", "Lower the rate.")
    return found


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
        real_T = _real(batch).flatten()

        def count(slots_TK: Tensor, kept_TK: Tensor, count_R: Tensor, real_T: Tensor = real_T) -> None:
            count_R += torch.bincount(kept_TK.sum(-1).cpu()[real_T], minlength=len(count_R))

        for index, router in routers.items():
            router.watch = partial(count, count_R=count_R[index])
        try:
            _forward(model, batch)
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


def _forward(model: nn.Module, batch: Batch) -> None:
    device = next(model.parameters()).device
    model(
        input_ids=batch.ids_BL.to(device),
        attention_mask=_real(batch).long().to(device),
        use_cache=False,
        logits_to_keep=1,
    )


def _real(batch: Batch) -> Tensor:
    return batch.mask_BL if batch.mask_BL is not None else torch.ones_like(batch.ids_BL, dtype=torch.bool)
