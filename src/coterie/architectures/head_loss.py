"""The language model's head and its cross entropy as one operation, without ever holding all logits.

For whoever trains with a large vocabulary. With logits z = W x of a token and its label c,

    loss = log sum_v exp(z_v) - z_c        d loss / d z = softmax(z) - onehot(c)

so that the gradients of x and W are known as soon as a chunk of logits is: they are computed in the forward, chunk by
chunk of tokens, and multiplied with what comes from above in the backward, as Liger Kernel does on GPUs
(arXiv:2410.10989). Tokens without a label cost nothing. Memory: two chunks of logits instead of some copies of all, and
the gradient of W, which the backward needs anyway. Softmax and sums are float32 whatever the products are in.
"""

# T tokens, C tokens of a chunk, H hidden, V vocabulary

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IGNORED = -100


class _HeadLoss(torch.autograd.Function):
    """Sum of the losses of rows that all have a label."""

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, weight_VH: Tensor, label_T: Tensor, dtype: torch.dtype, chunk: int) -> Tensor:
        for_x, for_weight, *_ = ctx.needs_input_grad
        narrow_TH, narrow_VH = x_TH.to(dtype), weight_VH.to(dtype)
        wide = torch.promote_types(dtype, torch.float32)
        loss = torch.zeros((), dtype=wide, device=x_TH.device)
        grad_x = torch.empty_like(narrow_TH) if for_x else None
        grad_weight: Tensor | None = None
        rows = min(chunk, len(x_TH))
        logits, logs = (torch.empty(rows, len(weight_VH), dtype=t, device=x_TH.device) for t in (dtype, wide))
        for first in range(0, len(x_TH), chunk):
            x_CH, label_C = narrow_TH[first : first + chunk], label_T[first : first + chunk, None]
            logits_CV, log_CV = logits[: len(x_CH)], logs[: len(x_CH)]
            torch.mm(x_CH, narrow_VH.T, out=logits_CV)
            torch.log_softmax(logits_CV.to(wide), -1, out=log_CV)
            loss -= log_CV.gather(1, label_C).sum()
            if not (for_x or for_weight):
                continue
            log_CV.exp_().scatter_add_(1, label_C, log_CV.new_full(label_C.shape, -1.0))
            grad_CV = log_CV if dtype == wide else logits_CV.copy_(log_CV)
            if grad_x is not None:
                torch.mm(grad_CV, narrow_VH, out=grad_x[first : first + chunk])
            if for_weight and grad_weight is None:
                grad_weight = grad_CV.T.mm(x_CH).to(weight_VH.dtype)
            elif for_weight and grad_weight is not None:
                if grad_weight.dtype == dtype:
                    grad_weight.addmm_(grad_CV.T, x_CH)
                else:
                    grad_weight += grad_CV.T.mm(x_CH)
        if for_weight and grad_weight is None:
            grad_weight = torch.zeros_like(weight_VH)
        ctx.save_for_backward(None if grad_x is None else grad_x.to(x_TH.dtype), grad_weight)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        made = ctx.saved_tensors
        return (*(None if t is None else t * grads[0].to(t.dtype) for t in made), None, None, None)


def head_loss(
    hidden_TH: Tensor, weight_VH: Tensor, label_T: Tensor, *, items: int | Tensor | None = None, chunk: int = 256
) -> Tensor:
    """Mean cross entropy of the labels under the logits hidden @ weight^T, a scalar in at least float32.

    Parameters
    ----------
    hidden_TH : what the head receives, of any leading shape. weight_VH : the head's matrix.
    label_T : for each of them the token that comes next; -100 for none. Shifting is the caller's.
    items : divide the sum by this instead of by the number of labels, as for accumulated gradients.
    chunk : tokens whose logits are held at a time.

    Under autocast products are in its dtype. Without any label the loss is 0, where torch says nan.
    """
    x_TH, label_T = hidden_TH.flatten(0, -2), label_T.flatten()
    device = x_TH.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_TH.dtype
    real_T = label_T != IGNORED
    x_TH, label_T = x_TH[real_T], label_T[real_T]
    total: Tensor = _HeadLoss.apply(x_TH, weight_VH, label_T, dtype, chunk)  # type: ignore[no-untyped-call]
    return total / (max(len(label_T), 1) if items is None else items)
