"""
Train a 2026 architecture with the trainer of train_gpt2.py: Muon, RoPE, QK norm, squared ReLU.

    python modern.py                                      # one GPU; a smoke run on a CPU
    torchrun --standalone --nproc_per_node=8 modern.py    # 8 GPUs

The recipe is the tuned Muon baseline of the NanoGPT speedrun's optimization track
(github.com/KellerJordan/modded-nanogpt, records/track_3_optimization). Its authors report a validation loss
of 3.28 on FineWeb after 3,250 steps of 524,288 tokens; GPT-2 (124M) takes 10B tokens for it. This project has
not measured it at 124M. Flags, data order, resume, evaluation and files are those of train_gpt2.py.
"""

import sys

try:
    import train_gpt2
except ModuleNotFoundError as e:
    if e.name != "train_gpt2":
        raise
    print("modern.py: error: train_gpt2.py is missing; put it next to modern.py", file=sys.stderr)
    sys.exit(2)

import torch
import torch.nn as nn
from torch.nn import functional as F

from train_gpt2 import (
    GPT, PRESETS, UserError, apply_head, apply_rotary_emb, causal_attention, make_optimizer,
    print0, run_script,
)

RECIPE = dict(max_lr=0.025, min_lr=0.0, warmup_steps=0, max_steps=3250, grad_clip=0.0, weight_decay=0.05)
N_HEAD = {"gpt2": 6, "gpt2-medium": 8, "gpt2-large": 10, "gpt2-xl": 10}  # fewer, wider heads
SOFT_CAP = 15.0


class Attention(nn.Module):
    """Causal self-attention with QK norm."""

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        # Three matrices, not one: Muon orthogonalizes each matrix, and q, k, v should be separate.
        self.c_q, self.c_k, self.c_v, self.c_proj = (nn.Linear(C, C) for _ in range(4))
        self.n_head = config.n_head

    def forward(self, x, rope, mask=None, kv_cache=None):
        B, T, C = x.size()
        q, k, v = (layer(x).view(B, T, self.n_head, C // self.n_head)
                   for layer in (self.c_q, self.c_k, self.c_v))
        # QK norm (Dehghani et al. 2023, arXiv 2302.05442) makes |q| = |k| = sqrt(hs), and RoPE keeps it,
        # so the attention logits are bounded: |0.12 q.k| <= 0.12 hs.
        q, k = (apply_rotary_emb(F.rms_norm(t, (t.size(-1),)), *rope) for t in (q, k))
        return self.c_proj(causal_attention(self, q, k, v, mask, kv_cache, scale=0.12))


class MLP(nn.Module):
    """Position-wise MLP with squared ReLU (So et al. 2021, arXiv 2109.08668)."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    """Pre-norm transformer block with RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, config):
        super().__init__()
        self.ln_1, self.ln_2 = nn.RMSNorm(config.n_embd), nn.RMSNorm(config.n_embd)
        self.attn, self.mlp = Attention(config), MLP(config)

    def forward(self, x, rope, mask=None, kv_cache=None):
        x = x + self.attn(self.ln_1(x), rope, mask, kv_cache)
        return x + self.mlp(self.ln_2(x))


