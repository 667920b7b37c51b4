"""
Reproduce GPT-2 (124M): the model, the data loader and the training loop in one file.

    python train_gpt2.py                                      # one GPU, or a smoke run anywhere
    torchrun --standalone --nproc_per_node=8 train_gpt2.py    # 8 GPUs
    python train_gpt2.py --init log/last.pt --eval_only --prompt "The sea" --sample_length 200

In the line of build-nanogpt, with its names and its numbers. Two ideas carry what is added: `step`
counts completed updates everywhere, and the batch of a step is a function of that step alone. So a
run can be stopped, resumed, moved to another number of processes or inspected, and nothing but the
step has to be remembered to know which tokens come next.

Read it from the top: flags, model, optimizer and schedule, data, evaluation, one training step,
setting up, the loop. Beside it: tokens.py (tokenizer, shards), loss.py, checkpoint.py, machine.py
(processes, device), common.py (errors, flags, files), hellaswag.py, plot.py.
"""

import contextlib
import glob
import math
import os
import platform
import time
from dataclasses import asdict, dataclass, fields, replace
from functools import partial

import numpy as np
import torch
import torch.distributed
import torch.nn as nn
from torch.nn import functional as F

from checkpoint import (
    check_resume, describe_data, export_hf, load_for_resume, read_checkpoint, save_checkpoint,
    swap_conv1d,
)
from common import (
    HERE, AgreedError, Clock, Parser, Reporter, RunError, UserError, add_flags, check_ranges, flag,
    is_due, one_line, open_log_dir, open_reporter, optional_import, run_main, say, versions, warn,
)
from loss import head_cross_entropy
from machine import (
    Dist, StopFlag, best_dtype, can_compile, fits_gpu, load_optimizer, make_optimizer,
    measure_matmul, optimizer_state, processes,
)
from tokens import (
    MANIFEST, Data, encode_prompt, inspect_step, open_data, open_hellaswag, scan_vocabulary,
)

SHARDS = os.path.join(HERE, "edu_fineweb10B")

# -----------------------------------------------------------------------------
# Flags: one field each, with its default, its meaning and its range

GPT2_SIZES = {
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),  # 124M parameters
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),  # 350M
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),  # 774M
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),  # 1558M
}
MAX_LR = dict(zip(GPT2_SIZES, (6e-4, 3e-4, 2.5e-4, 2e-4), strict=True))  # GPT-3 paper, table 2.1
PRESETS = {name: size | dict(max_lr=MAX_LR[name]) for name, size in GPT2_SIZES.items()} | {
    "smoke": dict(n_layer=4, n_head=4, n_embd=128, block_size=256, T=128, total_batch_size=512,
                  max_lr=2e-3, warmup_steps=10, max_steps=100, eval_every=25, val_tokens=4096,
                  data=os.path.join(HERE, "input.txt")),
}
FLAG_GROUPS = dict(preset="model", data="data", max_lr="optimization", device="machine",
                   eval_every="evaluation", log_dir="run")


@dataclass(frozen=True)
class TrainConfig:
    """Every setting of a run. None, 0 or auto: decided at start-up, as the text says."""

    preset: str = flag("auto", "sizes and max_lr; auto = gpt2 where there are a GPU and shards, "
                       "smoke on a CPU", choices=("auto", *PRESETS))
    n_layer: int = flag(12, "transformer blocks", ge=1)
    n_head: int = flag(12, "attention heads; divides n_embd", ge=1)
    n_embd: int = flag(768, "width of the residual stream", ge=1)
    block_size: int = flag(1024, "longest context in tokens", ge=1)
    vocab_size: int = flag(50304, "rows of the embedding, 50257 and padding", ge=1)
    pos: str = flag("learned", "position encoding", choices=("learned", "rope"))
    mlp: str = flag("gelu", "feed-forward layer", choices=("gelu", "swiglu"))
    norm: str = flag("layernorm", "normalization", choices=("layernorm", "rmsnorm"))
    init: str = flag("scratch", "gpt2, gpt2-medium, gpt2-large or gpt2-xl from Hugging Face, or a "
                     "checkpoint's path: its weights and shape only")

    data: str = flag("", "folder of shards, or a text file",
                     shown="edu_fineweb10B beside this script; smoke: input.txt")
    shuffle: str = flag("none", "order of the windows: as they come, or a new permutation each "
                        "epoch", choices=("none", "windows"))
    B: int = flag(0, "rows per micro-step and process; 0 = on CUDA the largest power of two up to "
                  "64 that fits, on a CPU up to 4", ge=0)
    T: int = flag(1024, "tokens per row, at most block_size", ge=1)
    total_batch_size: int = flag(524288, "tokens per step over all processes", ge=1)

    max_lr: float = flag(6e-4, "peak learning rate", gt=0)
    min_lr: float = flag(None, "final learning rate", float, ge=0, shown="max_lr / 10")
    warmup_steps: int = flag(715, "steps of linear warm-up", ge=0)
    max_steps: int = flag(19073, "steps of the run", ge=1)
    weight_decay: float = flag(0.1, "of matrices and embeddings", ge=0)
    grad_clip: float = flag(1.0, "largest gradient norm, 0 = no limit", ge=0)
    optimizer: str = flag("adamw", "muon: Muon for the matrices in the blocks, AdamW for the rest",
                          choices=("adamw", "muon"))
    seed: int = flag(1337, "of the initial weights and of --shuffle", ge=0)

    device: str = flag("auto", "cuda, cuda:1, mps or cpu")
    dtype: str = flag("auto", "of autocast; auto = bfloat16 where CUDA has it, float16 on older "
                      "cards, else float32", choices=("auto", "bfloat16", "float16", "float32"))
    compile: bool = flag(None, "torch.compile the training step", bool, shown="on for CUDA")
    zero: bool = flag(False, "shard the optimizer state over the processes")

    eval_every: int = flag(250, "steps between evaluations; also at step 0 and at the end", ge=1)
    val_tokens: int = flag(None, "tokens per validation", int, ge=1,
                           shown="10485760, on a CPU 65536")
    hellaswag: int = flag(None, "HellaSwag examples per evaluation, 0 = off", int, ge=0,
                          shown="10042, on a CPU 0")
    prompt: str = flag("Hello, I'm a language model,", "text to continue, - = read stdin")
    num_samples: int = flag(4, "samples per evaluation, 0 = off", ge=0)
    sample_length: int = flag(32, "tokens per sample, with the prompt", ge=1)
    top_k: int = flag(50, "sample among the k likeliest tokens, 0 = all", ge=0)
    temperature: float = flag(1.0, "of sampling, 0 = greedy", ge=0)

    log_dir: str = flag("log", "folder of the run's files")
    save_every: int = flag(1000, "steps between writes of last.pt, 0 = at the end only", ge=0)
    checkpoint_every: int = flag(5000, "steps between kept model_{step:05d}.pt, 0 = at the end "
                                 "only", ge=0)
    resume: bool = flag(False, "go on from the newest good checkpoint in log_dir, or start")
    eval_only: bool = flag(False, "evaluate and sample what --init or --resume loads, then stop")
    export_hf: str = flag("", "write the weights to this folder for Hugging Face, then stop")
    inspect: int = flag(None, "print what this step reads and its text, then stop", int, ge=0,
                        le=10**9, shown="")
    wandb: str = flag("", "also log to this project of Weights & Biases", empty=True)

    def __post_init__(self):
        check_ranges(self)
        if self.min_lr is None:
            object.__setattr__(self, "min_lr", self.max_lr / 10)
        if self.min_lr > self.max_lr:
            raise UserError(f"--min_lr {self.min_lr:g} is above --max_lr {self.max_lr:g}")
        if self.n_embd % self.n_head:
            raise UserError(f"--n_embd {self.n_embd} is not divisible by --n_head {self.n_head}")
        if self.pos == "rope" and self.n_embd // self.n_head % 2:
            raise UserError("--pos rope needs an even n_embd / n_head")
        if self.T > self.block_size:
            raise UserError(f"--T {self.T} is beyond --block_size {self.block_size}: lower T or "
                            "raise block_size")


