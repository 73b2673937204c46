"""The pattern store: for each task, a score of every expert of every layer, and a key to find the task by.

A store is a folder of one safetensors file and one JSON. The key of a task is its TCESS vector of the first MoE layer
(see `profiling.contribution`), whatever made the scores: it is what can be computed for a query before any expert is
loaded. Scores are kept, not just orders, so that the number of kept experts can change and tasks can be mixed.

Files of strangers are expected: everything is checked before it is used. Which bytes are loaded is not known here.
"""

# E experts, D tasks

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from coterie.anatomy import MoELayer
from coterie.compression.methods import Method, closest, get_method
from coterie.compression.pruning.easy_ep import mixed
from coterie.compression.selector import Budget, select_layer
from coterie.errors import DataError, OutputError, UsageError
from coterie.profiling.contribution import Shift, check_candidates, tcess, tcess_name
from coterie.profiling.observe import unique
from coterie.profiling.observers import Observer
from coterie.profiling.profile import LayerProfile
from coterie.profiling.run import profile_model
from coterie.streaming.lockstep import Progress, States
from coterie.streaming.model import StreamedModel
from coterie.streaming.writer import Workspace, check_place, write_json
from coterie.text import TokenData, by_task

FORMAT = 1
TCESS = "tcess"  # the score source that needs nothing beyond the key


@dataclass(frozen=True)
class Key:
    """How keys were made: TCESS of decoder layer `layer` with these parameters."""

    layer: int
    candidates: int = 1
    threshold: float = -1.0
    shift: Shift = "none"

    @property
    def observer(self) -> type[Observer]:
        return tcess(self.candidates, self.threshold, self.shift)

    @property
    def name(self) -> str:
        return tcess_name(self.candidates, self.threshold, self.shift)


