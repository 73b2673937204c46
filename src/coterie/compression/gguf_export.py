"""Write a checkpoint as one GGUF file for llama.cpp, for the families of `anatomy.gguf_families`.

Codes, tensor names and the file's layout are the `gguf` package's; what is known here is how a model in memory becomes
its tensors. Experts of a layer are merged to [E, O, I], quantized weights are made dense first, and codes are computed
one matrix at a time. Norms, biases and routers stay 32-bit; a matrix whose rows no block of the type divides stays F16.
llama.cpp itself has not read such a file here. What stands for it: its loader's requirements were read; the tests
compute logits from a file alone as its graphs do; and its own converter (the one in llama-cpp-python 0.3.36) wrote the
same bytes for tiny models of all four families in BF16 and Q8_0, which was compared by hand.
"""

# E experts, O outputs and I inputs of a matrix, H hidden, V vocabulary

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from coterie.anatomy import ExpertBank
from coterie.anatomy.forms import form_of, projection_shapes
from coterie.anatomy.gguf_families import GGUF_FAMILIES, GgufFamily
from coterie.compression.exporting import Exported
from coterie.compression.gguf_vocab import Vocabulary, read_vocabulary
from coterie.errors import CheckpointError, UsageError
from coterie.experts.packed import PackedLinear
from coterie.streaming.lockstep import Progress
from coterie.streaming.model import StreamedModel
from coterie.streaming.writer import Workspace, check_room

OTHER_WAY = "Use `coterie export --form dense` (if it is quantized) and llama.cpp's own converter."


@dataclass(frozen=True)
class FileType:
    """Types of what a file holds, named as in gguf: of experts, of other matrices, of embeddings and output.

    number : what `general.file_type` says.
    """

    number: int
    experts: str
    others: str
    embeddings: str


# what the gguf package can compute codes for. Embeddings and output are as sensitive as they are in llama.cpp's own
# files, which give them more bits; MXFP4 is for experts only there, and ternary codes leave embeddings alone.
TYPES: dict[str, FileType] = {
    "F32": FileType(0, "F32", "F32", "F32"),
    "F16": FileType(1, "F16", "F16", "F16"),
    "BF16": FileType(32, "BF16", "BF16", "BF16"),
    "Q8_0": FileType(7, "Q8_0", "Q8_0", "Q8_0"),
    "Q5_1": FileType(9, "Q5_1", "Q5_1", "Q8_0"),
    "Q5_0": FileType(8, "Q5_0", "Q5_0", "Q8_0"),
    "Q4_1": FileType(3, "Q4_1", "Q4_1", "Q8_0"),
    "Q4_0": FileType(2, "Q4_0", "Q4_0", "Q8_0"),
    "MXFP4": FileType(38, "MXFP4", "Q8_0", "Q8_0"),
    "TQ2_0": FileType(37, "TQ2_0", "TQ2_0", "F16"),
    "TQ1_0": FileType(36, "TQ1_0", "TQ1_0", "F16"),
}


@dataclass(frozen=True)
class Entry:
    """One tensor of the file.

    module : path of what holds its values. pieces : these along the first dimension, once they are in memory.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    module: str
    pieces: Callable[[], Iterator[Tensor]]


def load_gguf() -> Any:
    """The `gguf` package. Raises UsageError where it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise UsageError(
            "writing GGUF needs the package gguf", "Install it with: pip install 'coterie[gguf]'"
        ) from error
    return gguf


def check_type(kind: str) -> str:
    """The name of a type in TYPES, whatever its case. Raises UsageError."""
    if kind.upper() not in TYPES:
        raise UsageError(f"no GGUF type {kind!r} that can be written here", f"There is {', '.join(TYPES)}.")
    return kind.upper()


