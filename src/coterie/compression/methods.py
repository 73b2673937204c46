"""What a compression method is, and the register of all of them.

A method is a class of typed, bounded, documented parameters with a few functions; one decorator line gives it a name,
a kind and its paper. The command line's help, `coterie methods` and the documentation are made from that.

    @method("frequency", kind="pruning", paper="folklore")
    class Frequency(Method):
        def observes(self): return (SelectionCount,)
        def score(self, layer): return layer.count_E.float()
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from coterie.anatomy import ExpertBank, MoELayer
from coterie.compression.plan import LayerPlan
from coterie.compression.selector import Budget, select_global, select_layer
from coterie.errors import UsageError
from coterie.experts.forward import Slot
from coterie.profiling.observers import Observer
from coterie.profiling.profile import LayerProfile


class Pick(NamedTuple):
    """What a method decided for one layer.

    keep : experts that stay, ascending. scores_E : what says why (or [0] where nothing does).
    extra : what `rebuild` and `router_rows` need (JSON), put into the plan.
    """

    keep: list[int]
    scores_E: Tensor
    extra: dict[str, Any] = {}


class Method(BaseModel):
    """Base of all methods. Subclasses declare parameters as annotated pydantic fields with a description."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def observes(self) -> tuple[type[Observer], ...]:
        """The statistics `score` and `prepare` read; only these are computed."""
        return ()

    def observes_for(self, counts: Mapping[int, int] | None) -> tuple[type[Observer], ...]:
        """The same where it depends on how many experts each layer keeps (None: not known beforehand)."""
        return self.observes()

    def score(self, layer: LayerProfile) -> Tensor:
        """Saliency of each routed expert. Shape [E]; larger is more worth keeping."""
        raise TypeError(f"{type(self).__name__} gives no score")

    def pick(self, layer: LayerProfile, moe: MoELayer, count: int, budget: Budget) -> Pick:
        """The `count` experts of one layer that stay; for methods whose choice is more than a ranking."""
        scores_E = self.score(layer)
        return Pick(select_layer(scores_E, count, moe, budget), scores_E)

    def check_spread(self, moe: Mapping[int, MoELayer], budget: Budget) -> None:
        """Raise UsageError for a budget over all layers that cannot be met, before any weight is read."""
        select_global({i: torch.zeros(layer.num_experts) for i, layer in moe.items()}, moe, budget)

    def pick_all(
        self, layers: Mapping[int, LayerProfile], moe: Mapping[int, MoELayer], budget: Budget
    ) -> dict[int, Pick]:
        """The experts of all layers that stay under a budget over all layers."""
        scores = {index: self.score(layers[index]) for index in moe}
        keeps = select_global(scores, moe, budget)
        return {index: Pick(keeps[index], scores[index]) for index in moe}

    def prepare(self, layer: LayerProfile, plan: LayerPlan) -> None:
        """Put into `plan.extra` what `rebuild` needs beyond the kept experts."""

    @property
    def sees_twice(self) -> bool:
        """Does `looks_again` want anything?"""
        return False

    def looks_again(self, plan: LayerPlan) -> tuple[type[Observer], ...]:
        """What `rebuild` and `factor` have to see of the layer once its plan is made; forgotten with the layer."""
        return ()

    def rebuild(self, experts: ExpertBank, plan: LayerPlan, seen: LayerProfile | None = None) -> dict[str, float]:
        """Edit the kept experts in place, before the others are removed. Returns figures for the record.

        seen : the statistics of `looks_again`.
        """
        return {}

    def expert_map(self, plan: LayerPlan) -> list[int] | None:
        """Which of the kept experts, by position in `plan.keep`, stands for each of the router's; None if the router
        is cut to the kept ones."""
        return None

    def ranks(self, moe: MoELayer) -> dict[str, int] | None:
        """Rank of the factors that gate, up and down are stored as; None if they stay matrices."""
        return None

    def factor(
        self, experts: ExpertBank, plan: LayerPlan, seen: LayerProfile | None = None
    ) -> dict[str, Tensor] | None:
        """Factors that take the place of the kept experts' matrices: `factor_p_a` [K, O, r], `factor_p_b` [K, r, I].

        Called before `rebuild`; what `rebuild` makes of the matrices is then not written, only of the biases.
        """
        return None

    def check_model(self, moe: Mapping[int, MoELayer]) -> None:
        """Raise UsageError or ModelError for a model this method cannot work on, before any weight is read."""

    def reform(self, moe: MoELayer) -> dict[str, Any]:
        """Entries of the form (`anatomy.forms`) its layers get, beside map and ranks."""
        return {}

    def added(self, moe: MoELayer) -> dict[str, Tensor]:
        """Tensors the experts module of a layer gets beside those it has, by name; their values are known at once."""
        return {}

    def slot(self, moe: MoELayer) -> Slot | None:
        """What a layer as it comes out of this method does to a token's ids and weights, where `reform` says so."""
        return None

    def active(self, moe: MoELayer) -> int:
        """Experts that run per token afterwards."""
        return moe.active_experts

    def router_rows(self, rows: dict[str, Tensor], plan: LayerPlan) -> dict[str, Tensor]:
        """New router tensors instead of the kept experts' old ones.

        rows : every tensor outside of the experts with one entry per expert, by its path below the MoE block, in the
            stored dtype, all experts, entries along dimension 0. Returns, for those that change, tensors of the same
            dtype with one entry for each kept expert, in the order of `plan.keep`.
        """
        return {}

    def notes(self) -> list[str]:
        """What a user of the result has to know; goes into the record and is said at the end."""
        return []

    @property
    def rebuilds(self) -> bool:
        """Does `rebuild` change weights?"""
        return type(self).rebuild is not Method.rebuild

    @property
    def keeps_all(self) -> bool:
        """Does every expert stay, whatever becomes of it? Then a budget says nothing."""
        return False

    @property
    def allocates(self) -> bool:
        """Does it give layers different numbers of experts of its own accord? `pick_all` is then called."""
        return False

    @property
    def cuts(self) -> bool:
        """Is the router cut to the experts that stay? If not, budgets below top-k and uneven groups are possible."""
        return True

    @property
    def redirects(self) -> bool:
        """Does the router stay whole, with an expert map behind it?"""
        return False

    def stored(self, count: int, moe: MoELayer) -> int:
        """Experts a layer of the output holds when `count` distinct ones are wanted."""
        return count

    @property
    def reroutes(self) -> bool:
        """Does `router_rows` change routers?"""
        return type(self).router_rows is not Method.router_rows

    def plain_checkpoint(self, plan: LayerPlan) -> str | None:
        """Why a plain checkpoint cannot hold this method's result for this layer, or None if it can."""
        return None


