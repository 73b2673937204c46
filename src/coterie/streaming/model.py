"""A model whose weights come and go: built on the meta device, one decoder layer in memory at a time.

transformers itself converts checkpoint keys to modules and back, so no architecture is known here. Opening a model
runs the whole conversion once on meta tensors: names, counts and shapes of every tensor are checked against the
config before a single weight is read.

Peak memory: embeddings (only until the batches have been embedded), or one layer. Experts keep the dtype they are
stored in and are widened one at a time when they run; everything else is small and is cast to the compute dtype.
Experts that are stored packed (see `stored`) are unpacked when their layer is loaded: FP8 to the compute dtype (in
float32, four times the bytes of the files; --compute-dtype bfloat16 halves that), MXFP4 to bfloat16 (3.8 times).
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import logging as transformers_logging
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import LoadStateDictConfig

from coterie.anatomy import MoELayer, decoder_layers, is_experts_module, moe_layers
from coterie.anatomy.architectures import model_class_of
from coterie.anatomy.forms import with_planes
from coterie.anatomy.uneven import checksums_of, damage, is_coterie, rebuild
from coterie.errors import CheckpointError, CoterieError, ModelError
from coterie.experts import forward as experts_forward
from coterie.experts.masks import Wide
from coterie.experts.nested import plane_of
from coterie.experts.packed import checksum
from coterie.routing.base import Router
from coterie.streaming.checkpoint import DTYPES, Checkpoint, PackedInfo
from coterie.streaming.config import choose_compute_dtype, one_line, read_config, stored_form
from coterie.streaming.fused import fused_layouts


class StreamedModel:
    """One checkpoint, ready to be run layer by layer.

    Parameters
    ----------
    checkpoint : Checkpoint
    device : str
        Where layers compute.
    compute_dtype : str
        "auto", "float32", "bfloat16" or "float16".
    experts : str
        Experts implementation; "coterie" can be observed and computes from narrower weights.
    allow_nonfinite : bool
        Accept NaN and Inf weights.
    planes : int
        Of nested experts, only so many planes are there and ever read: the same as if there were no more.

    Attributes
    ----------
    form : the packed form its weights are stored in; None for ordinary numbers
    model : PreTrainedModel, on meta except what is loaded
    layers, prefix : the decoder layers and their path
    moe : {layer index: MoELayer}
    params : {checkpoint key: parameter it is (part of)}; None for keys no parameter takes
    layer_keys : checkpoint keys of each decoder layer
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: str = "cpu",
        compute_dtype: str = "auto",
        experts: str = experts_forward.NAME,
        allow_nonfinite: bool = False,
        trust_remote_code: bool = False,
        planes: int | None = None,
    ) -> None:
        if planes is not None:
            _leave_planes(checkpoint, planes)
        transformers_logging.disable_progress_bar()
        self.checkpoint, self.device, self.experts = checkpoint, device, experts
        self.allow_nonfinite = allow_nonfinite
        self.config = read_config(checkpoint, trust_remote_code=trust_remote_code)
        self.form = stored_form(checkpoint)
        self.compute_dtype = choose_compute_dtype(compute_dtype, device, self.own_dtype)
        if self.form is not None:
            checkpoint.unpack(self.form, self.compute_dtype)
        self.model = self.build()
        self.prefix, self.layers = decoder_layers(self.model)
        self.mapping = get_model_conversion_mapping(self.model)
        self._dtype_plan = self.model._get_dtype_plan(self.compute_dtype)
        self._stored_dtype: dict[str, torch.dtype] = {}
        self.params = self._match_keys()
        self._check_by_dry_conversion()
        shapes = {name: tensor.shape for name, tensor in self.model.state_dict().items()}
        self.fused = fused_layouts(checkpoint, self.params, shapes, self.mapping)
        self._reusable: dict[tuple[str, torch.Size, torch.dtype], Tensor] = {}
        self.moe = {layer.index: layer for layer in moe_layers(self.model)}
        for moe_layer in self.moe.values():
            _check_routing(moe_layer)
        self.layer_keys: list[list[str]] = [[] for _ in self.layers]
        self.outer_keys: list[str] = []
        for key, param in self.params.items():
            if param is None:
                continue
            if param.startswith(f"{self.prefix}."):
                self.layer_keys[int(param[len(self.prefix) + 1 :].split(".")[0])].append(key)
            else:
                self.outer_keys.append(key)
        self._checksums = checksums_of(checkpoint.raw_config.get("quantization_config"))
        checkpoint.on_weight, checkpoint.on_read = self._check_weight, self._hand_on
        self.on_read: Any = None
        self._errors: list[CoterieError] = []
        self.retain: set[str] = set()  # parameters whose stored values are wanted besides the cast ones
        self.retained: dict[str, Tensor] = {}
        self._prefetch: tuple[threading.Thread, threading.Event] | None = None

    def refuse_packed(self, why: str) -> None:
        """Raise ModelError where weights are stored packed: for jobs whose result could not be stored so."""
        if self.form is not None:
            raise ModelError(
                f"{self.checkpoint.folder.name} is stored as {self.form.name}: {why}",
                "Start from the unquantized checkpoint and quantize the result.",
            )

    @property
    def own_dtype(self) -> torch.dtype:
        """The dtype the model's weights have: that of its largest tensor; of packed ones, what the config says."""
        if self.form is not None:
            named = getattr(self.config.get_text_config(decoder=True), "dtype", None) or self.config.dtype
            return named if isinstance(named, torch.dtype) else torch.bfloat16
        largest = max(self.checkpoint.tensors.values(), key=lambda info: info.nbytes, default=None)
        return DTYPES[largest.dtype] if largest else torch.float32

    # -- building and checking ------------------------------------------------------------------------------------

    def build(self) -> PreTrainedModel:
        """The model on the meta device, layers cut to the sizes its config names."""
        config = self.config
        if hasattr(config.get_text_config(decoder=True), "output_router_logits"):
            config.get_text_config(decoder=True).output_router_logits = False
        try:
            with torch.device("meta"):
                model = model_class_of(config)._from_config(config, dtype=self.compute_dtype)  # type: ignore[attr-defined]
                if is_coterie(self.checkpoint.raw_config.get("quantization_config")):
                    rebuild(model, self.checkpoint.raw_config["quantization_config"])
        except CoterieError:
            raise
        except Exception as error:  # sizes in a config can be anything; so can the exception they cause
            raise CheckpointError(f"config.json describes a model that cannot be built: {one_line(error)}") from error
        assert isinstance(model, PreTrainedModel)
        model.set_experts_implementation(self.experts)
        if any(isinstance(module, Router) and module.needs_attention for module in model.modules()):
            model.set_attn_implementation("eager")
        return model.eval()

    def _match_keys(self) -> dict[str, str | None]:
        """Which parameter each checkpoint key is (the first part of), by transformers' own rules."""
        renamings = [m for m in self.mapping if isinstance(m, WeightRenaming)]
        converters = [m for m in self.mapping if isinstance(m, WeightConverter)]
        state = self.model.state_dict()
        params: dict[str, str | None] = {}
        for key in self.checkpoint.tensors:
            name, _ = rename_source_key(key, renamings, converters, self.model.base_model_prefix, state)
            if name not in state and key in state:
                name = key
            params[key] = name if name in state else None
        self._check_one_form(params)
        for key, matched in params.items():  # on meta, every parameter takes the dtype it is stored in
            if matched is not None:
                self._stored_dtype[matched] = DTYPES[self.checkpoint.tensors[key].dtype]
                put_tensor(self.model, matched, state[matched].to(self._stored_dtype[matched]))
        return params

    def _check_one_form(self, params: dict[str, str | None]) -> None:
        """Raise CheckpointError where the tensors of one parameter are stored in different forms: an expert could not
        take another one's place with its bytes."""
        seen: dict[str, tuple[str, object]] = {}
        for key, param in params.items():
            info = self.checkpoint.tensors[key]
            stored = tuple(part.dtype for part in info.parts) if isinstance(info, PackedInfo) else None
            if param is not None and (first := seen.setdefault(param, (key, stored)))[1] != stored:
                raise CheckpointError(f"{first[0]} and {key} are parts of one parameter and stored in different forms")

    def _check_by_dry_conversion(self) -> None:
        metas = {key: _MetaSlice(info.meta()) for key, info in self.checkpoint.tensors.items()}
        settings = LoadStateDictConfig(dtype=self.compute_dtype, weight_mapping=self.mapping, device_map={"": "meta"})
        info, _ = convert_and_load_state_dict_in_model(self.model, metas, settings, None)
        self.model._adjust_missing_and_unexpected_keys(info)
        missing = info.missing_keys - set(self.model.all_tied_weights_keys)
        folder = self.checkpoint.folder.name
        if info.conversion_errors:
            name, text = min(info.conversion_errors.items())
            raise CheckpointError(f"{folder}: tensors of {name} do not fit together: {text.strip().splitlines()[-1]}")
        if info.mismatched_keys:
            name, found, expected = min(info.mismatched_keys, key=lambda entry: entry[0])
            raise CheckpointError(
                f"{folder}: {len(info.mismatched_keys)} tensors have another shape than config.json says,"
                f" first {name}: {list(found)} instead of {list(expected)}",
                "Config and weights do not belong together.",
            )
        if missing:
            raise CheckpointError(
                f"{folder}: {len(missing)} tensors are missing, first {min(missing)}",
                "The checkpoint is incomplete: fetch it again.",
            )
        if info.unexpected_keys:
            raise CheckpointError(
                f"{folder}: {len(info.unexpected_keys)} tensors belong to no part of"
                f" {type(self.model).__name__}, first {min(info.unexpected_keys)}",
                "Config and weights do not belong together, or the installed transformers is too old for this model.",
            )

    # -- weights in and out ---------------------------------------------------------------------------------------

    def load_outer(self) -> None:
        """Load what surrounds the decoder layers on the text path: embeddings, final norm, rotary tables; no head."""
        decoder = self.prefix.rpartition(".")[0]
        self.load_keys([k for k in self.outer_keys if not decoder or str(self.params[k]).startswith(f"{decoder}.")])
        self.materialise_buffers(self.model, skip=self.layers)

    def load_head(self) -> None:
        """Load the language-model head, or the embeddings it is tied to."""
        names = {id(module): name for name, module in self.model.named_modules()}
        head, embeddings = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        wanted = self.keys_of(f"{names[id(head)]}.{n}" for n, _ in head.named_parameters())
        if not wanted:  # tied: the checkpoint holds it once, as embeddings
            wanted = self.keys_of(f"{names[id(embeddings)]}.{n}" for n, _ in embeddings.named_parameters())
        self.load_keys(wanted)
        self.model.tie_weights()

    def free_embeddings(self) -> None:
        """Forget the token embeddings: once all batches are embedded nothing in a sweep needs them."""
        embeddings = self.model.get_input_embeddings()
        _to_meta(embeddings)

    def free_outer(self) -> None:
        for name, module in self.model.named_modules():
            if not name.startswith(self.prefix):
                for key, param in module.named_parameters(recurse=False):
                    module._parameters[key] = nn.Parameter(param.to("meta"), requires_grad=False)

    def load_layer(self, index: int) -> nn.Module:
        """Bring decoder layer `index` into memory. Raises CheckpointError on unreadable or NaN weights."""
        self._stop_prefetch()
        self.load_keys(self.layer_keys[index])
        layer = self.layers[index]
        self.materialise_buffers(layer)
        return layer

    def load_moe(self, index: int, *, experts: bool = True) -> None:
        """Bring only the MoE block of layer `index` into memory, with or without its experts: enough to edit it."""
        moe = self.moe[index]
        names = [str(self.params[k]) for k in self.layer_keys[index]]
        wanted = [n.startswith(f"{moe.name}.") and (experts or not n.startswith(f"{moe.experts_name}.")) for n in names]
        self.load_keys([key for key, want in zip(self.layer_keys[index], wanted, strict=True) if want])

    def free_layer(self, index: int) -> None:
        """Put layer `index` back on meta, in the dtypes it is stored in. An edited layer keeps its edited shapes."""
        self._recycle(index)
        _to_meta(self.layers[index])
        for param in {str(self.params[key]) for key in self.layer_keys[index]}:
            tensor = self.model.get_parameter_or_buffer(param).detach()
            if tensor.dtype != self._stored_dtype[param]:
                put_tensor(self.model, param, tensor.to(self._stored_dtype[param]))
        self.checkpoint.release(self.layer_keys[index])

    def forget_buffers(self) -> None:
        """Free the memory that one layer leaves to the next."""
        self._reusable.clear()
        experts_forward.release_scratch()

    def prefetch(self, index: int) -> None:
        """Start reading the bytes of layer `index` into the system's page cache, in a thread, bounded by one layer."""
        if index < len(self.layers):
            stop = threading.Event()
            thread = threading.Thread(
                target=self.checkpoint.prefetch, args=(self.layer_keys[index], stop), name="prefetch", daemon=True
            )
            self._prefetch = (thread, stop)
            thread.start()

    def _stop_prefetch(self) -> None:
        if self._prefetch is not None:
            thread, stop = self._prefetch
            stop.set()
            thread.join()
            self._prefetch = None

    def checkpoint_tensors(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Parameters by model name, as the tensors a checkpoint of this family would hold. Works on meta tensors."""
        tensors: dict[str, Tensor] = revert_weight_conversion(self.model, state)
        return tensors

    def plain_tensors(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """As `checkpoint_tensors`, for stock parameters that this checkpoint holds in another form.

        transformers remembers of its conversions only those that this checkpoint needed; packed experts need none.
        """
        used = self.model._weight_conversions
        prefixes = [m for m in used or () if isinstance(m, PrefixChange)]
        others = [
            m for m in get_model_conversion_mapping(self.model, add_legacy=False) if not isinstance(m, PrefixChange)
        ]
        self.model._weight_conversions = [*prefixes, *others] or None
        try:
            return self.checkpoint_tensors(state)
        finally:
            self.model._weight_conversions = used

    def keys_of(self, params: Iterable[str]) -> list[str]:
        """Checkpoint keys that make up the given parameters."""
        wanted = set(params)
        return [key for key, param in self.params.items() if param in wanted]

    def pass_on(self, key: str) -> None:
        """Read one tensor only to check it and hand it to `on_read`."""
        self._errors.clear()
        self.checkpoint.read(key)
        if self._errors:
            raise self._errors[0]

    def load_keys(self, keys: list[str]) -> None:
        """Bring these tensors of the checkpoint into memory. Raises CheckpointError on unreadable or NaN weights."""
        self._errors.clear()
        named = {str(self.params[key]) for key in keys}
        straight = [param for param in sorted(named) if param in self.fused]
        for param in straight:
            self._load_fused(param)
        taken = set(straight)
        others = [key for key in keys if self.params[key] not in taken]
        settings = LoadStateDictConfig(
            dtype=self.compute_dtype, weight_mapping=self.mapping, device_map={"": self.device}
        )
        info, _ = convert_and_load_state_dict_in_model(self.model, self.checkpoint.lazy(others), settings, None)
        if self._errors:
            raise self._errors[0]
        if info.conversion_errors:
            name, text = min(info.conversion_errors.items())
            raise CheckpointError(f"cannot assemble {name}: {text.strip().splitlines()[-1]}")
        for param in named & self.retain:
            self.retained[param] = self.model.get_parameter_or_buffer(param).detach()
        for owner in {param.rpartition(".")[0] for param in named}:
            self._to_compute_dtype(self.model.get_submodule(owner))
        for param in named:  # torch multiplies weights that learn in another way, also where no gradient is taken
            self.model.get_parameter_or_buffer(param).requires_grad_(False)

    def _load_fused(self, param: str) -> None:
        """Read a fused parameter expert by expert, into the memory the same parameter of another layer has left."""
        owner_path, _, name = param.rpartition(".")
        owner = self.model.get_submodule(owner_path)
        template = owner._parameters[name]
        assert template is not None
        memory = self._reusable.pop((name, template.shape, template.dtype), None)
        if memory is None:
            memory = torch.empty(template.shape, dtype=template.dtype)
        self.fused[param].read(self.checkpoint, memory)
        value = nn.Parameter(memory.to(self.device), requires_grad=False)
        value._is_hf_initialized = True  # type: ignore[attr-defined]
        owner._parameters[name] = value

    def _recycle(self, index: int) -> None:
        """Keep the memory of a layer's fused experts for the next layer, unless an edit has replaced it."""
        prefix = f"{self.prefix}.{index}."
        for param in self.fused:
            if param.startswith(prefix):
                value = self.model.get_parameter_or_buffer(param).detach()
                E = value.shape[0]
                if E == len(self.fused[param].keys) and value.device.type == "cpu" and not value.is_meta:
                    self._reusable[(param.rpartition(".")[2], value.shape, value.dtype)] = value

    def _to_compute_dtype(self, module: nn.Module) -> None:
        """Cast what was loaded into `module` to the compute dtype; fused experts may stay as they are stored, mask
        routers do."""
        if (is_experts_module(module) and self.experts == experts_forward.NAME) or isinstance(module, Wide):
            return
        for name, param in module.named_parameters(recurse=False):
            if not param.is_meta and param.is_floating_point():
                dtype = self._dtype_of(module, name)
                if param.dtype != dtype:
                    cast = nn.Parameter(param.detach().to(dtype), requires_grad=False)
                    cast._is_hf_initialized = True  # type: ignore[attr-defined]
                    module._parameters[name] = cast
        for name, buffer in module.named_buffers(recurse=False):
            if not buffer.is_meta and buffer.is_floating_point() and name not in module._non_persistent_buffers_set:
                module._buffers[name] = buffer.to(self._dtype_of(module, name))

    def _dtype_of(self, module: nn.Module, name: str) -> torch.dtype:
        if self._dtype_plan:
            path = next(n for n, m in self.model.named_modules() if m is module)
            for pattern, dtype in self._dtype_plan.items():
                if re.search(pattern.replace("*", ".*"), f"{path}.{name}"):
                    return dtype  # type: ignore[no-any-return]
        return self.compute_dtype

    def _check_weight(self, key: str, tensor: Tensor) -> None:
        written = self._checksums.get(self.params[key] or "")
        if written is not None and checksum(tensor) != written:
            self._errors.append(damage(str(self.params[key])))
        checked = not self.allow_nonfinite and tensor.dtype in _EXPONENT and tensor.numel() > 0
        if checked and not all_finite(tensor):
            bad = int((~torch.isfinite(tensor.float())).sum())
            error = CheckpointError(
                f"{key} holds {bad} NaN or Inf weights of {tensor.numel()}",
                "The checkpoint is damaged; --allow-nonfinite goes on regardless.",
            )
            self._errors.append(error)

    def _hand_on(self, key: str, tensor: Tensor) -> None:
        if self.on_read is not None and not self._errors:
            try:
                self.on_read(key, tensor)
            except CoterieError as error:
                self._errors.append(error)

    def materialise_buffers(self, root: nn.Module, skip: nn.Module | None = None) -> None:
        """Rebuild buffers that no checkpoint holds (rotary tables and the like) the way from_pretrained does."""
        skipped = set(skip.modules()) if skip is not None else set()
        owners = {id(m): m for m in self.model.modules() if isinstance(m, PreTrainedModel)}
        paths = dict(self.model.named_modules())
        names = {id(m): n for n, m in paths.items()}
        for module in root.modules():
            if module in skipped:
                continue
            pending = [n for n in module._non_persistent_buffers_set if _on_meta(module._buffers.get(n))]
            if not pending:
                continue
            for name in pending:
                template = module._buffers[name]
                assert template is not None
                module._buffers[name] = torch.empty_like(template, device=self.device)
            path = names[id(module)]
            while not isinstance(paths[path], PreTrainedModel):
                path = path.rpartition(".")[0]
            owner = owners[id(paths[path])]
            with torch.no_grad():
                owner._init_weights(module)


def _leave_planes(checkpoint: Checkpoint, planes: int) -> None:
    """Forget the planes of nested experts above the first `planes`. Raises UsageError where there are not as many."""
    header = with_planes(checkpoint.raw_config.get("quantization_config") or {}, planes)
    checkpoint.raw_config = {**checkpoint.raw_config, "quantization_config": header}
    checkpoint.tensors = {key: info for key, info in checkpoint.tensors.items() if plane_of(key) <= planes}
    checkpoint.stored = checkpoint.tensors


_EXPONENT = {
    torch.bfloat16: (torch.int16, 0x7FFF, 0x7F80),
    torch.float16: (torch.int16, 0x7FFF, 0x7C00),
    torch.float32: (torch.int32, 0x7FFFFFFF, 0x7F800000),
    torch.float64: (torch.int64, 0x7FFFFFFFFFFFFFFF, 0x7FF0000000000000),
    torch.float8_e4m3fn: (torch.uint8, 0x7F, 0x7F),  # has no Inf: the pattern is its NaN
    torch.float8_e5m2: (torch.uint8, 0x7F, 0x7C),
    torch.float8_e8m0fnu: (torch.uint8, 0xFF, 0xFF),
}


def all_finite(tensor: Tensor) -> bool:
    """No NaN, no Inf: without its sign bit, every bit pattern is below that of infinity. One pass over integers, in
    pieces, so that a large embedding is not copied whole."""
    integer, magnitude, infinity = _EXPONENT[tensor.dtype]
    pieces = torch.split(tensor.reshape(-1).view(integer), 2**22)
    return all(int(piece.bitwise_and(magnitude).amax()) < infinity for piece in pieces)


class _MetaSlice:
    """A meta tensor behind the interface of a lazily read one."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def __getitem__(self, index: Any) -> Tensor:
        return self._tensor

    def get_shape(self) -> list[int]:
        return list(self._tensor.shape)

    def get_dtype(self) -> str:
        return str(self._tensor.dtype)


def _check_routing(layer: MoELayer) -> None:
    """Numbers of a config that no tensor's shape contradicts, but that no router can work with."""
    E, where = layer.router_size, f"in layer {layer.index}"
    counts = {
        n: v for n in ("num_group", "n_group", "topk_group") if isinstance(v := getattr(layer.router, n, None), int)
    }
    if not 0 < layer.top_k <= E:
        raise CheckpointError(f"config.json has the router {where} pick {layer.top_k} of {E} experts per token")
    if min(counts.values(), default=1) < 1 or E % layer.groups or layer.groups_used > layer.groups:
        told = ", ".join(f"{name}={value}" for name, value in counts.items())
        raise CheckpointError(
            f"config.json has the router {where} split {E} experts into groups that do not work: {told}"
        )


def _on_meta(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.is_meta


def put_tensor(model: nn.Module, path: str, tensor: Tensor) -> None:
    """Give a model another tensor under the name of one of its parameters or buffers."""
    owner_path, _, name = path.rpartition(".")
    owner = model.get_submodule(owner_path)
    if name in owner._parameters:
        owner._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[name] = tensor


def _to_meta(module: nn.Module) -> None:
    for child in module.modules():
        for name, param in child._parameters.items():
            if param is not None and not param.is_meta:
                child._parameters[name] = nn.Parameter(param.detach().to("meta"), requires_grad=False)
        for name, buffer in child._buffers.items():
            if buffer is not None and not buffer.is_meta:
                child._buffers[name] = buffer.to("meta")
