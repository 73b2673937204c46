"""Two small mixtures that are no language models: one for feature vectors with several tasks, one for images.

    Mixture           tables, pairs of user and item: experts that all tasks share, a router and a head for each task
    ImageMixture      small pictures: a transformer over patches with MoE layers, and any residual rule over its depth

Both are plain modules, made of the toolkit's routers, and keep a record of every call (`routing.record`): balancing
terms, listeners and residual rules work as in a decoder. A training loop is the user's own; it says which step comes:

    model = Mixture(64, {"digit": Task(kind="classes", outputs=10)}, router={"kind": "comet", "top_k": 2})
    Balance.of([{"name": "router", "key": "entropy", "weight": 0.1}]).watch(model)
    for step, (x, y) in enumerate(batches):
        model.at(step, len(batches))              # of routers that change over time; the others do not care
        model(x, labels={"digit": y}).loss.backward()
        ...

Multi-gate mixtures: Ma et al. (KDD 2018); the sizes of COMET's recommender (arXiv:2306.02824) are 16 experts of one
layer of 256, and the same for heads. What a good router for which data is, is not known here.
"""

# T examples or tokens, B images, L patches, H features, I width of an expert, O its outputs, E experts, K slots

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import ModelOutput

from coterie.errors import UsageError
from coterie.routing import record
from coterie.routing.base import Router, checked, router_class
from coterie.routing.permuted import Permuted
from coterie.routing.residual import Momentum, Residual, attach


class Task(BaseModel):
    """What is to be told.

    Parameters
    ----------
    kind : str
        "binary" (labels 0 or 1, one logit), "regression" (one number, squared error) or "classes" (cross entropy).
    outputs : int
        Classes; 1 for the other kinds.
    weight : float
        Times the loss of this task.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["binary", "regression", "classes"] = "binary"
    outputs: int = Field(default=1, ge=1)
    weight: float = Field(default=1.0, ge=0)

    @model_validator(mode="after")
    def _fits(self) -> Task:
        if (self.kind == "classes") != (self.outputs > 1):
            raise ValueError(f"a task of kind {self.kind} cannot have {self.outputs} outputs")
        return self

    def loss(self, told: Tensor, label_T: Tensor) -> Tensor:
        """Mean over examples. told : [T, outputs]."""
        if self.kind == "classes":
            return F.cross_entropy(told, label_T)
        if self.kind == "binary":
            return F.binary_cross_entropy_with_logits(told[:, 0], label_T.to(told.dtype))
        return F.mse_loss(told[:, 0], label_T.to(told.dtype))


@dataclass
class MixtureOutput(ModelOutput):  # type: ignore[misc]
    """loss : of all tasks, weighted, where labels were given. told : {task: [T, outputs]}, logits or numbers."""

    loss: Tensor | None = None
    told: dict[str, Tensor] | None = None


class DenseExperts(nn.Module):
    """E experts of one shape: a layer of `width`, and a second one of `outputs` unless that is 0.

    Biases, ReLU, dropout behind it. index == experts means "no expert".
    """

    def __init__(self, features: int, width: int, experts: int, *, outputs: int = 0, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_experts, self.outputs, self.dropout = experts, outputs or width, dropout
        self.up_proj = nn.Parameter(torch.empty(experts, width, features))
        self.up_proj_bias = nn.Parameter(torch.zeros(experts, width))
        nn.init.normal_(self.up_proj, std=(2 / features) ** 0.5)
        if outputs:
            self.down_proj = nn.Parameter(torch.empty(experts, outputs, width))
            self.down_proj_bias = nn.Parameter(torch.zeros(experts, outputs))
            nn.init.normal_(self.down_proj, std=width**-0.5)

    def one(self, expert: int, x_RH: Tensor) -> Tensor:
        """One expert on some rows, [R, O]."""
        h_RI = F.linear(x_RH, self.up_proj[expert], self.up_proj_bias[expert]).relu()
        h_RI = F.dropout(h_RI, self.dropout, self.training)
        if not hasattr(self, "down_proj"):
            return h_RI
        return F.linear(h_RI, self.down_proj[expert], self.down_proj_bias[expert])

    def all(self, x_TH: Tensor) -> Tensor:
        """Every expert on every row, [T, E, O]."""
        h_ETI = torch.baddbmm(self.up_proj_bias[:, None], x_TH.expand(self.num_experts, -1, -1), self.up_proj.mT).relu()
        h_ETI = F.dropout(h_ETI, self.dropout, self.training)
        if hasattr(self, "down_proj"):
            h_ETI = torch.baddbmm(self.down_proj_bias[:, None], h_ETI, self.down_proj.mT)
        return h_ETI.transpose(0, 1)

    def forward(self, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """Weighted sums over the chosen experts, [T, O]. Where slots are for half of all or more, all experts run in
        one product."""
        if 2 * index_TK.shape[-1] >= self.num_experts:
            return weighted(self.all(x_TH), index_TK, weight_TK)
        sum_TO = x_TH.new_zeros(len(x_TH), self.outputs)
        for expert in range(self.num_experts):
            token_R, slot_R = (index_TK == expert).nonzero(as_tuple=True)
            if len(token_R):
                y_RO = self.one(expert, x_TH[token_R]) * weight_TK[token_R, slot_R, None]
                sum_TO = sum_TO.index_add(0, token_R, y_RO.to(sum_TO.dtype))
        return sum_TO


def weighted(y_TEO: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """Sums [T, O] of the outputs of all experts, those that were not chosen weighing 0."""
    empty_TE = weight_TK.new_zeros(len(y_TEO), y_TEO.shape[1] + 1)
    weight_TE = empty_TE.scatter_add(1, index_TK, weight_TK)[:, :-1]
    return torch.einsum("te,teo->to", weight_TE.to(y_TEO.dtype), y_TEO)


class _Routed(nn.Module):
    """What both models share."""

    def routers(self) -> list[Router]:
        """All that decide, in the order of tasks or layers; a router inside of another is that one's business."""
        found = [module for module in self.modules() if isinstance(module, Router)]
        inner = [module.inner for module in found if isinstance(module, Permuted)]
        return [module for module in found if not any(module is other for other in inner)]

    def at(self, step: int, steps: int) -> None:
        """Say before each training step which one it is of how many."""
        for router in self.routers():
            router.at(step, steps)


