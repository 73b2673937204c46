"""Teach transformers to load Coterie's own checkpoints, and do it without importing transformers.

`import coterie` calls `install`. From then on plain `AutoModelForCausalLM.from_pretrained(path)` rebuilds checkpoints
whose layers differ, trains them and saves them again. It uses transformers' registers of quantization methods, which
are the hooks it offers for changing modules before weights are loaded; nothing is quantized by that. Weights that are
stored in a packed form (FP8, MXFP4) are dequantized by transformers' own way for that form. Coterie's own decoder is
made known to the Auto classes under its model type, "coterie".
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_REGISTER = "transformers.quantizers.auto"
_CONFIGS, _AUTO = "transformers.models.auto.configuration_auto", "transformers.models.auto.modeling_auto"
_DECODER = "transformers.models.coterie"


def install() -> None:
    """Register with transformers: now if it is loaded, else at the moment it is."""
    for module, act in ((_REGISTER, register), (_CONFIGS, register_config), (_AUTO, register_decoder)):
        if module in sys.modules:
            act()
        elif not any(isinstance(finder, _AfterImport) and finder.name == module for finder in sys.meta_path):
            sys.meta_path.insert(0, _AfterImport(module, act))


class _AfterImport(MetaPathFinder):
    """Waits for one module to be imported, acts, and is gone."""

    def __init__(self, name: str, act: Callable[[], None]) -> None:
        self.name, self.act = name, act

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            self.act()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


class _Decoder(ModuleType):
    """Stands where transformers looks for the modules of a model type; loads ours when something of it is wanted."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        place = "config" if name.endswith("Config") else "decoder"
        return getattr(importlib.import_module(f"coterie.architectures.{place}"), name)


def register_config() -> None:
    """Make the config of Coterie's own decoder known under its model type."""
    sys.modules.setdefault(_DECODER, _Decoder(_DECODER))
    sys.modules[_CONFIGS].CONFIG_MAPPING_NAMES["coterie"] = "CoterieConfig"


def register_decoder() -> None:
    """Make Coterie's own decoder known to the Auto classes."""
    auto: Any = sys.modules[_AUTO]
    auto.MODEL_MAPPING_NAMES["coterie"] = "CoterieModel"
    auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["coterie"] = "CoterieForCausalLM"
    for mapping in (auto.MODEL_MAPPING, auto.MODEL_FOR_CAUSAL_LM_MAPPING):  # where they were made before the config was
        mapping._reverse_config_mapping["CoterieConfig"] = "coterie"


def register() -> None:
    """Add the "coterie" method to transformers' registers, once."""
    auto: Any = sys.modules[_REGISTER]
    if "coterie" in auto.AUTO_QUANTIZER_MAPPING:
        return
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class CoterieConfig(QuantizationConfigMixin):  # type: ignore[misc]
        """The `quantization_config` entry, kept as it was read."""

        def __init__(self, **entries: Any) -> None:
            entries.pop("quant_method", None)
            self.quant_method = "coterie"
            self.__dict__.update(entries)

    class CoterieQuantizer(HfQuantizer):  # type: ignore[misc]
        """Rebuilds the modules of a model before its weights are loaded."""

        requires_calibration = False

        def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
            super().__init__(quantization_config, **kwargs)
            packed = getattr(quantization_config, "packed", None)
            self.dtypes: dict[str, Any] = {}
            self.packed = auto.AutoHfQuantizer.from_config({**packed, "dequantize": True}) if packed else None

        def update_weight_conversions(self, weight_conversions: Any, model: Any) -> Any:
            if self.packed is not None:
                return self.packed.update_weight_conversions(weight_conversions, model)
            return super().update_weight_conversions(weight_conversions, model)

        def validate_environment(self, *args: Any, **kwargs: Any) -> None:
            from coterie.anatomy.uneven import check_header

            check_header(self.quantization_config.to_dict())

        def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
            from coterie.anatomy.uneven import rebuild
            from coterie.experts.nested import PLANES, nested_modules

            rebuild(model, self.quantization_config.to_dict())
            if nested_modules(model):  # planes that are not wanted stay where they are
                model._keys_to_ignore_on_load_unexpected = {
                    *(model._keys_to_ignore_on_load_unexpected or ()),
                    PLANES,
                }
            self.dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}

        def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
            from coterie.anatomy.routers import check_loaded, show_attention
            from coterie.anatomy.uneven import check_codes
            from coterie.experts import compressed, levels, masks

            check_loaded(model)
            show_attention(model)
            check_codes(model, self.quantization_config.to_dict())
            compressed.fill_missing(model)
            masks.fill_missing(model)
            levels.fill_missing(model)
            if self.packed is not None:  # transformers leaves what is not packed in the dtype it is stored in
                for name, parameter in model.named_parameters():
                    parameter.data = parameter.data.to(self.dtypes.get(name, parameter.dtype))
            model.is_quantized = False  # its weights are ordinary numbers: they may be cast and trained
            return model

        def is_serializable(self) -> bool:
            return True

        @property
        def is_trainable(self) -> bool:
            return True

    auto.register_quantization_config("coterie")(CoterieConfig)
    auto.register_quantizer("coterie")(CoterieQuantizer)
