"""Groups of similar experts: from a similarity matrix to labels. Where similarity comes from is not known here."""

# E experts, C clusters

from __future__ import annotations

import warnings

import torch
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor


def spectral_embedding(similarity_EE: Tensor, dimensions: int) -> Tensor:
    """The eigenvectors of the symmetric normalised Laplacian with the smallest eigenvalues. Shape [E, dimensions].

    similarity_EE : symmetric, not negative. The Laplacian is 1 - D^(-1/2) S D^(-1/2) with the row sums D.
    """
    similarity_EE = similarity_EE.double()
    scale_E = similarity_EE.sum(1).clamp(min=1e-12).rsqrt()
    laplacian_EE = torch.eye(len(similarity_EE), dtype=torch.float64) - scale_E[:, None] * similarity_EE * scale_E
    _, vectors_EE = torch.linalg.eigh((laplacian_EE + laplacian_EE.T) / 2)
    chosen: Tensor = vectors_EE[:, :dimensions]
    return chosen


def k_means(points_EX: Tensor, clusters: int, seed: int) -> list[int]:
    """Labels 0..clusters-1 of the points, every one used; the best of ten starts.

    Points that coincide can leave a cluster empty: it then takes the point farthest from its own centre.
    """
    count = len(points_EX)
    if clusters >= count:
        return list(range(count))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct points than clusters: handled below
        found = KMeans(clusters, n_init=10, random_state=seed).fit(points_EX.double().numpy())
    labels = torch.as_tensor(found.labels_).long()
    centres_CX = torch.as_tensor(found.cluster_centers_)
    for empty in sorted(set(range(clusters)) - set(labels.tolist())):
        distance_E = (points_EX.double() - centres_CX[labels]).norm(dim=1)
        alone_E = torch.bincount(labels, minlength=clusters)[labels] == 1
        labels[int(distance_E.masked_fill(alone_E, -1.0).argmax())] = empty
    return [int(label) for label in labels]
