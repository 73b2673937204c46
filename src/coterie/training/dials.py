"""Schedules: what changes while a model is trained, as a function of the step alone, so that a resumed run goes on.

    what                   e.g. router.top_k, router.temperature, balance.switch (times the term's weight), residual.mu
    s                      0 at step `begin`, 1 at step `until` (shares of the training, or steps), held outside
    linear                 v = first + (last - first) s
    cosine                 v = last + (first - last) cos(pi s / 2)
    exponential            v = first (last / first)^s
    saturating             v = last + (first - last) 0.99^(300 s)
    steps                  v = values[floor(len(values) s)]

linear and exponential are EvoMoE's for its temperature (arXiv:2112.14397); linear, cosine, saturating (there:
exponential) and steps are SMoE-Dropout's for the number of experts (arXiv:2303.01610). Whole settings are rounded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import nn
from transformers import TrainerCallback

from coterie.anatomy import any_moe_layers
from coterie.balancing.base import Balance
from coterie.errors import UsageError
from coterie.routing.base import Router
from coterie.routing.residual import Residual, momentum

OWNERS = ("router", "balance", "residual")


class Dial(BaseModel):
    """One schedule.

    Parameters
    ----------
    what : str
        "router.NAME" a setting of the routers that have it, "balance.TERM" a factor on the weight of a balancing term,
        "residual.NAME" a setting of the residual rule.
    kind : str
        "linear", "cosine", "exponential", "saturating" or "steps".
    first, last : float
        Values at its begin and end. values : of "steps".
    begin, until : float
        When: up to 1 a share of the training, above a step.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    what: str
    kind: Literal["linear", "cosine", "exponential", "saturating", "steps"] = "linear"
    first: float = 0.0
    last: float = 1.0
    values: list[float] = []
    begin: float = Field(default=0.0, ge=0)
    until: float = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _sound(self) -> Dial:
        if self.what.partition(".")[0] not in OWNERS or "." not in self.what:
            raise ValueError(f"{self.what!r} is not one of router.NAME, balance.TERM, residual.NAME")
        if self.kind == "steps" and not self.values:
            raise ValueError("a schedule of steps needs values")
        if self.kind == "exponential" and not (self.first > 0 and self.last > 0):
            raise ValueError("an exponential schedule goes between positive values")
        return self

    def span(self, steps: int) -> tuple[int, int]:
        """First and last step. Raises UsageError for a schedule that is longer than the training."""
        begin, until = (round(t * steps) if t <= 1 else round(t) for t in (self.begin, self.until))
        if until > steps or begin >= until:
            raise UsageError(
                f"the schedule of {self.what} goes from step {begin} to {until} in a training of {steps} steps",
                "Give begin and until as shares of the training, or train longer.",
            )
        return begin, until

    def at(self, step: int, steps: int) -> float:
        """The value at a step of a training of `steps`."""
        begin, until = self.span(steps)
        s = min(max((step - begin) / (until - begin), 0.0), 1.0)
        if self.kind == "steps":
            return self.values[min(int(len(self.values) * s), len(self.values) - 1)]
        a, b = self.first, self.last
        if self.kind == "linear":
            return a + (b - a) * s
        if self.kind == "cosine":
            return b + (a - b) * math.cos(math.pi * s / 2)
        if self.kind == "exponential":
            return float(a * (b / a) ** s)
        return float(b + (a - b) * 0.99 ** (300 * s))


class Turning(TrainerCallback):  # type: ignore[misc]
    """Turns the dials before every step. Raises UsageError at once for a dial that nothing has."""

    def __init__(self, dials: Sequence[Dial], model: nn.Module, balance: Balance | None, steps: int) -> None:
        self.dials, self.balance, self.steps = list(dials), balance, steps
        blocks = any_moe_layers(model)
        self.routers = [layer.router for layer in blocks if isinstance(layer.router, Router)]
        self.rules = [rule for layer in blocks if (rule := momentum(layer.block)) is not None]
        self.now: dict[str, float] = {}
        for dial in self.dials:
            dial.span(steps)
        self.turn(0)

    def turn(self, step: int) -> None:
        """Set everything as it is at this step."""
        self.now = {dial.what: dial.at(step, self.steps) for dial in self.dials}
        for what, value in self.now.items():
            owner, _, name = what.partition(".")
            if owner == "router":
                self._turn_routers(name, value)
            elif owner == "balance":
                if self.balance is None or name not in {part.label for part in self.balance.parts}:
                    raise UsageError(f"the schedule of {what} has no balancing term to turn", "Add it to balancing.")
                self.balance.scale[name] = value
            else:
                if not self.rules or name not in Residual.model_fields:
                    raise UsageError(f"the schedule of {what} has no residual rule to turn", "Set residual.")
                for rule in self.rules:
                    rule.residual = rule.residual.model_copy(update={name: value})
        for router in self.routers:
            router.at(step, self.steps)

    def _turn_routers(self, name: str, value: float) -> None:
        with_it = [router for router in self.routers if name in type(router.settings).model_fields]
        if not with_it:
            kinds = ", ".join(sorted({router.kind for router in self.routers})) or "none of ours"
            raise UsageError(f"no router has a setting {name!r} (routers: {kinds})", "See `coterie methods`.")
        for router in with_it:
            exact: Any = value
            whole = isinstance(getattr(router.settings, name), (bool, int))
            router.dial(**{name: round(exact) if whole else exact})

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.turn(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.turn(state.global_step)
