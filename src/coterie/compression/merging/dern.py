"""DERN: drop experts, then recombine their neurons into the experts that stay (arXiv:2509.10377).

For someone who prunes half of the experts of a coarse model and does not want to lose what the dropped ones knew.
Per layer, R the kept and P the dropped experts, m neurons each; z_j = (gate row, up row, down column) is a segment:
1. s_i = mean over tokens of the weight the router applied to expert i (soft frequency). R = the largest; any other
   pruning method can choose R instead (`selector`), s_i then only weighs the means below.
2. Each segment of P goes to the kept expert with the most similar single segment,
       r* = argmax_r max_j' cos(phi(z_j), phi(z_j'^r)),
   if that cosine exceeds alpha; otherwise it is discarded.
3. A kept expert with n_r > m segments is clustered back to m: unit rows; the m segments with the largest |gate| entry
   are the first centres; repeat: assign by cosine, centre = sum omega * L * u / sum omega with L the mean norm of
   the members and omega the s of the expert a member came from. Centres become the neurons.

The architecture stays, with fewer experts. A segment alone in its cluster is written back bit by bit, and an expert
that received nothing is not touched: where nothing moves, DERN is plain pruning of the same experts.

What the paper leaves open: empty clusters get the worst represented segment, and near-copies of a centre are no first
centres (with neither, taking in a copy of oneself ruins an expert; `init="paper"` is the literal rule). The router
keeps its rows of R; `router` has the other readings of the paper's soft redistribution. Neurons are written in the
order of their first centres, which changes no output. Without a gate, phi has no gate part and the up row takes the
gate's place in choosing centres. Gate and up biases travel with their segment, take no part in cosines and norms, and
are averaged with the segment's coefficients, norm factor included; the down bias of a kept expert stays. Not in the
paper: `init="own"`, where moved segments join neurons and never displace one; milder where experts differ much.

Memory beyond the experts themselves, in float32 numbers: stage 2 (2 max(chunk, m) + 2 m) F + chunk * m, F = H times the
number of sim_parts; stage 3, one kept expert at a time, 9 n_r H + 2 n_r m, where n_r is m N / K on average and at most
(|P| + 1) m. No second copy of the layer is made. Time: 2 |P| K m^2 F operations in stage 2; 6 n_r m H in the first
round of stage 3 for an expert, and less in each later round, which only revisits the clusters that changed.
"""

# Shapes: N segments, I = m neurons of one expert, E experts, R kept experts, T tokens, K experts per token

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field, field_validator
from torch import Tensor

from coterie.anatomy import ExpertBank
from coterie.compression.merging.segments import (
    PARTS,
    Part,
    Segments,
    best_match,
    equalised_means,
    first_distinct,
    means_or_members,
    normalise_rows_,
    spherical_kmeans,
    strongest_gate_first,
)
from coterie.compression.methods import Method, get_method, method, methods
from coterie.compression.plan import LayerPlan
from coterie.compression.pruning.soft_frequency import SoftFrequency
from coterie.errors import CheckpointError, ModelError, UsageError
from coterie.profiling.observers import GateMass, Observer
from coterie.profiling.profile import LayerProfile


def _parts(value: Any) -> Any:
    """ "up,down" and ["up", "down"] alike, in one order and once each."""
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",")]
    valid = isinstance(value, (list, tuple)) and all(part in PARTS for part in value)
    return tuple(part for part in PARTS if part in value) if valid else value