def made_router(told: Mapping[str, Any], features: int, experts: int, layer: int) -> Router:
    """A router with fresh weights from {kind, and its settings}. Raises UsageError for what cannot be."""
    settings = dict(told)
    cls = router_class(str(settings.pop("kind", "top-k")))
    if cls.needs_attention or cls.shared_module(features, checked(cls.kind, cls.Settings, settings)) is not None:
        raise UsageError(f"the {cls.kind} router needs the layers of a decoder, which this model does not have")
    router = cls(features, experts, checked(cls.kind, cls.Settings, settings), layer=layer)
    router.reset(features**-0.5)
    return router


class PairEmbedding(nn.Module):
    """Ids of several kinds, [T, kinds], as their embeddings side by side: users and items."""

    def __init__(self, counts: Sequence[int], size: int) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(count, size) for count in counts)
        self.features = size * len(counts)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.cat([table(ids[:, i]) for i, table in enumerate(self.tables)], -1)


class Mixture(_Routed):
    """Experts that all tasks share, a router and a head for each task.

    Parameters
    ----------
    features : int
        H, of what the routers and experts receive.
    tasks : mapping
        {name: Task}.
    router : mapping
        `kind`, and settings of that router. Of `permuted` ones the tasks share P.
    experts, width : int
        E, and the one layer of each.
    head : int
        Width of the layer between mixture and output of a task; 0: none.
    dropout : float
        Behind the experts' layer.
    bottom : module, optional
        From what the model is given to features [T, H], for example a `PairEmbedding`.
    """

    def __init__(
        self,
        features: int,
        tasks: Mapping[str, Task],
        *,
        router: Mapping[str, Any],
        experts: int = 16,
        width: int = 256,
        head: int = 256,
        dropout: float = 0.0,
        bottom: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if not tasks:
            raise UsageError("a mixture needs a task", 'Give tasks={"name": Task(...)}.')
        self.tasks = dict(tasks)
        self.bottom = bottom if bottom is not None else nn.Identity()
        self.experts = DenseExperts(features, width, experts, dropout=dropout)
        self.gates = nn.ModuleList(made_router(router, features, experts, i) for i in range(len(tasks)))
        first = self.gates[0]
        for gate in self.gates:
            if isinstance(gate, Permuted) and isinstance(first, Permuted):
                gate.permutation = first.permutation
        self.heads = nn.ModuleDict()
        for name, task in self.tasks.items():
            wide: list[nn.Module] = [nn.Linear(width, head), nn.ReLU()] if head else []
            self.heads[name] = nn.Sequential(*wide, nn.Linear(head or width, task.outputs))
        record.equip(self, self, [])

    def forward(
        self, features: Tensor, input_ids: Tensor | None = None, labels: Mapping[str, Tensor] | None = None
    ) -> MixtureOutput:
        """What is told for T examples, and with labels {task: [T]} the loss.

        input_ids : [T, 1], what a hash router looks experts up by, for example users.
        """
        x_TH = self.bottom(features)
        chosen = [gate(x_TH)[1:] for gate in self.gates]
        # from a quarter of the experts on it is no slower to run all, once for all tasks and in one product
        if 4 * sum(index_TK.shape[-1] for _, index_TK in chosen) >= self.experts.num_experts:
            y_TEO = self.experts.all(x_TH)
            mixed = [weighted(y_TEO, index_TK, weight_TK) for weight_TK, index_TK in chosen]
        else:
            mixed = [self.experts(x_TH, index_TK, weight_TK) for weight_TK, index_TK in chosen]
        told = {name: self.heads[name](y_TO) for name, y_TO in zip(self.tasks, mixed, strict=True)}
        return MixtureOutput(loss=_loss(self.tasks, told, labels), told=told)

    @torch.no_grad()
    def fold(self) -> None:
        """Put the experts in the order that was found, so that no permutation is left; see `routing.permuted`."""
        if not isinstance(first := self.gates[0], Permuted):
            return
        _, order = first.fold()
        for parameter in self.experts.parameters():
            parameter.copy_(parameter[order])
        self.gates = nn.ModuleList(gate.fold()[0] for gate in self.gates if isinstance(gate, Permuted))


def _loss(tasks: Mapping[str, Task], told: Mapping[str, Tensor], labels: Mapping[str, Tensor] | None) -> Tensor | None:
    if labels is None:
        return None
    if missing := sorted(set(tasks) - set(labels)):
        raise UsageError(f"no labels for {', '.join(missing)}", f"There are tasks: {', '.join(tasks)}.")
    return torch.stack([task.weight * task.loss(told[name], labels[name]) for name, task in tasks.items()]).sum()


class _Block(nn.Module):
    """Router and experts of a layer."""

    def __init__(self, gate: Router, experts: DenseExperts) -> None:
        super().__init__()
        self.gate, self.experts = gate, experts

    def forward(self, x_BLH: Tensor) -> Tensor:
        x_TH = x_BLH.flatten(0, 1)
        _, weight_TK, index_TK = self.gate(x_TH)
        y_TH: Tensor = self.experts(x_TH, index_TK, weight_TK)
        return y_TH.view(x_BLH.shape)


class _Layer(nn.Module):
    def __init__(self, hidden: int, heads: int, block: _Block, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.attention = nn.MultiheadAttention(hidden, heads, dropout, batch_first=True)
        self.block = block

    def forward(self, x_BLH: Tensor) -> Tensor:
        n_BLH = self.norm1(x_BLH)
        x_BLH = x_BLH + self.attention(n_BLH, n_BLH, n_BLH, need_weights=False)[0]
        added: Tensor = self.block(self.norm2(x_BLH))
        return x_BLH + added


class ImageMixture(_Routed):
    """A small vision transformer: patches, attention among them, MoE layers; the mean over patches tells the class.

    Parameters
    ----------
    size, patch, channels : int
        Side of the square images and of their patches, in pixels, and colours.
    classes : int
    router : mapping
        `kind`, and settings of that router.
    residual : mapping, optional
        How MoE layers are added, see `routing.residual`: {"rule": "heavy-ball", "mu": 0.7}; None: as usual.
    hidden, layers, heads, experts, width : int
        Size of a patch in the stream, depth, attention heads, E, and the width of an expert.
    dropout : float
    """

    def __init__(
        self,
        size: int,
        patch: int,
        classes: int,
        *,
        router: Mapping[str, Any],
        residual: Mapping[str, Any] | None = None,
        channels: int = 1,
        hidden: int = 48,
        layers: int = 6,
        heads: int = 4,
        experts: int = 8,
        width: int = 48,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if size % patch:
            raise UsageError(f"images of {size} pixels do not split into patches of {patch}", "Choose a divisor.")
        if hidden % heads:
            raise UsageError(f"hidden={hidden} does not split over {heads} heads")
        self.task = Task(kind="classes", outputs=classes)
        self.embed = nn.Conv2d(channels, hidden, patch, stride=patch)
        self.positions = nn.Parameter(torch.randn((size // patch) ** 2, hidden) * 0.02)
        self.layers = nn.ModuleList()
        rule = None if residual is None else checked("residual", Residual, dict(residual))
        for index in range(layers):
            bank = DenseExperts(hidden, width, experts, outputs=hidden, dropout=dropout)
            layer = _Layer(hidden, heads, _Block(made_router(router, hidden, experts, index), bank), dropout)
            if rule is not None:
                attach(layer.block, layer.norm2, Momentum(rule, index, index))
            self.layers.append(layer)
        self.norm = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, classes)
        record.equip(self, self, list(self.layers))

    def forward(self, pixels: Tensor, labels: Tensor | None = None) -> MixtureOutput:
        """pixels : [B, channels, size, size]; labels : [B]. The logits are told["classes"], [B, classes]."""
        x_BLH = self.embed(pixels).flatten(2).mT + self.positions
        here = record.current()
        if here is not None:
            here.shape = (x_BLH.shape[0], x_BLH.shape[1])
        for layer in self.layers:
            x_BLH = layer(x_BLH)
        logits = self.head(self.norm(x_BLH).mean(1))
        loss = None if labels is None else self.task.loss(logits, labels)
        return MixtureOutput(loss=loss, told={"classes": logits})