@dataclass
class PatternStore:
    """Patterns of all tasks for one model.

    model, model_digest : the checkpoint. experts : {decoder layer: E}, the MoE layers. tasks : names, index = row.
    tokens : {task: tokens its pattern was made of}. score : {"name": ..., "parameters": {...}}, what made the scores.
    key : how keys were made. keys_DE, scores_DE[layer] : float64. settings : compute dtype and the like.
    """

    model: str
    model_digest: str
    experts: dict[int, int]
    tasks: list[str]
    tokens: dict[str, int]
    score: dict[str, Any]
    key: Key
    keys_DE: Tensor
    scores_DE: dict[int, Tensor]
    settings: dict[str, Any] = field(default_factory=dict)

    def row(self, task: str) -> int:
        """Number of a task. Raises UsageError for one that is not stored."""
        if task not in self.tasks:
            raise UsageError(f"the store has no task {task!r}", closest(task, self.tasks))
        return self.tasks.index(task)

    def scores(self, layer: int, tasks: str | Sequence[str]) -> Tensor:
        """Scores [E] of a task, or of several with equal say (a generalist): each task's sum to 1 in size."""
        names = [tasks] if isinstance(tasks, str) else list(tasks)
        rows = [self.row(name) for name in names]
        if len(rows) == 1:
            return self.scores_DE[layer][rows[0]]
        return mixed(self.scores_DE[layer][rows])

    def order(self, layer: int, tasks: str | Sequence[str]) -> list[int]:
        """Experts of a layer, best first; of equal ones the lower number."""
        order: list[int] = torch.argsort(self.scores(layer, tasks), descending=True, stable=True).tolist()
        return order

    def keep(self, layer: MoELayer, tasks: str | Sequence[str], count: int) -> list[int]:
        """The `count` best experts of a layer, ascending; of a router with groups the same number in each."""
        return select_layer(self.scores(layer.index, tasks), count, layer, Budget(keep_experts=count))

    def overlap(self, share: float) -> dict[str, dict[str, float]]:
        """{task: {task: intersection over union}} of the best experts at this share, mean over layers."""
        tops: dict[str, list[set[int]]] = {
            task: [set(self.order(i, task)[: max(1, round(E * share))]) for i, E in self.experts.items()]
            for task in self.tasks
        }
        return {
            a: {b: sum(len(x & y) / len(x | y) for x, y in zip(tops[a], tops[b])) / len(tops[a]) for b in self.tasks}
            for a in self.tasks
        }

    def negative(self) -> dict[str, int]:
        """{task: scores below zero}: a sure choice that ranks below an expert never chosen."""
        return {
            task: sum(int((score_DE[row] < 0).sum()) for score_DE in self.scores_DE.values())
            for row, task in enumerate(self.tasks)
        }

    def check(self, streamed: StreamedModel) -> None:
        """Raise UsageError unless the store was made of this very checkpoint."""
        found = {index: layer.num_experts for index, layer in streamed.moe.items()}
        if self.model_digest != streamed.checkpoint.digest() or self.experts != found:
            raise UsageError(
                f"the pattern store was made of another model ({self.model})",
                "Expert numbers mean nothing elsewhere: build one of this checkpoint (`coterie patterns build`).",
            )

    def joined(self, other: PatternStore) -> PatternStore:
        """Both stores' tasks; of a task in both, `other`'s. Raises UsageError where they are of different make."""
        if self.model_digest != other.model_digest:
            raise UsageError("these pattern stores are of different models")
        if (self.score, self.key) != (other.score, other.key):
            raise UsageError(
                f"these patterns are made differently: {_make(self)} and {_make(other)}",
                "Build them with the same --score, --set, --candidates, --key-threshold and --shift.",
            )
        kept = [task for task in self.tasks if task not in other.tasks]
        rows = [self.row(task) for task in kept]
        return replace(
            self,
            tasks=kept + other.tasks,
            tokens={task: self.tokens[task] for task in kept} | other.tokens,
            keys_DE=torch.cat([self.keys_DE[rows], other.keys_DE]),
            scores_DE={i: torch.cat([s[rows], other.scores_DE[i]]) for i, s in self.scores_DE.items()},
        )

    def describe(self) -> dict[str, Any]:
        """Everything but the numbers, as JSON."""
        return {
            "format": FORMAT,
            "model": self.model,
            "model_digest": self.model_digest,
            "layers": [{"index": i, "experts": e} for i, e in self.experts.items()],
            "tasks": [{"name": task, "tokens": self.tokens[task]} for task in self.tasks],
            "score": self.score,
            "key": vars(self.key),
            "settings": self.settings,
        }

    def save(self, folder: Path, *, overwrite: bool = False) -> None:
        """Write `folder` whole or not at all."""
        tensors = {f"{i}.score_DE": s.contiguous() for i, s in self.scores_DE.items()} | {"key_DE": self.keys_DE}
        with Workspace(folder, {"patterns": self.model_digest, "tasks": self.tasks}, overwrite=overwrite) as work:
            try:
                save_file(tensors, work.folder / "patterns.safetensors")
            except (OSError, SafetensorError) as error:
                raise OutputError(f"cannot write {folder}: {error}") from error
            write_json(work.folder / "patterns.json", self.describe())
            work.publish(["patterns.safetensors", "patterns.json"])

    @classmethod
    def load(cls, folder: Path) -> PatternStore:
        """Read a store. Raises DataError if it is none, damaged, empty or of a newer format."""
        for name in ("patterns.json", "patterns.safetensors"):
            if not (folder / name).is_file():
                raise DataError(f"{folder} is not a pattern store: no {name}", "Make one: `coterie patterns build`.")
        try:
            meta = json.loads((folder / "patterns.json").read_text(encoding="utf-8"))
            if type(meta["format"]) is not int or meta["format"] > FORMAT:
                raise DataError(
                    f"{folder} has pattern format {meta['format']!r}, this version reads up to {FORMAT}",
                    "Install a newer Coterie, or build the store again.",
                )
            store = _parsed(meta, load_file(folder / "patterns.safetensors"))
        except (KeyError, TypeError, ValueError, OSError, RecursionError, SafetensorError, AttributeError) as error:
            raise DataError(f"{folder} is a damaged pattern store: {error}") from error
        if not store.tasks:
            raise DataError(f"{folder} holds no patterns", "Build it with at least one --task.")
        return store


def _make(store: PatternStore) -> str:
    return f"{store.score['name']} with keys of {store.key.candidates}, {store.key.threshold}, {store.key.shift}"


def _parsed(meta: dict[str, Any], tensors: Mapping[str, Tensor]) -> PatternStore:
    """A store of what its two files hold. Raises ValueError, KeyError or TypeError for what does not fit together."""
    experts = {layer["index"]: layer["experts"] for layer in meta["layers"]}
    tokens = {task["name"]: task["tokens"] for task in meta["tasks"]}
    key = Key(**meta["key"])
    whole = [*experts, *experts.values(), *tokens.values(), key.layer, key.candidates]
    if not all(type(n) is int and n >= 0 for n in whole) or not all(isinstance(t, str) and t for t in tokens):
        raise ValueError("its layers, experts, tasks and tokens must be names and whole numbers")
    if len(tokens) != len(meta["tasks"]) or len(experts) != len(meta["layers"]) or not experts:
        raise ValueError("a task or a layer is named twice, or there is no layer")
    if key.layer != min(experts) or key.shift not in ("none", "mean", "logsumexp") or type(key.threshold) is not float:
        raise ValueError(f"its key {meta['key']} is none of the first MoE layer {min(experts)}")
    if not 1 <= key.candidates <= experts[key.layer]:
        raise ValueError(f"its key takes {key.candidates} candidates of {experts[key.layer]} experts")
    scores, keys_DE = {i: tensors[f"{i}.score_DE"] for i in experts}, tensors["key_DE"]
    for name, tensor, E in [
        ("keys", keys_DE, experts[key.layer]),
        *((f"layer {i}", scores[i], experts[i]) for i in experts),
    ]:
        if tensor.shape != (len(tokens), E) or tensor.dtype != torch.float64:
            raise ValueError(f"{name}: {list(tensor.shape)} {tensor.dtype} for {len(tokens)} tasks and {E} experts")
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name}: a score is not a finite number")
    if not isinstance(meta["score"]["name"], str) or not isinstance(meta["settings"], dict):
        raise ValueError("its score has no name, or its settings are no object")
    names = (str(meta["model"]), str(meta["model_digest"]))
    return PatternStore(*names, experts, list(tokens), tokens, meta["score"], key, keys_DE, scores, meta["settings"])


