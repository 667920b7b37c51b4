"""
The sequel to train_gpt2.py: six years later, the same loss after a sixth of the tokens.

    python modern.py                                      # one GPU, or a smoke run anywhere
    torchrun --standalone --nproc_per_node=8 modern.py    # 8 GPUs

The lecture ends in 2019. This is the tuned Muon baseline of the NanoGPT speedrun's optimization
track (github.com/KellerJordan/modded-nanogpt, records/track_3_optimization): 3.28 on FineWeb's
validation tokens, GPT-2 (124M)'s loss, after 3,250 steps of 524,288 tokens; 1.70B in place of 10B.
That is its authors' figure, not ours. The trainer is train_gpt2.py's: flags, order of the data,
resume, evaluation and files are the same. What is here is another model, with the optimizers and
the schedule that it likes.
"""

import torch
import torch.nn as nn
from torch.nn import functional as F

from plumbing.errors import UserError
from plumbing.machine import describe_muon, make_optimizer
from train_gpt2 import (
    GPT, GPT2_SIZES, SMOKE, attend, head_cross_entropy, main, rotate, soft_cap,
)

RECIPE = dict(max_lr=0.025, min_lr=0.0, warmup_steps=0, max_steps=3250, grad_clip=0.0,
              weight_decay=0.05)
HEADS = {"gpt2": 6, "gpt2-medium": 8, "gpt2-large": 10, "gpt2-xl": 10}  # fewer and wider

CAP = 15.0  # no logit is beyond it


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        # four matrices, not one of three in one: Muon makes each of them orthogonal by itself
        self.c_q, self.c_k, self.c_v, self.c_proj = (nn.Linear(C, C) for _ in range(4))
        self.n_head = config.n_head

    def forward(self, x, rope, mask=None, cache=None):
        B, T, C = x.size()
        q, k, v = (c(x).view(B, T, self.n_head, C // self.n_head)
                   for c in (self.c_q, self.c_k, self.c_v))
        # QK norm (Dehghani et al. 2023, arXiv 2302.05442): no product of q and k can run away
        q, k = (rotate(F.rms_norm(t, (t.size(-1),)), *rope) for t in (q, k))
        # both have length sqrt(hs) now, so the scale is free to be chosen
        return self.c_proj(attend(self, q, k, v, mask, cache, scale=0.12))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        # ReLU squared (So et al. 2021, Primer, arXiv 2109.08668): sparse, and cheaper than GELU
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        # RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467): the mean need not be taken off
        self.ln_1, self.ln_2 = nn.RMSNorm(config.n_embd), nn.RMSNorm(config.n_embd)
        self.attn, self.mlp = Attention(config), MLP(config)

    def forward(self, x, rope, mask=None, cache=None):
        x = x + self.attn(self.ln_1(x), rope, mask, cache)
        return x + self.mlp(self.ln_2(x))


def orthogonalize(G):
    """G (rows, columns) with all its singular values brought to about 1: of U S V^T, U V^T.

    Newton-Schulz: X -> 2 X - 1.5 (X X^T) X + 0.5 (X X^T)^2 X leaves U and V alone and moves every
    singular value in (0, 1] towards 1. Twelve times, in bfloat16: only products, which GPUs like.
    """
    X = G.bfloat16()
    if G.size(0) > G.size(1):
        X = X.mT  # the smaller side makes the smaller products
    X = X / (X.norm() + 1e-7)
    for _ in range(12):
        A = X @ X.mT
        X = 2 * X + (-1.5 * A + 0.5 * A @ A) @ X
    return X.mT if G.size(0) > G.size(1) else X


class Muon(torch.optim.Muon):
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): momentum whose every direction
    is made equally strong. torch's, but each product rounded by itself, as the recipe's are."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state, momentum = self.state[p], group["momentum"]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                average = state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
                update = orthogonalize(p.grad.lerp(average, momentum))  # Nesterov: one step ahead
                update *= max(1, p.size(0) / p.size(1)) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"])


