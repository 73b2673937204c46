"""Momentum over depth: how an MoE layer's output is added to the residual stream (MomentumSMoE, arXiv:2410.14574).

A layer x + MoE(x) is one step of gradient descent on the experts' objectives, u = MoE(x) being minus the gradient and
depth the iteration. The family takes better steps. p starts at 0 in every model call and goes from MoE layer to MoE
layer; layers without experts pass it through:

    heavy-ball    p <- mu p + u                                x <- x + gamma p
    adam          p <- b1 p + (1 - b1) u
                  m <- beta m + (1 - beta) u^2                 x <- x + g1 p / sqrt(m + eps) - kappa x
    robust        y  = x + alpha gamma p      (what the norm before the experts receives)
                  p <- mu p + MoE(y)                           x <- x + gamma p

`adam` is for the first `adam_layers` MoE layers, with a momentum b1 and a step g1 of its own; later ones are
heavy-ball, on a momentum that holds its u too. In `robust` one dial rho and the condition number k give mu, gamma and
alpha (Cyrus et al. 2018):

    gamma = k (1 - rho)^2 (1 + rho) / L      mu = k rho^3 / (k - 1)      alpha = rho^3 / ((k - 1) (1 - rho)^2 (1 + rho))

mu = 0 with gamma = 1 is the plain model, bit for bit; a trained model starts there and mu is raised on a schedule.
Gradients flow through p to all earlier MoE layers. p is float32 and is kept in the record of the model call, per token.

Differs from the authors' code: experts add (theirs subtract, which freshly trained experts absorb), and one residual
path instead of two. The momentum is a hook on the MoE block: what a block returns is added to the stream by its layer,
times the layer's own constant in some models (`scale`). Where a layer does something else with it, as after a norm
behind the block, there is no momentum: `addition` finds out by trying.
"""

# T tokens, H hidden; everything here has the shape of the block's output [B, L, H]

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from coterie.errors import ModelError, UsageError
from coterie.routing.base import checked
from coterie.routing.record import Here, current

NAME = "momentum"