# What belongs to a command, not to a run: never taken from a checkpoint.
PER_COMMAND = {"preset", "init", "device", "log_dir", "resume", "eval_only", "export_hf", "inspect"}
# What a resume may change. Everything else is the mathematics of the run.
ELASTIC = PER_COMMAND | {"data", "B", "compile", "zero", "eval_every", "val_tokens", "hellaswag",
                         "prompt", "num_samples", "sample_length", "top_k", "temperature",
                         "save_every", "checkpoint_every", "wandb"}


def parse_flags(argv=None):
    """The flags that were typed, as a dict; the rest is left to a checkpoint or a preset."""
    parser = Parser(__doc__.strip().split("\n\nIn the")[0])
    add_flags(parser, TrainConfig, FLAG_GROUPS)
    return vars(parser.parse_args(argv))


def choose_preset(given, device_type, world_size):
    """(preset, why) where --preset is auto. Several processes are no smoke run by accident."""
    shards = bool(glob.glob(os.path.join(SHARDS, "*train*")))
    if device_type != "cpu":
        if shards or "data" in given or "resume" in given or world_size > 1:
            return "gpt2", f"there is an accelerator, {device_type}"
        return "smoke", f"there are no shards in {SHARDS}"
    if world_size > 1 and "data" not in given:
        raise UserError(f"{world_size} processes on a CPU: say --preset gpt2 or --preset smoke")
    return "smoke", "there is no GPU"

# -----------------------------------------------------------------------------
# The model: GPT-2 (Radford et al. 2019), and three later variations behind flags


@dataclass
class GPTConfig:
    block_size: int = 1024  # longest context
    vocab_size: int = 50257  # 50,000 BPE merges + 256 bytes + <|endoftext|>
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    pos: str = "learned"
    mlp: str = "gelu"
    norm: str = "layernorm"


def make_norm(config):
    return (nn.LayerNorm if config.norm == "layernorm" else nn.RMSNorm)(config.n_embd, eps=1e-5)


def rotate(x, cos, sin):
    """RoPE (Su et al. 2021, arXiv 2104.09864): turn the pairs (i, i + hs/2) of x (B, nh, T, hs)."""
    x1, x2 = x.float().chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # queries, keys, values at once
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.c_proj.is_residual_projection = True
        self.n_head = config.n_head

    def forward(self, x, rope=None, mask=None, cache=None):
        """x (B, T, C) -> (B, T, C). `cache`, a dict, remembers keys and values between calls."""
        B, T, C = x.size()
        q, k, v = (t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
                   for t in self.c_attn(x).split(C, dim=2))
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            end = cache["length"] + T
            if self not in cache:
                cache[self] = q.new_empty(2, *q.shape[:2], cache["size"], q.size(3))
            cache[self][:, :, :, end - T:end] = torch.stack((k, v))
            k, v = cache[self][:, :, :, :end]
        causal = mask is None and T == k.size(2)  # a single new token may see all of the cache
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))