class Keeper(Method):
    """Base of methods that keep every expert, whatever becomes of it."""

    @property
    def keeps_all(self) -> bool:
        return True

    def pick(self, layer: LayerProfile, moe: MoELayer, count: int, budget: Budget) -> Pick:
        return Pick(list(range(moe.num_experts)), torch.zeros(0))


class OwnJob(Keeper):
    """Base of methods that change weights in a job of their own, not layer by layer (see `api.shrink.JOBS`).

    how_much : what says how much is changed, for a hint. takes : of what else says what happens (protect, profile,
    plan), what it understands. on_the_fly : why methods of this kind cannot be compared
    without writing a checkpoint. without_text : what to do where text is missing.
    """

    how_much: ClassVar[str] = ""
    takes: ClassVar[frozenset[str]] = frozenset()
    without_text: ClassVar[str] = "Name some with --data."
    on_the_fly: ClassVar[str] = ""

    def check(self) -> None:
        """Raise UsageError for parameters that do not go together."""

    @property
    def needs_text(self) -> bool:
        return True


@dataclass(frozen=True)
class Registered:
    """One method of the register."""

    name: str
    kind: str
    paper: str
    cls: type[Method]

    @property
    def summary(self) -> str:
        return (self.cls.__doc__ or "").strip().splitlines()[0]

    def parameters(self) -> list[dict[str, Any]]:
        """Name, type, bounds, default and description of every parameter."""
        properties = self.cls.model_json_schema().get("properties", {})
        return [{"name": name, **{k: v for k, v in p.items() if k != "title"}} for name, p in properties.items()]


_register: dict[str, Registered] = {}
M = TypeVar("M", bound=type[Method])


def method(name: str, *, kind: str, paper: str) -> Callable[[M], M]:
    """Register a method class under `name`."""

    def decorate(cls: M) -> M:
        if name in _register and _register[name].cls.__qualname__ != cls.__qualname__:
            raise ValueError(f"two methods are called {name!r}")
        _register[name] = Registered(name, kind, paper, cls)
        return cls

    return decorate


def methods() -> dict[str, Registered]:
    """All methods by name; importing a file in a method folder is enough to be listed."""
    families = ("pruning", "merging", "factorizing", "editing", "sparsifying", "slimming", "quantizing", "skipping")
    for family in families:
        package = importlib.import_module(f"coterie.compression.{family}")
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{module.name}")
    return dict(sorted(_register.items()))


def get_method(name: str, parameters: dict[str, Any] | None = None) -> Method:
    """The method `name` with `parameters`. Raises UsageError naming the closest valid method, parameter or range."""
    known = methods()
    if name not in known:
        raise UsageError(f"no method {name!r}", closest(name, list(known)))
    cls = known[name].cls
    unknown = [p for p in parameters or {} if p not in cls.model_fields]
    if unknown:
        raise UsageError(f"{name} has no parameter {unknown[0]!r}", closest(unknown[0], list(cls.model_fields)))
    try:
        return cls(**(parameters or {}))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "parameters"
        raise UsageError(
            f"{name}: {where} = {first['input']!r}: {first['msg']}", f"See `coterie methods {name}` for its parameters."
        ) from error


def closest(name: str, known: list[str]) -> str:
    """The hint for an unknown name: the most similar valid one, and all of them."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    if near:
        return f"Did you mean {near[0]!r}? All: {', '.join(known)}."
    return f"There is: {', '.join(known)}." if known else "It takes no parameters."
