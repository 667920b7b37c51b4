"""
The loss of a language model without all of its logits in memory.
"""

import torch
from torch.nn import functional as F

CHUNK_ROWS = {"cpu": 256, "cuda": 4096}  # least rows of logits alive together


def head_cross_entropy(h, weight, targets):
    """Mean cross-entropy of the logits h @ weight.T, in nats.

    h (B, T, C), weight (V, C), targets (B, T) -> scalar. Where the rows fit into one chunk it is
    F.cross_entropy. So it is under torch.compile, which fuses the loss into the product and keeps
    the logits in half precision: measured faster than chunks.
    """
    h, targets = h.flatten(0, 1), targets.flatten()
    kind = h.device.type
    # A chunk costs a pass over the weight's gradient: its logits may be as large as that.
    chunk = max(CHUNK_ROWS.get(kind, CHUNK_ROWS["cpu"]), weight.size(1))
    if h.size(0) <= chunk or torch.compiler.is_compiling():
        return F.cross_entropy(F.linear(h, weight), targets)
    low = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if low else weight.dtype
    wants_grad = torch.is_grad_enabled() and (h.requires_grad or weight.requires_grad)
    return ChunkedCrossEntropy.apply(h, weight, targets, chunk, dtype, wants_grad)


class ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of the logits h @ weight.T, a chunk of rows at a time.

    h (N, C), weight (V, C), targets (N,) -> scalar. The full (N, V) logits are the largest tensor
    of a step; here only `chunk` rows of them are alive, because the gradients are taken in the
    forward pass while they are at hand. The weight's gradient is summed in the weight's own
    dtype (float32): in bfloat16 the sum over chunks would lose digits.
    """

    @staticmethod
    def forward(ctx, h, weight, targets, chunk, dtype, wants_grad):
        total = torch.zeros((), dtype=weight.dtype, device=h.device)
        w = weight.to(dtype)
        grad_h = torch.empty_like(h, dtype=dtype) if wants_grad else None
        grad_w = torch.zeros_like(weight) if wants_grad else None
        with torch.autocast(h.device.type, enabled=False):
            for rows in (slice(i, i + chunk) for i in range(0, h.size(0), chunk)):
                x, target = h[rows].to(dtype), targets[rows].unsqueeze(1)
                g = (x @ w.T).to(weight.dtype)  # logits; everything after is done in their place
                top, picked = g.amax(dim=1, keepdim=True), g.gather(1, target)
                z = g.sub_(top).exp_().sum(dim=1, keepdim=True)
                total += (top + z.log() - picked).sum()
                if wants_grad:  # of the sum, not yet of the mean: small numbers suffer in float16
                    g = g.div_(z).scatter_add_(1, target, -torch.ones_like(z)).to(dtype)
                    grad_h[rows] = g @ w
                    if dtype == grad_w.dtype:
                        grad_w.addmm_(g.T, x)
                    else:
                        grad_w += g.T @ x
        if wants_grad:
            ctx.save_for_backward(grad_h, grad_w)
            ctx.h_dtype = h.dtype
        return total / h.size(0)

    @staticmethod
    def backward(ctx, grad):
        grad_h, grad_w = ctx.saved_tensors
        scale = grad / grad_h.size(0)
        return (grad_h * scale).to(ctx.h_dtype), grad_w.mul_(scale), None, None, None, None
