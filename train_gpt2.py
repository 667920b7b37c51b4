"""
Reproduce GPT-2 (124M): model, data loader, training loop and evaluation in one file.

    python train_gpt2.py                                      # one GPU; a smoke run on a CPU
    torchrun --standalone --nproc_per_node=8 train_gpt2.py    # 8 GPUs
    python train_gpt2.py --init log/last.pt --eval_only --prompt "The sea"

Based on build-nanogpt, with the same names and hyperparameters. `step` counts completed optimizer updates. A
batch depends only on step, seed and data, so resuming, changing the world size and inspecting batches need no
saved loader state.

Part 1 follows Karpathy's lecture from top to bottom: flags, model, learning rate, data, evaluation, one
optimizer step, the training loop. Part 2 is the machinery around it: distributed setup, checkpoints,
tokenizer, log files, errors and main(). modern.py trains a newer architecture with this trainer.
"""

import argparse
import bisect
import contextlib
import ctypes
import functools
import glob
import hashlib
import itertools
import json
import logging
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import zipfile
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from typing import NamedTuple

# Idle OpenMP threads spin by default, which slows down a machine shared with other processes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
import torch.distributed
import torch.nn as nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

try:
    import hellaswag
except ModuleNotFoundError as e:  # optional: without hellaswag.py that evaluation is off
    if e.name != "hellaswag":
        raise
    hellaswag = None

HERE = os.path.dirname(os.path.abspath(__file__))
SHARDS_DIR = os.path.join(HERE, "edu_fineweb10B")

# =============================================================================
# Part 1: the lecture
# =============================================================================

# -----------------------------------------------------------------------------
# Command-line flags. A flag's group determines whether --resume may change it.

PRESETS = {  # learning rates: GPT-3 paper, table 2.1
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768, max_lr=6e-4),  # 124M parameters
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024, max_lr=3e-4),  # 350M
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280, max_lr=2.5e-4),  # 774M
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600, max_lr=2e-4),  # 1558M
    # Runs on a laptop CPU with bundled text. float32 keeps results comparable across CPUs.
    "smoke": dict(n_layer=4, n_head=4, n_embd=128, block_size=256, T=128, total_batch_size=512, max_lr=1.5e-3,
                  warmup_steps=20, max_steps=100, eval_every=25, val_tokens=4096, hellaswag=0,
                  dtype="float32", data=os.path.join(HERE, "input.txt")),
}


def build_parser(model_class):
    """Build the parser. The "gpt2" preset of model_class overrides the defaults, which are GPT-3's.

    Batches of 0.5M tokens, warm-up over 375M tokens, cosine decay to 10% of the peak, weight decay 0.1 and
    clipping at 1.0. max_steps is 10e9 tokens / 2**19 tokens per step.
    """
    docs = (sys.modules[model_class.__module__].__doc__ or "").strip().split("\n\n")  # None under python -OO
    parser = FlagParser("\n\n".join(docs[:2]), model_class.presets["gpt2"], model_class.unsupported_flags)
    on_off = argparse.BooleanOptionalAction

    add = parser.add_group("command", "for this call only, not restored by --resume")
    add("preset", str, "auto", "model size and learning rate; auto: smoke on a CPU; on a GPU gpt2 with "
        "shards, --data, --resume or several ranks, else smoke", choices=("auto", *model_class.presets))
    add("init", user_path, "scratch", "initial weights: scratch, gpt2, gpt2-medium, gpt2-large, gpt2-xl "
        "(Hugging Face), or the path of a checkpoint")
    add("device", str, "auto", "cuda, cuda:1, mps or cpu; auto: the first of cuda, mps and cpu")
    log_dir = "log" if model_class.arch == "gpt2" else f"log_{model_class.arch}"
    add("log_dir", user_path, log_dir, "directory for log, checkpoints and curves")
    add("resume", None, False, "resume from the latest valid checkpoint in --log_dir; start fresh if there "
        "is none", action="store_true")
    add("eval_only", None, False, "evaluate the weights of --init or --resume, print samples, then exit",
        action="store_true")
    add("export_hf", user_path, None, "export the weights to this directory in Hugging Face format, then "
        "exit", metavar="DIR")
    add("inspect", nonnegative_int, None, "print the shards, offsets and text of this step, then exit",
        metavar="STEP")

    add = parser.add_group("model", "fixed by the checkpoint on --resume")
    add("n_layer", positive_int, 12, "number of transformer blocks")
    add("n_head", positive_int, 12, "attention heads per block; must divide n_embd")
    add("n_embd", positive_int, 768, "width of the residual stream")
    add("block_size", positive_int, 1024, "maximum context length in tokens")
    add("vocab_size", positive_int, 50304, "vocabulary size, 50257 padded to a multiple of 128")
    add("pos", str, "learned", "position encoding", choices=("learned", "rope"))
    add("mlp", str, "gelu", "MLP activation", choices=("gelu", "swiglu"))
    add("norm", str, "layernorm", "normalization layer", choices=("layernorm", "rmsnorm"))

    add = parser.add_group("data order", "fixed by the checkpoint on --resume")
    add("T", positive_int, 1024, "sequence length in tokens, at most block_size")
    add("total_batch_size", positive_int, 524288, "tokens per optimizer step over all ranks")
    add("shuffle", str, "none", "order of the training windows; windows: a new permutation per epoch",
        choices=("none", "windows"))
    add("seed", nonnegative_int, 1337, "seed of the initial weights and of --shuffle")

    add = parser.add_group("optimization", "may change on --resume; changes are printed")
    add("max_steps", positive_int, 19073, "number of optimizer steps")
    add("max_lr", positive_float, 6e-4, "peak learning rate")
    add("min_lr", nonnegative_float, None, "final learning rate", shown="max_lr / 10")
    add("warmup_steps", nonnegative_int, 715, "steps of linear learning rate warm-up")
    add("weight_decay", nonnegative_float, 0.1, "weight decay of matrices and embeddings")
    add("grad_clip", nonnegative_float, 1.0, "max gradient norm (0 = no clipping)")
    add("dtype", str, "auto", "autocast dtype; auto: bfloat16 on CUDA GPUs that have it, float16 on older "
        "ones, float32 elsewhere", choices=("auto", "bfloat16", "float16", "float32"))

    add = parser.add_group("machine", "may change on --resume")
    add("B", nonnegative_int, 0, "micro-batch size per rank, in sequences; 0 = largest power of two up to 64 "
        "that fits (CUDA), up to 4 elsewhere")
    add("compile", None, None, "compile the model with torch.compile", shown="on for CUDA", action=on_off)
    add("zero", None, False, "shard the optimizer state over the ranks (ZeRO stage 1)", action=on_off)

    add = parser.add_group("evaluation", "may change on --resume")
    add("eval_every", nonnegative_int, 250, "evaluation interval in steps, plus step 0 and the end (0 = off)")
    add("val_tokens", nonnegative_int, 10485760, "validation tokens per evaluation (0 = off; 65536 on a CPU)")
    add("hellaswag", nonnegative_int, 10042, "HellaSwag examples per evaluation (0 = off; 0 on a CPU)")
    add("prompt", str, "Hello, I'm a language model,", "prompt of the samples (- = stdin)",
        metavar="TEXT")
    add("num_samples", nonnegative_int, 4, "samples per evaluation (0 = off)")
    add("sample_length", positive_int, None, "tokens per sample, prompt included",
        shown="32; 128 for byte tokens")
    add("top_k", nonnegative_int, 50, "sample from the k most likely tokens (0 = all)")
    add("temperature", nonnegative_float, 1.0, "sampling temperature (0 = greedy)")

    add = parser.add_group("files", "paths may change on --resume; the training data must be identical")
    add("data", user_path, None, "directory of token shards, or a UTF-8 text file",
        shown="edu_fineweb10B next to this script; smoke: input.txt")
    add("save_every", nonnegative_int, 1000, "interval of last.pt in steps (0 = only at the end)")
    add("checkpoint_every", nonnegative_int, 5000, "interval of the permanent model_{step:05d}.pt in steps "
        "(0 = only at the end)")
    add("wandb", str, None, "also log to this Weights & Biases project", shown="off", metavar="PROJECT")
    return parser


# -----------------------------------------------------------------------------
# Model: GPT-2 (Radford et al. 2019); --pos, --mlp and --norm select later variants


@dataclass
class GPTConfig:
    """Model hyperparameters."""

    block_size: int = 1024  # maximum context length
    # 50,000 BPE merges + 256 bytes + <|endoftext|>. Training pads it to 50304, a multiple of 128, for faster
    # matmuls. The extra ids never occur as targets, so their logits are pushed down.
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    pos: str = "learned"
    mlp: str = "gelu"
    norm: str = "layernorm"


def make_norm(config):
    """The normalization layer of --norm over the channel dimension C."""
    return (nn.LayerNorm if config.norm == "layernorm" else nn.RMSNorm)(config.n_embd, eps=1e-5)


def apply_rotary_emb(x, cos, sin):
    """Rotate the channel pairs (i, i + hs/2) of x (B, T, nh, hs) by position-dependent angles.

    RoPE (Su et al. 2021, arXiv 2104.09864). The rotation angle is proportional to position, so q.k depends
    only on the relative position. Computed in float32, returned in the dtype of x.
    """
    x1, x2 = x.float().chunk(2, dim=-1)
    y1, y2 = x1 * cos - x2 * sin, x2 * cos + x1 * sin
    return torch.cat([y1.to(x.dtype), y2.to(x.dtype)], dim=-1)


def causal_attention(layer, q, k, v, mask=None, kv_cache=None, scale=None):
    """Scaled dot-product attention: q, k, v (B, T, nh, hs) -> (B, T, nh * hs).

    mask: bool (B, 1, T, T), True = attend; None = causal. scale: None = 1/sqrt(hs), which keeps the variance
    of q.k near 1, so that the softmax does not saturate. kv_cache: dict of the past keys and values of each
    `layer`, for generation; after the prompt, tokens must come one at a time.
    """
    B, T, n_head, head_size = q.size()
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, nh, T, hs)
    if kv_cache is not None:
        end = kv_cache["length"] + T
        if layer not in kv_cache:
            kv_cache[layer] = q.new_empty(2, B, n_head, kv_cache["size"], head_size)
        kv_cache[layer][:, :, :, end - T:end] = torch.stack((k, v))
        k, v = kv_cache[layer][:, :, :, :end]
    is_causal = mask is None and T == k.size(2)  # a single new token attends to the whole cache
    # FlashAttention kernels (Dao et al. 2022, arXiv 2205.14135) never materialize the (T, T) attention
    # matrix. Reading and writing it would take longer than the matmuls.
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale)
    return y.transpose(1, 2).contiguous().view(B, T, n_head * head_size)


