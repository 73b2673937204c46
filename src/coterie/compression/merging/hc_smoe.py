"""HC-SMoE: merge experts that put out the same on average, found by hierarchical clustering (arXiv:2410.08589).

The training-free merge people reach for: no gradients, little text, and nothing of the router is asked. Per layer:

    o_j    = mean_x E_j(x)                          over all tokens x that enter the layer, routed or not, no gate
    D(A,B) = mean_{i in A, j in B} || o_i - o_j ||  average linkage (UPGMA); the closest two merge until r are left
    E_C    = sum_{j in C} a_j E_j, sum a = 1         a_j how often j is selected; neurons are not aligned

and the router's outputs of all members point at the merged expert. Every layer keeps the same number.

Differs from the authors' code: complete linkage is complete linkage (theirs merges the two most distant clusters), and
frequencies count the experts that were really selected (theirs takes the top 2 of the logits, whatever the model).
Their K-means and one-shot grouping are `sub-moe` and `m-smoe` here; fix-dom and ZipIt merging are not built.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from pydantic import Field
from torch import Tensor

from coterie.compression.clustering import Linkage, hierarchical, members_of
from coterie.compression.merging.base import Merger
from coterie.compression.methods import method
from coterie.compression.similarity import SIMILARITIES, Similarity
from coterie.profiling.observers import Observer, SelectionCount
from coterie.profiling.profile import LayerProfile


@method("hc-smoe", kind="merging", paper="arXiv:2410.08589")
class HcSmoe(Merger):
    """Merge experts with like mean outputs, by hierarchical clustering, without retraining."""

    linkage: Linkage = Field("average", description="Distance of two clusters; the paper finds average best.")
    similarity: Similarity = Field("mean-outputs", description="What is compared; the paper finds mean outputs best.")

    def observes(self) -> tuple[type[Observer], ...]:
        return tuple(dict.fromkeys((SelectionCount, *SIMILARITIES[self.similarity].observes)))

    def clusters(
        self, layer: LayerProfile, experts: Sequence[int], count: int, alone: Collection[int]
    ) -> list[list[int]]:
        inside = list(experts)
        distance_EE: Tensor = SIMILARITIES[self.similarity].distance(layer)[inside][:, inside]
        labels = hierarchical(
            distance_EE,
            count,
            self.linkage,
            alone=[inside.index(e) for e in alone],
            max_size=self.max_size,
        )
        return [[inside[i] for i in members] for members in members_of(labels)]