class Residual(BaseModel):
    """How the output of an MoE layer is added to the stream.

    Parameters
    ----------
    rule : str
        "heavy-ball", "adam" or "robust".
    mu, gamma : float
        Momentum, -1 to 1, and step. Of "robust" they follow from rho, condition and smoothness, unless alpha is given.
    adam_mu, adam_gamma, beta, eps, kappa : float
        Of "adam": momentum, step, decay of squares, what keeps the root from 0, decay of the stream (the authors' code
        has 1: the stream is replaced).
    adam_layers : int
        Of "adam": so many MoE layers, from the first on; the others are heavy-ball.
    rho, condition, smoothness : float
        Of "robust": rate, between 1 - 1/sqrt(condition), the fastest, and 1 - 1/condition, the most robust to noise;
        condition number and largest curvature of the objectives.
    alpha : float, optional
        Of "robust": how far to look ahead, in which case mu and gamma are used as they are given.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rule: Literal["heavy-ball", "adam", "robust"] = "heavy-ball"
    mu: float = Field(default=0.7, gt=-1, lt=1)
    gamma: float = Field(default=1.0, gt=0)
    adam_mu: float = Field(default=0.9, ge=0, lt=1)
    adam_gamma: float = Field(default=1.0, gt=0)
    beta: float = Field(default=0.999, ge=0, lt=1)
    eps: float = Field(default=1e-8, gt=0)
    kappa: float = Field(default=0.0, ge=0, le=1)
    adam_layers: int = Field(default=1, ge=1)
    rho: float | None = Field(default=None, gt=0, lt=1)
    condition: float = Field(default=10.0, gt=1)
    smoothness: float = Field(default=1.0, gt=0)
    alpha: float | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _in_range(self) -> Residual:
        low, high = 1 - self.condition**-0.5, 1 - 1 / self.condition
        if self.rho is not None and not low - 1e-9 <= self.rho <= high + 1e-9:
            raise ValueError(f"rho={self.rho} is outside of {low:.4f} to {high:.4f} for condition={self.condition:g}")
        return self

    @property
    def steps(self) -> tuple[float, float, float]:
        """(mu, gamma, alpha) as they are used."""
        if self.rule != "robust":
            return self.mu, self.gamma, 0.0
        if self.alpha is not None:
            return self.mu, self.gamma, self.alpha
        k = self.condition
        rho = 1 - k**-0.5 if self.rho is None else self.rho
        rest = (1 - rho) ** 2 * (1 + rho)
        return k * rho**3 / (k - 1), k * rest / self.smoothness, rho**3 / ((k - 1) * rest)


class Momentum(nn.Module):
    """The residual rule of one MoE layer.

    order : how many MoE layers stand before it. scale : what its decoder layer multiplies before it adds.
    """

    def __init__(self, residual: Residual, layer: int, order: int, scale: float = 1.0) -> None:
        super().__init__()
        self.residual, self.layer, self.order, self.scale = residual, layer, order, scale

    @property
    def adaptive(self) -> bool:
        return self.residual.rule == "adam" and self.order < self.residual.adam_layers

    @property
    def looks_at_stream(self) -> bool:
        return self.residual.rule == "robust" or (self.adaptive and self.residual.kappa > 0)

    @property
    def carries_state(self) -> bool:
        """What it adds depends on the MoE layers before it."""
        mu, _, alpha = self.residual.steps
        return bool(mu or alpha) or self.residual.rule == "adam"

    def dial(self, **values: Any) -> None:
        """Change what it was told while it is in use. Raises UsageError for a value that cannot be."""
        told = checked("residual", Residual, {**self.residual.model_dump(), **values})
        if told.rule != self.residual.rule or (told.kappa > 0) != (self.residual.kappa > 0):
            raise UsageError("a residual rule in use cannot become another one, nor begin or end to decay the stream")
        self.residual = told

    def extra_repr(self) -> str:
        return repr(self.residual)

    def here(self) -> Here:
        record = current()
        if record is None:
            raise ModelError(
                f"layer {self.layer} has momentum over depth and runs outside of its model",
                "Call the whole model, not a block of it.",
            )
        return Here(record, self.layer, NAME)

    def added(self, u: Tensor) -> Tensor:
        """What is added to the stream, for the block's output u."""
        here, (mu, gamma, _) = self.here(), self.residual.steps
        before: dict[str, Tensor] = here.previous() or {}
        if mu == 0 and not self.adaptive:
            here.leave({"p": u.float()})
            return u if gamma == 1 else u * gamma
        wide, share = u.float(), 1.0
        if self.adaptive:
            mu, gamma = self.residual.adam_mu, self.residual.adam_gamma
            share = 1 - mu
        p = share * wide if "p" not in before else mu * before["p"] + share * wide
        state = {"p": p}
        if not self.adaptive:
            step = gamma * p
        else:
            beta = self.residual.beta
            squares = (1 - beta) * wide.square()
            state["m"] = squares if "m" not in before else beta * before["m"] + squares
            step = gamma * p / (state["m"] + self.residual.eps).sqrt()
            if self.residual.kappa:
                assert here.record is not None
                step = step - self.residual.kappa * here.record.streams.pop(self.layer).float()
            step = step / self.scale
        here.leave(state)
        return step.to(u.dtype)

    def ahead(self, x: Tensor) -> Tensor:
        """What the norm before the experts receives instead of the stream x."""
        here = self.here()
        if self.residual.rule != "robust":
            assert here.record is not None
            here.record.streams[self.layer] = x
            return x
        before: dict[str, Tensor] | None = here.previous()
        _, gamma, alpha = self.residual.steps
        if before is None or not alpha:
            return x
        return (x.float() + alpha * gamma * self.scale * before["p"]).to(x.dtype)


def momentum(block: nn.Module) -> Momentum | None:
    """The residual rule of an MoE block, if it has one."""
    found = getattr(block, NAME, None)
    return found if isinstance(found, Momentum) else None