class MLP(nn.Module):
    """4x wide with tanh GELU as GPT-2 has it, or SwiGLU (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.gated = config.mlp == "swiglu"
        hidden = 256 * math.ceil(8 * C / 3 / 256) if self.gated else 4 * C
        self.c_fc = nn.Linear(C, 2 * hidden if self.gated else hidden)  # gate and value at once
        self.c_proj = nn.Linear(hidden, C)
        self.c_proj.is_residual_projection = True

    def forward(self, x):
        x = self.c_fc(x)
        if self.gated:
            gate, x = x.chunk(2, dim=-1)
            return self.c_proj(F.silu(gate) * x)
        return self.c_proj(F.gelu(x, approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = make_norm(config)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x, rope=None, mask=None, cache=None):
        x = x + self.attn(self.ln_1(x), rope, mask, cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(dict(wte=nn.Embedding(config.vocab_size, config.n_embd)))
        if config.pos == "learned":
            self.transformer.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.transformer.h = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.transformer.ln_f = make_norm(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight  # weight tying: one tensor, two uses
        self.apply(self._init_weights)

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            std = 0.02
            if getattr(module, "is_residual_projection", False):
                std *= (2 * self.config.n_layer) ** -0.5  # two additions to the stream per block
            torch.nn.init.normal_(module.weight, mean=0.0, std=std)
            if getattr(module, "bias", None) is not None:
                torch.nn.init.zeros_(module.bias)

    def hidden(self, idx, pos=None, mask=None, cache=None):
        """Token ids (B, T) -> the states that lm_head reads, (B, T, C).

        pos (B, T): positions, where they are not 0..T-1. mask (B, 1, T, T), bool: True = may
        attend, where that is not causal. cache: {"length": 0, "size": tokens to make room for},
        filled and used while generating.
        """
        T, past = idx.size(1), cache["length"] if cache else 0
        assert pos is not None or past + T <= self.config.block_size, (
            f"{past + T} tokens, but block_size is {self.config.block_size}")
        if pos is None:
            pos = torch.arange(past, past + T, device=idx.device)
        x, rope = self.transformer.wte(idx), None
        if self.config.pos == "learned":
            x = x + self.transformer.wpe(pos)
        else:
            half = self.config.n_embd // self.config.n_head // 2
            freqs = 10000.0 ** (-torch.arange(half, device=idx.device) / half)
            angles = (pos[..., None] * freqs).view(-1, 1, T, half)  # (B or 1, 1, T, hs/2)
            rope = angles.cos(), angles.sin()
        for block in self.transformer.h:
            x = block(x, rope, mask, cache)
        if cache is not None:
            cache["length"] = past + T
        return self.transformer.ln_f(x)

    def forward(self, idx, targets=None):
        """idx (B, T) -> (logits (B, T, V), None); with targets (B, T) -> (None, mean loss)."""
        x = self.hidden(idx)
        if targets is None:
            return self.lm_head(x), None
        return None, head_cross_entropy(x, self.lm_head.weight, targets)

    @torch.no_grad()
    def generate(self, idx, n_new, temperature=1.0, top_k=50, n_vocab=50257, generator=None,
                 use_cache=True):
        """Yield n_new times the next token (B, 1) of idx (B, T); ids stay below n_vocab.

        Beyond block_size every token is computed afresh from the last block_size tokens.
        temperature 0 takes the likeliest token; top_k 0 samples among all.
        """
        size = min(idx.size(1) + n_new, self.config.block_size)
        cache = {"length": 0, "size": size} if use_cache else None
        n_vocab = min(n_vocab, self.config.vocab_size)
        for _ in range(n_new):
            if cache is not None and idx.size(1) <= self.config.block_size:
                x = self.hidden(idx[:, cache["length"]:], cache=cache)
            else:
                x = self.hidden(idx[:, -self.config.block_size:])
            logits = self.lm_head(x[:, -1])[:, :n_vocab].float()
            if temperature < 1e-6:  # below it the division overflows
                next_id = logits.argmax(dim=-1, keepdim=True)
            else:
                probs = F.softmax(logits / temperature, dim=-1)
                topk_probs, topk_indices = torch.topk(probs, min(top_k or n_vocab, n_vocab))
                choice = torch.multinomial(topk_probs, 1, generator=generator)
                next_id = torch.gather(topk_indices, -1, choice)
            idx = torch.cat((idx, next_id), dim=1)
            yield next_id

    def flops_per_token(self, T):
        """Of training: 6 per weight, 12 L C T for attention (PaLM, arXiv 2204.02311, app. B)."""
        c, names = self.config, self.named_parameters()
        n = sum(p.numel() for name, p in names if name != "transformer.wpe.weight")
        return 6 * n + 12 * c.n_layer * c.n_embd * T

    def configure_optimizers(self, weight_decay, learning_rate, device_type, skip=(), zero=False):
        """AdamW: matrices and embeddings decay, biases and norms do not. `skip`: parameters that
        another optimizer takes; `zero`: shard the state over the processes."""
        skip = set(skip)
        params = [p for p in self.parameters() if p.requires_grad and p not in skip]
        decay, nodecay = ([p for p in params if (p.dim() >= 2) == d] for d in (True, False))
        for name, group in (("decayed", decay), ("non-decayed", nodecay)):
            say(f"num {name} parameter tensors: {len(group)}, with "
                f"{sum(p.numel() for p in group):,} parameters")
        groups = [{"params": decay, "weight_decay": weight_decay},
                  {"params": nodecay, "weight_decay": 0.0}]
        fused = device_type in ("cuda", "cpu", "mps")
        say(f"using fused AdamW: {fused}")
        return make_optimizer(torch.optim.AdamW, groups, zero, lr=learning_rate, betas=(0.9, 0.95),
                              eps=1e-8, fused=fused)

    @classmethod
    def from_pretrained(cls, model_type):
        """OpenAI's weights by way of Hugging Face: gpt2, gpt2-medium, gpt2-large or gpt2-xl."""
        transformers = optional_import("transformers", model_type)
        try:
            return cls.from_hf(transformers.GPT2LMHeadModel.from_pretrained(model_type))
        except (OSError, ValueError) as e:
            raise UserError(f"{model_type} cannot be had from Hugging Face ({one_line(e)})") from e

    @classmethod
    def from_hf(cls, hf):
        """A transformers GPT2LMHeadModel -> GPT with the same weights."""
        c = hf.config
        model = cls(GPTConfig(c.n_positions, c.vocab_size, c.n_layer, c.n_head, c.n_embd))
        state = {k: v for k, v in hf.state_dict().items()
                 if not k.endswith((".attn.bias", ".attn.masked_bias"))}
        model.load_state_dict(swap_conv1d(state))
        return model


