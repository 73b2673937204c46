"""All parts a model can be made of or trained with, by name, with what they can be told: routers, balancing terms and
controllers, residual rules. What `coterie methods` and the page of parts show is generated from here."""

from __future__ import annotations

import inspect
import re
import sys
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from coterie.balancing.base import terms
from coterie.balancing.controllers import BiasSettings
from coterie.routing.base import routers
from coterie.routing.residual import Residual


@dataclass(frozen=True)
class Part:
    """One part. settings : what it can be told. owner : the class that does it."""

    name: str
    kind: str
    paper: str
    settings: type[BaseModel]
    owner: type[Any]

    @property
    def summary(self) -> str:
        """The first sentence about it."""
        text = inspect.getdoc(self.owner) or ""
        return " ".join(text.split("\n\n")[0].split())

    @property
    def module(self) -> str:
        return self.owner.__module__

    @property
    def about(self) -> str:
        """What its file says."""
        return (sys.modules[self.module].__doc__ or "").strip()

    def parameters(self) -> list[dict[str, Any]]:
        """Name, type, bounds, default and description of every setting."""
        said: dict[str, str] = {}
        for cls in reversed(self.settings.__mro__):
            said |= described(cls)
        schema = self.settings.model_json_schema()
        shown = []
        for name, entry in schema.get("properties", {}).items():
            plain = {k: v for k, v in entry.items() if k not in ("title", "$ref", "anyOf")}
            if "anyOf" in entry:  # an optional one: its type, or none
                plain["anyOf"] = [_plain(one) for one in entry["anyOf"] if one.get("type") != "null"]
            if "$ref" in entry:
                plain |= _plain(entry)
            shown.append({"name": name, **plain, "description": said.get(name, entry.get("description", ""))})
        return shown


def _plain(entry: dict[str, Any]) -> dict[str, Any]:
    return {"type": "table"} if "$ref" in entry else entry


def described(cls: type[Any]) -> dict[str, str]:
    """What the "Parameters" of a class's docstring say of each name."""
    text = inspect.cleandoc(cls.__doc__ or "")
    _, _, section = text.partition("Parameters\n----------\n")
    section = re.split(r"\n\n\S|\n\w+\n-{3,}\n", section)[0]
    found: dict[str, str] = {}
    names: list[str] = []
    for line in section.splitlines():
        head = re.match(r"^([a-z_][a-z_0-9, ]*) : (.*)$", line)
        if head:
            names = [name.strip() for name in head[1].split(",")]
            found |= dict.fromkeys(names, "")
        elif names and line.strip():
            for name in names:
                found[name] = f"{found[name]} {line.strip()}".strip()
    return found


def parts() -> dict[str, Part]:
    """All there are, kind by kind."""
    made = [Part(name, "router", cls.paper, cls.Settings, cls) for name, cls in routers().items()]
    made += [Part(name, "balancing", cls.paper, cls, cls) for name, cls in terms().items()]
    made.append(Part("bias", "controller", "arXiv:2408.15664", BiasSettings, BiasSettings))
    made.append(Part("momentum", "residual", "arXiv:2410.14574", Residual, Residual))
    return {f"{part.kind} {part.name}": part for part in made}