def build_store(
    streamed: StreamedModel,
    tasks: Mapping[str, TokenData],
    *,
    model: str,
    score: str = TCESS,
    parameters: dict[str, Any] | None = None,
    candidates: int = 1,
    threshold: float = -1.0,
    shift: Shift = "none",
    memory: int = 2 * 2**30,
    progress: Progress | None = None,
) -> PatternStore:
    """Patterns of tasks from their text.

    Parameters
    ----------
    streamed : the model, freshly opened. tasks : {name: samples}.
    score, parameters : "tcess" (with the key's own K_a, r and shift), or any method that scores experts on text.
    candidates, threshold, shift : K_a and r of the keys, see `tcess`.

    One sweep over all tasks where the score's statistics are kept per domain (tcess, premoe, easy-ep), else one each.
    Raises UsageError for a score that gives no number per expert or looks at no text.
    """
    if not tasks:
        raise UsageError("a pattern store needs at least one task", "Name some: --task math=FILE.")
    if plus := [task for task in tasks if "+" in task or not task]:
        raise UsageError(f"{plus[0]!r} cannot be a task's name", "A + joins names: math+code is both with equal say.")
    key = Key(min(streamed.moe), candidates, float(threshold), shift)
    check_candidates(candidates, streamed.moe[key.layer].num_experts)
    own = {"candidates": candidates, "threshold": threshold, "shift": shift}
    if score == TCESS and parameters:
        raise UsageError("tcess takes its parameters from the key", "Use --candidates, --key-threshold and --shift.")
    method = get_method("premoe", own) if score == TCESS else get_method(score, parameters)
    observers = unique([*method.observes(), key.observer])
    if not any(o.needs_text for o in method.observes()):
        raise UsageError(f"{score} looks at no text: every task would have the same pattern")
    if type(method).score is Method.score:
        raise UsageError(f"{score} gives no score per expert, so it has no order to store", "Try tcess or easy-ep.")
    per_domain = all(name.endswith(("_D", "_DE")) for o in observers for name in o.fields)
    rounds = [dict(tasks)] if per_domain else [{task: data} for task, data in tasks.items()]
    keys, scores = [], {index: [] for index in streamed.moe}  # type: ignore[var-annotated]
    for together in rounds:
        data = by_task(together)
        states = States(limit=memory)
        profile = profile_model(streamed, data, observers, model=model, states=states, progress=progress)
        for row, task in enumerate(together):
            for index, layer in profile.layers.items():
                alone = of_domain(layer, row, data.tokens[task])
                if not alone.has(key.observer) and index == key.layer:
                    raise UsageError(f"the router of layer {index} shows no logits of all experts: no keys can be made")
                scores[index].append(method.score(alone).double())
            first = of_domain(profile.layers[key.layer], row, data.tokens[task])
            keys.append(first.stats[key.name][0] / data.tokens[task])
    return PatternStore(
        model=model,
        model_digest=streamed.checkpoint.digest(),
        experts={index: layer.num_experts for index, layer in streamed.moe.items()},
        tasks=list(tasks),
        tokens={task: sum(data.tokens.values()) for task, data in tasks.items()},
        score={"name": score, "parameters": {} if score == TCESS else method.model_dump(mode="json")},
        key=key,
        keys_DE=torch.stack(keys),
        scores_DE={index: torch.stack(rows) for index, rows in scores.items()},
        settings={"compute_dtype": str(streamed.compute_dtype).removeprefix("torch.")},
    )


def of_domain(layer: LayerProfile, row: int, tokens: int) -> LayerProfile:
    """One domain's part of a layer's statistics, as if only it had been run; the others are kept as they are."""
    stats = {n: t[row : row + 1] if n.endswith(("_D", "_DE")) else t for n, t in layer.stats.items()}
    return replace(layer, tokens=tokens, stats=stats)


def check_out(out: Path, *, overwrite: bool, add: bool) -> PatternStore | None:
    """The store to add to, or None for a new one; raises OutputError where `out` is in the way."""
    if add and out.exists():
        return PatternStore.load(out)
    check_place(out, overwrite=overwrite)
    return None