def load_model(checkpoint, path):
    """The GPT of an opened checkpoint."""
    try:
        model = GPT(GPTConfig(**checkpoint["config"]))
        model.load_state_dict(checkpoint["model"])
        return model
    except (RuntimeError, TypeError) as e:
        raise UserError(f"the weights in {path} do not fit its config ({one_line(e)})") from None


def load_weights(name, device="cpu"):
    """(model, tokenizer name, flags of its run) of a checkpoint, or of OpenAI's weights by name."""
    if name in GPT2_SIZES:
        return GPT.from_pretrained(name).to(device), "gpt2", {}
    checkpoint = read_checkpoint(name)
    model = load_model(checkpoint, name).to(device)
    return model, checkpoint.get("tokenizer", "gpt2"), checkpoint.get("flags", {})


# -----------------------------------------------------------------------------
# Optimizer and schedule


def make_optimizers(model, cfg, device_type, zero):
    """{"adamw": ...}, and with --optimizer muon {"muon": ...} for the matrices in the blocks."""
    matrices = [p for p in model.transformer.h.parameters() if p.dim() == 2]
    matrices = matrices if cfg.optimizer == "muon" else []
    optimizers = {"adamw": model.configure_optimizers(cfg.weight_decay, cfg.max_lr, device_type,
                                                      skip=matrices, zero=zero)}
    if matrices:
        say(f"using Muon for {len(matrices)} matrices")
        # match_rms_adamw scales Muon's updates so that AdamW's learning rate suits both
        optimizers["muon"] = make_optimizer(
            torch.optim.Muon, matrices, zero, lr=cfg.max_lr, weight_decay=cfg.weight_decay,
            adjust_lr_fn="match_rms_adamw")
    return optimizers


def get_lr(it, max_lr=6e-4, min_lr=6e-5, warmup_steps=715, max_steps=19073):
    """Learning rate of update `it`: linear warm-up, then a cosine down to min_lr at max_steps."""
    if it < warmup_steps:
        return max_lr * (it + 1) / warmup_steps
    if it >= max_steps:
        return min_lr
    decay_ratio = (it - warmup_steps) / (max_steps - warmup_steps)
    coeff = 0.5 * (1.0 + math.cos(math.pi * decay_ratio))
    return min_lr + coeff * (max_lr - min_lr)


# -----------------------------------------------------------------------------
# Data: the batch of a step is a function of the step


class DataLoaderLite:
    """Batches (x, y), each (B, T) int64 on the CPU, y one token to the right of x.

    The tokens of a split are cut into windows of T inputs and their T targets; a window may
    straddle shards. Step s takes the global rows s*R .. s*R + R-1, R = rows_per_step. Row g is
    window order(g mod n) of epoch g // n, so every window is read once an epoch. Inside a step,
    row (m*W + k)*B + b goes to micro-step m, process k of W, row b: the same rows make the same
    step for any number of processes and any B.

    tokens: a tokens.TokenStream of at least T + 1 tokens, else UserError. shuffle: "none", or
    "windows": one permutation per epoch, the same on all processes, drawn from (seed, epoch).
    """

    def __init__(self, B, T, process_rank, num_processes, tokens, rows_per_step=None,
                 shuffle="none", seed=1337, vocab_size=65536):
        self.B, self.T, self.tokens = B, T, tokens
        self.process_rank, self.num_processes = process_rank, num_processes
        self.rows_per_step = rows_per_step or B * num_processes
        self.grad_accum_steps = self.rows_per_step // (B * num_processes)
        self.shuffle, self.seed, self.vocab_size = shuffle, seed, vocab_size
        self.n_windows = (len(tokens) - 1) // T
        if self.n_windows < 1:
            raise UserError(f"{', '.join(tokens.names[:3])}: {len(tokens):,} tokens are less than "
                            f"one window of T + 1 = {T + 1}: lower --T or give more data")
        self.orders = {}
        self.reset()

    def reset(self, step=0):
        """Make the first batch of `step` the next one."""
        self.next_micro_step = step * self.grad_accum_steps

    def next_batch(self):
        step, micro_step = divmod(self.next_micro_step, self.grad_accum_steps)
        self.next_micro_step += 1
        first = step * self.rows_per_step
        first += (micro_step * self.num_processes + self.process_rank) * self.B
        return self.read(self.windows(np.arange(first, first + self.B)))

    def windows(self, rows):
        """Window numbers of global rows, both int64 arrays."""
        epochs, numbers = np.divmod(rows, self.n_windows)
        if self.shuffle == "windows":
            for epoch in np.unique(epochs):
                here = epochs == epoch
                numbers[here] = self.order(int(epoch))[numbers[here]]
        return numbers

    def order(self, epoch):
        """The permutation of an epoch; two are kept, for a step across the border."""
        if epoch not in self.orders:
            order = np.arange(self.n_windows, dtype=np.uint32)  # 4 bytes: 40 MB for 10B tokens
            # RandomState, unlike default_rng, promises the same numbers in every version of numpy
            np.random.RandomState([self.seed % 2**32, self.seed >> 32, epoch]).shuffle(order)
            self.orders = {e: o for e, o in self.orders.items() if e == epoch - 1} | {epoch: order}
        return self.orders[epoch]

    def read(self, windows):
        """(x, y) of these windows, each (len(windows), T); neighbours are read in one go."""
        buf = np.empty((2, len(windows), self.T), dtype=np.int64)
        starts = np.flatnonzero(np.diff(windows, prepend=-2) != 1)
        for i, j in zip(starts, [*starts[1:], len(windows)], strict=True):
            pos = int(windows[i]) * self.T
            ids = self.tokens.read(pos, int(j - i) * self.T + 1)
            self.check_vocabulary(ids, pos)
            buf[0, i:j], buf[1, i:j] = ids[:-1].reshape(-1, self.T), ids[1:].reshape(-1, self.T)
        return torch.from_numpy(buf).unbind()

    def check_vocabulary(self, ids, pos):
        """UserError where `ids`, read at token `pos` of the stream, are not of this vocabulary."""
        if ids.max() >= self.vocab_size:
            shard, offset = self.tokens.locate(pos + int(ids.argmax()))
            raise UserError(f"{self.tokens.names[shard]} has token {ids.max()} at offset {offset}, "
                            f"beyond --vocab_size {self.vocab_size}: raise it, or give shards of "
                            "GPT-2 tokens")

    def where(self, step):
        """(row, epoch, window, shard number, offset) of each row of a step, over all processes."""
        rows = np.arange(step * self.rows_per_step, (step + 1) * self.rows_per_step)
        for row, window in zip(rows, self.windows(rows), strict=True):
            yield (int(row), int(row) // self.n_windows, int(window),
                   *self.tokens.locate(int(window) * self.T))