class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention: each token attends to itself and to earlier tokens."""

    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # q, k and v projections in one matmul
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)  # output projection
        self.c_proj.is_residual_projection = True
        self.n_head = config.n_head

    def forward(self, x, rope=None, mask=None, kv_cache=None):
        B, T, C = x.size()
        q, k, v = (t.view(B, T, self.n_head, C // self.n_head) for t in self.c_attn(x).split(C, dim=2))
        if rope is not None:
            q, k = apply_rotary_emb(q, *rope), apply_rotary_emb(k, *rope)
        return self.c_proj(causal_attention(self, q, k, v, mask, kv_cache))


class MLP(nn.Module):
    """Position-wise MLP: 4x wide with GELU as in GPT-2, or SwiGLU (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.is_gated = config.mlp == "swiglu"
        # SwiGLU has three matrices instead of two: 8/3 C wide it has as many parameters as GELU with 4 C. The
        # width is rounded up to a multiple of 256 for fast matmuls.
        hidden_size = 256 * math.ceil(8 * C / 3 / 256) if self.is_gated else 4 * C
        self.c_fc = nn.Linear(C, 2 * hidden_size if self.is_gated else hidden_size)
        self.c_proj = nn.Linear(hidden_size, C)
        self.c_proj.is_residual_projection = True

    def forward(self, x):
        x = self.c_fc(x)
        if self.is_gated:
            gate, x = x.chunk(2, dim=-1)
            return self.c_proj(F.silu(gate) * x)
        return self.c_proj(F.gelu(x, approximate="tanh"))  # GPT-2 was trained with the tanh approximation


class Block(nn.Module):
    """Pre-norm transformer block: attention, then MLP, each added to the residual stream."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = make_norm(config)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x, rope=None, mask=None, kv_cache=None):
        # Pre-norm: between the embeddings and ln_f the residual stream passes through additions only. Each
        # block receives the gradient directly, not only through the blocks after it.
        x = x + self.attn(self.ln_1(x), rope, mask, kv_cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2. Another architecture is a subclass that is passed to main(model_class=...), as in modern.py."""

    arch = "gpt2"  # recorded in checkpoints
    presets = PRESETS  # {name: flags}; "gpt2" holds the defaults
    unsupported_flags = ()
    lookup_only_params = ("transformer.wpe.weight",)  # embeddings without matmul; wte is also the output head

    def __init__(self, config):
        super().__init__()
        self.config = config
        if config.n_embd % (config.n_head * (2 if config.pos == "rope" else 1)):
            raise UserError(f"--n_embd {config.n_embd} is not divisible by --n_head {config.n_head}, or for "
                            "--pos rope by 2 * n_head")
        self.transformer = nn.ModuleDict(dict(wte=nn.Embedding(config.vocab_size, config.n_embd)))
        if config.pos == "learned":  # attention itself does not depend on the order of the earlier tokens
            self.transformer.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.transformer.h = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.transformer.ln_f = make_norm(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        # Weight tying (Press and Wolf 2017, arXiv 1608.05859): tokens of similar meaning should have similar
        # embeddings and similar logits, so one matrix serves both. Saves 39M of 163M parameters.
        self.transformer.wte.weight = self.lm_head.weight
        self.apply(self._init_weights)

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            std = 0.02  # OpenAI's value, close to 1/sqrt(n_embd)
            if getattr(module, "is_residual_projection", False):
                # The residual stream sums the outputs of 2 * n_layer layers, and their variances add up.
                # Scaling their std by 1/sqrt(2 * n_layer) keeps the variance independent of depth.
                std *= (2 * self.config.n_layer) ** -0.5
            torch.nn.init.normal_(module.weight, mean=0.0, std=std)
            if getattr(module, "bias", None) is not None:
                torch.nn.init.zeros_(module.bias)

    def forward(self, idx, targets=None):
        """Token ids (B, T) -> (logits (B, T, V), None); with targets (B, T) -> (None, mean loss).

        With targets no logits are returned, so that a compiled step need not materialize them.
        """
        logits = self.logits(self.hidden_states(idx))
        if targets is None:
            return logits, None
        # Softmax and log in float32: in bfloat16 a log-probability near -10 is rounded to multiples of 1/16.
        return None, F.cross_entropy(logits.view(-1, logits.size(-1)).float(), targets.reshape(-1))

    def hidden_states(self, idx, pos=None, mask=None, kv_cache=None):
        """Map token ids (B, T) to the final hidden states (B, T, C), the input of the output head.

        pos: token positions, (T,) or (B, T); default 0..T-1, after the cached tokens. mask: see
        causal_attention. kv_cache: {"length": 0, "size": max tokens}, filled during generation.
        """
        if pos is None:
            start = kv_cache["length"] if kv_cache is not None else 0
            end, block_size = start + idx.size(1), self.config.block_size
            assert end <= block_size, f"sequence of {end} tokens exceeds block_size {block_size}"
            pos = torch.arange(start, end, device=idx.device)
        x, rope = self.embed(idx, pos), self.rotary_cos_sin(pos)
        for block in self.transformer.h:
            x = block(x, rope, mask, kv_cache)
        if kv_cache is not None:
            kv_cache["length"] += idx.size(1)
        return self.transformer.ln_f(x)

    def embed(self, idx, pos):
        """Embed token ids (B, T) at positions (T,) or (B, T) as (B, T, C)."""
        x = self.transformer.wte(idx)
        return x + self.transformer.wpe(pos) if self.config.pos == "learned" else x

    def rotary_cos_sin(self, pos):
        """cos and sin of the RoPE angles, (1 or B, T, 1, hs/2) each; None for learned positions."""
        if self.config.pos == "learned":
            return None
        half = self.config.n_embd // self.config.n_head // 2
        freqs = 10000.0 ** (-torch.arange(half, device=pos.device) / half)
        angles = (pos[..., None] * freqs).view(-1, pos.size(-1), 1, half)
        return angles.cos(), angles.sin()

    def logits(self, x):
        """Map hidden states (..., C) to logits (..., V)."""
        return apply_head(self.lm_head, x)

    @torch.no_grad()
    def generate(self, idx, n_new, temperature=1.0, top_k=50, n_vocab=50257, generator=None, use_cache=True):
        """Yield n_new sampled tokens (B, 1), one after the other, that continue the prompt idx (B, T).

        Only ids below n_vocab are sampled. temperature 0 is greedy; top_k 0 samples from all tokens. Beyond
        block_size the context is cropped on the left. All positions then shift, so the KV cache is not used.
        """
        block_size, n_vocab = self.config.block_size, min(n_vocab, self.config.vocab_size)
        # A token never attends to later tokens, so its keys and values never change and can be cached.
        kv_cache = {"length": 0, "size": min(idx.size(1) + n_new, block_size)} if use_cache else None
        for _ in range(n_new):
            if kv_cache is not None and idx.size(1) <= block_size:
                x = self.hidden_states(idx[:, kv_cache["length"]:], kv_cache=kv_cache)
            else:
                x = self.hidden_states(idx[:, -block_size:])
            logits = self.logits(x[:, -1])[:, :n_vocab].float()  # without the padded vocabulary
            if temperature < 1e-6:
                next_id = logits.argmax(dim=-1, keepdim=True)
            else:
                # Each tail token is unlikely, but one of them is likely to be sampled, and it derails the
                # text: keep the top k.
                probs = F.softmax(logits / temperature, dim=-1)
                topk_probs, topk_indices = torch.topk(probs, min(top_k or n_vocab, n_vocab))
                sampled = torch.multinomial(topk_probs, 1, generator=generator)
                next_id = torch.gather(topk_indices, -1, sampled)
            idx = torch.cat((idx, next_id), dim=1)
            yield next_id

    def flops_per_token(self, T):
        """Training FLOPs per token: 6N + 12 * n_layer * C * T (PaLM, arXiv 2204.02311, appendix B).

        N counts all parameters but lookup-only embeddings: 2 FLOPs each in the forward pass, 4 in the
        backward pass. The attention term counts the full (T, T) matrix, as in the paper.
        """
        N = sum(p.numel() for name, p in self.named_parameters() if name not in self.lookup_only_params)
        return 6 * N + 12 * self.config.n_layer * self.config.n_embd * T

    @classmethod
    def from_pretrained(cls, model_type):
        """Load a model in eval mode by Hugging Face name (gpt2, ...) or checkpoint path. Raises UserError."""
        return cls.from_checkpoint(load_weights(model_type)).eval()

    @classmethod
    def check_arch(cls, ckpt):
        """Raise UserError if a loaded checkpoint belongs to another script."""
        arch = ckpt.get("arch", "gpt2")
        if arch != cls.arch:
            script = "train_gpt2.py" if arch == "gpt2" else f"{arch}.py"
            raise UserError(f"{ckpt['path']} has the architecture {arch}, not {cls.arch}; use {script}")

    @classmethod
    def from_checkpoint(cls, ckpt):
        """Build the model of a loaded checkpoint. Raises UserError."""
        cls.check_arch(ckpt)
        try:
            model = cls(GPTConfig(**ckpt["config"]))
            model.load_state_dict(ckpt["model"])
        except (RuntimeError, TypeError, AttributeError) as e:
            raise UserError(f"{ckpt['path']}: the weights do not match the config ({one_line(e)})") from None
        return model

    def configure_optimizers(self, weight_decay, learning_rate, device_type, zero=False):
        """Build AdamW with weight decay on matrices and embeddings only. zero: use ZeRO stage 1."""
        # Decay pulls weights towards 0, which regularizes the matrices; they hold nearly all parameters. Norm
        # gains start at 1 and, like biases, are few: decay would only remove scale and offset.
        params = [p for p in self.parameters() if p.requires_grad]
        decay_params = [p for p in params if p.dim() >= 2]
        nodecay_params = [p for p in params if p.dim() < 2]
        for kind, group in (("decayed", decay_params), ("non-decayed", nodecay_params)):
            n = sum(p.numel() for p in group)
            print0(f"num {kind} parameter tensors: {len(group)}, with {n:,} parameters")
        param_groups = [{"params": decay_params, "weight_decay": weight_decay},
                        {"params": nodecay_params, "weight_decay": 0.0}]
        # The fused kernel does the whole update of many tensors in one launch. The default launches one
        # kernel per arithmetic operation and moves the state through memory each time.
        use_fused = device_type in ("cuda", "cpu", "mps")  # where torch has the kernel
        print0(f"using fused AdamW: {use_fused}")
        return make_optimizer(torch.optim.AdamW, param_groups, zero, lr=learning_rate, betas=(0.9, 0.95),
                              eps=1e-8, fused=use_fused)

    def make_optimizers(self, args, device_type, zero):
        """Build {name: optimizer}. "ratio" in a parameter group multiplies the scheduled learning rate."""
        return {"adamw": self.configure_optimizers(args.weight_decay, args.max_lr, device_type, zero)}

    @staticmethod
    def schedule(it, args):
        """Learning rate of update `it`."""
        return get_lr(it, args.max_lr, args.min_lr, args.warmup_steps, args.max_steps)


# -----------------------------------------------------------------------------
# Learning rate schedule


def get_lr(it, max_lr=6e-4, min_lr=6e-5, warmup_steps=715, max_steps=19073):
    """Learning rate of update `it`: linear warm-up, then cosine decay to min_lr at max_steps."""
    # During the first steps Adam's second moments are estimated from few gradients, so its updates are
    # unreliable: keep them small. it + 1, because a step with learning rate 0 would be wasted.
    if it < warmup_steps:
        return max_lr * (it + 1) / warmup_steps
    if it >= max_steps:
        return min_lr
    # Large steps while the loss falls fast; small steps at the end, where gradient noise dominates.
    decay_ratio = (it - warmup_steps) / (max_steps - warmup_steps)
    coeff = 0.5 * (1.0 + math.cos(math.pi * decay_ratio))  # from 1 to 0
    return min_lr + coeff * (max_lr - min_lr)


# -----------------------------------------------------------------------------
# Data: token shards as one stream; the batch of a step is a pure function of the step


class Shard(NamedTuple):
    """uint16 tokens in a file, starting at byte `offset`, or in an array."""

    name: str
    count: int
    path: str | None = None
    offset: int = 0
    array: np.ndarray | None = None

    def read(self, start, count):
        """Tokens [start, start + count). Raises OSError."""
        if self.array is not None:
            return self.array[start:start + count]
        tokens = np.fromfile(self.path, "<u2", count, offset=self.offset + 2 * start)
        if len(tokens) < count:
            raise OSError(f"{self.path} was truncated: it had {self.count:,} tokens when the run started")
        return tokens


class TokenStream:
    """The concatenated shards of a split, read by position.

    Uses np.fromfile, not a memory map: mapped pages count as resident memory, so each rank would appear to
    hold the whole data set.
    """

    def __init__(self, shards, identity=None):
        """identity: of the data, independent of its path; default: from the shards' names and counts."""
        self.shards, self.names, self.counts = shards, [s.name for s in shards], [s.count for s in shards]
        self.starts = [0, *itertools.accumulate(self.counts)]
        self.identity = identity or data_identity({"shards": zip(self.names, self.counts, strict=True)})

    def __len__(self):
        return self.starts[-1]

    def locate(self, position):
        """(shard index, offset in tokens) of a position in the stream."""
        i = bisect.bisect_right(self.starts, position) - 1
        return i, position - self.starts[i]

    def read(self, start, count):
        """Tokens [start, start + count) as uint16 (count,). Raises OSError."""
        parts = []
        while count > 0:
            i, offset = self.locate(start)
            n = min(count, self.counts[i] - offset)
            parts.append(self.shards[i].read(offset, n))
            start, count = start + n, count - n
        return np.concatenate(parts)


@functools.lru_cache(maxsize=2)  # a step may span two epochs
def window_permutation(n_windows, seed, epoch):
    """The order of the windows in an epoch of --shuffle windows, uint32 (n_windows,)."""
    order = np.arange(n_windows, dtype=np.uint32)
    # RandomState guarantees the same stream in every numpy version; default_rng does not.
    np.random.RandomState([seed % 2**32, seed >> 32, epoch]).shuffle(order)
    return order


class DataLoaderLite:
    """Batches of input and target tokens.

    Window w is tokens [w*T, w*T + T + 1) of the stream: the first T are inputs, the last T targets. It may
    straddle shards. Step s reads the global sequences s*R .. s*R + R-1, where R = sequences_per_step.
    Sequence g is window order[g mod n_windows] of epoch g // n_windows, so each window is read once per
    epoch. Within a step, sequence (m*W + k)*B + b belongs to micro-step m, rank k of W and batch index b. So
    a step reads the same tokens for any B and world size.

    shuffle: "none", or "windows" for one permutation per epoch, the same on all ranks, drawn from (seed,
    epoch). Raises UserError if the stream is shorter than one window.
    """

    def __init__(self, B, T, process_rank, num_processes, tokens, sequences_per_step=None, shuffle="none",
                 seed=1337, vocab_size=65536):
        self.B, self.T, self.tokens = B, T, tokens
        self.process_rank, self.num_processes = process_rank, num_processes
        self.sequences_per_step = sequences_per_step or B * num_processes
        self.grad_accum_steps = self.sequences_per_step // (B * num_processes)
        self.shuffle, self.seed, self.vocab_size = shuffle, seed, vocab_size
        self.n_windows = (len(tokens) - 1) // T  # the last input needs a target
        if self.n_windows < 1:
            raise UserError(f"{', '.join(tokens.names[:3])}: a split of {len(tokens):,} tokens is shorter "
                            f"than one window of T + 1 = {T + 1}; use a smaller --T, or more data (the val "
                            "split of a text is its last tenth; --val_tokens 0 turns validation off)")
        self.reset()

    def reset(self, step=0):
        """Make the first batch of `step` the next one."""
        self.next_micro_step = step * self.grad_accum_steps

    def next_batch(self):
        """Inputs and targets (B, T), int64 on the CPU, of this rank's next micro-step. Raises as read()."""
        step, micro_step = divmod(self.next_micro_step, self.grad_accum_steps)
        self.next_micro_step += 1
        first = step * self.sequences_per_step
        first += (micro_step * self.num_processes + self.process_rank) * self.B
        return self.read(self.windows_of(np.arange(first, first + self.B)))

    def windows_of(self, sequences):
        """Window numbers of global sequence numbers, both int64 arrays."""
        epochs, windows = np.divmod(sequences, self.n_windows)
        if self.shuffle == "windows":
            for epoch in np.unique(epochs):
                mask = epochs == epoch
                windows[mask] = window_permutation(self.n_windows, self.seed, int(epoch))[windows[mask]]
        return windows

    def read(self, windows):
        """Inputs and targets (len(windows), T) of these windows. Raises OSError, UserError."""
        batch = np.empty((2, len(windows), self.T), dtype=np.int64)
        run_starts = np.flatnonzero(np.diff(windows, prepend=-2) != 1)  # of consecutive windows
        for i, j in itertools.pairwise([*run_starts, len(windows)]):
            position = int(windows[i]) * self.T
            ids = self.tokens.read(position, int(j - i) * self.T + 1)
            if ids.max() >= self.vocab_size:
                shard, offset = self.tokens.locate(position + int(ids.argmax()))
                raise UserError(f"{self.tokens.names[shard]} has token {ids.max()} at offset {offset}, "
                                f"outside --vocab_size {self.vocab_size}; use a larger --vocab_size, or "
                                "shards of GPT-2 tokens")
            batch[0, i:j], batch[1, i:j] = ids[:-1].reshape(-1, self.T), ids[1:].reshape(-1, self.T)
        return torch.from_numpy(batch).unbind()

    def locate(self, step):
        """Yield (sequence in the step, epoch, window, shard index, offset) for all sequences of a step."""
        first = step * self.sequences_per_step
        sequences = np.arange(first, first + self.sequences_per_step)
        for sequence, window in zip(sequences.tolist(), self.windows_of(sequences).tolist(), strict=True):
            yield (sequence - first, sequence // self.n_windows, window, *self.tokens.locate(window * self.T))


# -----------------------------------------------------------------------------
# Evaluation. The compiled model only sees full training-size batches, so it is never recompiled for another
# shape. Everything else runs on the raw module.


def autocast(args, device):
    """Run matmuls in --dtype.

    bfloat16 matmuls are several times faster on tensor cores. Its range is that of float32, so gradients need
    no scaling. Its 2 to 3 significant digits are enough for activations but would round away small weight
    updates, so weights and optimizer state stay float32.
    """
    dtype = getattr(torch, args.dtype)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


@dataclass
class Evaluator:
    """The enabled evaluations: validation loss, HellaSwag, samples. Each prints and returns its result."""

    args: argparse.Namespace
    dist: "Dist"
    raw_model: GPT
    model: nn.Module  # raw_model wrapped in DDP and torch.compile, for full batches
    loader: DataLoaderLite | None  # of the val split
    examples: list  # of HellaSwag, [] = off
    prompt: list  # token ids, [] = no samples (rank 0 only)
    tokenizer: object
    stop: "StopSignal"

    def __post_init__(self):
        if self.loader:
            self.loader.read(np.arange(1))  # fail before training if the val split is unreadable

    @contextlib.contextmanager
    def evaluation_mode(self):
        """Run in eval mode, without gradients, with autocast and without cuDNN attention."""
        self.raw_model.eval()  # Trainer.update() turns training mode on again
        # On Hopper, cuDNN attention takes seconds to plan for each new shape.
        backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        with torch.no_grad(), autocast(self.args, self.dist.device), sdpa_kernel(backends):
            yield

    def validate(self):
        """Mean loss over the first val_tokens of the split; None if off.

        It does not depend on B or world size: the ranks share the windows, and the mean is over tokens.
        """
        loader, dist = self.loader, self.dist
        if not loader:
            return None
        n_windows = min(max(1, self.args.val_tokens // loader.T), loader.n_windows)
        total = torch.zeros((), device=dist.device)
        for start in range(0, n_windows, loader.B * dist.world_size):
            first = start + dist.rank * loader.B
            windows = np.arange(first, min(first + loader.B, n_windows))
            try:
                if len(windows):
                    x, y = (t.to(dist.device) for t in loader.read(windows))
                    model = self.model if len(windows) == loader.B else self.raw_model
                    with self.evaluation_mode():
                        total += model(x, y)[1] * len(windows)
            except (OSError, UserError) as e:  # UserError: a token outside the vocabulary
                self.stop.data_error = e
            self.stop.check()
        val_loss = dist.all_reduce_sum([total.item()])[0] / n_windows
        print0(f"validation loss: {val_loss:.4f}")
        return val_loss

    def score_hellaswag(self):
        """HellaSwag accuracy (acc_norm: the lowest mean token loss wins); None if off."""
        if not self.examples:
            return None
        dist = self.dist
        with self.evaluation_mode():
            if self.args.eval_only and dist.master_process:
                hellaswag.show_examples(self.raw_model, self.examples, dist.device, self.tokenizer.decode)
            result = hellaswag.evaluate(
                self.raw_model, self.examples, dist.device, dist.rank, dist.world_size,
                on_batch_end=self.stop.check, progress=dist.master_process)
        correct, correct_norm, total, cropped = dist.all_reduce_sum(result)
        print0(f"HellaSwag accuracy: {correct_norm}/{total}={correct_norm / total:.4f}")
        if self.args.eval_only:
            print0(f"{cropped} examples cropped to block_size {self.raw_model.config.block_size}")
            print0("\n".join(hellaswag.score_lines(correct, correct_norm, total)))
        return correct_norm / total

    def sample(self):
        """Sample num_samples texts with seed 42; return them, prompt included; [] if off."""
        if not self.prompt:
            return []
        args, device = self.args, self.dist.device
        idx = torch.tensor(self.prompt, device=device).repeat(args.num_samples, 1)
        generator = torch.Generator(device=device).manual_seed(42)
        n_new = args.sample_length - idx.size(1)
        with self.evaluation_mode():
            new = self.raw_model.generate(idx, n_new, args.temperature, args.top_k, self.tokenizer.n_vocab,
                                      generator)
            idx = torch.cat([idx, *new], dim=1)
        texts = [self.tokenizer.decode(ids) for ids in idx.tolist()]
        for i, text in enumerate(texts):
            print0(f"rank 0 sample {i}: {text}")
        return texts


# -----------------------------------------------------------------------------
# One optimizer step


class Trainer:
    """Training state: model, optimizers, step, and the prefetched micro-batch.

    raw_model: the unwrapped module, with the weights of resume_ckpt if there is one. model: raw_model wrapped
    in DDP and torch.compile. run_metadata: config, flags etc. that every checkpoint records. resume_ckpt:
    checkpoint whose optimizer state is restored, or None.
    """

    def __init__(self, args, dist, raw_model, model, loader, stop, run_metadata, resume_ckpt=None):
        self.args, self.dist, self.stop, self.run_metadata = args, dist, stop, run_metadata
        self.raw_model, self.model, self.loader = raw_model, model, loader
        self.step = 0  # completed updates
        self.val_loss = None  # at this step
        self.optimizers = raw_model.make_optimizers(args, dist.device.type, args.zero and dist.world_size > 1)
        # float16's smallest positive value is 6e-8; smaller gradients become 0. The scaler multiplies the
        # loss, and thereby the gradients, by a large factor and divides it out before clipping.
        self.scaler = torch.amp.GradScaler(dist.device.type, enabled=args.dtype == "float16")
        if resume_ckpt:
            for name, state in resume_ckpt.pop("optimizer").items():  # pop: free the memory
                load_optimizer_state(self.optimizers[name], state)
            if resume_ckpt["scaler"]:
                self.scaler.load_state_dict(resume_ckpt["scaler"])
            torch.set_rng_state(resume_ckpt.pop("rng"))
            self.step = resume_ckpt["step"]
        loader.reset(self.step)
        self.fetch_batch()
        if stop.data_error:
            raise stop.data_error

    def fetch_batch(self):
        """Read the next micro-batch and start its copy while the device computes.

        If reading fails, keep the old batch and set stop.data_error: all ranks then discard this update.
        """
        device, is_cuda = self.dist.device, self.dist.device.type == "cuda"
        try:
            batch = self.loader.next_batch()
            # non_blocking needs pinned memory; from pageable memory it is unsafe on MPS (pytorch#189690).
            self.batch = [(t.pin_memory() if is_cuda else t).to(device, non_blocking=is_cuda) for t in batch]
        except (OSError, UserError) as e:  # UserError: a token outside the vocabulary
            self.stop.data_error = e

    def update(self, lr):
        """Do one optimizer step on total_batch_size tokens; return (loss, gradient norm before clipping).

        The loss is the mean over micro-steps and ranks. Raises RunError before a non-finite loss or gradient
        reaches the weights, and TrainingInterrupted if any rank could not read its data.
        """
        args, device, grad_accum_steps = self.args, self.dist.device, self.loader.grad_accum_steps
        self.raw_model.train()
        loss_accum = torch.zeros((), device=device)
        for micro_step in range(grad_accum_steps):
            x, y = self.batch  # prefetched during the previous micro-step
            # DDP averages gradients over the ranks during backward(). Gradients accumulate, so only the last
            # micro-step needs that. DDP decides in its forward: no_sync() must cover forward and backward.
            skip_sync = self.dist.world_size > 1 and micro_step < grad_accum_steps - 1
            with self.model.no_sync() if skip_sync else contextlib.nullcontext():
                with autocast(args, device):
                    _, loss = self.model(x, y)
                # cross_entropy averages over B*T tokens, and backward() sums over micro-steps. Dividing by
                # grad_accum_steps gives the gradient of the mean over the whole batch.
                loss = loss / grad_accum_steps
                self.scaler.scale(loss).backward()
            loss_accum += loss.detach()
            self.fetch_batch()
        loss, norm = self.clip_and_all_reduce(loss_accum)
        self.check_finite(loss, norm)
        for optimizer in self.optimizers.values():
            for param_group in optimizer.param_groups:
                param_group["lr"] = lr * param_group.get("ratio", 1.0)
            if math.isfinite(norm):  # after a float16 overflow no optimizer may step
                self.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()
        self.step, self.val_loss = self.step + 1, None
        return loss, norm

    def clip_and_all_reduce(self, loss_accum):
        """Clip the gradients; return (mean loss over ranks, norm before clipping) as floats."""
        for optimizer in self.optimizers.values():
            self.scaler.unscale_(optimizer)
        # Clip so that one outlier batch cannot dominate the optimizer's moment estimates. A rising norm is an
        # early sign of instability.
        norm = nn.utils.clip_grad_norm_(self.raw_model.parameters(), self.args.grad_clip or math.inf)
        # Piggyback the stop flags on the loss all-reduce so that all ranks stop after the same step.
        flags = (torch.full_like(loss_accum, flag) for flag in self.stop.local_flags())
        shared = torch.stack([loss_accum, *flags])
        if self.dist.world_size > 1:
            torch.distributed.all_reduce(shared)
        # .tolist() is the only host-device synchronization of the step (float16's scaler adds one).
        loss, signals, data_errors, norm = torch.stack([*shared, norm]).tolist()
        if data_errors:  # a batch of this step or of the next could not be read: discard this update
            raise TrainingInterrupted
        self.stop.any_signal = signals > 0
        return loss / self.dist.world_size, norm

    def check_finite(self, loss, norm):
        """Raise RunError for a non-finite loss or norm, unless the float16 scaler can recover."""
        if math.isfinite(loss) and (math.isfinite(norm) or self.scaler.get_scale() > 1):
            return  # finite, or a float16 overflow: update() skips the step, the scaler halves its scale
        what = f"gradient norm ({norm})" if math.isfinite(loss) else f"loss ({loss})"
        *_, shard, offset = next(self.loader.locate(self.step))
        raise RunError(f"step {self.step}: non-finite {what}. Weights not updated; the last checkpoint in "
                       f"{self.args.log_dir} is intact. Batch: {self.loader.tokens.names[shard]} offset "
                       f"{offset} and later; show its text with --inspect {self.step}")

    def save(self, permanent=False, final=False):
        """Save the training state with save_checkpoint(). All ranks must call it."""
        optimizers = {name: full_optimizer_state(o, self.dist) for name, o in self.optimizers.items()}
        if self.dist.master_process:
            state = self.run_metadata | dict(
                model=self.raw_model.state_dict(), optimizer=optimizers, scaler=self.scaler.state_dict(),
                step=self.step, val_loss=self.val_loss, rng=torch.get_rng_state(),
                finished=final and permanent)
            save_checkpoint(state, self.args.log_dir, permanent, final)


# -----------------------------------------------------------------------------
# Training loop


def train(trainer, evaluator, run_log):
    """Evaluate and save when due, then do one update, until max_steps updates are done.

    The last iteration only evaluates and saves the final weights. A run resumed at step s repeats the
    evaluation and the save that are due at s. run_log: RunLog on rank 0, None elsewhere. Raises RunError, and
    TrainingInterrupted on all ranks together.
    """
    args = trainer.args
    while True:
        step, last_step = trainer.step, trainer.step >= args.max_steps

        # once in a while: validation loss, HellaSwag, samples
        if is_due(step, args.eval_every, args):
            trainer.val_loss = evaluator.validate()
            hella_acc = evaluator.score_hellaswag()
            if run_log:
                run_log.log(step, val=trainer.val_loss, hella=hella_acc)
                if step > 0:  # the untrained model writes noise
                    run_log.log_samples(step, evaluator.sample())
                    run_log.draw_curves()

        # once in a while: checkpoint
        permanent = last_step or is_due(step, args.checkpoint_every, args)
        if step > 0 and (permanent or is_due(step, args.save_every, args)):
            trainer.save(permanent, final=last_step)
        if last_step:
            return

        # one optimizer step; dt excludes evaluation and saving. The optimizer kernels are launched after the
        # step's only synchronization, so their time counts toward the next step: averages are accurate.
        t0 = time.perf_counter()
        lr = trainer.raw_model.schedule(step, args)
        loss, norm = trainer.update(lr)
        dt = time.perf_counter() - t0
        if run_log:
            run_log.log_update(step, loss, norm, lr, dt)

        # any rank received a signal: all ranks stop here
        if trainer.stop.any_signal:
            raise TrainingInterrupted


def is_due(step, every, args):
    """True at step 0, every `every` steps and after the last update; never if `every` is 0."""
    return every > 0 and (step % every == 0 or step >= args.max_steps)


# =============================================================================
# Part 2: machinery
# =============================================================================

# -----------------------------------------------------------------------------
# Distributed setup and device


@dataclass(frozen=True)
class Dist:
    """Rank, world size and device of this process, with collectives that also work for one process.

    A rank that raised an error must not enter a collective: the other ranks may not reach it.
    """

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def master_process(self):
        return self.rank == 0

    def all_reduce_sum(self, values):
        """Elementwise sum over the ranks of a list of numbers."""
        return [sum(column) for column in zip(*self.all_gather_object(values), strict=True)]

    def all_gather_object(self, value=None):
        """List of the picklable values of all ranks; also a barrier."""
        values = [value] * self.world_size
        if self.world_size > 1:
            torch.distributed.all_gather_object(values, value)
        return values


@contextlib.contextmanager
def init_distributed(device_name):
    """Read torchrun's environment, choose the device, yield a Dist in a process group. Raises UserError."""
    local_rank, world_size = rank("LOCAL_RANK"), int(os.environ.get("WORLD_SIZE", 1))
    if rank() >= world_size or (world_size > 1 and "MASTER_ADDR" not in os.environ):
        raise UserError(f"RANK is {rank()}, WORLD_SIZE is {world_size}; start with torchrun, or unset both")
    device = choose_device(device_name, local_rank, world_size)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32: tensor cores, 10 mantissa bits instead of 23
    else:
        # Make glibc keep freed memory: each page returned to the system costs a page fault in the next step.
        with contextlib.suppress(AttributeError, OSError, TypeError):  # not glibc
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(-4, 0)  # M_MMAP_MAX = 0: large tensors come from the heap, too
            mallopt(-1, -1)  # M_TRIM_THRESHOLD: never trim
    if world_size > 1:  # the other ranks wait while rank 0 saves: allow 30 minutes
        backend, device_id = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        torch.distributed.init_process_group(backend, timeout=timedelta(minutes=30), device_id=device_id)
    dist = Dist(rank(), local_rank, world_size, device)
    dist.all_gather_object()  # wait for all ranks: connection errors would hide an earlier error of rank 0
    yield dist
    if world_size > 1:  # skipped after an error: the other ranks would print connection errors that hide it
        torch.distributed.destroy_process_group()


def choose_device(name, local_rank, world_size):
    """The torch.device of this rank. Raises UserError."""
    if name == "auto":
        fallback = "mps" if torch.backends.mps.is_available() and world_size == 1 else "cpu"
        name = "cuda" if torch.cuda.is_available() else fallback
    if not re.fullmatch(r"cuda|cpu" if world_size > 1 else r"cuda(:\d+)?|mps|cpu", name):
        raise UserError(f"--device {name}: choose cuda or cpu, or for one rank cuda:0, cuda:1, ... or mps")
    device = torch.device("cuda", local_rank) if name == "cuda" else torch.device(name)
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device {name}: {device} is not available ({one_line(e, 100)}); use --device cpu, "
                        "or no more ranks than GPUs") from None
    return device


def resolve_dtype(name, device):
    """The dtype of --dtype auto: bfloat16 or float16 on CUDA, float32 elsewhere."""
    if name != "auto" or device.type != "cuda":
        return "float32" if name == "auto" else name
    # not torch.cuda.is_bf16_supported(), which counts slow emulation
    return "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float16"


def check_mps(args, B):
    """Raise UserError for settings that torch computes incorrectly on Apple GPUs."""
    if not args.eval_only and B * args.T >= 32767:
        raise UserError(f"--B {B} --T {args.T}: sums of 32,767 or more terms are wrong on M1 and M2 GPUs "
                        "(pytorch#195163); use a smaller --B or --T")
    if args.dtype != "float32" and torch.__version__ < (2, 13):
        raise UserError(f"--dtype {args.dtype}: attention on mps leaks later tokens before torch 2.13 "
                        "(pytorch#195910); use --dtype float32 or a newer torch")


def apply_head(head, x):
    """Apply the nn.Linear head (C -> V). On MPS in slices of V: long backward sums are wrong (check_mps)."""
    if x.device.type != "mps":
        return head(x)
    logits = torch.cat([F.linear(x, weight) for weight in head.weight.split(16384)], dim=-1)
    return logits if head.bias is None else logits + head.bias


def try_compile(device):
    """Try a tiny torch.compile; if it fails (no gcc, no Triton, old GPU) print a warning, return False."""
    if rank():  # torch._dynamo's warnings are the same on all ranks
        torch._logging.set_logs(all=logging.ERROR)
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=device))
        return True
    except Exception as e:
        warn(f"torch.compile failed ({one_line(e)}); continuing without it")
        return False


def wrap_ddp_and_compile(model, args, dist):
    """Wrap the model in DDP if there are several ranks, then compile it if all ranks can. Collective.

    DDP averages gradients over the ranks. torch.compile fuses elementwise operations into few kernels, so
    activations make fewer trips to GPU memory, and removes Python overhead.
    """
    if dist.world_size > 1:
        # torch.compile splits the graph at bucket boundaries: use 100 MB instead of 25 MB
        model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True, bucket_cap_mb=100)
    wants_compile = dist.device.type == "cuda" if args.compile is None else args.compile
    if not all(dist.all_gather_object(wants_compile and try_compile(dist.device))):
        return model
    if dist.device.type == "cpu":  # the compiled embedding backward uses atomic adds, whose order varies
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    return torch.compile(model)


def make_optimizer(optimizer_class, params, zero, **settings):
    """Create the optimizer; with zero, shard its state over the ranks (ZeRO stage 1, arXiv 1910.02054)."""
    if not zero:
        return optimizer_class(params, **settings)
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(params, optimizer_class=optimizer_class, **settings)


def full_optimizer_state(optimizer, dist):
    """Return the optimizer's state_dict; with ZeRO, gather its shards on rank 0. Collective."""
    if not hasattr(optimizer, "optim"):
        return optimizer.state_dict()
    params = [p for group in optimizer.param_groups for p in group["params"]]
    shard, states = optimizer.optim.state, {}
    # Gather the scalars (step counters), with None in place of tensors. Then each owner broadcasts its
    # tensors. consolidate_state_dict() takes 40 s at 124M.
    counters = {i: {key: None if value.dim() else value.cpu() for key, value in shard[p].items()}
                for i, p in enumerate(params) if p in shard}
    for owner, theirs in enumerate(dist.all_gather_object(counters)):
        states |= theirs
        for i, key in [(i, key) for i, state in theirs.items() for key in state if state[key] is None]:
            tensor = shard[params[i]][key] if owner == dist.rank else torch.empty_like(params[i])
            torch.distributed.broadcast(tensor, owner)
            if dist.master_process:
                states[i][key] = tensor.cpu()
    return torch.optim.Optimizer.state_dict(optimizer) | {"state": states}


def load_optimizer_state(optimizer, saved):
    """Load a full state_dict; with ZeRO, keep only this rank's shard.

    Group settings (betas, weight decay, ...) come from the flags. Only "lr", which the next update sets, and
    "ratio", the learning rate multiplier, come from the checkpoint.
    """
    local = getattr(optimizer, "optim", optimizer)  # with ZeRO, the optimizer of this rank's shard
    shard = {p for group in local.param_groups for p in group["params"]}
    for group, old in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        group |= {key: old[key] for key in ("lr", "ratio") if key in old}
        for i, p in zip(old["params"], group["params"], strict=True):
            if p in shard:  # copy: the saved tensors are views of the memory-mapped file
                local.state[p] = {k: v.to(p.device, copy=True) for k, v in saved["state"].get(i, {}).items()}


# -----------------------------------------------------------------------------
# Signals and data errors

PARENT_PID = os.getppid()


class StopSignal:
    """Stop requests of this rank: SIGTERM, SIGINT, SIGHUP, the death of torchrun, or a data error.

    The run stops after the current step or evaluation batch. A second signal exits at once.
    """

    def __init__(self, dist):
        self.dist = dist
        self.local_signal, self.signal_time = 0, 0.0
        self.data_error = None  # of this rank
        self.any_signal = False  # whether any rank received a signal

    def install_handlers(self, stack):
        """Handle signals (main thread only) until `stack` restores the old handlers."""
        if threading.current_thread() is threading.main_thread():
            for signum in {signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGHUP", signal.SIGTERM)}:
                if signal.getsignal(signum) != signal.SIG_IGN:  # nohup ignores SIGHUP
                    stack.callback(signal.signal, signum, signal.signal(signum, self.handle))

    def handle(self, signum, frame):
        # Slurm signals torchrun and its workers, and torchrun forwards the signal, so workers receive it
        # twice. Signals within one second count as one.
        if not self.local_signal:
            self.local_signal, self.signal_time = signum, time.monotonic()
        elif time.monotonic() - self.signal_time > 1:
            os._exit(128 + signum)

    def local_flags(self):
        """[signal or death of torchrun, data error] of this rank, to be summed over the ranks."""
        is_orphan = "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != PARENT_PID
        return [self.local_signal > 0 or is_orphan, self.data_error is not None]

    def check(self):
        """Raise TrainingInterrupted on all ranks if any rank has a reason to stop. Collective."""
        if any(self.dist.all_reduce_sum(self.local_flags())):
            raise TrainingInterrupted(self.data_error_message() or "interrupted")

    def data_error_message(self):
        """The message of the first rank that could not read its data; None if all could. Collective."""
        messages = self.dist.all_gather_object(self.data_error and str(self.data_error))
        return next((f"rank {i}: {m}" if i else m for i, m in enumerate(messages) if m), None)


# -----------------------------------------------------------------------------
# Checkpoint files, and weights from and to Hugging Face
#
# A checkpoint is a dict of plain data that torch.load(weights_only=True) reads without this code:
#   arch        "gpt2" (also if missing) or "modern": the script that it belongs to
#   model       state_dict without the prefixes of torch.compile and DDP
#   optimizer   {name: state_dict}, the same with and without --zero
#   scaler      state_dict of GradScaler, {} unless float16
#   rng         torch's CPU random state
#   step        completed updates
#   val_loss    at this step, or None
#   config      GPTConfig fields
#   flags       all flags of the run
#   tokenizer   "gpt2" or "bytes"
#   data        identity of the training data, independent of its path
#   finished    whether the run is complete, including its last evaluation
#   wandb_id    only with --wandb


@contextlib.contextmanager
def atomic_write(path):
    """Yield a binary file that replaces `path` once it is complete and on disk; else `path` is unchanged."""
    tmp = f"{path}.tmp"
    try:
        with open(tmp, "w+b") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    finally:
        with contextlib.suppress(OSError):  # it exists only after an error
            os.remove(tmp)


def link_or_copy(source, path):
    """Make `path` a hard link to `source`, or a copy where links are not supported."""
    with contextlib.suppress(FileNotFoundError):
        os.remove(path)
    try:
        os.link(source, path)
    except OSError:
        with open(source, "rb") as old, atomic_write(path) as new:
            shutil.copyfileobj(old, new)


def save_checkpoint(state, log_dir, permanent, final):
    """Write last.pt; if permanent, also link it as model_{step:05d}.pt.

    A failed write leaves complete files intact. It is a warning, or if final a RunError.
    """
    t0, step, last = time.perf_counter(), state["step"], os.path.join(log_dir, "last.pt")
    try:
        with atomic_write(last) as f:
            torch.save(state, f)
        if permanent:
            link_or_copy(last, os.path.join(log_dir, f"model_{step:05d}.pt"))
        print0(f"saved {last}: step {step}, {os.path.getsize(last) / 1e6:,.0f} MB in "
               f"{time.perf_counter() - t0:.2f} s")
    except (OSError, RuntimeError, MemoryError) as e:
        message = f"could not save the checkpoint of step {step} ({one_line(e)}); complete ones are intact"
        if final:
            raise RunError(f"{message}. Free some disk space, then rerun with --resume") from None
        warn(f"{message}, training continues")


def load_checkpoint(path):
    """Load a checkpoint of this project or of build-nanogpt as a dict, with its path. Raises UserError.

    Verifies the CRC and executes no code. On POSIX the ranks on one machine share the mapped file's memory.
    """
    # build-nanogpt pickled its GPTConfig
    allowed = [(GPTConfig, f"{module}.GPTConfig") for module in ("__main__", "train_gpt2", "model")]
    try:
        with zipfile.ZipFile(path) as archive:
            # The CRC does not cover external attributes; torch reads entries with the directory bit as empty.
            odd = (info.filename for info in archive.infolist() if info.external_attr)
            if damaged := archive.testzip() or next(odd, None):
                raise ValueError(f"damaged in {damaged}")
        with torch.serialization.safe_globals(allowed):
            try:
                ckpt = torch.load(path, map_location="cpu", weights_only=True, mmap=os.name == "posix")
            except (OSError, RuntimeError):  # storage without mmap
                ckpt = torch.load(path, map_location="cpu", weights_only=True)
        config = ckpt["config"]
        ckpt["config"] = dict(config if isinstance(config, dict) else vars(config))
        ckpt["model"] = {re.sub(r"^(_orig_mod\.|module\.)+", "", name): value
                         for name, value in ckpt["model"].items()}
        return ckpt | {"path": path}
    except Exception as e:  # damaged files cause many kinds of errors
        raise UserError(f"{path} is not a valid checkpoint ({one_line(e)})") from None


def find_latest_checkpoint(log_dir):
    """Load the valid checkpoint of the largest step; None if log_dir has none. Raises UserError."""
    def step_of(path):
        try:
            return torch.load(path, map_location="meta", mmap=True, weights_only=True)["step"]
        except Exception:
            return math.inf  # unreadable: sorted first, so that its warning is printed

    paths = [os.path.join(log_dir, name) for pattern in ("last.pt", "model_*.pt")
             for name in glob.glob(pattern, root_dir=log_dir)]
    paths.sort(key=step_of, reverse=True)  # stable: last.pt before the permanent one of its step
    for path in paths:
        try:
            ckpt = load_checkpoint(path)
            if not {"optimizer", "flags", "data", "step", "tokenizer", "scaler", "rng"} <= {*ckpt}:
                raise UserError(f"{path} holds weights only; start from it with --init {path}")
            return ckpt | {"data": data_identity(ckpt["data"])}
        except UserError as e:
            warn(f"skipping a checkpoint: {e}")
    if paths:
        raise UserError(f"no valid checkpoint among {len(paths)} in {log_dir}; to start fresh, omit --resume")
    return None


def data_identity(data):
    """String that identifies the training data, independent of its path.

    data: dict(shards=[(name, tokens), ...]), or for a text dict(shards=None, kind=sha256, tokens=number).
    Checkpoints of earlier versions hold such a dict instead of the string, which is returned as it is.
    """
    if isinstance(data, str):
        return data
    if not data["shards"]:
        return f"text, {data['tokens']:,} tokens, {data['kind'].removeprefix('text ')[:12]}"
    pairs = [list(pair) for pair in data["shards"]]
    digest = hashlib.sha256(json.dumps(pairs).encode()).hexdigest()
    return f"{len(pairs)} shards, {sum(count for _, count in pairs):,} tokens, {digest[:12]}"


def is_finished(ckpt, args):
    """Return whether the run is complete at --max_steps; if so, print it. Raises UserError."""
    step = ckpt["step"]
    if args.max_steps < step:
        raise UserError(f"--max_steps {args.max_steps} is below step {step} of {ckpt['path']}")
    # checkpoints of earlier versions have no "finished"; a run killed before the link has no model_N.pt
    is_complete = ckpt.get("finished", ckpt["val_loss"] is not None)
    if args.max_steps > step or not is_complete or not os.path.exists(f"{args.log_dir}/model_{step:05d}.pt"):
        return False
    print0(f"the run in {args.log_dir} is finished: {step} steps; to train longer, pass a larger "
           "--max_steps")
    return True


def load_weights(name):
    """Load a checkpoint, or Hugging Face weights by name or directory, as a dict. Raises UserError."""
    is_hub_name = re.fullmatch("gpt2(-medium|-large|-xl)?", name)
    if not is_hub_name and not os.path.isfile(os.path.join(name, "model.safetensors")):
        ckpt = load_checkpoint(name)
        ckpt.pop("optimizer", None)  # free the memory
        return ckpt
    import transformers

    try:
        hf = transformers.GPT2LMHeadModel.from_pretrained(name)
    except (OSError, ValueError) as e:
        raise UserError(f"could not load {name} from Hugging Face ({one_line(e)})") from e
    c = hf.config
    config = dict(block_size=c.n_positions, vocab_size=c.vocab_size, n_layer=c.n_layer, n_head=c.n_head,
                  n_embd=c.n_embd)
    return dict(config=config, model=transpose_conv1d(hf.state_dict()), tokenizer="gpt2", flags={}, path=name)


def transpose_conv1d(state):
    """Transpose the Conv1D weights: OpenAI stores them as (in, out), nn.Linear as (out, in)."""
    four = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    return {name: value.t().contiguous() if name.endswith(four) else value for name, value in state.items()}


def export_hf(model, directory):
    """Write a directory that transformers loads as GPT-2, without padded vocabulary. Raises UserError."""
    c = model.config
    if model.arch != "gpt2" or (c.pos, c.mlp, c.norm) != ("learned", "gelu", "layernorm"):
        raise UserError("--export_hf needs the GPT-2 architecture: train_gpt2.py with --pos learned --mlp "
                        "gelu --norm layernorm")
    import transformers

    hf = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer,
        n_head=c.n_head, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    hf.load_state_dict(transpose_conv1d(model.state_dict()))
    hf.resize_token_embeddings(min(c.vocab_size, 50257))
    os.makedirs(directory, exist_ok=True)
    hf.save_pretrained(directory)
    print0(f"wrote {directory}; load it with GPT2LMHeadModel.from_pretrained({directory!r})")


# -----------------------------------------------------------------------------
# Parsing of flags


def number(kind, low, high):
    """An argparse type: an int or float from `low` to `high`."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:  # also rejects nan
            raise argparse.ArgumentTypeError(f"must be at least {low} and at most {high:g}, got {text[:40]}")
        return value

    parse.__name__ = kind.__name__  # for argparse's own messages
    return parse


positive_int, nonnegative_int = number(int, 1, 10**12), number(int, 0, 10**12)
positive_float, nonnegative_float = number(float, 1e-30, 1e30), number(float, 0.0, 1e30)


def user_path(text):
    if not text:  # most often an unset shell variable
        raise argparse.ArgumentTypeError("must not be empty")
    return os.path.expanduser(text)  # shells do not expand the ~ of --data=~/shards


class FlagParser(argparse.ArgumentParser):
    """argparse that raises UserError; parse_args() returns only the flags that were given.

    defaults: {flag: value}; group_of: {flag: title of its group}.
    """

    def __init__(self, description, overrides, unsupported):
        super().__init__(description=description, usage="%(prog)s [--flag value ...]", allow_abbrev=False,
                         argument_default=argparse.SUPPRESS,
                         formatter_class=argparse.RawDescriptionHelpFormatter)
        self.overrides, self.unsupported, self.defaults, self.group_of = overrides, unsupported, {}, {}

    def add_group(self, title, description):
        """Return add_flag() for a new group."""
        return functools.partial(self.add_flag, self.add_argument_group(title, description))

    def add_flag(self, group, name, type, default, help, shown=None, **options):
        if name in self.unsupported:
            return
        default = self.overrides.get(name, default)
        self.defaults[name], self.group_of[name] = default, group.title
        shown = shown if default is None else default
        options["help"] = help if shown is None or shown is False else f"{help} (default: {shown})"
        if type is not None:
            options["type"] = type
        group.add_argument(f"--{name}", **options)

    def error(self, message):
        raise UserError(f"{message} (see --help)")


# -----------------------------------------------------------------------------
# Tokenizer, text files and directories of shards


def get_tokenizer(name="gpt2"):
    """Load a tiktoken.Encoding: "gpt2", or "bytes", GPT-2's 256 single-byte tokens. Raises UserError."""
    import requests
    import tiktoken

    if name == "bytes":  # GPT-2's ids 0..255 are the printable bytes, then the others
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        byte_of_id = printable + sorted({*range(256)} - {*printable})
        ranks = {bytes([byte]): i for i, byte in enumerate(byte_of_id)}
        return tiktoken.Encoding(name, pat_str="(?s).", mergeable_ranks=ranks, special_tokens={})
    requests.get = functools.partial(requests.get, timeout=10)  # default for all callers; tiktoken has none
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as e:  # network, proxy or cache directory
        raise UserError(f"could not download the GPT-2 vocabulary ({one_line(e, 100)}); copy tiktoken's "
                        "cache directory from a machine that has it and set TIKTOKEN_CACHE_DIR") from e


def load_tokenizer(name, dist, has_shards):
    """Load the same tokenizer on all ranks; rank 0 decides which. Collective. Raises UserError.

    If the GPT-2 vocabulary cannot be downloaded: None with shards, "bytes" for a new run on text (name None).
    """
    if dist.master_process:
        try:
            name = get_tokenizer(name or "gpt2").name
        except UserError as e:
            if name and not has_shards:
                raise
            name = None if has_shards else "bytes"
            warn(f"{e}. " + ("No samples and no HellaSwag" if has_shards else
                             "Reading the text as byte tokens (ids 0-255)"))
    name = dist.all_gather_object(name)[0]
    return get_tokenizer(name) if name else None


def read_text(path):
    """Read a UTF-8 text file. Raises UserError, also for data formats that are not plain text."""
    try:
        if path.lower().endswith((".json", ".jsonl", ".csv", ".tsv")):
            raise ValueError("a data format")  # binary formats are no valid UTF-8
        with open(path, encoding="utf-8-sig") as f:  # without a byte order mark
            return f.read()
    except ValueError as e:
        raise UserError(f"--data {path} is not UTF-8 text ({one_line(e)}); use the directory of shards, or "
                        "tokenize .txt, .jsonl or .parquet files with `python fineweb.py --files`") from e


def open_shard(path):
    """Check the header and size of a .npy or llm.c-style .bin file. Raises UserError."""
    try:
        if path.endswith(".npy"):
            array = np.load(path, mmap_mode="r")
            count, offset = array.size, array.offset
            if array.dtype != np.dtype("<u2") or array.ndim != 1:
                raise ValueError(f"{array.dtype} {array.shape}, not uint16 (tokens,)")
        else:
            magic, version, count = (int(n) for n in np.fromfile(path, "<i4", 3))
            offset = 1024
            if (magic, version) != (20240520, 1):
                raise ValueError("no llm.c header")
        size = os.path.getsize(path)
        if count <= 0 or size != offset + 2 * count:
            raise ValueError(f"{size:,} bytes, but its header declares {count:,} tokens")
    except Exception as e:  # np.load raises many kinds of errors for damaged files
        raise UserError(f"{path} is not a token shard, or is damaged ({one_line(e)}); make or download it "
                        "again, or move it out of this directory") from e
    return Shard(os.path.basename(path), count, path, offset)


def open_shards(path):
    """{"train": TokenStream, "val": TokenStream} of the shards in a directory, sorted by name.

    Raises UserError, also if the shards differ from manifest.json, which fineweb.py writes.
    """
    if not os.path.isdir(path):
        raise UserError(f"no such file or directory: {path}; check --data, or run `python fineweb.py`")
    names = [name for name in sorted(os.listdir(path)) if re.fullmatch(r"[^.].*\.(npy|bin)", name)]
    word = r"(?<![a-zA-Z])(train|val)(?![a-zA-Z])"  # the last one in a name is its split
    shards = {split: [n for n in names if re.findall(word, n)[-1:] == [split]] for split in ("train", "val")}
    for split, found in shards.items():
        if not found:
            raise UserError(f"no {split} shards in {path}: needs a .npy or .bin file with '{split}' in its "
                            f"name. To tokenize text files: `python fineweb.py --files '{path}/*' --out DIR`")
    if len({name[-4:] for found in shards.values() for name in found}) > 1:
        raise UserError(f"{path} holds two data sets, .npy and .bin files; keep one of them")
    streams = {split: TokenStream([open_shard(os.path.join(path, n)) for n in found])
               for split, found in shards.items()}
    if os.path.exists(os.path.join(path, "manifest.json")):
        found = {(shard.name, shard.count) for stream in streams.values() for shard in stream.shards}
        try:
            with open(os.path.join(path, "manifest.json"), encoding="utf-8") as f:
                manifest = json.load(f)
            differing = found ^ {(shard["name"], shard["tokens"]) for shard in manifest["shards"]}
            if differing or not manifest.get("complete", True):
                raise ValueError(f"differing: {sorted(dict(differing))[:3]}, or not complete")
        except (ValueError, LookupError, TypeError) as e:  # also if another program wrote it
            raise UserError(f"{path} is incomplete or differs from its manifest.json ({one_line(e)}); rerun "
                            "the command that made it, or check it with `python fineweb.py --verify --out "
                            f"{path}`") from e
    return streams


def load_data(args, is_explicit, ckpt, dist):
    """Load --data, a directory of shards or a text file, and its tokenizer. Raises UserError.

    Returns (streams, tokenizer). streams: {"train": TokenStream, "val": TokenStream}, or {} if --eval_only
    needs none. tokenizer: None if not needed or not available. Sets args.sample_length.
    """
    path, streams, text = args.data, {}, None
    needs_data = not args.eval_only or args.inspect is not None
    if not needs_data and not (args.val_tokens and (is_explicit or os.path.exists(path))):
        if args.val_tokens:
            print0(f"validation is off: no data at {path}")
    elif os.path.isfile(path):
        text = read_text(path)
    else:
        streams = open_shards(path)
    name = ckpt.get("tokenizer", "gpt2") if ckpt else None
    if streams and name == "bytes":
        raise UserError(f"the checkpoint was trained on byte tokens, but {path} holds GPT-2 tokens; use "
                        "--data with its text file")
    tokenizer = None
    if text is not None or args.num_samples or args.hellaswag or args.inspect is not None:
        tokenizer = load_tokenizer(name, dist, bool(streams))
    if args.sample_length is None:
        args.sample_length = 128 if tokenizer and tokenizer.name == "bytes" else 32
    if text is not None:
        tokens = np.array(tokenizer.encode_ordinary(text), dtype=np.uint16)
        n = int(0.9 * len(tokens))  # the first 90% are train, the rest val
        identity = data_identity(dict(shards=None, kind=hashlib.sha256(text.encode()).hexdigest(), tokens=n))
        streams = {split: TokenStream([Shard(os.path.basename(path), len(part), array=part)], identity)
                   for split, part in (("train", tokens[:n]), ("val", tokens[n:]))}
    return streams, tokenizer


def encode_prompt(args, tokenizer):
    """Token ids of --prompt; [] if samples are off. Sets args.prompt to stdin for -. Raises UserError."""
    if not args.num_samples or tokenizer is None:
        return []
    if args.prompt == "-":  # the checkpoint records the text
        args.prompt = sys.stdin.buffer.read().decode("utf-8", "replace") if sys.stdin else ""
    ids, limit = tokenizer.encode_ordinary(args.prompt), min(args.block_size, args.sample_length - 1)
    if not 0 < len(ids) <= limit:
        raise UserError(f"--prompt has {len(ids)} tokens; --block_size {args.block_size} and --sample_length "
                        f"{args.sample_length} allow 1 to {limit}")
    if max(ids) >= args.vocab_size:
        warn(f"no samples: the prompt has token {max(ids)}, outside --vocab_size {args.vocab_size}")
        return []
    return ids


# -----------------------------------------------------------------------------
# Run directory and log files


def lock_log_dir(log_dir):
    """Lock an existing log_dir until release() or the end of this process. Raises UserError."""
    from filelock import FileLock, Timeout

    lock = FileLock(os.path.join(os.path.realpath(log_dir), ".lock"), is_singleton=True)  # re-entrant
    try:
        lock.acquire(timeout=2.0)  # a run that was just killed may still be exiting
    except Timeout:
        raise UserError(f"another run is writing to {log_dir}; use another --log_dir, or wait") from None
    except (NotImplementedError, OSError) as e:  # storage without locks
        warn(f"cannot lock {log_dir} ({one_line(e)}); make sure that no other run writes to it")
    return lock


def open_log_dir(args):
    """Create and lock the run directory; a fresh run renames an older one to log_dir.N. Raises UserError."""
    path = os.path.realpath(args.log_dir)  # rename the target of a symbolic link, not the link
    marks = ("log.txt", "config.json", "last.pt")
    if not args.resume and any(os.path.exists(os.path.join(path, mark)) for mark in marks):
        lock_log_dir(path).release()
        if path == os.getcwd():
            raise UserError(f"--log_dir {args.log_dir} is the current directory and holds a run; use "
                            "--resume, or another --log_dir")
        n = next(n for n in itertools.count(1) if not os.path.exists(f"{path}.{n}"))
        try:
            os.rename(path, f"{path}.{n}")
        except OSError as e:  # for example a mount point
            raise UserError(f"cannot rename the older run in --log_dir {args.log_dir} ({one_line(e)}); use "
                            "--resume, or another --log_dir") from None
        print0(f"renamed the older run in {args.log_dir} to {os.path.relpath(path)}.{n}")
    os.makedirs(path, exist_ok=True)
    return lock_log_dir(path)


def open_step_file(path, from_step, evaluates):
    """Open a log file for appending, after removing the lines of steps from from_step on.

    evaluates: whether from_step is evaluated again; else its evaluations are kept.
    """
    kept, evaluation = [], rb"%d (val|hella|sample) " % from_step
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as f:
        kept = [x for x in f if re.match(rb"\d+ .*\n", x) and (
            int(x.split()[0]) < from_step or not evaluates and re.match(evaluation, x))]
    with atomic_write(path) as f:
        f.writelines(kept)
    return open(path, "ab", buffering=1 << 20)


class RunLog:
    """Output of rank 0: console, log.txt, samples.txt, config.json, curves.png, Weights & Biases."""

    def __init__(self, trainer, streams):
        self.args = args = trainer.args
        dist, loader = trainer.dist, trainer.loader
        name = torch.cuda.get_device_name(dist.device) if dist.device.type == "cuda" else dist.device.type
        settings = trainer.run_metadata | dict(
            B=loader.B, world_size=dist.world_size, device=f"{dist.device} ({name})",
            compile=hasattr(trainer.model, "_orig_mod"), first_shard=loader.tokens.names[0],
            torch=torch.__version__)
        settings["model"] = settings.pop("config")
        with atomic_write(os.path.join(args.log_dir, "config.json")) as f:
            f.write(json.dumps(settings, indent=1).encode())
        compiled = "on" if settings["compile"] else "off"
        print0(f"using device: {settings['device']}, {args.dtype}, compile {compiled}")
        print0(f"total desired batch size: {args.total_batch_size}")
        print0(f"=> calculated gradient accumulation steps: {loader.grad_accum_steps} (B {loader.B}, "
               f"T {args.T}, ranks {dist.world_size})")
        for split, stream in streams.items():
            print0(f"found {len(stream.names)} shards for split {split}: {len(stream):,} tokens")
        epochs = args.max_steps * loader.sequences_per_step / loader.n_windows
        print0(f"max_steps {args.max_steps} is {epochs:.3f} epochs of {loader.n_windows:,} windows")

        evaluates = is_due(trainer.step, args.eval_every, args)
        self.log_file, self.samples_file = (
            open_step_file(os.path.join(args.log_dir, name), trainer.step, evaluates)
            for name in ("log.txt", "samples.txt"))
        flops, peak = trainer.raw_model.flops_per_token(args.T), peak_flops(dist, args.dtype)
        self.peak_tokens_per_sec = peak and peak / flops
        self.write_failed, self.plot_process, self.wandb = False, None, None
        if args.wandb:
            import wandb

            self.wandb = wandb.init(project=args.wandb, dir=args.log_dir, config=settings,
                                    id=settings["wandb_id"], resume="allow")

    def write(self, file, text):
        """Append to a file. After a failure (disk full) the text stays in its buffer for the next call."""
        try:
            file.write(text.encode())
            file.flush()
        except OSError as e:
            if not self.write_failed:
                warn(f"cannot write {file.name} ({one_line(e)}); trying again at every step")
            self.write_failed = True

    def log(self, step, **values):
        """Write train, val, hella and norm to log.txt, and everything to W&B."""
        digits = dict(train=6, val=4, hella=4, norm=4)
        lines = (f"{step} {name} {values[name]:.{n}f}\n" for name, n in digits.items()
                 if values.get(name) is not None)
        self.write(self.log_file, "".join(lines))
        if self.wandb:
            self.wandb.log(values, step=step)

    def log_update(self, step, loss, norm, lr, dt):
        """Print and log one update; print the remaining time now and then."""
        tokens_per_sec, max_steps = self.args.total_batch_size / dt, self.args.max_steps
        mfu = self.peak_tokens_per_sec and tokens_per_sec / self.peak_tokens_per_sec  # None if unknown
        self.log(step, train=loss, norm=norm, lr=lr, dt=dt, tok_per_sec=tokens_per_sec, mfu=mfu)
        print0(f"step {step:5d} | loss: {loss:.6f} | lr {lr:.4e} | norm: {norm:.4f} | "
               f"dt: {dt * 1000:.2f}ms | tok/sec: {tokens_per_sec:.2f}"
               + (f" | mfu: {100 * mfu:.1f}%" if mfu else ""))
        if step % max(25, max_steps // 50) == 10:
            left = timedelta(seconds=round(dt * (max_steps - step - 1)))
            print0(f"{100 * (step + 1) / max_steps:.1f}% done, ETA {left}")

    def log_samples(self, step, texts):
        for i, text in enumerate(texts):
            self.write(self.samples_file, f"{step} sample {i}: {json.dumps(text, ensure_ascii=False)}\n")

    def draw_curves(self, timeout=0.0):
        """Redraw curves.png in a process, unless the last one runs longer than `timeout` s or failed."""
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            if self.plot_process is None or self.plot_process.wait(timeout) == 0:
                self.plot_process = subprocess.Popen(  # in its own session: Ctrl-C must not reach it
                    [sys.executable, os.path.join(HERE, "plot.py"), self.args.log_dir],
                    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
                self.plot_process.wait(timeout)

    def close(self):
        with contextlib.suppress(OSError):  # write() has warned
            self.log_file.close()
            self.samples_file.close()
        self.draw_curves(timeout=60)
        if self.wandb:
            self.wandb.finish()


# Dense bfloat16 TFLOP/s from the data sheets; float16 for the T4 and the V100. Names match at word
# boundaries, so that "L4" does not match an L40.
PEAK_TFLOPS = {"B200": 2250, "GH200": 989, "H200 NVL": 835, "H200": 989, "H100 NVL": 835, "H100 PCIe": 756,
               "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "A10": 125, "RTX 4090(?! Laptop| D)": 165,
               "RTX 3090(?! Ti)": 71, "V100": 125, "T4": 65}


def peak_flops(dist, dtype):
    """Dense peak FLOP/s of all ranks' CUDA devices in a 16-bit dtype; None if unknown."""
    if dist.device.type != "cuda" or dtype == "float32":
        return None
    name = torch.cuda.get_device_name(dist.device)
    found = (peak for card, peak in PEAK_TFLOPS.items() if re.search(rf"\b{card}\b", name))
    return next((1e12 * peak * dist.world_size for peak in found), None)


# -----------------------------------------------------------------------------
# Errors


class UserError(Exception):
    """A mistake in flags or files, with its fix; exit status 2."""


class RunError(Exception):
    """The environment failed (disk, network) or training diverged; exit status 1."""


class TrainingInterrupted(RunError):
    """Raised on all ranks together; a training run then saves and stops."""


# UserError, and built-in errors that are mistakes of the user, too: exit status 2.
USER_ERRORS = (UserError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError,
               PermissionError, ModuleNotFoundError)


def rank(name="RANK"):
    """This process's RANK, or LOCAL_RANK, as set by torchrun."""
    return int(os.environ.get(name, 0))


def print0(message, stream="stdout"):
    """Print on rank 0. A closed pipe or full disk loses the message but does not stop the run."""
    if rank() == 0:
        with contextlib.suppress(OSError, ValueError):
            print(message, file=getattr(sys, stream), flush=True)


def warn(message):
    print0(f"warning: {message}", "stderr")


def one_line(error, length=200):
    """'TypeError: message' on one line."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}"[:length].removesuffix(": ")


def is_out_of_memory(error):
    """Whether Python, torch or the GPU driver ran out of memory."""
    pattern = "MemoryError|out of memory|(allocate|enough) memory|size calculation|ALLOC_FAILED|MemoryAlloc"
    return isinstance(error, (MemoryError, RuntimeError)) and bool(re.search(pattern, one_line(error)))


def run_script(script, main):
    """Run main() as a command: print errors and exit with its status."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # print any text on any terminal
            stream.reconfigure(errors="backslashreplace")
    try:
        status = main()
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except Exception as e:
        report_error(script, e)
        status = 2 if isinstance(e, USER_ERRORS) or is_out_of_memory(e) else 1
    exit_process(status)


def report_error(script, error):
    """Print one line for an expected error, a traceback for a bug."""
    is_expected = isinstance(error, (*USER_ERRORS, RunError, OSError))
    lost_peer = not is_expected and re.search("onnection (closed|reset) by peer", str(error))
    if rank() > 0 or lost_peer:  # the rank at fault reports first, then torchrun ends this process
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        time.sleep(3 + rank("LOCAL_RANK"))
    if lost_peer and "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun reports the lost rank
        return
    prefix, message = f"rank {rank()}: " if rank() else "", str(error)
    if is_out_of_memory(error):
        message = f"out of memory ({one_line(error)}); use a smaller --B, --T or model"
    elif isinstance(error, ModuleNotFoundError):
        message += f"; pip install {error.name}"
    elif not is_expected:
        script, message = "", "".join(traceback.format_exception(error))
    with contextlib.suppress(OSError, ValueError):
        print((script and f"{script}: error: ") + prefix + message, file=sys.stderr, flush=True)


def exit_process(status):
    """Flush and exit. Ranks of a distributed run skip Python's teardown: gloo's threads outlive the process
    group and would abort a finished run."""
    for name in ("stdout", "stderr"):
        try:
            getattr(sys, name).flush()
        except (OSError, ValueError, AttributeError):  # closed pipe: drop the stream, or the exit fails on it
            setattr(sys, name, None)
    if os.environ.get("WORLD_SIZE", "1") == "1" and "TORCHELASTIC_RUN_ID" not in os.environ:
        sys.exit(status)
    os._exit(status)


# -----------------------------------------------------------------------------
# Setup and main. All checks run before the run directory is created or renamed.


def choose_preset(cli_args, dist):
    """(preset, reason) for --preset auto."""
    if dist.device.type == "cpu":
        return "smoke", "no GPU"
    if cli_args.keys() & {"data", "resume"} or dist.world_size > 1 or os.path.isdir(SHARDS_DIR):
        return "gpt2", f"device {dist.device.type}"
    return "smoke", f"no shards in {SHARDS_DIR}"


def resolve_config(cli_args, parser, model_class, dist, ckpt, is_resume):
    """Resolve all flags: explicit flags override those of the checkpoint, which override the preset.

    Raises UserError, also if explicit flags change the model, or the data order of a resumed training run.
    """
    group_of, eval_only = parser.group_of, "eval_only" in cli_args
    cpu_defaults = dict(val_tokens=65536, hellaswag=0) if dist.device.type == "cpu" else {}
    preset, reason = cli_args.get("preset", "auto"), "--preset"
    if preset == "auto" and not is_resume:
        preset, reason = choose_preset(cli_args, dist)
    if not is_resume and not cli_args.keys() & {"eval_only", "export_hf"}:
        print0(f"preset {preset} ({reason})")
    config = parser.defaults | cpu_defaults | model_class.presets.get(preset, {})
    if ckpt:
        # Hugging Face's config has no pos, mlp, norm
        saved = parser.defaults | cpu_defaults | ckpt.get("flags", {}) | asdict(GPTConfig()) | ckpt["config"]
        requested = cli_args
        if is_resume and preset not in ("auto", saved["preset"]):
            model = {n: value for n, value in model_class.presets[preset].items() if group_of[n] == "model"}
            requested = model | cli_args
        fixed = ("model", "data order") if is_resume and not eval_only else ("model",)
        action = "resume" if is_resume else f"use --init {cli_args['init']}"
        check_unchanged(action, saved, {n: v for n, v in requested.items() if group_of[n] in fixed})
        if saved["min_lr"] == saved["max_lr"] / 10:
            saved["min_lr"] = None  # follows a new --max_lr
        taken = ("data", "T", "val_tokens", "hellaswag") if eval_only else ()
        config |= {name: saved[name] for name, group in group_of.items()
                   if name in taken or (group != "command" if is_resume else group == "model")}
        preset = saved["preset"] if is_resume else preset
    args = argparse.Namespace(**config | cli_args | {"preset": preset})
    if args.dtype == "auto" and is_resume:
        args.dtype = ckpt["flags"]["dtype"]
    args.dtype = resolve_dtype(args.dtype, dist.device)
    args.data = os.path.abspath(args.data or SHARDS_DIR)
    if args.min_lr is None:
        args.min_lr = args.max_lr / 10
    if "T" not in cli_args:
        args.T = min(args.T, args.block_size)
    if args.min_lr > args.max_lr:
        raise UserError(f"--min_lr {args.min_lr:g} is greater than --max_lr {args.max_lr:g}")
    if args.T > args.block_size:
        raise UserError(f"--T {args.T} is greater than --block_size {args.block_size}")
    return args


def check_unchanged(action, saved, requested):
    """Raise UserError with a table of the {flag: value} in `requested` that differ from those in `saved`."""
    rows = [(f"--{name}", saved[name], new) for name, new in sorted(requested.items()) if saved[name] != new]
    if rows:
        table = "".join(f"\n  {name:20} | {old!s:36} | {new}"
                        for name, old, new in [("flag", "checkpoint", "now"), *rows])
        hint = ", or start a new run with another --log_dir" if action == "resume" else ""
        raise UserError(f"cannot {action}: these flags differ from the checkpoint (omit them{hint}){table}")


def print_changes(args, ckpt, model_class):
    """Print what is resumed, the optimization flags that changed, and the learning rate of the next step."""
    print0(f"resuming from {ckpt['path']}, step {ckpt['step']}")
    old, step, changes = argparse.Namespace(**(vars(args) | ckpt["flags"])), ckpt["step"], []
    for name in "max_steps", "max_lr", "min_lr", "warmup_steps", "weight_decay", "grad_clip", "dtype":
        before, now = getattr(old, name), getattr(args, name)
        if before != now:
            form = "{} {:g} -> {:g}" if isinstance(now, float) else "{} {} -> {}"
            changes.append(form.format(name, before, now))
    if changes:
        print0(f"changed on resume: {', '.join(changes)}; lr of step {step}: "
               f"{model_class.schedule(step, old):.4e} -> {model_class.schedule(step, args):.4e}")


def sequences_per_rank(args, world_size):
    """Sequences per rank and step. Raises UserError that lists valid batch sizes."""
    total, unit = args.total_batch_size, (args.B or 1) * args.T * world_size
    if total % unit:
        unit *= 1 if args.B or total < 16 * unit else 16  # suggest sizes that allow B = 16
        nearest = max(total // unit, 1) * unit
        raise UserError(f"--total_batch_size {total} is not divisible by B * T * ranks = {args.B or 1} * "
                        f"{args.T} * {world_size}; use {nearest} or {nearest + unit}")
    return total // (args.T * world_size)


def choose_B(args, n_sequences, model, dist):
    """Micro-batch size: --B, or on CUDA the largest power of two up to 64 that fits on all ranks.

    Elsewhere the largest up to 4; for --eval_only 8, or 1 on a CPU.
    """
    if args.B or args.eval_only:
        return args.B or (1 if dist.device.type == "cpu" else 8)
    sizes = [b for b in (64, 32, 16, 8, 4, 2, 1) if n_sequences % b == 0]
    if dist.device.type != "cuda":
        return next(b for b in sizes if b <= 4)

    def fits(B):
        idx = torch.zeros(B, args.T, dtype=torch.long, device=dist.device)
        try:
            with autocast(args, dist.device):
                _, loss = model(idx, idx)
            loss.backward()
        except RuntimeError as e:
            return not is_out_of_memory(e)  # the first step reports other errors
        finally:
            model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
        return True

    # Reserve memory for AdamW's state and DDP's buckets, plus 5%.
    free, total = torch.cuda.mem_get_info()
    reserved = total // 20 + (12 if dist.world_size > 1 else 8) * sum(p.numel() for p in model.parameters())
    torch.cuda.set_per_process_memory_fraction(
        max(0.0, free + torch.cuda.memory_reserved() - reserved) / total)
    best = min(dist.all_gather_object(next(filter(fits, sizes), 1)))
    torch.cuda.set_per_process_memory_fraction(1.0)
    return best


def load_hellaswag(args, is_explicit, tokenizer, dist):
    """Load the HellaSwag examples; [] if off. If any rank lacks them, warn and return [], or raise UserError
    if --hellaswag is explicit."""
    if not args.hellaswag:
        return []
    problem = None
    try:
        is_gpt2 = tokenizer and tokenizer.name == "gpt2" and args.vocab_size >= tokenizer.n_vocab
        if not (hellaswag and is_gpt2):
            problem = "it needs hellaswag.py and the GPT-2 vocabulary"
        elif dist.local_rank == 0:
            hellaswag.download("val")  # once per machine; the other ranks wait in all_gather_object
    except OSError as e:
        problem = str(e)
    problem = next(filter(None, dist.all_gather_object(problem)), None)
    if problem and is_explicit:
        raise UserError(f"--hellaswag {args.hellaswag}: {problem}")
    if problem:
        warn(f"HellaSwag is off: {problem}")
        return []
    try:
        return hellaswag.load_examples(hellaswag.data_file("val"), args.hellaswag, args.block_size,
                                       tokenizer.encode_ordinary)
    except ValueError as e:
        raise UserError(str(e)) from e


def load_start(args, dist, stack):
    """Load the checkpoint of --resume or --init: (checkpoint or None, whether it is resumed).

    With --resume, rank 0 first locks log_dir; `stack` releases the lock. Raises UserError.
    """
    if args.resume:
        is_read_only = args.eval_only or args.export_hf or args.inspect is not None
        if dist.master_process and os.path.isdir(args.log_dir) and not is_read_only:
            stack.callback(lock_log_dir(args.log_dir).release)
        ckpt = find_latest_checkpoint(args.log_dir)
        if ckpt and ckpt["flags"].get("optimizer") == "muon":
            raise UserError(f"{ckpt['path']} was trained with --optimizer muon, which was removed; resume it "
                            "with commit 7f9751b, or start from its weights with --init")
        if ckpt:
            return ckpt, True
        if args.log_dir == "log_modern" and os.path.exists("log/last.pt"):  # of an earlier version
            if load_checkpoint("log/last.pt").get("arch") == "modern":
                raise UserError("no checkpoint in log_modern, but log holds a run of modern.py; use --resume "
                                "--log_dir log")
        print0(f"no checkpoint in {args.log_dir}, starting at step 0")
    return (None if args.init == "scratch" else load_weights(args.init)), False


def compare_ranks(dist, values):
    """Raise UserError on all ranks unless {what: value} is the same on all of them."""
    for other, theirs in enumerate(dist.all_gather_object(values)):
        for what in sorted({*values, *theirs}):
            first, second = (v.get(what, "not given") for v in (values, theirs))
            if first != second:
                raise UserError(f"{what} is {first} on rank {dist.rank} but {second} on rank {other}; start "
                                "all ranks with the same flags and files")


def inspect_step(args, tokens, tokenizer):
    """Print shard, offset and text of every sequence that a step reads. tokens: the train TokenStream."""
    loader = DataLoaderLite(1, args.T, 0, 1, tokens, args.total_batch_size // args.T, args.shuffle, args.seed)
    for sequence, epoch, window, shard, offset in loader.locate(args.inspect):
        print0(f"step {args.inspect} sequence {sequence}: epoch {epoch} window {window} "
               f"{tokens.names[shard]} offset {offset}")
        if tokenizer:
            ids = tokens.read(window * args.T, args.T)
            print0(tokenizer.decode(ids[ids < tokenizer.n_vocab].tolist()))


def main(argv=None, model_class=GPT):
    """Train, evaluate or export a GPT or subclass; return the exit status. Raises UserError and RunError."""
    if torch.__version__ < (2, 9):
        raise UserError(f"torch {torch.__version__} is too old; pip install 'torch>=2.9'")
    parser = build_parser(model_class)
    cli_args = vars(parser.parse_args(argv))
    early_args = argparse.Namespace(**parser.defaults | cli_args)  # only the "command" group is final yet
    with contextlib.ExitStack() as stack:
        dist = stack.enter_context(init_distributed(early_args.device))
        ckpt, is_resume = load_start(early_args, dist, stack)
        if ckpt:
            model_class.check_arch(ckpt)
        args = resolve_config(cli_args, parser, model_class, dist, ckpt, is_resume)
        if (args.eval_only or args.export_hf) and not ckpt:
            raise UserError("--eval_only and --export_hf need --init PATH, or --resume with a checkpoint")
        if args.export_hf:
            if dist.master_process:
                export_hf(model_class.from_checkpoint(ckpt), args.export_hf)
            return 0
        compare_ranks(dist, {"the checkpoint (is --log_dir on shared storage?)":
                             (ckpt["path"], ckpt["step"]) if is_resume else "missing"})
        if is_resume and not args.eval_only and args.inspect is None and is_finished(ckpt, args):
            return 0

        streams, tokenizer = load_data(args, "data" in cli_args, ckpt, dist)
        identity = streams["train"].identity if streams else None
        compare_ranks(dist, {f"--{name}": value for name, value in cli_args.items()} | {
            "--dtype": args.dtype, "the training data": identity})
        if is_resume and not args.eval_only:
            check_unchanged("resume", ckpt, {"data": identity})
        if args.inspect is not None:
            sequences_per_rank(args, dist.world_size)  # refuse a batch that training refuses
            inspect_step(args, streams["train"], tokenizer)
            return 0
        examples = load_hellaswag(args, "hellaswag" in cli_args, tokenizer, dist)
        return run(args, dist, model_class, ckpt, is_resume, streams, tokenizer, examples, stack)


def run(args, dist, model_class, ckpt, is_resume, streams, tokenizer, examples, stack):
    """Build model, data loaders, evaluator and trainer, then evaluate or train. Returns the exit status."""
    n_sequences = None if args.eval_only else sequences_per_rank(args, dist.world_size)
    prompt = encode_prompt(args, tokenizer) if dist.master_process else []

    torch.manual_seed(args.seed)  # reproducible initialization; DDP also copies rank 0's weights
    if ckpt:
        model = model_class.from_checkpoint(ckpt)
        del ckpt["model"]  # free the memory
    else:
        config = {f.name: getattr(args, f.name, f.default) for f in fields(GPTConfig)}
        model = model_class(GPTConfig(**config))
    model.to(dist.device)
    B = choose_B(args, n_sequences, model, dist)
    if dist.device.type == "mps":
        check_mps(args, B)
    stop = StopSignal(dist)
    loader_args = B, args.T, dist.rank, dist.world_size
    has_val = streams and args.val_tokens
    val_loader = DataLoaderLite(*loader_args, streams["val"], vocab_size=args.vocab_size) if has_val else None
    wrapped_model = model if args.eval_only else wrap_ddp_and_compile(model, args, dist)
    evaluator = Evaluator(args, dist, model, wrapped_model, val_loader, examples, prompt, tokenizer, stop)
    if args.eval_only:
        evaluator.validate()
        evaluator.score_hellaswag()
        evaluator.sample()
        return 0

    loader = DataLoaderLite(*loader_args, streams["train"], args.total_batch_size // args.T, args.shuffle,
                            args.seed, args.vocab_size)
    run_metadata = dict(arch=model.arch, config=asdict(model.config), flags=vars(args),
                        tokenizer=tokenizer.name if tokenizer else "gpt2", data=loader.tokens.identity)
    if args.wandb:
        import wandb  # fails before the run directory is touched

        old_id = ckpt.get("wandb_id") if is_resume else None
        run_metadata["wandb_id"] = old_id or wandb.util.generate_id()
    trainer = Trainer(args, dist, model, wrapped_model, loader, stop, run_metadata,
                      ckpt if is_resume else None)
    if is_resume:
        print_changes(args, ckpt, model_class)
    if args.warmup_steps > args.max_steps:
        warn(f"the learning rate never reaches --max_lr: --warmup_steps {args.warmup_steps} is greater than "
             f"--max_steps {args.max_steps}")
    return run_training(trainer, evaluator, streams, stack)


def run_training(trainer, evaluator, streams, stack):
    """Open the run directory, run the training loop, handle its end; return the status. Raises RunError."""
    args, stop, run_log, is_interrupted = trainer.args, trainer.stop, None, False
    trainer.dist.all_gather_object()  # all ranks have passed all checks: files may be written now
    if trainer.dist.master_process:
        stack.callback(open_log_dir(args).release)
        run_log = RunLog(trainer, streams)
    stop.install_handlers(stack)
    try:
        train(trainer, evaluator, run_log)
    except TrainingInterrupted:
        is_interrupted = True
        trainer.save(final=True)
    finally:
        if run_log:
            run_log.close()
    if is_interrupted:
        if data_error := stop.data_error_message():
            raise RunError(f"{data_error}. Checkpoint saved at step {trainer.step}; fix the data and rerun "
                           "with --resume")
        print0(f"interrupted at step {trainer.step}, checkpoint saved; rerun with --resume to continue")
        return 128 + (stop.local_signal or signal.SIGTERM)
    loss = "" if trainer.val_loss is None else f", validation loss {trainer.val_loss:.4f}"
    print0(f"done: {args.max_steps} steps, {args.max_steps * args.total_batch_size:,} tokens{loss}")
    if args.preset == "smoke" and args.max_steps < 1000:
        print0("next: the same command with --max_steps 1000, or `python fineweb.py --pretokenized 10` and a "
               "GPU for the 124M run")
    return 0


if __name__ == "__main__":
    run_script("train_gpt2.py", main)