@method("dern", kind="pruning + merging", paper="arXiv:2509.10377")
class Dern(Method):
    """Drop experts and recombine their neurons into the kept ones, without retraining."""

    selector: str = Field("soft-frequency", description="Pruning method that chooses the experts to keep.")
    alpha: float = Field(
        0.5, ge=-1, le=2, description="Cosine a dropped neuron must exceed to be moved; from 1 on nothing moves."
    )
    sim_parts: Annotated[tuple[Part, ...], BeforeValidator(_parts)] = Field(
        ("up", "down"), min_length=1, description="Vectors of a neuron that find its new expert: of gate, up, down."
    )
    router: Literal["slice", "stats", "prob_map"] = Field(
        "slice",
        description="slice: keep the router rows of the kept experts. stats: also let a receiver's neurons weigh more "
        "by the importance it took over. prob_map: record the map from old to new probabilities for a router that "
        "applies it; no plain checkpoint.",
    )
    init: Literal["dedup", "paper", "own", "random"] = Field(
        "dedup",
        description="First centres. dedup: strongest gates, no near-copies, empty clusters refilled. paper: strongest "
        "gates, the literal rule. own: the kept expert's neurons, so that moved ones can only join them. random: for "
        "comparison only.",
    )
    weights: Literal["importance", "uniform"] = Field(
        "importance", description="Weight of a neuron in its cluster's mean: its expert's soft frequency, or equal."
    )
    max_iter: int = Field(20, ge=1, description="Rounds of clustering at most.")
    canonicalize: bool = Field(
        False, description="Compare and average neurons after removing their up/down scale and sign ambiguity."
    )
    seed: int = Field(0, ge=0, description="Seed of init=random.")
    chunk: int = Field(4096, ge=1, description="Dropped neurons compared at a time: memory against speed.")

    @field_validator("selector")
    @classmethod
    def _selector_prunes(cls, name: str) -> str:
        pruning = [known for known, entry in methods().items() if entry.kind == "pruning"]
        if name not in pruning:
            raise UsageError(f"dern: selector {name!r} is no pruning method", f"There is: {', '.join(pruning)}.")
        return name

    # -- stage 1: which experts stay

    def observes(self) -> tuple[type[Observer], ...]:
        """What the selector observes, and the applied router weights."""
        return tuple(dict.fromkeys((*get_method(self.selector).observes(), GateMass)))

    def score(self, layer: LayerProfile) -> Tensor:
        """The selector's saliency of each expert. Shape [E], float32, larger is more worth keeping."""
        return get_method(self.selector).score(layer)

    def prepare(self, layer: LayerProfile, plan: LayerPlan) -> None:
        """Put the importance s of every expert, dropped ones too, into the plan."""
        plan.extra["importance"] = SoftFrequency().score(layer).tolist()

    def plain_checkpoint(self, plan: LayerPlan) -> str | None:
        """Why a plain checkpoint cannot hold the result; None if it can."""
        if self.router != "prob_map":
            return None
        return "router=prob_map needs a router that maps old probabilities to the kept experts; use slice or stats"

    # -- stages 2 and 3

    def rebuild(self, experts: ExpertBank, plan: LayerPlan, seen: LayerProfile | None = None) -> dict[str, float]:
        """Recombine the dropped experts' neurons into the kept experts, in place.

        Returns diagnostics, none if no expert is dropped: `moved` and `discarded` segments, `moved_share`,
        `mean_similarity` (mean best-match cosine of the dropped segments), `receivers` (kept experts that got any),
        `merged_clusters` (with more than one member), `iterations` (of the clustering; the most any expert needed).
        """
        keep = sorted(plan.keep)
        drop = [expert for expert in range(experts.num_experts) if expert not in plan.keep]
        if not drop:
            return {}
        self._check(experts, plan)
        with torch.no_grad():
            # every move is decided on the original experts before the first of them changes
            home_PI, cosine_PI = self._assign(experts, keep, drop)
            map_ER = redistribution(home_PI, keep, drop)
            importance_E = self._importance(map_ER, keep, plan).to(home_PI.device)
            merged = receivers = iterations = 0
            for slot, r in enumerate(keep):
                rows = {i: n for i, home_I in zip(drop, home_PI) if len(n := (home_I == slot).nonzero()[:, 0])}
                if rows:  # its own segments first, then those that arrived
                    rows = {r: torch.arange(experts.intermediate_size, device=home_PI.device)} | rows
                    segments = Segments.join([Segments.of(experts.read(i), row_N) for i, row_N in rows.items()])
                    omega_N = torch.cat([importance_E[i].expand(len(row_N)) for i, row_N in rows.items()])
                    new, means, rounds = self._recluster(segments, omega_N, experts.intermediate_size, (plan.index, r))
                    experts.write(r, new.into(experts.read(r)))
                    merged, receivers, iterations = merged + means, receivers + 1, max(iterations, rounds)
        if self.router == "prob_map":
            plan.extra["prob_map"] = map_ER.tolist()
        moved_PI = (home_PI >= 0).double()
        return {
            "moved": float(moved_PI.sum()),
            "discarded": float((1 - moved_PI).sum()),
            "moved_share": float(moved_PI.mean()),
            "mean_similarity": float(cosine_PI.mean()),
            "receivers": receivers,
            "merged_clusters": merged,
            "iterations": iterations,
        }

    def _assign(self, experts: ExpertBank, keep: list[int], drop: list[int]) -> tuple[Tensor, Tensor]:
        """Stage 2: the position in `keep` each dropped segment goes to (-1: nowhere), and its cosine. Shapes [P, I]."""

        def phi(several: list[int]) -> Tensor:
            segments = [Segments.of(experts.read(i)) for i in several]
            segments = [s.canonical() for s in segments] if self.canonicalize else segments
            rows_NF = torch.cat([s.matrix(self.sim_parts) for s in segments])
            normalise_rows_(rows_NF)
            return rows_NF

        found = []
        group = max(1, self.chunk // experts.intermediate_size)
        for start in range(0, len(drop), group):
            phi_NF = phi(drop[start : start + group])
            best_N, home_N = best_match(phi_NF, phi(keep[:1]), self.chunk)[0], phi_NF.new_zeros(len(phi_NF)).long()
            for slot, r in enumerate(keep[1:], start=1):
                cosine_N, _ = best_match(phi_NF, phi([r]), self.chunk)
                better_N = cosine_N > best_N  # strictly: ties stay with the lowest index
                best_N, home_N = torch.where(better_N, cosine_N, best_N), torch.where(better_N, slot, home_N)
            found.append((torch.where(best_N > self.alpha, home_N, -1), best_N))
        home_N, cosine_N = (torch.cat(tensors) for tensors in zip(*found))
        return home_N.view(len(drop), -1), cosine_N.view(len(drop), -1)

    def _recluster(
        self, segments: Segments, omega_N: Tensor, clusters: int, place: tuple[int, int]
    ) -> tuple[Segments, int, int]:
        """Stage 3 for one expert: its new segments, how many of them are means, and the rounds it took."""
        rows = segments.canonical() if self.canonicalize else segments
        unit_NF = rows.matrix()
        norm_N = normalise_rows_(unit_NF)
        omega_N = omega_N.to(norm_N.dtype)
        if self.init == "random":
            # a different draw for each layer and expert, the same in each run and on each device
            generator = torch.Generator().manual_seed(self.seed + 1_000_003 * place[0] + 1_009 * place[1])
            order_N = torch.randperm(len(norm_N), generator=generator).to(norm_N.device)
        elif self.init == "own":
            order_N = torch.arange(len(norm_N), device=norm_N.device)  # they are the first rows
        else:
            order_N = strongest_gate_first(segments, norm_N)
        seed_C = first_distinct(order_N, unit_NF, clusters) if self.init == "dedup" else order_N[:clusters]
        seed_C = seed_C.sort().values  # neurons keep their order, and ties go to the lowest row
        cluster_N, iterations = spherical_kmeans(
            unit_NF, omega_N, seed_C, max_iter=self.max_iter, reseed=self.init != "paper"
        )
        means = equalised_means(rows, norm_N, omega_N, cluster_N, clusters)
        return *means_or_members(means, segments, cluster_N, seed_C), iterations

    def _importance(self, map_ER: Tensor, keep: list[int], plan: LayerPlan) -> Tensor:
        """omega: what a segment of each expert weighs. Shape [E], float64."""
        if self.weights == "uniform":
            return torch.ones(len(map_ER), dtype=torch.float64)
        importance_E = torch.tensor(plan.extra["importance"], dtype=torch.float64)
        if self.router == "stats":  # s_r + sum_i A[i, r] s_i: A[r, r] = 1 is the first term
            importance_E[keep] = map_ER.T @ importance_E
        return importance_E

    def _check(self, experts: ExpertBank, plan: LayerPlan) -> None:
        importance = plan.extra.get("importance")
        usable = isinstance(importance, list) and all(isinstance(v, int | float) for v in importance)
        if self.weights == "importance" and not (usable and len(importance or ()) == experts.num_experts):
            lacking = f"{plan.name}: the plan lacks an importance for each of the {experts.num_experts} experts"
            raise UsageError(lacking, "Make the plan with method dern, or set weights=uniform.")
        if self.sim_parts == ("gate",) and not experts.has_gate:
            raise ModelError(f"{plan.name}: sim_parts=gate, but the experts have no gate", "Use up, down or both.")
        # GPT-OSS clamps up and adds one; without a gate the activation sits on up: neither can be rescaled
        if self.canonicalize and (experts.has_bias or not experts.has_gate):
            raise ModelError(f"{plan.name}: canonicalize changes experts with biases or no gate", "Leave it off.")
        for expert in range(experts.num_experts):
            if not Segments.of(experts.read(expert)).finite():
                raise CheckpointError(f"{plan.name}: expert {expert} has weights that are not finite numbers")


def redistribution(home_PI: Tensor, keep: list[int], drop: list[int]) -> Tensor:
    """A[i, r] = share of dropped expert i's segments that went to kept expert r; A[r, r] = 1. Shape [E, R], float64."""
    map_ER = torch.zeros(len(keep) + len(drop), len(keep), dtype=torch.float64)
    for slot, r in enumerate(keep):
        map_ER[r, slot] = 1
        map_ER[drop, slot] = (home_PI == slot).double().mean(dim=1).cpu()
    return map_ER


def mapped_routing(probability_TE: Tensor, map_ER: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Routing of router=prob_map: q = p A over the kept experts, top-k of q, renormalised. Weights and ids, [T, K]."""
    weight_TK, index_TK = (probability_TE @ map_ER.to(probability_TE)).topk(top_k, dim=-1)
    return weight_TK / weight_TK.sum(dim=-1, keepdim=True), index_TK
