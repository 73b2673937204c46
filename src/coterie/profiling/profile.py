"""A profile: what every MoE layer did on a calibration set, in a folder that any method can use later.

`profile/` holds one safetensors file with all statistics and one JSON with what they were measured on. Profiles of
the same model on other text merge: sums add up, maxima stay.
"""

# E experts, D domains

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from coterie.errors import DataError, OutputError, UsageError
from coterie.profiling.observers import OBSERVERS, Observer
from coterie.streaming.writer import Workspace

FORMAT = 1


@dataclass
class LayerProfile:
    """Statistics of one MoE layer.

    index : decoder layer. experts, top_k : its size. tokens : non-padding tokens seen.
    stats : {name: tensor}, names as in the observers; also readable as attributes (`layer.count_E`).
    """

    index: int
    name: str
    experts: int
    top_k: int
    tokens: int
    groups: int = 1
    stats: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def __getattr__(self, name: str) -> Tensor:
        stats = self.__dict__.get("stats", {})
        if name in stats:
            return stats[name]  # type: ignore[no-any-return]
        source = next((n for n, cls in OBSERVERS.items() if name in cls.fields), None)
        if source is None:
            raise AttributeError(name)
        raise UsageError(
            f"the profile of layer {self.__dict__.get('index')} has no {name}",
            f"Profile again with --observe {source}.",
        )

    def describe(self) -> dict[str, Any]:
        """Everything but the statistics, as JSON."""
        return {name: getattr(self, name) for name in ("index", "name", "experts", "top_k", "tokens", "groups")}

    def has(self, observer: type[Observer]) -> bool:
        return all(name in self.stats for name in observer.fields)


@dataclass
class Profile:
    """Statistics of all MoE layers and what they were measured on.

    model : name or folder. model_digest, data_digest : identities. domains : their names, index = domain number.
    settings : samples, length, compute dtype and the like. rules : how each statistic merges, see `Observer.fields`.
    """

    model: str
    model_digest: str
    data_digest: str
    domains: list[str]
    layers: dict[int, LayerProfile]
    settings: dict[str, Any] = field(default_factory=dict)
    rules: dict[str, str] = field(default_factory=dict)

    def require(self, observers: Iterable[type[Observer]]) -> None:
        """Raise UsageError unless every layer holds these statistics."""
        missing = sorted({o.__name__ for o in observers for layer in self.layers.values() if not layer.has(o)})
        if missing:
            raise UsageError(
                f"the profile lacks {', '.join(missing)}",
                "Profile again with "
                + " ".join(f"--observe {name}" for name in missing)
                + ", or name the method there.",
            )

    def save(self, folder: Path, *, overwrite: bool = False) -> None:
        """Write `folder` whole or not at all."""
        with Workspace(folder, {"profile": self.model_digest, "data": self.data_digest}, overwrite=overwrite) as work:
            save_layers(work.folder / "profile.safetensors", self.layers.values())
            meta = {
                "format": FORMAT,
                "model": self.model,
                "model_digest": self.model_digest,
                "data_digest": self.data_digest,
                "domains": self.domains,
                "settings": self.settings,
                "rules": self.rules,
                "layers": [layer.describe() for layer in self.layers.values()],
            }
            (work.folder / "profile.json").write_text(json.dumps(meta, indent=2) + "\n")
            work.publish(["profile.safetensors", "profile.json"])

    @classmethod
    def load(cls, folder: Path) -> Profile:
        """Read a profile folder. Raises DataError if it is none or damaged."""
        try:
            meta = json.loads((folder / "profile.json").read_text(encoding="utf-8"))
            if meta["format"] != FORMAT:
                raise DataError(f"{folder} has profile format {meta['format']}, this version reads {FORMAT}")
            layers = load_layers(folder / "profile.safetensors", meta["layers"])
            for layer in layers.values():
                _check_shapes(layer, len(meta["domains"]))
            names = ("model", "model_digest", "data_digest", "domains", "settings")
            return cls(layers=layers, rules=meta.get("rules", {}), **{name: meta[name] for name in names})
        except FileNotFoundError as error:
            name = "profile.json" if not (folder / "profile.json").exists() else "profile.safetensors"
            raise DataError(f"{folder} is not a profile: no {name}") from error
        except (KeyError, TypeError, ValueError, OSError, RecursionError, SafetensorError) as error:
            raise DataError(f"{folder} is a damaged profile: {error}") from error

    def merge(self, other: Profile) -> Profile:
        """The profile of both texts together. Raises UsageError if they are not of the same model."""
        if self.model_digest != other.model_digest:
            raise UsageError("these profiles are of different models and cannot be merged")
        domains = list(dict.fromkeys(self.domains + other.domains))
        rules = {**other.rules, **self.rules}
        layers = {}
        for index, mine in self.layers.items():
            theirs = other.layers[index]
            if mine.stats.keys() != theirs.stats.keys():
                missing = sorted(mine.stats.keys() ^ theirs.stats.keys())
                raise UsageError(f"these profiles hold different statistics: {', '.join(missing)}")
            a = _on_domains(mine.stats, self.domains, domains)
            b = _on_domains(theirs.stats, other.domains, domains)
            stats = {name: _merged(_rule(name, rules), name, a, b) for name in a}
            layers[index] = LayerProfile(
                index, mine.name, mine.experts, mine.top_k, mine.tokens + theirs.tokens, mine.groups, stats
            )
        digest = "+".join(sorted({*self.data_digest.split("+"), *other.data_digest.split("+")}))
        settings = _settings_of_both(self.settings, other.settings)
        return Profile(self.model, self.model_digest, digest, domains, layers, settings, rules)


