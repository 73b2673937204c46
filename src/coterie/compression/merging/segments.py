"""Neurons of gated FFN experts as rows: comparing them across experts and clustering them.

A gated expert is a sum over its neurons, and each term of the sum needs three vectors and nothing else:

    E(x) = sum_j down[:, j] * act(gate[j, :] . x) * (up[j, :] . x)

A *segment* is that triple (gate row, up row, down column). Segments can be permuted inside an expert and moved between
experts of a layer without touching any other term. Here are the pieces from which methods at neuron level are built:
segments read from and written into an expert, best-match cosine search, the choice of initial centres, and spherical
weighted k-means with equalised norms.

Biases: where an expert has gate and up biases (GPT-OSS) they belong to the segment and travel with it. They have no
part in cosines and norms, which compare weight vectors only; in a mean they get the coefficients of their segment's
vectors, the norm factor included. The down bias belongs to the expert, not to a neuron, and is never touched.

It does not know which experts go, how many stay, or what a router is. Segments keep the dtype they are stored in;
cosines and means are computed in float32 (float64 for float64 weights) on their device. Sums over clusters use
`index_add_`: bit-identical between runs on CPU, and on CUDA with `torch.use_deterministic_algorithms(True)`.
"""

# Shapes: N segments (rows), Q query rows, H hidden, I neurons of one expert, F features of a row, C clusters

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from coterie.anatomy import ExpertWeights

Part = Literal["gate", "up", "down"]
PARTS: tuple[Part, ...] = ("gate", "up", "down")


@dataclass(frozen=True)
class Segments:
    """N neurons, one per row. `gate_NH` is None for experts without a gate, the biases where the family has none."""

    up_NH: Tensor
    down_NH: Tensor
    gate_NH: Tensor | None = None
    up_bias_N: Tensor | None = None
    gate_bias_N: Tensor | None = None

    @classmethod
    def of(cls, expert: ExpertWeights, rows_N: Tensor | None = None) -> Segments:
        """The segments of an expert, as views; or copies of `rows_N` of them, if given."""
        every = cls(expert.up_IH, expert.down_HI.T, expert.gate_IH, expert.up_bias_I, expert.gate_bias_I)
        return every if rows_N is None else every.map(lambda tensor: tensor[rows_N])

    @classmethod
    def join(cls, several: Sequence[Segments]) -> Segments:
        """All rows of several, in order, as copies."""
        first, *others = several
        return first.map(lambda *tensors: torch.cat(tensors), *others)

    def into(self, expert: ExpertWeights) -> ExpertWeights:
        """`expert` with these neurons in place of its own; its down bias stays."""
        return dataclasses.replace(
            expert,
            up_IH=self.up_NH,
            down_HI=self.down_NH.T,
            gate_IH=self.gate_NH,
            up_bias_I=self.up_bias_N,
            gate_bias_I=self.gate_bias_N,
        )

    def map(self, function: Callable[..., Tensor], *others: Segments) -> Segments:
        """`function` applied to each tensor that is there, together with the same tensor of `others`."""
        present = [field.name for field in dataclasses.fields(self) if getattr(self, field.name) is not None]
        return Segments(**{name: function(*(getattr(s, name) for s in (self, *others))) for name in present})

    def finite(self) -> bool:
        """Are all weights numbers? NaN and infinity both show in the extremes, which are cheap to find."""
        tensors = (self.up_NH, self.down_NH, self.gate_NH, self.up_bias_N, self.gate_bias_N)
        return all(bool(end.isfinite()) for tensor in tensors if tensor is not None for end in torch.aminmax(tensor))

    def matrix(self, parts: Sequence[Part] = PARTS) -> Tensor:
        """The chosen weight vectors side by side, as a copy in float32 or wider. Shape [N, F].

        A gate that does not exist is left out.
        """
        vectors = {"gate": self.gate_NH, "up": self.up_NH, "down": self.down_NH}
        rows_NF = torch.cat([v for part in PARTS if part in parts and (v := vectors[part]) is not None], dim=1)
        return rows_NF.to(working_dtype(rows_NF))

    def canonical(self) -> Segments:
        """The same functions with ||up|| = ||down|| and the largest up entry positive.

        (up * c, down / c) is one function for every c != 0, but cosines between segments see c. Only right for gated
        experts that are linear in the up projection and have no biases: the caller has to make sure of that.
        """
        up_NH, down_NH = (tensor.to(working_dtype(tensor)) for tensor in (self.up_NH, self.down_NH))
        up_norm_N, down_norm_N = up_NH.norm(dim=1), down_NH.norm(dim=1)
        largest_N1 = up_NH.gather(1, up_NH.abs().argmax(dim=1, keepdim=True))
        sign_N = torch.where(largest_N1[:, 0] < 0, -1.0, 1.0)
        # a neuron without an up or a down vector outputs nothing: there is no scale to find
        alive_N = (up_norm_N > 0) & (down_norm_N > 0)
        scale_N = torch.where(alive_N, sign_N * (down_norm_N / up_norm_N).sqrt(), 1.0)
        return dataclasses.replace(self, up_NH=up_NH * scale_N[:, None], down_NH=down_NH / scale_N[:, None])


