"""How alike the experts of a layer are, by several measures, each one function of the layer's profile.

A measure says which observers it reads and gives a matrix [E, E], float64 and symmetric: a similarity with diagonal 1
or a distance with diagonal 0. `SIMILARITIES` has them by name, each readable as similarity, as distance or as the Gram
matrix that kernel k-means takes. What is done with similar experts is not known here.
"""

# E experts, I expert intermediate (neurons), H hidden

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from coterie.anatomy import MoELayer
from coterie.compression.merging.segments import Segments, best_match, normalise_rows_
from coterie.profiling.observers import DenseOutput, LayerShape, Observer, OutputCosine, RouterGram
from coterie.profiling.profile import LayerProfile
from coterie.profiling.weights import ExpertGram, RouterRows

Similarity = Literal[
    "router-logits",
    "router-logits-centred",
    "router-rows",
    "outputs",
    "mean-outputs",
    "mean-outputs-cosine",
    "weights",
    "weights-cosine",
    "neurons",
]


def cosines(gram_EE: Tensor) -> Tensor:
    """Cosines of vectors from their inner products; 0 for those of length zero, 1 on the diagonal."""
    norm_E = gram_EE.diagonal().clamp(min=1e-12).sqrt()
    return (gram_EE / torch.outer(norm_E, norm_E)).clamp(-1, 1).fill_diagonal_(1.0)


def router_logits(layer: LayerProfile, centred: bool = False) -> Tensor:
    """Cosine of the logits that two experts get over all tokens (M-SMoE, UNCURL); centred: their correlation."""
    gram_EE = layer.router_gram_EE
    if centred:
        gram_EE = gram_EE - torch.outer(layer.router_sum_E, layer.router_sum_E) / max(layer.tokens, 1)
    return cosines(gram_EE)


def router_rows(layer: LayerProfile) -> Tensor:
    """Cosine of the router's rows of two experts, a logit bias being one more column."""
    rows_EC = layer.router_rows_EC.double()
    return cosines(rows_EC @ rows_EC.T)


def outputs(layer: LayerProfile) -> Tensor:
    """Mean over all tokens of the cosine of two experts' outputs (Sub-MoE, eq. 2)."""
    return (layer.output_cosine_EE / max(layer.tokens, 1)).clamp(-1, 1).fill_diagonal_(1.0)


def mean_outputs(layer: LayerProfile) -> Tensor:
    """Euclidean distance of two experts' outputs averaged over all tokens (HC-SMoE)."""
    mean_EH = layer.dense_output_sum_EH / max(layer.tokens, 1)
    distance_EE: Tensor = torch.cdist(mean_EH, mean_EH, compute_mode="donot_use_mm_for_euclid_dist")
    return distance_EE


def mean_outputs_cosine(layer: LayerProfile) -> Tensor:
    """Cosine of two experts' outputs averaged over all tokens."""
    return cosines(layer.dense_output_sum_EH @ layer.dense_output_sum_EH.T)


def weights(layer: LayerProfile) -> Tensor:
    """Euclidean distance of two experts' weights and biases as they are stored, neurons by their number."""
    gram_EE = layer.expert_gram_EE
    square_E = gram_EE.diagonal()
    return (square_E[:, None] + square_E - 2 * gram_EE).clamp(min=0).sqrt().fill_diagonal_(0.0)


def weights_cosine(layer: LayerProfile) -> Tensor:
    """Cosine of two experts' weights and biases as they are stored, neurons by their number."""
    return cosines(layer.expert_gram_EE)


def neurons(layer: LayerProfile) -> Tensor:
    """Mean over the neurons of two experts of the cosine to the other's most similar one; blind to their order."""
    return layer.neuron_match_EE


class NeuronMatch(Observer):
    """neuron_match_EE: mean over the neurons of i and j of the largest cosine to a neuron of the other, diagonal 1.

    A neuron is its gate row, up row and down column together. Biases are left out. Time: E^2 I^2 3 H multiplications,
    which suits few or small experts. Memory: two experts in float32 and 1024 I numbers.
    """

    fields = {"neuron_match_EE": "same"}
    needs_text = False

    def __init__(self, shape: LayerShape) -> None:
        super().__init__(shape)
        self.neuron_match_EE = torch.eye(shape.experts, dtype=torch.float64)

    def see_layer(self, layer: MoELayer) -> None:
        def unit(expert: int) -> Tensor:
            rows_IF = Segments.of(layer.bank.read(expert)).matrix()
            normalise_rows_(rows_IF)
            return rows_IF

        for i in range(1, layer.num_experts):
            mine_IF = unit(i)
            for j in range(i):
                theirs_IF = unit(j)
                both = (best_match(mine_IF, theirs_IF)[0], best_match(theirs_IF, mine_IF)[0])
                mean = float(torch.cat(both).double().mean())
                self.neuron_match_EE[i, j] = self.neuron_match_EE[j, i] = mean


@dataclass(frozen=True)
class Measure:
    """One measure of alikeness: what it reads, its matrix, and whether that is a distance."""

    observes: tuple[type[Observer], ...]
    between: Callable[[LayerProfile], Tensor]
    is_distance: bool = False

    def similarity(self, layer: LayerProfile) -> Tensor:
        """Diagonal 1, at most 1. Of a distance d: 1 - d / max d."""
        found_EE = self.between(layer)
        return 1 - found_EE / found_EE.max().clamp(min=1e-300) if self.is_distance else found_EE

    def distance(self, layer: LayerProfile) -> Tensor:
        """Diagonal 0, not negative. Of a similarity s: 1 - s."""
        found_EE = self.between(layer)
        return found_EE if self.is_distance else (1 - found_EE).clamp(min=0)

    def gram(self, layer: LayerProfile) -> Tensor:
        """Inner products for kernel k-means: the similarity itself, or those of centred points at these distances."""
        found_EE = self.between(layer)
        if not self.is_distance:
            return found_EE
        square_EE = found_EE.square()
        mean_E = square_EE.mean(0)
        return (mean_E[:, None] + mean_E - square_EE - mean_E.mean()) / 2


SIMILARITIES: dict[Similarity, Measure] = {
    "router-logits": Measure((RouterGram,), router_logits),
    "router-logits-centred": Measure((RouterGram,), lambda layer: router_logits(layer, centred=True)),
    "router-rows": Measure((RouterRows,), router_rows),
    "outputs": Measure((OutputCosine,), outputs),
    "mean-outputs": Measure((DenseOutput,), mean_outputs, is_distance=True),
    "mean-outputs-cosine": Measure((DenseOutput,), mean_outputs_cosine),
    "weights": Measure((ExpertGram,), weights, is_distance=True),
    "weights-cosine": Measure((ExpertGram,), weights_cosine),
    "neurons": Measure((NeuronMatch,), neurons),
}
assert tuple(SIMILARITIES) == get_args(Similarity)