# -----------------------------------------------------------------------------
# A run


@dataclass
class Run:
    """All that a step and an evaluation need, on this process."""

    cfg: TrainConfig
    dist: Dist
    data: Data
    raw_model: GPT  # for evaluation, sampling and checkpoints
    loader: DataLoaderLite | None
    val_loader: DataLoaderLite | None
    prompt: list  # token ids; empty: no samples
    examples: list  # of HellaSwag; empty: off
    stop: StopFlag
    step: int = 0  # completed updates
    val_loss: float | None = None  # at this step
    model: nn.Module | None = None  # raw_model in DDP and compiled
    ddp: nn.Module | None = None
    compiled: bool = False
    optimizers: dict | None = None
    scaler: torch.amp.GradScaler | None = None
    batch: tuple | None = None  # the next (x, y), on the device
    matmul_rate: float = 0.0  # FLOP/s of a large matrix product on this device in this dtype
    reporter: Reporter | None = None  # on the main process

    def autocast(self):
        dtype = getattr(torch, self.cfg.dtype)
        return torch.autocast(self.dist.device.type, dtype, enabled=dtype != torch.float32)

    def fetch_batch(self):
        """Start the next batch on its way to the device, beside the work that runs there."""
        cuda = self.dist.device.type == "cuda"
        self.batch = [(t.pin_memory() if cuda else t).to(self.dist.device, non_blocking=True)
                      for t in self.loader.next_batch()]


# -----------------------------------------------------------------------------
# Evaluation: on the raw module, so that the compiled step never meets another shape. Nothing in
# the model depends on train or eval mode. None: a signal came in between.