def working_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype to compute in: bfloat16 cosines of vectors with thousands of entries are useless."""
    return torch.promote_types(tensor.dtype, torch.float32)


def normalise_rows_(rows_NF: Tensor) -> Tensor:
    """Scale rows to length one, in place; zero rows stay zero. Returns the lengths they had, shape [N]."""
    norm_N: Tensor = torch.linalg.vector_norm(rows_NF, dim=1)
    rows_NF.div_(norm_N.clamp(min=torch.finfo(norm_N.dtype).tiny)[:, None])
    return norm_N


def best_match(unit_QF: Tensor, unit_NF: Tensor, chunk: int = 1024) -> tuple[Tensor, Tensor]:
    """For each query row the largest cosine to any of N rows, and which one (ties: the lowest).

    Shapes [Q] (in -1..1) and [Q]. Both inputs have unit rows. `chunk` queries are compared at a time, so that the peak
    is chunk * N numbers; the Q * N matrix never exists.
    """
    found = [(block_qF @ unit_NF.T).max(dim=1) for block_qF in torch.split(unit_QF, chunk)]
    return torch.cat([f.values for f in found]).clamp(-1, 1), torch.cat([f.indices for f in found])


def strongest_gate_first(segments: Segments, norm_N: Tensor) -> Tensor:
    """Rows by max_t |gate[j, t]|, the strongest response a neuron's gate can give to one input. Shape [N].

    Without a gate the up row is what decides whether a neuron fires, and is used instead. bfloat16 weights have many
    equal maxima: these rows come by decreasing length, so that the order of neurons in an expert has no influence.
    """
    rows_NH = segments.up_NH if segments.gate_NH is None else segments.gate_NH
    order_N = norm_N.argsort(descending=True, stable=True)
    return order_N[rows_NH.abs().amax(dim=1)[order_N].argsort(descending=True, stable=True)]


def first_distinct(order_N: Tensor, unit_NF: Tensor, count: int, tolerance: float = 1e-5) -> Tensor:
    """The first `count` rows of an order, passing over those whose cosine to a taken one exceeds 1 - tolerance.

    Where fewer than `count` rows are distinct, the first of the passed-over ones fill up. Shape [count].
    """
    taken = passed = order_N[:0]
    while len(taken) < count and len(order_N):
        missing = count - len(taken)
        block, order_N = order_N[:missing], order_N[missing:]
        block = block[~(unit_NF[block] @ unit_NF[taken].T > 1 - tolerance).any(dim=1)]
        earlier_twin = (unit_NF[block] @ unit_NF[block].T > 1 - tolerance).tril(diagonal=-1)
        # "no earlier row that is itself taken is a twin": iterating settles the rows from the front,
        # and stops after as many rounds as the longest chain of twins
        take = torch.ones_like(block, dtype=torch.bool)
        while not torch.equal(update := ~(earlier_twin & take).any(dim=1), take):
            take = update
        passed, taken = torch.cat([passed, block[~take]]), torch.cat([taken, block[take]])
    return torch.cat([taken, passed])[:count]


def spherical_kmeans(
    unit_NF: Tensor, weight_N: Tensor, seed_C: Tensor, *, max_iter: int = 20, reseed: bool = True
) -> tuple[Tensor, int]:
    """Cluster unit rows by cosine into as many clusters as there are seeds.

    Parameters
    ----------
    unit_NF : Tensor
        Rows of length one (or zero).
    weight_N : Tensor
        Weight of each row in the centre of its cluster, >= 0.
    seed_C : Tensor
        Distinct rows that are the first centres.
    max_iter : int
        Assignments at most; stops earlier when one changes nothing.
    reseed : bool
        Give each cluster that an assignment leaves empty the row worst represented by its own centre. Without it an
        empty cluster goes back to its seed.

    Returns
    -------
    cluster of each row, shape [N], and the number of assignments computed. Rows tied between centres go to the lowest.

    Notes
    -----
    The centre of a cluster is the weighted mean of its members scaled to equal norms. Only its direction matters for
    the next assignment, and the common norm does not change the direction, so unit rows suffice here;
    `equalised_means` restores the norm at the end. Most clusters keep their members after the first rounds, so only
    the cosines to centres that changed are computed again. Peak: (N + C) * F + 2 * N * C numbers besides the inputs.
    """
    clusters = len(seed_C)
    cluster_N = torch.full((len(unit_NF),), clusters, device=unit_NF.device)  # not in any yet
    cluster_N[seed_C] = torch.arange(clusters, device=unit_NF.device)
    cosine_NC = unit_NF @ unit_NF[seed_C].T
    iterations = 0
    while iterations < max_iter:
        iterations += 1
        cosine_N, new_N = cosine_NC.max(dim=1)
        if reseed:
            new_N = _fill_empty(new_N, cosine_N, clusters)
        moved_N = new_N != cluster_N
        if not moved_N.any():
            break
        changed_C = torch.zeros(clusters + 1, dtype=torch.bool, device=unit_NF.device)
        changed_C[cluster_N[moved_N]] = changed_C[new_N[moved_N]] = True
        changed_C, cluster_N = changed_C[:clusters], new_N
        centre_CF = _directions(unit_NF, weight_N, cluster_N, seed_C, changed_C)
        cosine_NC[:, changed_C] = unit_NF @ centre_CF.T
    return cluster_N, iterations


def equalised_means(segments: Segments, norm_N: Tensor, weight_N: Tensor, cluster_N: Tensor, clusters: int) -> Segments:
    """Weighted mean of each cluster's segments after scaling them to the cluster's mean norm: C segments.

        L = mean_v ||v||        centre = sum_v weight_v * L * v / ||v||  /  sum_v weight_v

    `norm_N` are the lengths of the concatenated weight vectors. Segments of length zero have no direction and count
    neither in L nor in the mean. A cluster whose weights are all zero takes the plain mean; one without rows is zero.
    """
    alive_N = (norm_N > 0).to(norm_N.dtype)
    total_C, alive_C = norm_N.new_zeros(2, clusters).index_add_(1, cluster_N, torch.stack([norm_N, alive_N]))
    mean_norm_C = total_C / alive_C.clamp(min=1)
    share_N = _shares(weight_N * alive_N, cluster_N, clusters)
    factor_N = share_N * mean_norm_C[cluster_N] / norm_N.clamp(min=torch.finfo(norm_N.dtype).tiny)

    def mean(tensor: Tensor) -> Tensor:
        weighted = factor_N.view(-1, *[1] * (tensor.dim() - 1)) * tensor
        total = torch.zeros(clusters, *tensor.shape[1:], dtype=weighted.dtype, device=weighted.device)
        return total.index_add_(0, cluster_N, weighted)

    return segments.map(mean)


def means_or_members(means: Segments, segments: Segments, cluster_N: Tensor, seed_C: Tensor) -> tuple[Segments, int]:
    """The C segments to write back, and how many of them are means.

    A cluster of one gives that segment without arithmetic, so that it survives storage bit by bit; a cluster that
    stayed empty (clustering without `reseed`) gives its seed.
    """
    size_C = cluster_N.bincount(minlength=len(seed_C))
    single_N = (size_C[cluster_N] == 1).nonzero()[:, 0]
    member_C = seed_C.clone()
    member_C[cluster_N[single_N]] = single_N
    several_C = size_C > 1

    def choose(mean: Tensor, row: Tensor) -> Tensor:
        return torch.where(several_C.view(-1, *[1] * (mean.dim() - 1)), mean, row[member_C])

    return means.map(choose, segments), int(several_C.sum())


def _directions(unit_NF: Tensor, weight_N: Tensor, cluster_N: Tensor, seed_C: Tensor, chosen_C: Tensor) -> Tensor:
    """Unit centres of the chosen clusters (a mask), in order; the seed where a cluster has no members."""
    rows, slot_C = chosen_C[cluster_N].nonzero()[:, 0], chosen_C.cumsum(0) - 1
    weighted_NF = unit_NF[rows].mul_(_shares(weight_N, cluster_N, len(seed_C))[rows, None])
    centre_CF = torch.zeros(int(chosen_C.sum()), unit_NF.shape[1], dtype=unit_NF.dtype, device=unit_NF.device)
    centre_CF.index_add_(0, slot_C[cluster_N[rows]], weighted_NF)
    empty_C = (cluster_N.bincount(minlength=len(seed_C)) == 0)[chosen_C]
    centre_CF[empty_C] = unit_NF[seed_C[chosen_C][empty_C]]
    normalise_rows_(centre_CF)
    return centre_CF


def _shares(weight_N: Tensor, cluster_N: Tensor, clusters: int) -> Tensor:
    """Weights that sum to one in each cluster; equal ones where all are zero."""
    total_C = weight_N.new_zeros(clusters).index_add_(0, cluster_N, weight_N)
    weight_N = torch.where(total_C[cluster_N] > 0, weight_N, 1.0)
    total_C = weight_N.new_zeros(clusters).index_add_(0, cluster_N, weight_N)
    return weight_N / total_C[cluster_N]


def _fill_empty(cluster_N: Tensor, cosine_N: Tensor, clusters: int) -> Tensor:
    """Move the rows with the lowest cosine to their centre into the empty clusters, one each."""
    empty = (cluster_N.bincount(minlength=clusters) == 0).nonzero()[:, 0]
    if not len(empty):
        return cluster_N
    worst_first = cosine_N.argsort(stable=True)
    rank_N = torch.empty_like(worst_first)
    rank_N[worst_first] = torch.arange(len(worst_first), device=worst_first.device)
    # the best represented row of each cluster stays, so that filling one cluster never empties another
    top_C = rank_N.new_full((clusters,), -1).scatter_reduce_(0, cluster_N, rank_N, "amax")
    movable = worst_first[(rank_N != top_C[cluster_N])[worst_first]]
    filled_N = cluster_N.clone()
    filled_N[movable[: len(empty)]] = empty
    return filled_N
