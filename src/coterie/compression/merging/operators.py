"""Merge operators: what one expert a cluster of experts becomes, and low-rank factors of expert matrices.

Means and replacement act on whole experts. `subspace` is the merge of Sub-MoE (arXiv:2506.23266): the matrices
W_1 .. W_n [O, I] of one type in a cluster share their output space, so with shares f_i and M = [W_1 S_1, ..., W_n S_n],

    M = U Sigma [V_1 ... V_n]        W_m = U_r Sigma_r sum_i f_i V_i,r S_i^-1 = U_r U_r^T W_avg,   W_avg = sum_i f_i W_i

(S_i = 1 without whitening). Only U_r is needed, the leading eigenvectors of the O x O matrix M M^T, which is
sum_i W_i C_i W_i^T with C_i = S_i S_i^T the second moment of the inputs of W_i. It is added up expert by expert; the
experts are never put side by side, and no S_i is computed. At full rank U U^T W_avg is W_avg itself, so no
decomposition is made.

Of gate and up, C_i is the moment of the expert's inputs. Of down, W_i C_i W_i^T = sum_t (W_i a_t)(W_i a_t)^T is the
moment of its outputs without bias, so that the moment of its inner activations, far larger, is never needed.

Experts must be in the same neuron order where their neurons are not each other's by number: see `alignment`.
"""

# ruff: noqa: E741
# O out, I in (of one matrix), H hidden, R rank, E experts

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import scipy.linalg
import torch
from torch import Tensor

from coterie.anatomy import ExpertWeights
from coterie.errors import UsageError
from coterie.profiling.profile import LayerProfile

MATRICES = ("gate_IH", "up_IH", "down_HI")
MATRIX = {"gate": "gate_IH", "up": "up_IH", "down": "down_HI"}  # by the names of stored projections
COLUMNS = 512  # of a matrix that are widened and multiplied at a time

# -- whole experts ------------------------------------------------------------------------------------------------


def shares(weights: Sequence[float]) -> list[float]:
    """Weights that sum to 1; equal ones where all are 0, as of a cluster that no token has used."""
    total = sum(weights)
    return [w / total for w in weights] if total > 0 else [1 / len(weights)] * len(weights)


def weighted_mean(experts: Sequence[ExpertWeights], weights: Sequence[float]) -> ExpertWeights:
    """sum_y w_y E_y / sum_y w_y of every weight and bias, in float32; uniform if all weights are 0."""
    mean = {}
    for entry in fields(ExpertWeights):
        parts = [getattr(expert, entry.name) for expert in experts]
        if parts[0] is not None:
            mean[entry.name] = torch.zeros_like(parts[0], dtype=torch.float32)
            for part, share in zip(parts, shares(weights), strict=True):
                mean[entry.name].add_(part.float(), alpha=share)
    return ExpertWeights(**mean)


def uniform_mean(experts: Sequence[ExpertWeights], weights: Sequence[float]) -> ExpertWeights:
    """The plain mean, whatever the weights, in float32."""
    return weighted_mean(experts, [1.0] * len(experts))


def dominant(experts: Sequence[ExpertWeights], weights: Sequence[float]) -> ExpertWeights:
    """The expert of the largest weight as it is, in its own dtype; the first of equal ones."""
    return experts[max(range(len(experts)), key=lambda i: (weights[i], -i))]


OPERATORS: dict[str, Callable[[Sequence[ExpertWeights], Sequence[float]], ExpertWeights]] = {
    "frequency": weighted_mean,
    "mean": uniform_mean,
    "dominant": dominant,
}


# -- factors of one matrix ----------------------------------------------------------------------------------------


class Factors(NamedTuple):
    """A matrix of rank R as a product: left_OR @ right_RI."""

    left_OR: Tensor
    right_RI: Tensor

    @property
    def rank(self) -> int:
        return self.right_RI.shape[0]

    def product(self) -> Tensor:
        return self.left_OR @ self.right_RI