def save_layers(file: Path, layers: Iterable[LayerProfile]) -> None:
    tensors = {f"{layer.index}.{name}": t.contiguous() for layer in layers for name, t in layer.stats.items()}
    try:
        save_file(tensors, file)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"cannot write {file}: {error}") from error


def load_layers(file: Path, metas: Iterable[Mapping[str, Any]]) -> dict[int, LayerProfile]:
    stats: dict[int, dict[str, Tensor]] = {}
    for key, tensor in load_file(file).items():
        index, _, name = key.partition(".")
        stats.setdefault(int(index), {})[name] = tensor
    return {meta["index"]: LayerProfile(**meta, stats=stats.get(meta["index"], {})) for meta in metas}


def _check_shapes(layer: LayerProfile, domains: int) -> None:
    """Names of statistics end in their shape: E experts and D domains must be as many as there are."""
    sizes = {"E": layer.experts, "D": domains}
    for name, tensor in layer.stats.items():
        letters = name.rpartition("_")[2]
        wrong = tensor.dim() != len(letters) or any(sizes.get(x, n) != n for x, n in zip(letters, tensor.shape))
        if letters.isupper() and wrong:
            raise ValueError(f"{name} of layer {layer.index} has the shape {list(tensor.shape)}")


def _rule(name: str, rules: Mapping[str, str]) -> str:
    return rules.get(name) or next(cls.fields[name] for cls in OBSERVERS.values() if name in cls.fields)


def _merged(rule: str, name: str, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Tensor:
    if rule == "same":
        if not torch.equal(a[name], b[name]):
            raise UsageError(f"these profiles disagree on {name}, which is of the model alone")
        return a[name]
    if rule == "none":
        raise UsageError(f"{name} of two texts does not follow from that of each", "Profile both texts in one run.")
    if rule == "sum":
        return a[name] + b[name]
    if rule == "max":
        return torch.maximum(a[name], b[name])
    leader = rule.removeprefix("with ")
    return torch.where(b[leader] > a[leader], b[name], a[name])


def _settings_of_both(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """What two profiles were measured on, taken together; what does not add up is `a`'s."""
    joined = {**b, **a}
    for name in a.keys() & b.keys():
        if name == "samples":
            joined[name] = a[name] + b[name]
        elif name == "length":
            joined[name] = max(a[name], b[name])
        elif name == "tokens":
            joined[name] = {d: a[name].get(d, 0) + b[name].get(d, 0) for d in {**a[name], **b[name]}}
        elif name == "sources":
            joined[name] = list(dict.fromkeys([*a[name], *b[name]]))
    return joined


def _on_domains(stats: Mapping[str, Tensor], have: list[str], want: list[str]) -> dict[str, Tensor]:
    """Statistics per domain (names ending in _D or _DE) moved to the rows of a common list of domains."""
    result = dict(stats)
    for name, tensor in stats.items():
        if name.endswith(("_D", "_DE")):
            moved = torch.zeros((len(want), *tensor.shape[1:]), dtype=tensor.dtype)
            moved[[want.index(domain) for domain in have]] = tensor
            result[name] = moved
    return result