@torch.no_grad()
def validate(run):
    """Mean loss over the first val_tokens of the val split: the same for any B and world size."""
    loader, dist = run.val_loader, run.dist
    wanted = run.cfg.val_tokens or (65536 if dist.device.type == "cpu" else 10485760)
    n = min(max(1, wanted // loader.T), loader.n_windows)
    total = torch.zeros((), device=dist.device)
    for first in range(0, n, loader.B * dist.world_size):  # as often on every process
        if run.stop.anywhere(dist):
            return None
        mine = first + dist.rank * loader.B
        windows = np.arange(mine, min(mine + loader.B, n))
        if len(windows):
            x, y = (t.to(dist.device) for t in loader.read(windows))
            with run.autocast():
                _, loss = run.raw_model(x, y)
            total += loss * len(windows)
    loss = dist.sum([total.item()])[0] / n
    whole = f" over all {n * loader.T:,} tokens there are" if n < wanted // loader.T else ""
    say(f"validation loss: {loss:.4f}{whole}")
    return loss


def score_hellaswag(run):
    """HellaSwag accuracy (acc_norm), the examples shared out over the processes."""
    import hellaswag

    dist = run.dist
    with run.autocast():
        result = hellaswag.evaluate(run.raw_model, run.examples, dist.device, dist.rank,
                                    dist.world_size, between=lambda: run.stop.anywhere(dist),
                                    progress=dist.master_process)
    if result is None:
        return None
    correct, total = (int(n) for n in dist.sum([result.correct_norm, result.total]))
    say(f"HellaSwag accuracy: {correct}/{total}={correct / total:.4f}")
    return correct / total


def sample(run, show, live=None):
    """Continue the prompt num_samples times, on the main process; show(i, text) each.

    live(ids) is given the tokens of sample 0 as they come. The generator is its own, seeded 42
    every time: no other random state moves.
    """
    cfg, tokenizer = run.cfg, run.data.tokenizer
    idx = torch.tensor(run.prompt, device=run.dist.device).repeat(cfg.num_samples, 1)
    generator = torch.Generator(device=run.dist.device).manual_seed(42)
    columns = [idx]
    with run.autocast():
        for column in run.raw_model.generate(idx, cfg.sample_length - idx.size(1), cfg.temperature,
                                             cfg.top_k, tokenizer.n_vocab, generator):
            columns.append(column)
            if live:
                live(column[0].tolist())
    for i, row in enumerate(torch.cat(columns, dim=1).tolist()):
        show(i, tokenizer.decode(row))


def evaluate(run, step):
    """Validation, HellaSwag and samples, as far as they are on. False: a signal came in between."""
    values = {"val": validate(run)}
    if values["val"] is not None and run.examples:
        values["hella"] = score_hellaswag(run)
    if None in values.values():
        return False
    run.val_loss = values["val"]  # a checkpoint that has it needs no more evaluation
    if run.dist.master_process:
        run.reporter.scalars(step, **values)
        if step > 0 and run.prompt:
            sample(run, lambda i, text: run.reporter.sample(step, i, text))
        if 0 < step < run.cfg.max_steps:  # at its end a run draws anyway
            run.reporter.draw()
    return True


def evaluate_only(run):
    """Validation loss, HellaSwag and samples of loaded weights; writes nothing."""
    if run.val_loader:
        validate(run)
    if run.examples:
        score_hellaswag(run)
    if run.prompt:
        decode = run.data.tokenizer.stream()
        print(f"sample 0: {decode(run.prompt)}", end="", flush=True)
        sample(run, lambda i, text: print(f"\nsample {i}: {text}" * (i > 0), end=""),
               live=lambda ids: print(decode(ids), end="", flush=True))
        print()


def save(run, keep=False, must=False):
    """Write a checkpoint. All processes call it: under --zero each gives its share."""
    optimizers = {k: optimizer_state(o, run.dist) for k, o in run.optimizers.items()}
    if run.dist.master_process:
        save_checkpoint(dict(
            model=run.raw_model.state_dict(), optimizer=optimizers, scaler=run.scaler.state_dict(),
            step=run.step, config=asdict(run.raw_model.config), flags=asdict(run.cfg),
            tokenizer=run.data.tokenizer_name, data=run.data.identity, val_loss=run.val_loss,
            rng=torch.get_rng_state()), run.cfg.log_dir, keep, must)


# -----------------------------------------------------------------------------
# One training step


def train_step(run):
    """One update from total_batch_size tokens. Returns (loss, gradient norm before clipping, lr).

    The loss is the mean over micro-steps and processes. Gradients are synchronized in the last
    micro-step only; DDP reads that decision in its forward. Neither a loss nor a norm that is not
    finite reaches the weights.
    """
    cfg, dist, grad_accum_steps = run.cfg, run.dist, run.loader.grad_accum_steps
    loss_accum = torch.zeros((), device=dist.device)
    for micro_step in range(grad_accum_steps):
        x, y = run.batch
        local = run.ddp is not None and micro_step < grad_accum_steps - 1
        with run.ddp.no_sync() if local else contextlib.nullcontext():
            with run.autocast():
                _, loss = run.model(x, y)
            loss = loss / grad_accum_steps  # the loss is a mean: so is the sum of these parts
            run.scaler.scale(loss).backward()
        loss_accum += loss.detach()
        run.fetch_batch()
    for optimizer in run.optimizers.values():
        run.scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(run.raw_model.parameters(), cfg.grad_clip or math.inf)
    shared = torch.stack([loss_accum, torch.tensor(float(run.stop.here()), device=dist.device)])
    if dist.world_size > 1:
        torch.distributed.all_reduce(shared)
    loss, stop, norm = torch.cat([shared, norm.view(1)]).tolist()  # the one wait for the device
    loss, run.stop.agreed = loss / dist.world_size, stop > 0
    check_finite(run, loss, norm)
    lr = get_lr(run.step, cfg.max_lr, cfg.min_lr, cfg.warmup_steps, cfg.max_steps)
    for optimizer in run.optimizers.values():
        for param_group in optimizer.param_groups:
            param_group["lr"] = lr
        if math.isfinite(norm):
            run.scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
    run.scaler.update()
    return loss, norm, lr


def check_finite(run, loss, norm):
    """End the run before a loss or a norm that is not finite spoils the weights."""
    if math.isfinite(loss) and (math.isfinite(norm) or run.scaler.get_scale() > 1):
        return  # float16: the scaler skips an update whose norm overflowed, and halves its scale
    rows, names = list(run.loader.where(run.step)), run.loader.tokens.names
    (*_, first, start), (*_, last, end) = rows[0], rows[-1]
    raise RunError(
        f"step {run.step}: loss {loss}, gradient norm {norm}. The weights were not updated, the "
        f"last good checkpoint in {run.cfg.log_dir} is as it was. The step reads {names[first]} "
        f"offset {start} to {names[last]} offset {end + run.cfg.T}; --inspect {run.step} shows it")


# -----------------------------------------------------------------------------
# Setting up: every check comes before anything is written


def build_config(given, saved, init, dist):
    """Settle every flag: what was typed beats the checkpoint, which beats the preset."""
    model, _, init_flags = init
    defaults = {f.name: f.default for f in fields(TrainConfig)}
    if saved:
        cfg = {k: v for k, v in saved["flags"].items()
               if k in defaults.keys() - PER_COMMAND and (k, v) != ("prompt", "-")}  # not again
        cfg |= {"preset": saved["flags"]["preset"]} | PRESETS.get(given.get("preset"), {})
    elif given.get("preset", "auto") == "auto":
        preset, why = choose_preset(given, dist.device.type, dist.world_size)
        cfg = PRESETS[preset]
        given = given | {"preset": preset}
        if not given.get("eval_only") and not given.get("export_hf"):
            say(f"preset {preset}: {why}" + ("; for the real run: python fineweb.py, then this "
                                             "command on a GPU" * (preset == "smoke")))
    else:
        cfg = PRESETS[given["preset"]]
    if model:
        shape = asdict(model.config)
        for k in shape.keys() & given.keys():
            if given[k] != shape[k]:
                raise UserError(f"--{k} {given[k]} contradicts --init {given['init']}, where it is "
                                f"{shape[k]}: leave --{k} out")
        cfg = cfg | shape
        if given.get("eval_only"):  # as in the checkpoint's own run
            cfg = cfg | {k: init_flags.get(k, defaults[k]) for k in ("data", "T", "val_tokens")}
    cfg = defaults | cfg | given
    if "T" not in given:
        cfg["T"] = min(cfg["T"], cfg["block_size"])
    if "data" in given:
        cfg["data"] = os.path.abspath(given["data"])
    if cfg["dtype"] == "auto":
        cfg["dtype"] = best_dtype(dist.device)
    return TrainConfig(**cfg)


def check_batch(cfg, world_size):
    """Rows per process and step, or UserError with the nearest total_batch_size that works."""
    rows = cfg.T * world_size * (cfg.B or 1)
    if cfg.total_batch_size % rows == 0:
        return cfg.total_batch_size // (cfg.T * world_size)
    unit = rows if cfg.B or cfg.total_batch_size < 16 * rows else 16 * rows  # leaves room for B
    below = cfg.total_batch_size // unit * unit
    raise UserError(f"--total_batch_size {cfg.total_batch_size} is not divisible by B * T * "
                    f"processes = {cfg.B or 1} * {cfg.T} * {world_size} = {rows}: use "
                    + " or ".join(str(n) for n in (below, below + unit) if n))


def choose_B(cfg, rows, model, dist):
    """Rows per micro-step: what --B says, or the largest power of two that divides and fits."""
    if cfg.B or cfg.eval_only:
        return cfg.B or 8
    device, dtype = dist.device, getattr(torch, cfg.dtype)
    sizes = [b for b in (64, 32, 16, 8, 4, 2, 1) if rows % b == 0]
    if device.type != "cuda":
        return next(b for b in sizes if b <= 4)

    def attempt(B):  # eager: a compiled step needs less
        idx = torch.zeros(B, cfg.T, dtype=torch.long, device=device)
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            _, loss = model(idx, idx)
        loss.backward()

    adamw_bytes = 8 * sum(p.numel() for p in model.parameters())
    largest = next((b for b in sizes if fits_gpu(partial(attempt, b), adamw_bytes, device)), 0)
    model.zero_grad(set_to_none=True)
    B = min(dist.gather(largest))
    if not B:
        raise AgreedError("not even --B 1 fits the GPU: use a smaller --T or a smaller model")
    return B


def make_run(cfg, saved, init_model, data, n_examples, dist):
    """The part of a run that evaluation needs too: model, data, prompt, HellaSwag examples."""
    rows = None if cfg.eval_only else dist.together(check_batch, cfg, dist.world_size)
    prompt = dist.together(lambda: dist.master_process and encode_prompt(cfg, data.tokenizer)) or []
    examples = open_hellaswag(n_examples, cfg.block_size, data.tokenizer, dist)
    torch.manual_seed(cfg.seed)
    shape = {f.name: getattr(cfg, f.name) for f in fields(GPTConfig)}
    model = init_model or GPT(GPTConfig(**shape))
    if saved:
        model.load_state_dict(saved.pop("model"))
    model.to(dist.device)
    split = choose_B(cfg, rows, model, dist), cfg.T, dist.rank, dist.world_size
    loader = val_loader = None
    if data.train:
        loader = dist.together(DataLoaderLite, *split, data.train, cfg.total_batch_size // cfg.T,
                               cfg.shuffle, cfg.seed, cfg.vocab_size)
        val_loader = dist.together(DataLoaderLite, *split, data.val, None, "none", 0,
                                   cfg.vocab_size)
        on_main = (loader, val_loader) if dist.master_process else ()
        dist.together(lambda: [scan_vocabulary(x) for x in on_main])
    return Run(cfg, dist, data, model, loader, val_loader, prompt, examples, StopFlag())


def prepare_training(run, saved):
    """Wrap the model (DDP, then compile: the order torch recommends) and make the optimizers."""
    cfg, dist, device = run.cfg, run.dist, run.dist.device
    cuda = device.type == "cuda"
    dist.together(lambda: optional_import("wandb", "--wandb") if cfg.wandb else None)
    run.model = run.raw_model
    if dist.world_size > 1:
        run.model = run.ddp = nn.parallel.DistributedDataParallel(
            run.raw_model, device_ids=[device.index] if cuda else None,
            gradient_as_bucket_view=True)
    wanted = cuda if cfg.compile is None else cfg.compile
    run.compiled = all(dist.gather(wanted and can_compile(device)))
    if run.compiled:
        run.model = torch.compile(run.model)
        if device.type == "cpu":
            # the compiled embedding backward adds atomically: without this no two runs are equal
            torch.use_deterministic_algorithms(True)
            torch.utils.deterministic.fill_uninitialized_memory = False
    run.optimizers = make_optimizers(run.raw_model, cfg, device.type, cfg.zero and bool(run.ddp))
    run.scaler = torch.amp.GradScaler(device.type, enabled=cfg.dtype == "float16")
    run.matmul_rate = measure_matmul(device, getattr(torch, cfg.dtype))
    if saved:
        for kind, state in saved.pop("optimizer").items():
            load_optimizer(run.optimizers[kind], state)
        run.scaler.load_state_dict(saved["scaler"])
        torch.set_rng_state(saved["rng"])
        run.step = saved["step"]


def describe_run(run):
    """The start-up block; returns what config.json keeps, enough to repeat the run."""
    cfg, loader, device, data = run.cfg, run.loader, run.dist.device, run.data
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    say(f"using device: {device} ({name}), {cfg.dtype}, compile {'on' if run.compiled else 'off'}; "
        f"{run.matmul_rate / 1e12:.2f} TFLOP/s in a large matrix product")
    say(f"total desired batch size: {cfg.total_batch_size}")
    say(f"=> calculated gradient accumulation steps: {loader.grad_accum_steps} "
        f"(B {loader.B}, T {cfg.T}, processes {run.dist.world_size})")
    for split, tokens in (("train", data.train), ("val", data.val)):
        say(f"found {len(tokens.names)} shards for split {split}: {len(tokens):,} tokens")
    epochs = cfg.max_steps * loader.rows_per_step / loader.n_windows
    say(f"max_steps {cfg.max_steps} is {epochs:.3f} epochs of {loader.n_windows:,} windows")
    if cfg.warmup_steps > cfg.max_steps:
        warn(f"--warmup_steps {cfg.warmup_steps} is beyond --max_steps {cfg.max_steps}: the "
             "learning rate never reaches its peak")
    return dict(flags=asdict(cfg), model=asdict(run.raw_model.config), B=loader.B,
                processes=run.dist.world_size, device=f"{device} ({name})", compile=run.compiled,
                data=data.identity, tokenizer=data.tokenizer_name,
                **versions(os.path.join(cfg.data or SHARDS, MANIFEST)))


# -----------------------------------------------------------------------------
# The loop


def train(run):
    """Do what is due, then one update, until max_steps updates are done. Returns the exit status.

    The last round only evaluates and saves: so the final weights are seen, and a resume at step s
    begins with what is due at s.
    """
    cfg, clock = run.cfg, Clock()
    flops = run.raw_model.flops_per_token(cfg.T) * cfg.total_batch_size / run.dist.world_size
    run.loader.reset(run.step)
    run.fetch_batch()
    run.stop.install()
    while True:
        step, last_step = run.step, run.step == cfg.max_steps
        if (step % cfg.eval_every == 0 or last_step) and not evaluate(run, step):
            break
        keep = last_step or is_due(step, cfg.checkpoint_every)
        if keep or is_due(step, cfg.save_every):
            save(run, keep, must=last_step)
        if last_step:
            break
        t0 = time.perf_counter()
        loss, norm, lr = train_step(run)
        dt = time.perf_counter() - t0
        clock.add(dt)
        run.step, run.val_loss = step + 1, None
        if run.dist.master_process:
            run.reporter.update(step, cfg.max_steps, loss, norm, lr, dt, cfg.total_batch_size,
                                flops / run.matmul_rate / dt, clock)
        if run.stop.agreed:
            break
    if run.stop.agreed:
        save(run, must=True)
        say(f"stopped by a signal at step {run.step}; the same command with --resume goes on")
        return run.stop.status
    rate = f", {cfg.total_batch_size / clock.mean:,.0f} tok/s" if clock.mean else ""
    say(f"done: {cfg.max_steps} steps, {cfg.max_steps * cfg.total_batch_size:,} tokens{rate}, "
        f"validation loss {run.val_loss:.4f}")
    say(f"try next: python train_gpt2.py --init {os.path.join(cfg.log_dir, 'last.pt')} --eval_only "
        '--prompt "The sea" --sample_length 100')
    return 0


def train_and_report(run, saved):
    """Training from end to end, with the folder of the run opened and closed around it."""
    cfg, dist = run.cfg, run.dist
    prepare_training(run, saved)
    lock = dist.together(lambda: dist.master_process and open_log_dir(cfg.log_dir, cfg.resume))
    settings = describe_run(run)
    if saved:
        say(f"resuming from {saved['path']}, step {run.step}")
    run.reporter = dist.together(lambda: open_reporter(
        cfg.log_dir, settings, run.step, cfg.wandb) if dist.master_process else None)
    if not all(dist.gather(os.path.isdir(cfg.log_dir))):
        warn(f"not every node sees {cfg.log_dir}: a resume will need it on shared storage")
    try:
        return train(run)
    except torch.OutOfMemoryError:
        B, rows = run.loader.B, run.loader.rows_per_step // dist.world_size
        smaller = next((b for b in range(B - 1, 0, -1) if rows % b == 0), None)
        raise UserError(f"out of GPU memory with --B {B}: " + (
            f"use --B {smaller}, a step stays {cfg.total_batch_size} tokens" if smaller else
            "use a smaller --T or a smaller model")) from None
    finally:
        if dist.master_process:
            run.reporter.close()
            lock.close()


def run_command(given, dist):
    """What the flags ask for, on this process. Returns the exit status."""
    dist.check_same(given)
    aside = [f for f in ("eval_only", "export_hf", "inspect") if given.get(f, False) is not False]
    saved, init = None, (None, None, {})
    if given.get("resume"):
        saved = load_for_resume(given.get("log_dir", TrainConfig.log_dir), dist)
    if not saved:
        name = given.get("init", "scratch")
        if name in GPT2_SIZES and dist.world_size > 1:  # one downloads, then all read its cache
            dist.together(lambda: GPT.from_pretrained(name) if dist.master_process else None)
        if name != "scratch":
            init = dist.together(load_weights, name)
        elif aside and aside != ["inspect"]:
            raise UserError(f"--{aside[0]} needs weights: --init PATH, or --resume and a --log_dir "
                            "that holds a checkpoint")
    cfg = dist.together(build_config, given, saved, init, dist)
    dist.check_same({"dtype": cfg.dtype}, "the GPUs are of several kinds: give --dtype float16")
    if cfg.export_hf:
        model = init[0] or load_model(saved, "the checkpoint")
        return export_hf(model, cfg.export_hf) if dist.master_process else 0
    if saved and not cfg.eval_only:
        dist.together(check_resume, *({f"--{k}": v for k, v in flags.items() if k not in ELASTIC}
                                      for flags in (asdict(cfg), saved["flags"])))
        if saved["step"] == cfg.max_steps and saved["val_loss"] is not None and not aside:
            say(f"the run in {cfg.log_dir} is finished: {cfg.max_steps} steps, validation loss "
                f"{saved['val_loss']:.4f}")
            return 0
    n_examples = cfg.hellaswag
    if n_examples is None:
        n_examples = 0 if dist.device.type == "cpu" else 10042
    data = open_data(cfg.data or SHARDS, saved["tokenizer"] if saved else init[1], dist,
                     needed=cfg.num_samples or n_examples or cfg.inspect is not None,
                     optional=cfg.eval_only and "data" not in given)
    if saved and not cfg.eval_only:
        dist.together(check_resume, *({"--data": describe_data(identity)}
                                      for identity in (data.identity, saved["data"])))
    if cfg.inspect is not None:
        check_batch(replace(cfg, B=1), 1)
        loader = DataLoaderLite(1, cfg.T, 0, 1, data.train, cfg.total_batch_size // cfg.T,
                                cfg.shuffle, cfg.seed)
        return inspect_step(loader, data.tokenizer, cfg.inspect) if dist.master_process else 0
    run = make_run(cfg, saved, init[0], data, n_examples, dist)
    return evaluate_only(run) if cfg.eval_only else train_and_report(run, saved)


def main(argv=None):
    def command():
        given = parse_flags(argv)
        with processes(given.get("device", "auto")) as dist:
            return run_command(given, dist)

    run_main("train_gpt2.py", command)


if __name__ == "__main__":
    main()
