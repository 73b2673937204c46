"""Write a quantized checkpoint in the form other software reads: dense, or packed as compressed-tensors.

- dense: every code becomes the number it stands for, in the dtype the model had. Any software loads that; nothing is
  saved, quality is that of the codes.
- compressed-tensors ("pack-quantized"): one packed matrix per expert and projection under the family's own names. Its
  words are those of `experts.packing`. It knows symmetric grids whose groups divide the inputs, 2 to 8 bits; all
  experts share one width, and so do all linear layers: that is what transformers reads (layers of several widths are
  read by vLLM alone, and it computes 4 and 8 bits only).

Copied tensors are copied byte for byte.
"""

# E experts, P parts of a fused tensor (gate and up), O outputs and I inputs of a matrix

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from coterie.anatomy import MoELayer
from coterie.anatomy.forms import form_of
from coterie.errors import UsageError
from coterie.experts import packed, packing
from coterie.experts.forward import projections
from coterie.experts.packed import PLAIN, Packed, PackedLinear, Stack
from coterie.streaming.lockstep import Progress
from coterie.streaming.model import StreamedModel
from coterie.streaming.writer import DEFAULT_SHARD_BYTES, ShardWriter, Spec, Workspace, copy_small_files, write_json

Form = Literal["dense", "compressed-tensors"]
FORMS: tuple[Form, ...] = ("dense", "compressed-tensors")


@dataclass
class Exported:
    """What was written. notes : what a user should know of who loads it."""

    out: Path
    form: str
    bytes_before: int
    bytes_after: int
    notes: list[str] = field(default_factory=list)

    def describe(self) -> dict[str, Any]:
        return {**self.__dict__, "out": str(self.out)}


def export(
    streamed: StreamedModel,
    out: Path,
    form: Form,
    *,
    model: str,
    overwrite: bool = False,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress | None = None,
) -> Exported:
    """Write a packed checkpoint in another form.

    Raises UsageError if nothing is packed, or if the form cannot hold it, saying what does not fit. Peak memory: one
    layer packed, and one fused tensor of it dense (dense form) or one expert (compressed-tensors).
    """
    if next(packed.packed_modules(streamed.model), None) is None:
        raise UsageError(f"{model} holds no packed weights", "Export what `coterie compress --method quantize` wrote.")
    _refuse_special(streamed, model)
    layout = _dense_tensors if form == "dense" else _packed_tensors
    notes = [] if form == "dense" else _check_uniform(streamed)
    job = {"export": form, "checkpoint": streamed.checkpoint.digest(), "shard_bytes": shard_bytes}
    replaced = {
        f"{path}.{name}" for path, module in packed.packed_modules(streamed.model) for name in _own_tensors(module)
    }
    gone = set(streamed.keys_of(replaced))
    with Workspace(out, job, overwrite=overwrite) as work:
        specs = [
            Spec(k, info.meta().dtype, info.shape) for k, info in streamed.checkpoint.tensors.items() if k not in gone
        ]
        through = {spec.key for spec in specs}
        for index in range(len(streamed.layers)):
            specs += [Spec(key, t.dtype, tuple(t.shape)) for key, t in layout(streamed, index, None)]
        writer = ShardWriter(work.folder, specs, shard_bytes)

        def pass_on(key: str, tensor: Tensor) -> None:
            if key in through:
                writer.write(key, tensor)

        streamed.on_read = pass_on
        bar = progress or Progress()
        bar.start("layers", len(streamed.layers))
        try:
            for index in range(len(streamed.layers)):
                streamed.load_layer(index)
                for key, tensor in layout(streamed, index, streamed.compute_dtype):
                    writer.write(key, tensor)
                streamed.free_layer(index)
                bar.layer(index)
            for key in through:
                if not writer.has(key):
                    streamed.pass_on(key)
            writer.sync()
            write_json(work.folder / "config.json", _config(streamed, form))
            names = [*writer.files, "config.json", *copy_small_files(streamed.checkpoint.folder, work.folder)]
            size = writer.total_size
        finally:
            writer.close()
            bar.done()
        work.publish(names)
    before = sum(info.nbytes for info in streamed.checkpoint.tensors.values())
    return Exported(out, form, before, size, notes)


def _own_tensors(module: torch.nn.Module) -> list[str]:
    """Tensors of a packed module that its codes are made of."""
    if isinstance(module, PackedLinear):
        return [name for name in ("packed", "scale", "zero") if hasattr(module, name)]
    assert isinstance(module, Packed)
    parts = ("packed", "scale", "zero", "plain")
    return [f"{part}_{p}" for p in module.packed_bits for part in parts if hasattr(module, f"{part}_{p}")]


