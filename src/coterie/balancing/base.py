"""What balances the experts of a model in training: auxiliary terms that are added to its loss.

    balance = Balance.of([{"name": "switch", "weight": 0.01}, {"name": "z", "weight": 0.001}])
    balance.watch(model)                 # from now on the loss of a call in training holds the terms

A term sees what one layer's router decided (`routing.base.Routing`) and the record of the whole call. It is computed
layer by layer and averaged over layers, then added times its weight; a model that is not training has its plain loss.
Which routers a model has is not known here: a term says which it can do with.
"""

# T tokens, N router outputs, K slots per token

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from coterie.errors import UsageError
from coterie.routing.base import Routing, checked
from coterie.routing.record import Record


class Term(BaseModel):
    """Base of the auxiliary terms.

    Parameters
    ----------
    weight : float, >= 0
        What the term is multiplied with.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""

    weight: float = Field(default=0.01, ge=0)

    @property
    def label(self) -> str:
        """What its value and its scale are called: the name, unless one name can stand for several terms."""
        return self.name

    def of(self, routing: Routing, record: Record) -> Tensor | None:
        """The term of one layer, a scalar, not yet weighted; None where the layer's router has nothing to it."""
        raise NotImplementedError


TERMS: dict[str, type[Term]] = {}
C = TypeVar("C", bound=type[Term])


def term(name: str, *, paper: str = "") -> Callable[[C], C]:
    """Register a term under the name that users ask for."""

    def register(cls: C) -> C:
        cls.name, cls.paper = name, paper
        TERMS[name] = cls
        return cls

    return register


def terms() -> dict[str, type[Term]]:
    """All terms there are, by name."""
    import coterie.balancing.losses  # noqa: F401

    return dict(sorted(TERMS.items()))


class Balance:
    """The terms a model is trained with.

    Attributes
    ----------
    told : value of each term, not weighted, in the last call.
    scale : times all weights; schedules change it by name.
    """

    def __init__(self, parts: Iterable[Term]) -> None:
        self.parts = list(parts)
        self.scale: dict[str, float] = {}
        self.told: dict[str, float] = {}

    @classmethod
    def of(cls, entries: Iterable[Mapping[str, Any]]) -> Balance:
        """From plain dicts with a `name` each. Raises UsageError for names and values that cannot be."""
        made = []
        for entry in entries:
            name = str(entry.get("name"))
            found = terms().get(name)
            if found is None:
                raise UsageError(f"there is no balancing term {name!r}", f"There are: {', '.join(terms())}.")
            made.append(checked(name, found, {k: v for k, v in entry.items() if k != "name"}))
        return cls(made)

    def watch(self, model: nn.Module) -> None:
        """Add the terms to the loss of `model`, which must keep records (see `routing.record.equip`)."""
        model._coterie_balance = self  # type: ignore[assignment]

    def __call__(self, record: Record, loss: Tensor) -> Tensor:
        for part in self.parts:
            found = [value for r in record.routings.values() if (value := part.of(r, record)) is not None]
            if found:
                value = torch.stack(found).mean()
                self.told[part.label] = float(value.detach())
                weight = part.weight * self.scale.get(part.label, 1.0)
                if weight:
                    loss = loss + weight * value.to(loss)
        return loss
