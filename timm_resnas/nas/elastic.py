"""Elastic layers: one weight, many widths.

A sub-network of a supernet uses the first input and output channels of each layer. Here a batch consists of groups of
images, each with its widths, and goes through a layer in one call: each group multiplies only its own slice of
the weight, and all groups accumulate into one gradient buffer. (Slicing through autograd would fill and add a
full-size gradient per group: more memory traffic than the arithmetic saved.)

Groups that share an embedding width are kept in one tensor, a *pack*: ``[groups * images, tokens, channels]``. Where
the groups of a pack differ in a layer's width, the tensor is as wide as the widest of them, and what lies beyond a
group's own width is zero in the activations and in their gradients; `elastic_linear` keeps both promises.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

__all__ = ["Widths", "elastic_layer_norm", "elastic_linear", "masked_layer_norm", "zero_grads_for"]

# One width for each group of each pack.
Widths = Sequence[Sequence[int]]

# Groups of fewer rows than this are multiplied together, padded to the widest: below it, thin matrix products cost
# more than the arithmetic that they save. Measured with recipes/benchmark.py supernet-step.
MERGE_ROWS = 96


def elastic_layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """Layer norm over the channels that are there, with the first of the weight's entries."""
    dim = x.shape[-1]
    return F.layer_norm(x, (dim,), weight[:dim], bias[:dim], eps)


def elastic_linear(
    xs: Sequence[torch.Tensor],
    weight: torch.Tensor,
    bias: torch.Tensor,
    ins: Widths,
    outs: Widths,
    parts: int = 1,
) -> list[torch.Tensor]:
    """Linear layer in which each group of each pack uses the first rows and columns of ``weight``.

    Args:
        xs: Packs ``[n_k * images, tokens, in_k]``, zero beyond a group's own width.
        weight: ``[parts * out, in]``.
        bias: ``[parts * out]``.
        ins: Input width of each group; ``in_k`` is the widest of pack k.
        outs: Output width of each group, in each part.
        parts: Number of equal row blocks of ``weight`` that are sliced alike (3 for qkv).

    Returns:
        Packs ``[n_k * images, tokens, parts * out_k]``, each part zero beyond a group's own width.
    """
    if torch.is_autocast_enabled(xs[0].device.type):
        dtype = torch.get_autocast_dtype(xs[0].device.type)
        xs = [x.to(dtype) for x in xs]
        weight, bias = weight.to(dtype), bias.to(dtype)
    return list(_ElasticLinear.apply(weight, bias, ins, outs, parts, *xs))


def _segments(rows: int, ins: Sequence[int], outs: Sequence[int]) -> list[tuple[int, int, int, int]]:
    """(first row, last row, input width, output width) of the products that a pack is cut into."""
    if len(set(ins)) == 1 and len(set(outs)) == 1:
        return [(0, rows, ins[0], outs[0])]
    each = rows // len(ins)
    if each < MERGE_ROWS:
        return [(0, rows, max(ins), max(outs))]
    # neighbours that share both widths make one product
    segments: list[tuple[int, int, int, int]] = []
    for i, (width_in, width_out) in enumerate(zip(ins, outs, strict=True)):
        if segments and segments[-1][2:] == (width_in, width_out):
            segments[-1] = (segments[-1][0], (i + 1) * each, width_in, width_out)
        else:
            segments.append((i * each, (i + 1) * each, width_in, width_out))
    return segments


def _zero_beyond(x: torch.Tensor, widths: Sequence[int]) -> None:
    """Zero what lies beyond each group's width; x is [rows, ..., width]."""
    each = x.shape[0] // len(widths)
    for i, width in enumerate(widths):
        if width < x.shape[-1]:
            x[i * each : (i + 1) * each, ..., width:].zero_()