def _refuse_special(streamed: StreamedModel, model: str) -> None:
    for index, moe in streamed.moe.items():
        other = {k: v for k, v in form_of(moe).describe().items() if k != "bits"}
        if other:
            raise UsageError(
                f"layer {index} of {model} also has {', '.join(other)}, which only Coterie can run",
                "Merge with --set router=reduced, or prune, before quantizing for other software.",
            )


# -- dense ------------------------------------------------------------------------------------------------------------


def _stored(streamed: StreamedModel) -> torch.dtype:
    """The dtype the model's matrices had."""
    head = streamed.model.get_input_embeddings()
    name = next(n for n, module in streamed.model.named_modules() if module is head)
    (key, *_) = streamed.keys_of([f"{name}.weight"])
    return streamed.checkpoint.tensors[key].meta().dtype


def _dense_tensors(streamed: StreamedModel, index: int, live: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    """(key, tensor) of what a layer's packed modules stand for; meta tensors unless the layer is in memory (live)."""
    dtype, device = _stored(streamed), "meta" if live is None else "cpu"
    prefix = f"{streamed.prefix}.{index}"
    for path, module in streamed.layers[index].named_modules():
        full = f"{prefix}.{path}"
        if isinstance(module, PackedLinear):
            shape = module.stack().shape
            weight = torch.empty(shape, dtype=dtype, device=device)
            if live is not None:
                weight.copy_(module.dense())
            yield from streamed.plain_tensors({f"{full}.weight": weight}).items()
        elif isinstance(module, Packed):
            for name in ("gate_up_proj" if module.has_gate else "up_proj", "down_proj"):  # type: ignore[attr-defined]
                fused = _fused(module, name, dtype, live is not None)
                yield from streamed.plain_tensors({f"{full}.{name}": fused}).items()


def _fused(module: Any, name: str, dtype: torch.dtype, live: bool) -> Tensor:
    """One fused tensor of a stock experts module, [E, rows, columns] as the family stores it."""
    parts = ["gate", "up"] if name == "gate_up_proj" else [name.removesuffix("_proj")]
    E = module.stored_experts
    O, I = module.packed_shapes[parts[0]]  # noqa: E741
    rows, columns = len(parts) * O, I
    shape = (E, columns, rows) if module.is_transposed else (E, rows, columns)
    fused = torch.empty(shape, dtype=dtype, device="cpu" if live else "meta")
    if not live:
        return fused
    stacks = [module.stack(p) for p in parts]
    for e in range(E):
        target = fused[e].T if module.is_transposed else fused[e]  # [rows, columns]
        for n, stack in enumerate(stacks):
            view = target[n * O : (n + 1) * O] if module.is_concatenated or len(parts) == 1 else target[n::2]
            view.copy_(stack.dense(e))
    return fused


# -- compressed-tensors -----------------------------------------------------------------------------------------------


def _check_uniform(streamed: StreamedModel) -> list[str]:
    """Raise UsageError unless one scheme holds for all experts, and one for all linear layers. Returns notes."""
    kinds: dict[str, set[int]] = {"experts": set(), "linear layers": set()}
    whole: dict[str, set[bool]] = {"experts": set(), "linear layers": set()}
    for path, module in packed.packed_modules(streamed.model):
        for stack in _stacks(module):
            kind = "linear layers" if isinstance(module, PackedLinear) else "experts"
            kinds[kind] |= set(stack.bits)
            whole[kind].add(stack.group >= stack.shape[1])
            if len(whole[kind]) > 1:
                raise UsageError(
                    f"the group size {stack.group} takes whole rows of some {kind} and parts of others",
                    "Quantize with a --set group_size= below all of their inputs.",
                )
            if stack.zero_QOG is not None:
                raise UsageError(
                    f"{path} has zero points, which readers of packed experts do not know",
                    "Quantize with --set symmetric=true.",
                )
            if stack.shape[1] % stack.group and stack.group < stack.shape[1]:
                raise UsageError(
                    f"{path} has {stack.shape[1]} inputs, no multiple of the group size {stack.group}",
                    "Quantize with a --set group_size= that divides them.",
                )
    for kind, widths in kinds.items():
        if len(widths) > 1:
            raise UsageError(
                f"the {kind} have {', '.join(map(str, sorted(widths)))} bits: this form holds one width for all",
                "Export with --form dense, or load the checkpoint as it is after `import coterie`.",
            )
        if widths & {1, PLAIN} and widths != {PLAIN}:
            raise UsageError(f"the {kind} have {min(widths)} bit: this form holds 2 to 8", "Quantize to 2 or more.")
    if not _experts_have_names(streamed):
        raise UsageError(
            f"checkpoints of {streamed.config.model_type} store all experts of a layer in one tensor: there is no name"
            " for the packed matrix of one expert",
            "Export with --form dense.",
        )
    (bits,) = kinds["experts"] or {PLAIN}
    notes = ["transformers unpacks experts when it loads: pass CompressedTensorsConfig(dequantize=True)"]
    if bits not in (4, 8):
        notes.append(f"vLLM computes packed experts of 4 and 8 bits only, these have {bits}")
    return notes


def _stacks(module: torch.nn.Module) -> list[Stack]:
    if isinstance(module, PackedLinear):
        return [module.stack()]
    assert isinstance(module, Packed)
    return [module.stack(p) for p in module.packed_bits]


def _experts_have_names(streamed: StreamedModel) -> bool:
    moe = next(iter(streamed.moe.values()))
    return len(expert_names(streamed, moe)) == moe.num_experts * len(projections(moe.experts))


def expert_names(streamed: StreamedModel, moe: MoELayer) -> dict[tuple[int, str], str]:
    """{(expert, projection): its name in a checkpoint of this family}, without ".weight".

    Found by asking transformers how it would save fused tensors whose every number says what it belongs to; {} where
    experts are not stored one by one.
    """
    E, found = moe.num_experts, {}
    gated = bool(moe.experts.has_gate)
    for name, parts in (
        ("gate_up_proj" if gated else "up_proj", ["gate", "up"] if gated else ["up"]),
        ("down_proj", ["down"]),
    ):
        marks = torch.arange(E * len(parts), dtype=torch.float32).view(E, len(parts), 1)
        for key, tensor in streamed.plain_tensors({f"{moe.experts_name}.{name}": marks}).items():
            if tensor.numel() != 1:
                return {}
            expert, part = divmod(int(tensor.reshape(-1)[0]), len(parts))
            found[expert, parts[part]] = key.removesuffix(".weight")
    return found


def _packed_tensors(streamed: StreamedModel, index: int, live: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    prefix, narrow = f"{streamed.prefix}.{index}", packing.scale_dtype(_stored(streamed))
    for path, module in streamed.layers[index].named_modules():
        if isinstance(module, PackedLinear):
            (key,) = streamed.plain_tensors({f"{prefix}.{path}.weight": torch.empty(0, device="meta")})
            yield from _entries(key.removesuffix(".weight"), module.stack(), 0, narrow, live)
        elif isinstance(module, Packed):
            moe = streamed.moe[index]
            for (expert, p), name in expert_names(streamed, moe).items():
                yield from _entries(name, module.stack(p), expert, narrow, live)


def _entries(
    name: str, stack: Stack, expert: int, narrow: torch.dtype, live: torch.dtype | None
) -> Iterator[tuple[str, Tensor]]:
    """The three tensors of one matrix. narrow : dtype of scales, which sweeps widen."""
    yield f"{name}.weight_packed", stack.packed(expert)
    yield f"{name}.weight_scale", stack.scale_QOG[expert].to(narrow)
    yield f"{name}.weight_shape", torch.tensor(stack.shape) if live is not None else torch.empty(2, dtype=torch.int64)


def _config(streamed: StreamedModel, form: Form) -> dict[str, Any]:
    raw: dict[str, Any] = json.loads(json.dumps(streamed.checkpoint.raw_config))
    raw.pop("quantization_config")
    if form == "dense":
        return raw
    linears, experts, ignored = [], [], []
    groups: dict[str, Any] = {}
    for path, module in streamed.model.named_modules():
        if isinstance(module, PackedLinear):
            (key,) = streamed.plain_tensors({f"{path}.weight": torch.empty(0, device="meta")})
            linears.append(key.removesuffix(".weight"))
            groups["group_0"] = _scheme(module.stack(), linears)
        elif isinstance(module, Packed):
            experts.append(path)
        elif isinstance(module, torch.nn.Linear):
            (key,) = streamed.plain_tensors({f"{path}.weight": torch.empty(0, device="meta")})
            ignored.append(key.removesuffix(".weight"))
    moe = next(iter(streamed.moe.values()))
    ignored += [
        key.removesuffix(".weight")
        for layer in streamed.moe.values()
        for key in streamed.keys_of([f"{layer.router_name}.weight"])
    ]
    if experts:
        assert isinstance(moe.experts, Packed)
        first = next(iter(expert_names(streamed, moe).values()))
        around = first.split(".")[-3] if "experts" in first.split(".") else "experts"
        groups["group_1"] = _scheme(moe.experts.stack("down"), [f"re:.*\\.{around}\\.[0-9]+\\..*"])
    raw["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted(set(ignored)),
    }
    return raw


def _scheme(stack: Stack, targets: list[str]) -> dict[str, Any]:
    whole = stack.group >= stack.shape[1]
    return {
        "targets": targets,
        "weights": {
            "num_bits": stack.bits[0],
            "type": "int",
            "symmetric": True,
            "strategy": "channel" if whole else "group",
            **({} if whole else {"group_size": stack.group}),
        },
        "input_activations": None,
        "output_activations": None,
    }