def export_gguf(
    streamed: StreamedModel,
    out: Path,
    kind: str,
    *,
    model: str,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Write OUT/NAME-TYPE.gguf: every tensor, all metadata llama.cpp asks for, and the tokenizer.

    Raises UsageError for a family, a form of its layers or a tokenizer that the file cannot hold, before anything is
    written. Peak memory: one layer (or the embeddings), and one projection of all its experts in the type written.
    """
    kind, gguf = check_type(kind), load_gguf()
    family = family_of(streamed, model)
    vocabulary = read_vocabulary(streamed.checkpoint.folder, _vocabulary_size(streamed))
    parts = [_outer_entries(streamed, family, kind)]
    parts += [_layer_entries(streamed, family, index, kind) for index in range(len(streamed.layers))]
    entries = [entry for part in parts for entry in part]
    size = sum(_nbytes(entry) for entry in entries)
    name = Path(os.path.abspath(model)).name
    file = f"{name}-{kind}.gguf"
    job = {"export": f"gguf {kind}", "checkpoint": streamed.checkpoint.digest(), "file": file}
    bar = progress or Progress()
    with Workspace(out, job, overwrite=overwrite) as work:
        check_room(work.folder, size)
        writer = gguf.GGUFWriter(work.folder / file, _architecture(family))
        try:
            write_metadata(writer, streamed, family, vocabulary, kind, name)
            for entry in entries:
                writer.add_tensor_info(
                    entry.name, _stored_shape(entry), _stored_dtype(entry), _nbytes(entry), _qtype(entry.type)
                )
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            bar.start("layers", len(streamed.layers))
            for entry in parts[0]:
                streamed.load_keys(_keys_of(streamed, entry.module))
                writer.write_tensor_data(encoded(entry))
                streamed.free_outer()
            for index, part in enumerate(parts[1:]):
                streamed.load_layer(index)
                for entry in part:
                    writer.write_tensor_data(encoded(entry))
                streamed.free_layer(index)
                bar.layer(index)
            writer.flush()
            os.fsync(writer.fout[0].fileno())
        finally:
            writer.close()
            bar.done()
        written = (work.folder / file).stat().st_size
        work.publish([file])
    before = sum(info.nbytes for info in streamed.checkpoint.tensors.values())
    return Exported(out / file, f"gguf {kind}", before, written, vocabulary.notes + _notes(entries, kind))


def _notes(entries: list[Entry], kind: str) -> list[str]:
    notes = []
    if kind.startswith("TQ"):
        notes.append(f"{kind} knows -1, 0 and 1 times a scale: only models trained for that survive it")
    odd = [entry.shape[-1] for entry in entries if entry.type != _wanted_type(entry.name, entry.shape, kind)]
    if odd:
        widths = ", ".join(map(str, sorted(set(odd))))
        notes.append(f"{len(odd)} matrices are F16: their rows of {widths} numbers are no whole blocks of {kind}")
    return [*notes, "not tried with llama.cpp itself: compare some outputs before you rely on the file"]


# -- what can be written ----------------------------------------------------------------------------------------------


def family_of(streamed: StreamedModel, model: str) -> GgufFamily:
    """The row of a model's family. Raises UsageError where the graph of llama.cpp would compute something else."""
    text = streamed.config.get_text_config(decoder=True)
    family = GGUF_FAMILIES.get(text.model_type)
    if family is None:
        raise UsageError(
            f"{model} is a {text.model_type}; GGUF is written here for {', '.join(GGUF_FAMILIES)}", OTHER_WAY
        )
    _check_layers(streamed, model)
    heads, hidden = text.num_attention_heads, text.hidden_size
    rope = text.rope_parameters
    reasons = {
        f"has {text.hidden_act} experts, not silu": text.hidden_act != "silu",
        "attends in a sliding window": bool(getattr(text, "sliding_window", None)),
        "clips queries, keys and values": getattr(text, "clip_qkv", None) is not None,
        "has attention biases that the graph does not add": bool(getattr(text, "attention_bias", False)),
        f"has norm_topk_prob={not family.renormalized}": (
            getattr(text, "norm_topk_prob", family.renormalized) != family.renormalized
        ),
        f"has {heads} heads of {_head_size(text)} and hidden states of {hidden}": (
            family.square and heads * _head_size(text) != hidden
        ),
        f"has {text.num_key_value_heads} key heads and {heads} query heads": (
            family.ungrouped and text.num_key_value_heads != heads
        ),
        "turns parts of a head only": rope.get("partial_rotary_factor", 1.0) != 1.0,
        f"has {rope['rope_type']} positions": rope["rope_type"] not in ("default", "linear", "yarn"),
        "has an attention factor of its own beside yarn": any(
            rope.get(name) is not None for name in ("attention_factor", "mscale", "mscale_all_dim")
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            raise UsageError(
                f"{model} {reason}: llama.cpp's graph for {text.model_type} would compute something else",
                "It cannot be written as GGUF of this family.",
            )
    return family


def _check_layers(streamed: StreamedModel, model: str) -> None:
    """Raise UsageError unless all layers are MoE layers of one size, and nothing in them is Coterie's own."""
    dense = [index for index in range(len(streamed.layers)) if index not in streamed.moe]
    if dense:
        raise UsageError(
            f"layer {dense[0]} of {model} has no experts: llama.cpp expects some in every layer", OTHER_WAY
        )
    for index, moe in streamed.moe.items():
        other = {name: value for name, value in form_of(moe).describe().items() if name != "bits"}
        if other:
            raise UsageError(
                f"layer {index} of {model} has {', '.join(other)}, which only Coterie can run",
                "Merge with --set router=reduced, or prune, for other software.",
            )
    counts = {index: moe.num_experts for index, moe in streamed.moe.items()}
    if len(set(counts.values())) > 1:
        raise UsageError(
            f"the layers of {model} have {min(counts.values())} to {max(counts.values())} experts, and GGUF knows one"
            " number for all",
            "Make them uniform first: `coterie export MODEL OUT --pad`.",
        )
    widths = {moe.bank.intermediate_size for moe in streamed.moe.values()}
    if len(widths) > 1:
        raise UsageError(
            f"the experts of {model} have {min(widths)} to {max(widths)} neurons, and GGUF knows one width for all",
            "Shrink with --scope uniform.",
        )


def _head_size(text: Any) -> int:
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def _vocabulary_size(streamed: StreamedModel) -> int:
    return int(streamed.model.get_input_embeddings().weight.shape[0])


# -- tensors ----------------------------------------------------------------------------------------------------------


def _outer_entries(streamed: StreamedModel, family: GgufFamily, kind: str) -> list[Entry]:
    """Embeddings, last norm, and the output matrix unless the loader takes the embeddings for it."""
    names = {id(module): name for name, module in streamed.model.named_modules()}
    head, embeddings = streamed.model.get_output_embeddings(), streamed.model.get_input_embeddings()
    tied = not _keys_of(streamed, names[id(head)])
    found = []
    for path, module in streamed.model.named_modules():
        if path.startswith(f"{streamed.prefix}.") or not any(True for _ in module.parameters(recurse=False)):
            continue
        if module is head and tied:
            continue
        found += _module_entries(streamed, family, path, module, kind)
    if tied and family.own_output:
        (source,) = _module_entries(streamed, family, names[id(embeddings)], embeddings, kind)
        found.append(replace(source, name="output.weight"))
    return found


def _keys_of(streamed: StreamedModel, path: str) -> list[str]:
    """Checkpoint keys of one module's own tensors."""
    return streamed.keys_of(f"{path}.{name}" for name in streamed.model.get_submodule(path).state_dict())


def _layer_entries(streamed: StreamedModel, family: GgufFamily, index: int, kind: str) -> list[Entry]:
    """All tensors of a decoder layer; it may be on meta until their values are asked for."""
    found, moe = list[Entry](), streamed.moe[index]
    for path, module in streamed.layers[index].named_modules(prefix=f"{streamed.prefix}.{index}"):
        if module is not moe.experts:
            found += _module_entries(streamed, family, path, module, kind)
            continue
        for p, shape in projection_shapes(moe.bank).items():
            name = f"blk.{index}.ffn_{p}_exps.weight"
            shape_EOI = (moe.num_experts, *shape)
            found.append(Entry(name, shape_EOI, _type_of(name, shape_EOI, kind), path, _experts(moe.bank, p)))
    return found


def _experts(bank: ExpertBank, p: str) -> Callable[[], Iterator[Tensor]]:
    def pieces() -> Iterator[Tensor]:
        for e in range(bank.num_experts):
            yield getattr(bank.read(e), f"{p}_{'HI' if p == 'down' else 'IH'}")[None]

    return pieces


def _module_entries(
    streamed: StreamedModel, family: GgufFamily, path: str, module: nn.Module, kind: str
) -> list[Entry]:
    """The parameters a module has itself, under their names in GGUF."""
    if isinstance(module, PackedLinear):
        bias: Any = module.bias
        shapes = {"weight": module.stack().shape, **({} if bias is None else {"bias": tuple(bias.shape)})}
    else:
        shapes = {name: tuple(p.shape) for name, p in module.named_parameters(recurse=False)}
    text, found = streamed.config.get_text_config(decoder=True), []
    for own, shape in shapes.items():
        name = _names(family, len(streamed.layers)).get_name(f"{path}.{own}", (".weight", ".bias"))
        if name is None:
            raise UsageError(f"GGUF has no name for {path}.{own} in a {text.model_type}", OTHER_WAY)
        heads = {"attn_q": text.num_attention_heads, "attn_k": text.num_key_value_heads}.get(name.split(".")[-2], 0)
        turned = heads if family.pairs else 0
        found.append(Entry(name, shape, _type_of(name, shape, kind), path, _values(module, own, turned)))
    return found


def _values(module: nn.Module, own: str, heads: int) -> Callable[[], Iterator[Tensor]]:
    def pieces() -> Iterator[Tensor]:
        packed = isinstance(module, PackedLinear) and own == "weight"
        value: Tensor = module.dense() if packed else getattr(module, own).detach()  # type: ignore[operator]
        yield neighbours(value, heads) if heads else value

    return pieces


def neighbours(w_OI: Tensor, heads: int) -> Tensor:
    """Rows of q or k reordered within each head: number i of the first half is followed by number i of the second."""
    halves = w_OI.reshape(heads, 2, w_OI.shape[0] // heads // 2, *w_OI.shape[1:])
    return halves.transpose(1, 2).reshape(w_OI.shape)


def _names(family: GgufFamily, layers: int) -> Any:
    gguf = load_gguf()
    return gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.arch], layers)


def _architecture(family: GgufFamily) -> str:
    gguf = load_gguf()
    return str(gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[family.arch]])


# -- codes ------------------------------------------------------------------------------------------------------------


def _wanted_type(name: str, shape: tuple[int, ...], kind: str) -> str:
    part = name.split(".")[-2]
    if len(shape) == 1 or part.endswith("_norm") or part in ("ffn_gate_inp", "ffn_gate_inp_shexp"):
        return "F32"
    if part.endswith("_exps"):
        return TYPES[kind].experts
    return TYPES[kind].embeddings if part in ("token_embd", "output") else TYPES[kind].others


def _type_of(name: str, shape: tuple[int, ...], kind: str) -> str:
    """The type a tensor gets: F16 where rows are no multiple of the wanted type's block."""
    wanted = _wanted_type(name, shape, kind)
    block, _ = load_gguf().GGML_QUANT_SIZES[_qtype(wanted)]
    return wanted if shape[-1] % block == 0 else "F16"


def _qtype(name: str) -> Any:
    return load_gguf().GGMLQuantizationType[name]


def _stored_shape(entry: Entry) -> tuple[int, ...]:
    """Shape of the array that holds the tensor: numbers, or bytes of codes."""
    if entry.type in ("F32", "F16"):
        return entry.shape
    block, size = load_gguf().GGML_QUANT_SIZES[_qtype(entry.type)]
    return (*entry.shape[:-1], entry.shape[-1] // block * size)


def _stored_dtype(entry: Entry) -> np.dtype[Any]:
    return np.dtype({"F32": np.float32, "F16": np.float16}.get(entry.type, np.uint8))


def _nbytes(entry: Entry) -> int:
    return int(np.prod(_stored_shape(entry), dtype=np.int64)) * _stored_dtype(entry).itemsize


def encoded(entry: Entry) -> np.ndarray[Any, Any]:
    """A tensor as it stands in the file, computed piece by piece. Raises CheckpointError where F16 overflows."""
    quants, whole = load_gguf().quants, np.empty(_stored_shape(entry), _stored_dtype(entry))
    begin = 0
    for piece in entry.pieces():
        values = piece.to("cpu", torch.float32).contiguous().numpy()
        with np.errstate(over="ignore"):
            codes = quants.quantize(values, _qtype(entry.type))
        if entry.type == "F16" and not np.isfinite(codes).all() and np.isfinite(values).all():
            raise CheckpointError(
                f"{entry.name} has numbers up to {np.abs(values).max():.4g}, and half precision ends at 65504",
                "Write BF16 or F32.",
            )
        whole[begin : begin + len(codes)] = codes
        begin += len(codes)
    return whole


# -- metadata ---------------------------------------------------------------------------------------------------------


def write_metadata(
    writer: Any, streamed: StreamedModel, family: GgufFamily, vocabulary: Vocabulary, kind: str, name: str
) -> None:
    """All keys llama.cpp's loader asks of these families, from the config and the layers as they are."""
    gguf, text = load_gguf(), streamed.config.get_text_config(decoder=True)
    moe = next(iter(streamed.moe.values()))
    width = moe.bank.intermediate_size
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(TYPES[kind].number)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(len(streamed.layers))
    writer.add_context_length(text.max_position_embeddings)
    writer.add_embedding_length(text.hidden_size)
    writer.add_feed_forward_length(text.intermediate_size if family.dense_width else width)
    writer.add_head_count(text.num_attention_heads)
    writer.add_head_count_kv(text.num_key_value_heads)
    writer.add_key_length(_head_size(text))
    writer.add_value_length(_head_size(text))
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    writer.add_vocab_size(_vocabulary_size(streamed))
    writer.add_expert_count(moe.num_experts)
    writer.add_expert_used_count(moe.top_k)
    if family.dense_width:
        writer.add_expert_feed_forward_length(width)
    if family.shared_width:
        writer.add_expert_shared_feed_forward_length(getattr(text, family.shared_width))
    _write_positions(writer, text)
    _write_vocabulary(writer, streamed.checkpoint.folder, vocabulary)


def _write_positions(writer: Any, text: Any) -> None:
    gguf, rope = load_gguf(), text.rope_parameters
    writer.add_rope_dimension_count(_head_size(text))
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "default":
        return
    writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
    writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(
            rope.get("original_max_position_embeddings") or text.max_position_embeddings
        )
        writer.add_rope_scaling_yarn_beta_fast(rope.get("beta_fast") or 32.0)
        writer.add_rope_scaling_yarn_beta_slow(rope.get("beta_slow") or 1.0)


def _write_vocabulary(writer: Any, folder: Path, vocabulary: Vocabulary) -> None:
    gguf = load_gguf()
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.space_prefix is not None:
        writer.add_add_space_prefix(vocabulary.space_prefix)
    special = gguf.SpecialVocab(folder, load_merges=vocabulary.model == "gpt2", n_vocab=len(vocabulary.tokens))
    special.add_to_gguf(writer, quiet=True)
