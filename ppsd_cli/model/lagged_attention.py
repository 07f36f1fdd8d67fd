"""Attention of a deep head over a whole text at once: the lagged view of ``model/heads.py``.

The query at position p sees its own *near* keys at lags 0 to L - 1 (a different tap each) and the
*far* keys, those of the last tap, at positions up to p - L. The far part is plain causal attention
between queries from L on and keys up to T - L, which the fused kernels do; both parts are then
joined by their log-sum-exps. Backwards the fused kernel gets the joined output and log-sum-exp,
from which it forms the right probabilities (as in ring attention, arXiv 2310.01889).

Shapes: B texts, N query heads, T positions, L near lags, D head dimension.
"""

from typing import Any

import torch
from torch import Tensor

_ATEN = torch.ops.aten
_FLASH_DTYPES = (torch.bfloat16, torch.float16)
_FLASH_MAX_DIM = 256


def lagged_attention(
    q: Tensor, far_k: Tensor, far_v: Tensor, near_k: Tensor, near_v: Tensor
) -> Tensor:
    """Attention [B, N, T, D] of q over far keys [B, N, T, D] and near ones [B, N, T, L, D].

    ``near_k[..., p, k, :]`` is the key at position p - k; where that is negative it is hidden.
    """
    if fused_kernel_fits(q):
        out: Tensor = _Lagged.apply(q, far_k, far_v, near_k, near_v)  # type: ignore[no-untyped-call]
        return out
    return dense_lagged_attention(q, far_k, far_v, near_k, near_v)


def fused_kernel_fits(q: Tensor) -> bool:
    """Whether the fused far part is available for this device, number format and head size."""
    if q.device.type == "cpu":
        return q.dtype in (torch.float32, torch.bfloat16)
    aligned = q.shape[-1] % 8 == 0 and q.shape[-1] <= _FLASH_MAX_DIM
    return q.device.type == "cuda" and q.dtype in _FLASH_DTYPES and aligned


def dense_lagged_attention(
    q: Tensor, far_k: Tensor, far_v: Tensor, near_k: Tensor, near_v: Tensor
) -> Tensor:
    """The same by full score matrices: the reference, and the way without a fused kernel."""
    time, lags = q.shape[2], near_k.shape[3]
    positions = torch.arange(time, device=q.device)
    hide_far = positions[None, :] > positions[:, None] - lags
    far = (q @ far_k.mT).float() * q.shape[-1] ** -0.5
    near = _near_scores(q, near_k)
    scores = torch.cat([far.masked_fill(hide_far, -torch.inf), near], dim=-1)
    weights = scores.softmax(dim=-1).to(q.dtype)
    out = weights[..., :time] @ far_v
    return out + (weights[..., time:, None] * near_v).sum(dim=-2)


def _near_scores(q: Tensor, near_k: Tensor) -> Tensor:
    """Scaled scores [B, N, T, L] in float32; minus infinity before the start of the text."""
    scores = (q[..., None, :].float() * near_k.float()).sum(dim=-1) * q.shape[-1] ** -0.5
    time, lags = scores.shape[-2:]
    lag = torch.arange(lags, device=q.device)
    hide = lag[None, :] > torch.arange(time, device=q.device)[:, None]
    hidden: Tensor = scores.masked_fill(hide, -torch.inf)
    return hidden


class _Lagged(torch.autograd.Function):
    """Fused causal attention on the far part, joined with the few near keys."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, far_k: Tensor, far_v: Tensor, near_k: Tensor, near_v: Tensor
    ) -> Tensor:
        lags, time = near_k.shape[3], q.shape[2]
        scores = _near_scores(q, near_k)
        lse = scores.logsumexp(dim=-1)
        extra: tuple[Any, ...] = ()
        far_out = None
        if time > lags:
            far_out, far_lse, extra = _far_forward(
                q[:, :, lags:], far_k[:, :, : time - lags], far_v[:, :, : time - lags]
            )
            lse = torch.cat([lse[:, :, :lags], torch.logaddexp(lse[:, :, lags:], far_lse)], dim=2)
        weights = (scores - lse[..., None]).exp()
        out = (weights[..., None] * near_v).sum(dim=-2)
        if far_out is not None:
            share = (far_lse - lse[:, :, lags:]).exp()[..., None]
            out[:, :, lags:] += share * far_out
        out = out.to(q.dtype)
        ctx.save_for_backward(q, far_k, far_v, near_k, near_v, out, lse, weights)
        ctx.extra = extra
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        q, far_k, far_v, near_k, near_v, out, lse, weights = ctx.saved_tensors
        grad = grads[0].contiguous()
        lags, time, scale = near_k.shape[3], q.shape[2], q.shape[-1] ** -0.5
        delta = (grad.float() * out.float()).sum(dim=-1, keepdim=True)
        given = (grad[..., None, :].float() * near_v.float()).sum(dim=-1)
        by_score = weights * (given - delta) * scale  # [B, N, T, L]
        grad_near_k = (by_score[..., None] * q[..., None, :]).to(q.dtype)
        grad_near_v = (weights[..., None] * grad[..., None, :]).to(q.dtype)
        grad_q = (by_score[..., None] * near_k).sum(dim=-2)
        grad_far_k, grad_far_v = torch.zeros_like(far_k), torch.zeros_like(far_v)
        if time > lags:
            late, early = slice(lags, None), slice(0, time - lags)
            dq, dk, dv = _far_backward(
                grad[:, :, late],
                (q[:, :, late], far_k[:, :, early], far_v[:, :, early]),
                out[:, :, late],
                lse[:, :, late].contiguous(),
                ctx.extra,
            )
            grad_q[:, :, late] += dq
            grad_far_k[:, :, early] = dk
            grad_far_v[:, :, early] = dv
        return grad_q.to(q.dtype), grad_far_k, grad_far_v, grad_near_k, grad_near_v


def _far_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
    """Causal attention, its log-sum-exp [B, N, T] and what the backward kernel wants back."""
    if q.device.type == "cpu":
        out, lse = _ATEN._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
        return out, lse, ()
    out, lse, cum_q, cum_k, max_q, max_k, rng, unused, _ = (
        _ATEN._scaled_dot_product_flash_attention(q, k, v, 0.0, True, False)
    )
    return out, lse[..., : q.shape[2]], (cum_q, cum_k, max_q, max_k, rng, unused)


def _far_backward(
    grad: Tensor,
    qkv: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
    lse: Tensor,
    extra: tuple[Any, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the far queries, keys and values under the joined output and log-sum-exp."""
    if grad.device.type == "cpu":
        done = _ATEN._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, *qkv, out, lse, 0.0, True
        )
        return done[0], done[1], done[2]
    cum_q, cum_k, max_q, max_k, rng, unused = extra
    done = _ATEN._scaled_dot_product_flash_attention_backward(
        grad, *qkv, out, lse, cum_q, cum_k, max_q, max_k, 0.0, True, rng, unused
    )
    return done[0], done[1], done[2]