def rank_for(ratio: float, O: int, I: int) -> int:
    """The rank at which two factors hold (1 - ratio) of the numbers of an [O, I] matrix, rounded down."""
    rank = math.floor((1 - ratio) * O * I / (O + I))
    if not 1 <= rank <= min(O, I):
        raise UsageError(
            f"saving {ratio:g} of a {O} x {I} matrix asks for rank {rank}",
            f"A rank must be 1 to {min(O, I)}; use a ratio from 0 to {1 - (O + I) / (O * I):.3g}.",
        )
    return rank


def ranks_of(shapes: Mapping[str, tuple[int, int]], rank: int | None, save: float | None, layer: int) -> dict[str, int]:
    """The rank of each projection {name: (O, I)} of a layer: `rank`, or the one that saves a share of its numbers."""
    if rank is None:
        assert save is not None
        return {name: rank_for(save, *shape) for name, shape in shapes.items()}
    for name, shape in shapes.items():
        if not 1 <= rank <= min(shape):
            raise UsageError(
                f"rank {rank} is above the full rank of {name} in layer {layer}, which is {shape[0]} x {shape[1]}",
                f"Use 1 to {min(min(s) for s in shapes.values())}.",
            )
    return dict.fromkeys(shapes, rank)


def as_factors(matrix: Factors | Tensor) -> Factors:
    """A matrix that was left whole as a product too: itself times the identity on its narrow side."""
    if isinstance(matrix, Factors):
        return matrix
    O, I = matrix.shape
    identity = torch.eye(min(O, I), dtype=matrix.dtype, device=matrix.device)
    return Factors(identity, matrix) if O <= I else Factors(matrix, identity)


def factorise(weight_OI: Tensor, rank: int) -> Factors:
    """The best approximation of a rank: U = A_r sqrt(s_r), V = sqrt(s_r) B_r of the SVD A diag(s) B. float32.

    From the eigenvectors of the smaller of W W^T and W^T W in float64. Peak: two such matrices and W in float64.
    """
    O, I = weight_OI.shape
    _check_rank(rank, O, I)
    wide_OI = weight_OI.double()
    value_R, vector_XR = leading_eigenvectors(wide_OI @ wide_OI.T if O <= I else wide_OI.T @ wide_OI, rank)
    scale_R = value_R.clamp(min=0).sqrt().sqrt()  # s = sqrt(eigenvalue), and its root
    inverse_R = torch.where(scale_R > 0, 1 / scale_R, 0.0)
    if O <= I:
        left_OR, right_RI = vector_XR * scale_R, inverse_R[:, None] * (vector_XR.T @ wide_OI)
    else:
        left_OR, right_RI = wide_OI @ vector_XR * inverse_R, scale_R[:, None] * vector_XR.T
    return Factors(left_OR.float(), right_RI.float())


def stable_rank(weight_OI: Tensor) -> float:
    """sum_i s_i^2 / max_i s_i^2 of the singular values; 0 for a matrix of zeros. In float64."""
    wide_OI = weight_OI.double()
    gram_XX = wide_OI @ wide_OI.T if wide_OI.shape[0] <= wide_OI.shape[1] else wide_OI.T @ wide_OI
    total, largest = float(gram_XX.trace()), float(leading_eigenvectors(gram_XX, 1)[0])
    return total / largest if total > 0 else 0.0