class _ElasticLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, bias, ins, outs, parts, *xs):
        ctx.save_for_backward(weight, *xs)
        ctx.ins, ctx.outs, ctx.parts = ins, outs, parts
        weight = weight.view(parts, -1, weight.shape[1])
        bias = bias.view(parts, -1)
        ys = []
        for x, in_widths, out_widths in zip(xs, ins, outs, strict=True):
            flat = x.reshape(-1, x.shape[-1])
            width = max(out_widths)
            y = flat.new_empty(flat.shape[0], parts, width)
            for start, stop, n_in, n_out in _segments(flat.shape[0], in_widths, out_widths):
                for p in range(parts):
                    torch.addmm(
                        bias[p, :n_out],
                        flat[start:stop, :n_in],
                        weight[p, :n_out, :n_in].t(),
                        out=y[start:stop, p, :n_out],
                    )
            _zero_beyond(y, out_widths)
            ys.append(y.view(*x.shape[:-1], parts * width))
        return tuple(ys)

    @staticmethod
    def backward(ctx, *grads):
        weight, *xs = ctx.saved_tensors
        parts = ctx.parts
        weight = weight.view(parts, -1, weight.shape[1])
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[0] else None
        grad_bias = weight.new_zeros(weight.shape[:2]) if ctx.needs_input_grad[1] else None
        grad_xs = []
        for k, (x, grad, in_widths, out_widths) in enumerate(zip(xs, grads, ctx.ins, ctx.outs, strict=True)):
            flat = x.reshape(-1, x.shape[-1])
            grad = grad.reshape(flat.shape[0], parts, -1)
            grad_x = torch.empty_like(flat) if ctx.needs_input_grad[5 + k] else None
            for start, stop, n_in, n_out in _segments(flat.shape[0], in_widths, out_widths):
                for p in range(parts):
                    g = grad[start:stop, p, :n_out]
                    if grad_weight is not None:
                        grad_weight[p, :n_out, :n_in].addmm_(g.t(), flat[start:stop, :n_in])
                    if grad_bias is not None:
                        grad_bias[p, :n_out] += g.sum(0)
                    if grad_x is not None:
                        out = grad_x[start:stop, :n_in]
                        if p == 0:
                            torch.mm(g, weight[p, :n_out, :n_in], out=out)
                        else:
                            out.addmm_(g, weight[p, :n_out, :n_in])
            if grad_x is not None:
                _zero_beyond(grad_x, in_widths)
                grad_x = grad_x.view(x.shape)
            grad_xs.append(grad_x)
        return (
            None if grad_weight is None else grad_weight.view(-1, weight.shape[2]),
            None if grad_bias is None else grad_bias.view(-1),
            None,
            None,
            None,
            *grad_xs,
        )


def masked_layer_norm(
    x: torch.Tensor, keep: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    """Layer norm over the kept channels of each group, zero in the others.

    Statistics are two-pass (variance of what is centred) and at least float32.

    Args:
        x: ``[groups, images, tokens, channels]``, zero where not kept.
        keep: 1 for kept channels, 0 for others, ``[groups, 1, 1, channels]``.
        weight: ``[channels]``.
        bias: ``[channels]``.
        eps: Added to the variance.
    """
    return _MaskedLayerNorm.apply(x, keep, weight, bias, eps)


class _MaskedLayerNorm(torch.autograd.Function):
    # Memory traffic decides: each line over [groups, images, tokens, channels] is one pass.
    @staticmethod
    def forward(ctx, x, keep, weight, bias, eps):
        dtype = torch.promote_types(x.dtype, torch.float32)
        keep, weight, bias = keep.to(dtype), weight.to(dtype), bias.to(dtype)
        share = keep.sum(dim=-1, keepdim=True).reciprocal()
        mean = x.sum(dim=-1, keepdim=True, dtype=dtype) * share
        normed = torch.addcmul(x.to(dtype), mean, keep, value=-1)
        square = torch.linalg.vector_norm(normed, dim=-1, keepdim=True).square_()
        scale = square.mul_(share).add_(eps).rsqrt_()
        normed.mul_(scale)
        ctx.save_for_backward(normed, scale, keep, share, weight)
        return torch.addcmul(bias * keep, normed, weight).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        normed, scale, keep, share, weight = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        along = grad * normed  # zero where not kept, which `grad` need not be
        if ctx.needs_input_grad[2]:
            grad_weight = along.sum(dim=(0, 1, 2))
        if ctx.needs_input_grad[3]:
            grad_bias = (grad.sum(dim=(1, 2), dtype=keep.dtype) * keep[:, 0, 0]).sum(dim=0)
        if ctx.needs_input_grad[0]:
            factor = weight * keep
            slope = (along @ weight)[..., None] * share
            grad_x = grad * factor
            level = grad_x.sum(dim=-1, keepdim=True) * share
            grad_x.addcmul_(level, keep, value=-1).addcmul_(normed, slope, value=-1).mul_(scale)
            grad_x = grad_x.to(grad.dtype)
        return grad_x, None, grad_weight, grad_bias, None


def zero_grads_for(x: torch.Tensor, params: Sequence[torch.Tensor]) -> torch.Tensor:
    """``x`` as it is; in the backward pass ``params``, which took no part, get gradients of zero.

    So every parameter has a gradient in every step: distributed training needs that to know that a step is complete,
    and an optimizer treats what was left out as it treats what was masked.
    """
    return _ZeroGradsFor.apply(x, *params) if params and torch.is_grad_enabled() else x


class _ZeroGradsFor(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *params):
        ctx.shapes = [(p.shape, p.dtype, p.device) for p in params]
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        # one zero each, which takes the parameter's size only where the gradient is kept
        zeros = [torch.zeros((), dtype=t, device=d).expand(s) for s, t, d in ctx.shapes]
        return grad, *(z if needed else None for z, needed in zip(zeros, ctx.needs_input_grad[1:], strict=True))