class ModernGPT(GPT):
    arch = "modern"
    presets = {name: size | RECIPE | dict(n_head=HEADS[name]) for name, size in GPT2_SIZES.items()}
    presets["smoke"] = SMOKE | RECIPE | dict(n_layer=3, max_steps=SMOKE["max_steps"], eval_every=50)
    not_flags = ("pos", "mlp", "norm", "optimizer")

    def __init__(self, config):
        nn.Module.__init__(self)  # not GPT's, which would make its own layers
        self.config = config
        C, V = config.n_embd, config.vocab_size
        if C % (4 * config.n_head):
            raise UserError(f"--n_embd {C} / --n_head {config.n_head} is no multiple of 4, which "
                            "turning half of the pairs needs")
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(V, C),
            ln_0=nn.RMSNorm(C),  # behind the embedding: rows of any size come out alike
            h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
            ln_f=nn.RMSNorm(C)))
        # Not tied to the embedding: with rates of their own each learns faster. At 124M these are
        # 39M parameters more: they cost memory but, as the embedding only looks up, no products.
        self.lm_head = nn.Linear(C, V)
        self.apply(self._init_weights)

    def _init_weights(self, module):
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=(0.33 / module.in_features) ** 0.5)
            nn.init.zeros_(module.bias)
        # Whatever adds to the stream starts at zero (Zhang et al. 2019, Fixup, arXiv 1901.09321),
        # and so does the head: the first loss is ln V, and every block begins as the identity.
        if isinstance(module, (Attention, MLP)):
            nn.init.zeros_(module.c_proj.weight)
        if module is self:
            nn.init.zeros_(self.lm_head.weight)

    def embed(self, idx, pos):
        return self.transformer.ln_0(self.transformer.wte(idx))  # positions are RoPE's business

    def rope(self, pos):
        """RoPE on half of the pairs; the others see content alone, at any distance."""
        quarter = self.config.n_embd // self.config.n_head // 4
        freqs = (1 / 1024) ** torch.linspace(0, 1, quarter, device=pos.device)
        freqs = torch.cat([freqs, torch.zeros_like(freqs)])
        angles = (pos[..., None] * freqs).view(-1, pos.size(-1), 1, 2 * quarter)
        return angles.cos(), -angles.sin()  # turned the other way round than train_gpt2.py's

    def logits(self, h):
        # the cap (Gemma 2, arXiv 2408.00118, there with tanh): nothing is ever quite certain
        return soft_cap(self.lm_head(h).float(), CAP)

    def loss(self, h, targets):
        return head_cross_entropy(h, self.lm_head.weight, targets, self.lm_head.bias, CAP)

    def looked_up(self):
        return {"transformer.wte.weight"}

    def make_optimizers(self, cfg, device_type, zero):
        """Muon for the matrices inside the blocks, AdamW for the rest. cfg.max_lr is Muon's rate,
        cfg.weight_decay its decay; the others keep their ratio to it."""
        matrices = [p for p in self.transformer.h.parameters() if p.dim() == 2]
        describe_muon(matrices, steps=12, zero=zero)
        muon = make_optimizer(Muon, matrices, zero, lr=cfg.max_lr, momentum=0.95,
                              weight_decay=cfg.weight_decay)
        # a rate for each kind, as a share of Muon's: 0.7, 0.004 and 0.015 where that is 0.025
        groups = [{"params": [self.transformer.wte.weight], "ratio": 28.0},
                  {"params": [self.lm_head.weight], "ratio": 0.16},
                  {"params": [p for p in self.parameters() if p.dim() == 1], "ratio": 0.6}]
        # the recipe adds up the loss over tokens where we take the mean: its eps for our gradients
        eps = 1e-10 / cfg.total_batch_size
        adamw = make_optimizer(torch.optim.AdamW, groups, zero, lr=cfg.max_lr, betas=(0.8, 0.95),
                               eps=eps, weight_decay=cfg.weight_decay / 50,
                               fused=device_type == "cuda")
        return {"adamw": adamw, "muon": muon}

    def schedule(self, it, cfg):
        """All rates: constant for the first 30% of the steps, then linear to min_lr; no cosine."""
        if it < cfg.warmup_steps:
            return cfg.max_lr * (it + 1) / cfg.warmup_steps
        left = min(1.0, (1 - it / cfg.max_steps) / 0.7)
        return cfg.min_lr + left * (cfg.max_lr - cfg.min_lr)


# -----------------------------------------------------------------------------
# Your own architecture: copy this file, say to mine.py, and change one thing at a time.
#
# 1. arch = "mine": the name of the file. Checkpoints record it, and the other commands refuse them.
# 2. The forward pass is embed, rope, the blocks, transformer.ln_f, logits. A block takes and gives
#    (B, T, C); whoever attends calls attend(), so that the KV cache and HellaSwag's masks work.
# 3. loss(h, targets) is the mean over tokens, and logits(h) must agree with it.
# 4. make_optimizers returns {name: optimizer}; "ratio" in a group is its share of --max_lr.
# 5. python mine.py is a smoke run: compare its validation loss with that of the others.

if __name__ == "__main__":
    main(model_class=ModernGPT)
