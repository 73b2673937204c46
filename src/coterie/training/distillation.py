"""What a student loses against its teacher at each predicted token: four losses, as pure functions of logits.

With teacher logits z, student logits s, p = softmax(z / T) and q = softmax(s / T) over the vocabulary V, and the
teacher's K most likely tokens S (Hinton et al., arXiv:1503.02531; the names are ours):

    full           T^2 sum_{v in V} p_v (log p_v - log q_v)
    tail           the same over K + 1 buckets: the K tokens, and one bucket for all the others, on both sides
    renormalised   the same over S alone, p and q each made to sum to one over S: blind to what lies outside
    cross-entropy  -T^2 sum_{v in S} p'_v log q_v, p' made to sum to one over S, q over all of V (SlimMoE,
                   arXiv:2506.18349). Its gradient at T = 1 is q - p', which is not zero at equality: it pushes the
                   student to drop its tail, and scores weights where the others have no gradient.

T^2 keeps the size of the gradients when T changes. All are float32, and all are averaged over the predicted tokens
of a step. The code of M-SMoE (arXiv:2310.01334) sums over tokens and divides by the number of sequences only
(`batchmean`) and has no T^2; its weight of 0.2 therefore grows with the length of the sequences, ours does not.

Nothing here knows models, text or files.
"""

# B batch, L sequence, V vocabulary, K the teacher's most likely tokens, T predicted tokens

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from coterie.errors import UsageError

Loss = Literal["tail", "renormalised", "cross-entropy", "full"]
LOSSES: tuple[str, ...] = get_args(Loss)


@dataclass(frozen=True)
class TopK:
    """A teacher's most likely tokens at some temperature.

    ids_TK : int64. log_p_TK : their log-probabilities, float32. tail_T : log of the probability of all other tokens,
    float32; -inf where K = V.
    """

    ids_TK: Tensor
    log_p_TK: Tensor
    tail_T: Tensor


def top_k(logits_TV: Tensor, k: int, temperature: float = 1.0) -> TopK:
    """The k most likely tokens and what is left for the others."""
    log_p_TV = _log_softmax(logits_TV, temperature)
    log_p_TK, ids_TK = log_p_TV.topk(k)
    return TopK(ids_TK, log_p_TK, _outside(log_p_TV, ids_TK))


def full_kl(student_TV: Tensor, teacher_TV: Tensor, temperature: float = 1.0) -> Tensor:
    """KL of the whole distributions. Shape [T]. Peak memory: four times the student's float32 logits."""
    log_q_TV = _log_softmax(student_TV, temperature)
    log_p_TV = _log_softmax(teacher_TV, temperature)
    return temperature**2 * _kl(log_p_TV, log_q_TV)


def tail_kl(student_TV: Tensor, teacher: TopK, temperature: float = 1.0) -> Tensor:
    """KL over the teacher's K tokens and one bucket for the others. Shape [T]. Zero, without gradient, at equality."""
    log_q_TV = _log_softmax(student_TV, temperature)
    log_q_TK, log_p_TK = log_q_TV.gather(-1, teacher.ids_TK), teacher.log_p_TK
    if teacher.ids_TK.shape[-1] < student_TV.shape[-1]:
        log_q_TK = torch.cat([log_q_TK, _outside(log_q_TV, teacher.ids_TK)[..., None]], -1)
        log_p_TK = torch.cat([log_p_TK, teacher.tail_T[..., None]], -1)
    return temperature**2 * _kl(log_p_TK.log_softmax(-1), log_q_TK)  # what was stored in half precision sums to one


def renormalised_kl(student_TV: Tensor, teacher: TopK, temperature: float = 1.0) -> Tensor:
    """KL over the teacher's K tokens alone. Shape [T]. Zero, without gradient, at equality; blind to the tail."""
    log_q_TK = _log_softmax(student_TV.gather(-1, teacher.ids_TK), temperature)
    return temperature**2 * _kl(teacher.log_p_TK.log_softmax(-1), log_q_TK)


def cross_entropy(student_TV: Tensor, teacher: TopK, temperature: float = 1.0) -> Tensor:
    """The teacher's K tokens, renormalised, against the student's whole distribution. Shape [T]. Never zero."""
    log_q_TK = _log_softmax(student_TV, temperature).gather(-1, teacher.ids_TK)
    return -(temperature**2) * (teacher.log_p_TK.softmax(-1) * log_q_TK).sum(-1)


_OF_TOP = {"tail": tail_kl, "renormalised": renormalised_kl, "cross-entropy": cross_entropy}


def token_losses(
    student_TV: Tensor, teacher: Tensor | TopK, loss: str, *, k: int = 64, temperature: float = 1.0
) -> Tensor:
    """The loss called `loss` at every token. Shape [T].

    teacher : its logits [T, V], or what was kept of them. k : how many of whole logits count, except for "full".
    Raises UsageError for an unknown loss, and for "full" without whole logits.
    """
    if loss == "full":
        if isinstance(teacher, TopK):
            raise UsageError(
                "the full loss needs all of the teacher's logits, and a cache holds the most likely ones",
                "Take --loss tail, which is the same with --top as large as the vocabulary, or --logits online.",
            )
        return full_kl(student_TV, teacher, temperature)
    if loss not in _OF_TOP:
        raise UsageError(f"no loss {loss!r}", f"There are {', '.join(LOSSES)}.")
    kept = teacher if isinstance(teacher, TopK) else top_k(teacher, min(k, teacher.shape[-1]), temperature)
    return _OF_TOP[loss](student_TV, kept, temperature)


def predicted(labels_BL: Tensor) -> Tensor:
    """Which positions [B, L-1] predict a token that counts: those before a label that is not -100."""
    return labels_BL[:, 1:] != -100


def distillation_loss(
    logits_BLV: Tensor,
    labels_BL: Tensor,
    teacher_BLV: Tensor,
    loss: str = "tail",
    *,
    k: int = 64,
    temperature: float = 1.0,
) -> Tensor:
    """Mean of the loss over the predicted tokens of a batch; labels of -100 contribute nothing."""
    real_BL = predicted(labels_BL)
    student_TV, teacher_TV = logits_BLV[:, :-1][real_BL], teacher_BLV[:, :-1][real_BL]
    return token_losses(student_TV, teacher_TV, loss, k=k, temperature=temperature).mean()


def lm_losses(student_TV: Tensor, target_T: Tensor) -> Tensor:
    """-log q of the true next tokens at T = 1. Shape [T]."""
    return F.cross_entropy(student_TV.float(), target_T, reduction="none")


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """In float32; without a copy of the logits at temperature 1."""
    return (logits if temperature == 1 else logits.float() / temperature).log_softmax(-1, dtype=torch.float32)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _outside(log_TV: Tensor, ids_TK: Tensor) -> Tensor:
    """log of the probability outside of `ids_TK`. Shape [T]. A sum, not one minus a sum: exact also near nothing."""
    if ids_TK.shape[-1] == log_TV.shape[-1]:
        return torch.full(log_TV.shape[:-1], float("-inf"), device=log_TV.device)
    return log_TV.scatter(-1, ids_TK, float("-inf")).logsumexp(-1)