def leading_eigenvectors(gram_XX: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The `rank` largest eigenvalues of a symmetric matrix, descending [R], and their eigenvectors [X, R].

    On the CPU only these are computed, and `gram_XX` is overwritten: nothing of its size comes on top.
    """
    if gram_XX.is_cuda:
        value_X, vector_XX = torch.linalg.eigh(gram_XX)
        return value_X[-rank:].flip(0), vector_XX[:, -rank:].flip(1)
    count = len(gram_XX)
    value_R, vector_XR = scipy.linalg.eigh(
        gram_XX.numpy().T, overwrite_a=True, subset_by_index=[count - rank, count - 1], check_finite=True
    )
    return torch.from_numpy(value_R[::-1].copy()), torch.from_numpy(vector_XR[:, ::-1].copy())


def _check_rank(rank: int, O: int, I: int) -> None:
    if not 1 <= rank <= min(O, I):
        raise UsageError(f"rank {rank} of a {O} x {I} matrix", f"Use 1 to {min(O, I)}.")


# -- the subspace of a cluster ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moments:
    """What whitening needs of one expert: sums over the tokens routed to it, see `moments_of`.

    input_HH : of x x^T. output_HH : of y y^T, y the output without bias. tokens : how many.
    """

    input_HH: Tensor
    output_HH: Tensor
    tokens: int


def moments_of(layer: LayerProfile, members: Sequence[int]) -> list[Moments]:
    """The moments of a cluster's experts, from SelectionCount, InputSecondMoment and OutputSecondMoment.

    An expert with fewer tokens than inputs has a singular moment that says little of its inputs: its input moment is
    that of all experts' tokens together, scaled to as many tokens as it has (at least one).
    """
    hidden, count_E = layer.input_moment_EHH.shape[-1], layer.count_E
    pooled_HH = None
    found = []
    for expert in members:
        tokens, input_HH = int(count_E[expert]), layer.input_moment_EHH[expert]
        if tokens < hidden:
            if pooled_HH is None:
                pooled_HH = layer.input_moment_EHH.sum(0) / max(int(count_E.sum()), 1)
            input_HH = pooled_HH * max(tokens, 1)
        found.append(Moments(input_HH, layer.output_moment_EHH[expert], tokens))
    return found


def subspace(
    members: Sequence[ExpertWeights],
    weights: Sequence[float],
    *,
    rank: int | Mapping[str, int] | None = None,
    energy: float | None = None,
    moments: Sequence[Moments] | None = None,
    damping: float = 0.01,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Factors | Tensor]:
    """Each matrix of a cluster's mean, projected onto the leading output directions that its members share.

    Parameters
    ----------
    members : the experts, best as views of the bank: they are widened one at a time.
    weights : of the mean; equal ones if all are 0.
    rank : of all matrices, or {"gate_IH": ..., "up_IH": ..., "down_HI": ...}.
    energy : instead of `rank`, the least rank that keeps this share of the squared singular values of M.
    moments : of each member, for whitening; None for none.
    damping : lambda, see `joint_gram`.
    dtype : of M M^T and its decomposition. In float32 directions below some 3e-4 of the largest singular value are
        noise, in float64 below 1e-8.

    Returns
    -------
    {matrix name: Factors, or the mean [O, I] itself where the rank is full}; float32. With neither `rank` nor `energy`
    that is all of them. Full is a rank of min(O, I), which the mean of itself never exceeds. Biases are not factored:
    they are those of `weighted_mean`.

    Notes
    -----
    Peak memory beside the experts: the O^2 numbers of M M^T in `dtype`, with moments some 4 O I more while they are
    added up, O R for the eigenvectors, and the result. It is largest at gate and up. Measured at a quarter of Mixtral's
    sizes (8 experts, H = 1024, I = 3584, R = 716, float64): 157 MB, and 253 MB with moments, of which M M^T is 103 MB
    and the result 40 MB. For Mixtral (H = 4096, I = 14336) that is 2.5 GB and 4 GB; M alone would be 3.8 GB, and its
    SVD a multiple. In float32 about half. On CUDA the decomposition takes three times M M^T. Time grows with O^3: one
    M M^T of O = 3584 is decomposed in 5 s on one core, so one of Mixtral's takes minutes.
    """
    if rank is not None and energy is not None:
        raise UsageError("a rank and an energy are given, and each decides alone", "Leave one of them out.")
    if energy is not None and not 0 < energy <= 1:
        raise UsageError(f"an energy of {energy:g}", "Use a share above 0 and up to 1.")
    merged: dict[str, Factors | Tensor] = {}
    for name in MATRICES:
        if getattr(members[0], name) is None:
            continue
        matrices = [getattr(member, name) for member in members]
        O, I = matrices[0].shape
        wanted = rank[name] if isinstance(rank, Mapping) else rank
        if wanted is not None:
            _check_rank(wanted, O, I)
        basis_OR = None
        if wanted not in (None, min(O, I)) or energy is not None:
            gram_OO = joint_gram(matrices, moments, output=name == "down_HI", damping=damping, dtype=dtype)
            basis_OR = subspace_basis(gram_OO, wanted, energy).float()
            del gram_OO
        mean_OI = _mean(matrices, weights)
        if basis_OR is None or basis_OR.shape[1] >= min(O, I):
            merged[name] = mean_OI
        else:
            merged[name] = Factors(basis_OR, basis_OR.T @ mean_OI)
    return merged


def joint_gram(
    matrices: Sequence[Tensor],
    moments: Sequence[Moments] | None = None,
    *,
    output: bool = False,
    damping: float = 0.01,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """M M^T of M = [W_1 S_1, ..., W_n S_n], added up expert by expert. Shape [O, O], symmetric.

    Without `moments` S_i = 1. With them S_i S_i^T = C_i + lambda m_i 1:

    output=False (gate, up) : C_i is the expert's input moment, m_i the mean of its diagonal.
    output=True (down) : W_i C_i W_i^T is the expert's output moment Y_i. m_i is not known without the inner
        activations; taken is that of activations without any structure that give outputs of the same size,
        m_i = trace(Y_i) / |W_i|_F^2. An expert with fewer tokens than neurons has a C_i that is zero in most
        directions; for it lambda is 1, so that half of the size of its part comes from the weights alone.

    An expert without tokens adds nothing for down. If no member has any, there is nothing to whiten with, and S_i = 1.
    """
    O = matrices[0].shape[0]
    total_OO = torch.zeros(O, O, dtype=dtype, device=matrices[0].device)
    if moments is not None and not any(m.tokens for m in moments):
        moments = None
    for i, weight_OI in enumerate(matrices):
        if moments is None:
            _add_product(total_OO, weight_OI)
        elif output:
            level = float(moments[i].output_HH.trace()) / max(float(weight_OI.double().square().sum()), 1e-300)
            few = moments[i].tokens < weight_OI.shape[1]
            total_OO += moments[i].output_HH.to(total_OO)
            _add_product(total_OO, weight_OI, alpha=level if few else damping * level)
        else:
            moment_II = moments[i].input_HH
            level = float(moment_II.double().diagonal().mean())
            _add_product(total_OO, weight_OI, moment_II)
            _add_product(total_OO, weight_OI, alpha=damping * level)
    return total_OO


def _add_product(total_OO: Tensor, weight_OI: Tensor, moment_II: Tensor | None = None, alpha: float = 1.0) -> None:
    """total += alpha W C W^T, some columns at a time, as a product has buffers as large as its factors."""
    wide_OI = None if moment_II is None else weight_OI.to(total_OO)
    for start in range(0, weight_OI.shape[1], COLUMNS):
        part_OC = weight_OI[:, start : start + COLUMNS].to(total_OO)
        if wide_OI is None or moment_II is None:
            total_OO.addmm_(part_OC, part_OC.T, alpha=alpha)
        else:
            seen_OC = wide_OI @ moment_II[:, start : start + COLUMNS].to(total_OO)
            total_OO.addmm_(seen_OC, part_OC.T, alpha=alpha)


def subspace_basis(gram_OO: Tensor, rank: int | None = None, energy: float | None = None) -> Tensor:
    """U_r [O, R], orthonormal: the leading left singular vectors of M from M M^T, which is overwritten.

    One of `rank` and `energy`: with energy, the fewest whose eigenvalues make up this share of the trace.
    """
    if rank is not None:
        return leading_eigenvectors(gram_OO, rank)[1]
    assert energy is not None
    value_O, vector_OO = leading_eigenvectors(gram_OO, len(gram_OO))
    share_O = value_O.clamp(min=0).cumsum(0) / value_O.clamp(min=0).sum().clamp(min=1e-300)
    enough = int((share_O < energy - 1e-12).sum()) + 1
    return vector_OO[:, :enough]


def _mean(matrices: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    mean_OI = torch.zeros_like(matrices[0], dtype=torch.float32)
    for matrix_OI, share in zip(matrices, shares(weights), strict=True):
        mean_OI.add_(matrix_OI.float(), alpha=share)
    return mean_OI