def attach(block: nn.Module, norm: nn.Module | None, rule: Momentum) -> None:
    """From now on the output of `block` is added by `rule`. `norm` : what feeds the block; needed by some rules."""
    if momentum(block) is not None:
        raise ValueError("this block has a residual rule already")
    if rule.looks_at_stream:
        if norm is None:
            raise ModelError(
                f"layer {rule.layer} has no norm right before its experts, which the {rule.residual.rule} rule needs",
                "Use rule=heavy-ball.",
            )
        norm.register_forward_pre_hook(_AtNorm(rule))
    block.add_module(NAME, rule)
    block.register_forward_hook(_added)


class _AtNorm:
    """Sees the stream on its way into a norm."""

    def __init__(self, rule: Momentum) -> None:
        self.rule = rule

    def __call__(self, norm: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self.rule.ahead(args[0]), *args[1:])


def _added(block: nn.Module, args: Any, output: Any) -> Any:
    rule = momentum(block)
    assert rule is not None
    if isinstance(output, tuple):  # blocks that also return what their router gave
        return (rule.added(output[0]), *output[1:])
    return rule.added(output)


def feeding_norm(model: nn.Module, decoder: nn.Module, block: nn.Module) -> nn.Module | None:
    """The norm of `decoder` whose output is what `block` receives: found by running one token through the model."""
    outputs: list[tuple[nn.Module, Any]] = []
    found: list[nn.Module | None] = []

    def at_block(module: nn.Module, args: Any, kwargs: Any) -> None:
        given = args[0] if args else next(iter(kwargs.values()))
        found.append(next((norm for norm, output in outputs if output is given), None))

    norms = [child for child in decoder.children() if "norm" in type(child).__name__.lower()]
    handles = [norm.register_forward_hook(lambda m, a, output: outputs.append((m, output))) for norm in norms]
    handles.append(block.register_forward_pre_hook(at_block, with_kwargs=True))
    _one_token(model, handles)
    return found[0] if found else None


def addition(model: nn.Module, decoder: nn.Module, block: nn.Module, layer: int) -> float:
    """What `decoder` multiplies the output of `block` with before it adds it to the stream: found by adding something.

    Raises ModelError where it is not simply added.
    """
    outputs: list[Tensor] = []
    added: list[Tensor] = []

    def at_block(module: nn.Module, args: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        if not outputs:
            return None
        size = float(outputs[0].float().square().mean().sqrt().clamp(min=1))  # so that narrow dtypes can tell
        generator = torch.Generator().manual_seed(len(outputs))
        noise = torch.randn(first.shape, generator=generator, device="cpu") * size
        added.append((noise.to(first.device, first.dtype) + (added[-1] if added else 0)).to(first.dtype))
        return (first + added[-1], *output[1:]) if isinstance(output, tuple) else first + added[-1]

    def at_end(module: nn.Module, args: Any, output: Any) -> None:
        outputs.append((output[0] if isinstance(output, tuple) else output).detach())

    for _ in range(3):  # as it is, with something, with more
        _one_token(model, [block.register_forward_hook(at_block), decoder.register_forward_hook(at_end)])
    change, more = ((second - first).double().flatten() for first, second in (outputs[1:], added))
    scale = float(change @ more / (more @ more))
    if not scale or float((change - scale * more).norm() / (scale * more).norm()) > 0.05:
        raise ModelError(
            f"layer {layer} does not simply add what its experts give to the stream (a norm behind them, perhaps):"
            " there is no momentum to keep",
            "Only layers of the form x + MoE(norm(x)) can have momentum.",
        )
    return 1.0 if abs(scale - 1) < 0.01 else round(scale, 3)


def _one_token(model: nn.Module, handles: list[Any]) -> None:
    """Run one token through the model, then take the hooks off."""
    training, device = model.training, next(model.parameters()).device
    try:
        model.eval()
        with torch.no_grad():
            model(input_ids=torch.ones(1, 1, dtype=torch.long, device=device), use_cache=False)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