def orthogonalize(G):
    """Replace the singular values of a matrix G by about 1: U S V^T -> U V^T.

    Newton-Schulz iteration: X -> 2 X - 1.5 (X X^T) X + 0.5 (X X^T)^2 X keeps U and V and moves each singular
    value in (0, 1] towards 1. Raw momentum is dominated by a few singular directions; U V^T gives all of them
    the same step size. Only bfloat16 matmuls, which are fast on GPUs.
    """
    X = G.bfloat16()
    if G.size(0) > G.size(1):
        X = X.mT  # X X^T is then the smaller matrix
    X = X / (X.norm() + 1e-7)
    for _ in range(12):
        A = X @ X.mT
        X = 2 * X + (-1.5 * A + 0.5 * A @ A) @ X
    return X.mT if G.size(0) > G.size(1) else X


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalized updates (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

    Same update as torch.optim.Muon(nesterov=True, adjust_lr_fn="original", ns_steps=12,
    ns_coefficients=(2, -1.5, 0.5)) up to bfloat16 rounding.
    """

    def __init__(self, params, lr, momentum, weight_decay):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state, momentum = self.state[p], group["momentum"]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                buffer = state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
                update = orthogonalize(p.grad.lerp(buffer, momentum))  # Nesterov
                update *= max(1, p.size(0) / p.size(1)) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"])


class ModernGPT(GPT):
    """The model of the recipe. Same interface as GPT."""

    arch = "modern"
    presets = {name: PRESETS[name] | RECIPE | dict(n_head=n_head) for name, n_head in N_HEAD.items()}
    presets["smoke"] = PRESETS["smoke"] | RECIPE | dict(n_layer=3, max_steps=100, eval_every=50)
    unsupported_flags = ("pos", "mlp", "norm")
    lookup_only_params = ("transformer.wte.weight",)

    def __init__(self, config):
        nn.Module.__init__(self)  # not GPT's, which builds its own layers
        self.config = config
        C, V = config.n_embd, config.vocab_size
        if C % (4 * config.n_head):
            raise UserError(f"head size {C} / {config.n_head} is not a multiple of 4, which half-truncated "
                            "RoPE needs; change --n_embd or --n_head")
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(V, C), ln_0=nn.RMSNorm(C),
            h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]), ln_f=nn.RMSNorm(C)))
        # Untied: the recipe gives embedding and head different initial values and learning rates. Adds 39M
        # parameters at 124M, but no FLOPs, because the embedding is a lookup.
        self.lm_head = nn.Linear(C, V)
        self.apply(self._init_weights)

    def _init_weights(self, module):
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=(0.33 / module.in_features) ** 0.5)
            nn.init.zeros_(module.bias)
        # Zero-initialized output projections (Zhang et al. 2019, arXiv 1901.09321): each block starts as the
        # identity. With a zero head the initial loss is ln(vocab_size).
        if isinstance(module, (Attention, MLP)):
            nn.init.zeros_(module.c_proj.weight)
        if module is self:
            nn.init.zeros_(self.lm_head.weight)

    def embed(self, idx, pos):
        return self.transformer.ln_0(self.transformer.wte(idx))  # RoPE encodes the positions

    def rotary_cos_sin(self, pos):
        """cos and -sin of the RoPE angles. Half of the channel pairs do not rotate."""
        quarter = self.config.n_embd // self.config.n_head // 4
        freqs = (1 / 1024) ** torch.linspace(0, 1, quarter, device=pos.device)
        freqs = torch.cat([freqs, torch.zeros_like(freqs)])
        angles = (pos[..., None] * freqs).view(-1, pos.size(-1), 1, 2 * quarter)
        return angles.cos(), -angles.sin()  # the recipe rotates in the opposite direction

    def logits(self, x):
        # A soft cap (Gemma 2, arXiv 2408.00118, there with tanh) bounds the logits by +-15.
        z = apply_head(self.lm_head, x).float()
        return SOFT_CAP * z * (z.square() + SOFT_CAP**2).rsqrt()

    def make_optimizers(self, args, device_type, zero):
        """Muon for the matrices in the blocks, AdamW for all other parameters.

        --max_lr and --weight_decay apply to Muon; AdamW's values are fixed multiples of them.
        """
        matrices = [p for p in self.transformer.h.parameters() if p.dim() == 2]
        print0(f"using Muon for {len(matrices)} matrices, AdamW for the rest")
        muon = make_optimizer(Muon, matrices, zero, lr=args.max_lr, momentum=0.95,
                              weight_decay=args.weight_decay)
        # learning rates 0.7, 0.004 and 0.015 for Muon's 0.025
        groups = [{"params": [self.transformer.wte.weight], "ratio": 28.0},
                  {"params": [self.lm_head.weight], "ratio": 0.16},
                  {"params": [p for p in self.parameters() if p.dim() == 1], "ratio": 0.6}]
        # The recipe sums the loss over tokens; its eps is rescaled for the gradients of the mean.
        eps = 1e-10 / args.total_batch_size
        adamw = make_optimizer(torch.optim.AdamW, groups, zero, lr=args.max_lr, betas=(0.8, 0.95), eps=eps,
                               weight_decay=args.weight_decay / 50, fused=device_type == "cuda")
        return {"adamw": adamw, "muon": muon}

    @staticmethod
    def schedule(it, args):
        """Optional warm-up, constant until 30% of max_steps, then linear decay to min_lr."""
        if it < args.warmup_steps:
            return args.max_lr * (it + 1) / args.warmup_steps
        remaining = min(1.0, (1 - it / args.max_steps) / 0.7)
        return args.min_lr + remaining * (args.max_lr - args.min_lr)


def main(argv=None):
    """train_gpt2.main for ModernGPT."""
    return train_gpt2.main(argv, model_class=ModernGPT)


# -----------------------------------------------------------------------------
# To train your own architecture, copy this file, for example to mine.py.
#
# 1. arch = "mine": the name of the script. Checkpoints record it.
# 2. hidden_states() calls embed, rotary_cos_sin, the blocks and transformer.ln_f; a block maps (B, T, C) to
#    (B, T, C). Use causal_attention for the KV cache and HellaSwag's masks.
# 3. logits() maps hidden states to logits; the loss is their cross-entropy.
# 4. make_optimizers() returns {name: optimizer}. "ratio" in a parameter group multiplies --max_lr.
# 5. `python mine.py` is a smoke run; compare its validation loss with that of the others.

if __name__ == "__main__":
    run_script("modern.py", main)
