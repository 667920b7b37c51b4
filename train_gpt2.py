"""
Reproduce GPT-2 (124M): the model, the data loader and the training loop in one file.

    python train_gpt2.py                                      # one GPU, or a smoke run anywhere
    torchrun --standalone --nproc_per_node=8 train_gpt2.py    # 8 GPUs
    python train_gpt2.py --init log/last.pt --eval_only --prompt "The sea" --sample_length 200

In the line of build-nanogpt, with its names and its numbers. Two ideas carry what is added: `step`
counts completed updates everywhere, and the batch of a step is a function of that step alone. So a
run can be stopped, resumed, moved to another number of processes or inspected, and nothing but the
step has to be remembered to know which tokens come next.

Read it from the top: flags, model and optimizers, loss, schedule, data, evaluation, one step, the
loop, setting up, main. What you need not read to learn how GPT-2 is trained (files, processes, the
parsing of flags) is in plumbing/. The sequel, a later model for the same trainer, is modern.py.
"""

import contextlib
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, fields, replace

import numpy as np
import torch
import torch.distributed
import torch.nn as nn
from torch.nn import functional as F

import hellaswag
from plumbing import checkpoint, hardware, machine, tokens
from plumbing.checks import (
    check_apple, check_batch, check_memory, choose_preset, encode_prompt, needs_data, open_tokens,
    what_next,
)
from plumbing.errors import RunError, UserError, one_line, optional_import, run_main, say, warn
from plumbing.files import HERE
from plumbing.flags import Parser, add_flags, check_ranges, flag, settle
from plumbing.machine import Stopped, StopFlag
from plumbing.reporter import open_reporter

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
# Small enough for any laptop, its text comes with the project, and in float32 all see one result.
SMOKE = dict(n_layer=4, n_head=4, n_embd=128, block_size=256, T=128, total_batch_size=512,
             max_lr=2e-3, warmup_steps=10, max_steps=100, eval_every=25, val_tokens=4096,
             hellaswag=0, dtype="float32", data=os.path.join(HERE, "input.txt"))
PRESETS = {name: size | dict(max_lr=MAX_LR[name]) for name, size in GPT2_SIZES.items()}
PRESETS["smoke"] = SMOKE

# The group of a flag is its rule on a resume.
FLAG_GROUPS = {
    "common": "the dozen that most people need; the [group] says what a resume does with it",
    "model": "model: the mathematics of the run, which a resume keeps",
    "data order": "data order: kept by a resume too",
    "optimization": "optimization: kept by a resume too",
    "machine": "machine: may change on a resume",
    "evaluation": "evaluation: may change on a resume",
    "files": "files: may change on a resume",
    "command": "command: of this call alone, never remembered",
}


@dataclass(frozen=True)
class TrainConfig:
    """Every setting of a run. None, auto and --B 0: decided at start-up, as the text says."""

    # the dozen that most people type
    preset: str = flag("command", "auto", "sizes and learning rate; auto = gpt2 where there are a "
                       "GPU and shards, smoke on a CPU", choices=("auto", *PRESETS), common=True)
    data: str = flag("files", "", "folder of shards, or a text file", common=True,
                     shown="edu_fineweb10B beside this script; smoke: input.txt")
    init: str = flag("command", "scratch", "gpt2, gpt2-medium, gpt2-large or gpt2-xl from Hugging "
                     "Face, or a checkpoint's path: its weights and shape only", common=True)
    B: int = flag("machine", 0, "rows per micro-step and process; 0 = on CUDA the largest power of "
                  "two up to 64 that fits, elsewhere up to 4", ge=0, common=True)
    max_steps: int = flag("optimization", 19073, "steps of the run", ge=1, common=True)
    max_lr: float = flag("optimization", 6e-4, "peak learning rate", gt=0, common=True)
    device: str = flag("command", "auto", "cuda, cuda:1, mps or cpu", common=True)
    log_dir: str = flag("command", "log", "folder of the run's files", common=True)
    resume: bool = flag("command", False, "go on from the newest good checkpoint in log_dir, or "
                        "start", common=True)
    eval_only: bool = flag("command", False, "evaluate and sample what --init or --resume loads, "
                           "then stop", common=True)
    prompt: str = flag("evaluation", "Hello, I'm a language model,", "text to continue, - = read "
                       "stdin", common=True)
    sample_length: int = flag("evaluation", None, "tokens per sample, with the prompt", ge=1,
                              shown="32; 128 where tokens are bytes", common=True)

    # the shape of the model
    n_layer: int = flag("model", 12, "transformer blocks", ge=1)
    n_head: int = flag("model", 12, "attention heads; divides n_embd", ge=1)
    n_embd: int = flag("model", 768, "width of the residual stream", ge=1)
    block_size: int = flag("model", 1024, "longest context in tokens", ge=1)
    vocab_size: int = flag("model", 50304, "rows of the embedding, 50257 and padding", ge=1)
    pos: str = flag("model", "learned", "position encoding", choices=("learned", "rope"))
    mlp: str = flag("model", "gelu", "feed-forward layer", choices=("gelu", "swiglu"))
    norm: str = flag("model", "layernorm", "normalization", choices=("layernorm", "rmsnorm"))

    # which tokens a step reads, and in which order
    T: int = flag("data order", 1024, "tokens per row, at most block_size", ge=1)
    total_batch_size: int = flag("data order", 524288, "tokens per step over all processes", ge=1)
    shuffle: str = flag("data order", "none", "order of the windows: as they come, or a new "
                        "permutation each epoch", choices=("none", "windows"))
    seed: int = flag("data order", 1337, "of the initial weights and of --shuffle", ge=0)

    # how it learns from them
    min_lr: float = flag("optimization", None, "final learning rate", ge=0, shown="max_lr / 10")
    warmup_steps: int = flag("optimization", 715, "steps of linear warm-up", ge=0)
    weight_decay: float = flag("optimization", 0.1, "of matrices and embeddings", ge=0)
    grad_clip: float = flag("optimization", 1.0, "largest gradient norm, 0 = no limit", ge=0)
    optimizer: str = flag("optimization", "adamw", "muon: Muon for the matrices in the blocks, "
                          "AdamW for the rest", choices=("adamw", "muon"))
    dtype: str = flag("optimization", "auto", "of autocast; auto = bfloat16 where the device does "
                      "it well, float16 on older GPUs, else float32",
                      choices=("auto", "bfloat16", "float16", "float32"))

    # on what it runs: none of this changes the result but in the last digits
    compile: bool = flag("machine", None, "torch.compile the training step", shown="on for CUDA")
    zero: bool = flag("machine", False, "shard the optimizer state over the processes")

    # what is looked at on the way
    eval_every: int = flag("evaluation", 250, "steps between evaluations; also at step 0 and at "
                           "the end", ge=1)
    val_tokens: int = flag("evaluation", None, "tokens per validation, 0 = off", ge=0,
                           shown="10485760, on a CPU 65536")
    hellaswag: int = flag("evaluation", None, "HellaSwag examples per evaluation, 0 = off", ge=0,
                          shown="10042, on a CPU 0")
    num_samples: int = flag("evaluation", 4, "samples per evaluation, 0 = off", ge=0, le=10**4)
    top_k: int = flag("evaluation", 50, "sample among the k likeliest tokens, 0 = all", ge=0)
    temperature: float = flag("evaluation", 1.0, "of sampling, 0 = greedy", ge=0)

    # what is written
    save_every: int = flag("files", 1000, "steps between writes of last.pt, 0 = at the end only",
                           ge=0)
    checkpoint_every: int = flag("files", 5000, "steps between kept model_{step:05d}.pt, 0 = at "
                                 "the end only", ge=0)
    wandb: str = flag("files", "", "also log to this project of Weights & Biases", empty=True)

    # what a call does in place of training
    export_hf: str = flag("command", "", "write the weights to this folder for Hugging Face, then "
                          "stop")
    inspect: int = flag("command", None, "print what this step reads and its text, then stop", ge=0,
                        le=10**9, shown="")

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


def parse_flags(argv, model_class):
    """The flags that were typed, as a dict; the rest is left to a checkpoint or a preset."""
    about = (sys.modules[model_class.__module__].__doc__ or "").strip()  # python -OO has none
    parser = Parser("\n\n".join(about.split("\n\n")[:2]))
    add_flags(parser, TrainConfig, FLAG_GROUPS, defaults=model_class.presets["gpt2"],
              leave_out=model_class.not_flags)
    return vars(parser.parse_args(argv))


# -----------------------------------------------------------------------------
# The model: GPT-2 (Radford et al. 2019), and three later variations behind flags


@dataclass
class GPTConfig:
    """The shape of a model."""

    block_size: int = 1024  # longest context
    vocab_size: int = 50257  # 50,000 BPE merges + 256 bytes + <|endoftext|>
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    pos: str = "learned"
    mlp: str = "gelu"
    norm: str = "layernorm"


# Training uses 50304 rows for those 50257 tokens: 393 * 128, which the GPU's tiles divide without a
# remainder. No token ever points at the 47 rows more, and the model learns to leave them alone.


def make_norm(config):
    """What each token's state goes through before a layer: its size is brought to one."""
    return (nn.LayerNorm if config.norm == "layernorm" else nn.RMSNorm)(config.n_embd, eps=1e-5)


def rotate(x, cos, sin):
    """RoPE (Su et al. 2021, arXiv 2104.09864): turn the pairs (i, i + hs/2) of x (B, T, nh, hs)."""
    # Each pair turns by an angle that grows with the position, so the product of a query and a key
    # depends on how far apart they are, and not on where.
    x1, x2 = x.float().chunk(2, dim=-1)
    # each half is cast before they are joined: half the bytes go through memory
    return torch.cat([(x1 * cos - x2 * sin).to(x.dtype), (x2 * cos + x1 * sin).to(x.dtype)], dim=-1)


def attend(layer, q, k, v, mask=None, cache=None, scale=None):
    """Attention of q to k and v, each (B, T, nh, hs) -> (B, T, nh * hs).

    mask (B, 1, T, T), bool: True = may attend; without one it is causal. `cache`, a dict, keeps the
    keys and values of this `layer` between calls, so that a new token costs one token's work; once
    it holds some, they come one at a time.
    """
    B, T, n_head, hs = q.size()
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, nh, T, hs): every head by itself
    if cache is not None:
        end = cache["length"] + T
        if layer not in cache:
            cache[layer] = q.new_empty(2, B, n_head, cache["size"], hs)
        cache[layer][:, :, :, end - T:end] = torch.stack((k, v))
        k, v = cache[layer][:, :, :, :end]
    causal = mask is None and T == k.size(2)  # a single new token may see all of the cache
    # Every token gets a mean of the values up to its own, weighed by softmax(q k * scale), which is
    # 1 / sqrt(hs) where nothing else is said. Where the device has flash attention it is this call:
    # the T x T weights are never all there.
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)
    return y.transpose(1, 2).contiguous().view(B, T, n_head * hs)  # the heads side by side again


class CausalSelfAttention(nn.Module):
    """Where tokens talk to each other. Each asks (query), says what it has to offer (key), and gets
    from itself and those before it what they tell (value), as far as their keys fit its query."""

    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # queries, keys, values at once
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)  # what the heads found, mixed
        self.c_proj.is_residual_projection = True
        self.n_head = config.n_head

    def forward(self, x, rope=None, mask=None, cache=None):
        B, T, C = x.size()
        # each head has its own C / nh channels of all three, and so its own idea of what matters
        q, k, v = (t.view(B, T, self.n_head, C // self.n_head)
                   for t in self.c_attn(x).split(C, dim=2))
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        return self.c_proj(attend(self, q, k, v, mask, cache))


class MLP(nn.Module):
    """4x wide with tanh GELU as GPT-2 has it, or SwiGLU (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.gated = config.mlp == "swiglu"
        # two of its three matrices are in c_fc; 8/3 C wide they are as large as the two of 4 C
        hidden = 256 * math.ceil(8 * C / 3 / 256) if self.gated else 4 * C
        self.c_fc = nn.Linear(C, 2 * hidden if self.gated else hidden)  # gate and value at once
        self.c_proj = nn.Linear(hidden, C)
        self.c_proj.is_residual_projection = True

    def forward(self, x):
        x = self.c_fc(x)
        if self.gated:
            gate, x = x.chunk(2, dim=-1)
            return self.c_proj(F.silu(gate) * x)
        # the tanh form, as GPT-2 was trained with it, when the exact one was slow
        return self.c_proj(F.gelu(x, approximate="tanh"))


class Block(nn.Module):
    """Tokens talk to each other in attn, each thinks for itself in mlp; both add to the stream."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = make_norm(config)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x, rope=None, mask=None, cache=None):
        # Both only add to the stream, and the norm is on the way in, not on the stream itself: so
        # gradients reach the first block as directly as the last.
        x = x + self.attn(self.ln_1(x), rope, mask, cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """Decoder-only transformer. Another architecture is another class with these attributes, and
    goes into main(model_class=...): see modern.py."""

    arch = "gpt2"  # what its checkpoints say they hold
    presets = PRESETS  # {name: flags}; "gpt2" has the defaults
    not_flags = ()  # fields of TrainConfig that mean nothing to it

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(dict(wte=nn.Embedding(config.vocab_size, config.n_embd)))
        # attention by itself does not know who came first: each position has a vector of its own
        if config.pos == "learned":
            self.transformer.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.transformer.h = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.transformer.ln_f = make_norm(config)  # the stream has grown with every block
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        # Weight tying: tokens of similar meaning should be close where they come in and about
        # equally likely where they go out, so one matrix serves both ends. At 124M that saves
        # another 39M parameters.
        self.transformer.wte.weight = self.lm_head.weight
        self.apply(self._init_weights)

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            std = 0.02
            if getattr(module, "is_residual_projection", False):
                # Each block adds to the stream twice. 2L independent numbers of one size add up to
                # sqrt(2L) times that size: starting smaller keeps the stream's size at any depth.
                std *= (2 * self.config.n_layer) ** -0.5
            torch.nn.init.normal_(module.weight, mean=0.0, std=std)
            if getattr(module, "bias", None) is not None:
                torch.nn.init.zeros_(module.bias)

    def hidden(self, idx, pos=None, mask=None, cache=None):
        """Token ids (B, T) -> the states that the head reads, (B, T, C).

        pos (B, T): positions, where they are not 0..T-1. mask (B, 1, T, T), bool: True = may
        attend, where that is not causal. cache: {"length": 0, "size": tokens to make room for},
        filled and used while generating.
        """
        pos = self.positions(idx, cache) if pos is None else pos
        x, rope = self.embed(idx, pos), self.rope(pos)
        for block in self.transformer.h:
            x = block(x, rope, mask, cache)
        if cache is not None:
            cache["length"] += idx.size(1)
        return self.transformer.ln_f(x)

    def embed(self, idx, pos):
        """Token ids (B, T) at positions (T,) or (B, T) -> the first states, (B, T, C)."""
        x = self.transformer.wte(idx)
        return x + self.transformer.wpe(pos) if self.config.pos == "learned" else x

    def rope(self, pos):
        """cos and sin of RoPE's angles at positions (T,) or (B, T): (B or 1, T, 1, hs/2) each."""
        if self.config.pos == "learned":
            return None
        half = self.config.n_embd // self.config.n_head // 2
        freqs = 10000.0 ** (-torch.arange(half, device=pos.device) / half)
        angles = (pos[..., None] * freqs).view(-1, pos.size(-1), 1, half)
        return angles.cos(), angles.sin()

    def positions(self, idx, cache):
        """0..T-1, or behind what the cache holds: (T,)."""
        past = cache["length"] if cache else 0
        end = past + idx.size(1)
        assert end <= self.config.block_size, (
            f"{end} tokens, but block_size is {self.config.block_size}")
        return torch.arange(past, end, device=idx.device)

    def logits(self, h):
        """States (..., C) -> logits (..., V)."""
        return self.lm_head(h)

    def loss(self, h, targets):
        """States (B, T, C) and the ids that come next (B, T) -> mean cross-entropy in nats."""
        return head_cross_entropy(h, self.lm_head.weight, targets)

    def forward(self, idx, targets=None):
        """idx (B, T) -> (logits (B, T, V), None); with targets (B, T) -> (None, mean loss)."""
        h = self.hidden(idx)
        return (self.logits(h), None) if targets is None else (None, self.loss(h, targets))

    @torch.no_grad()
    def generate(self, idx, n_new, temperature=1.0, top_k=50, n_vocab=50257, generator=None,
                 use_cache=True):
        """Yield n_new times the next token (B, 1) of idx (B, T); ids stay below n_vocab.

        Beyond block_size every token is computed afresh from the last block_size tokens.
        temperature 0 takes the likeliest token; top_k 0 samples among all.
        """
        size = min(idx.size(1) + n_new, self.config.block_size)
        # Keys and values of a token never change, as no token sees a later one: they are kept.
        cache = {"length": 0, "size": size} if use_cache else None
        n_vocab = min(n_vocab, self.config.vocab_size)
        for _ in range(n_new):
            # with the cache only what is new goes through the model: at first the whole prompt
            if cache is not None and idx.size(1) <= self.config.block_size:
                h = self.hidden(idx[:, cache["length"]:], cache=cache)
            else:
                h = self.hidden(idx[:, -self.config.block_size:])
            logits = self.logits(h[:, -1])[:, :n_vocab].float()  # the padding rows are no tokens
            if temperature < 1e-6:  # 0 divides nothing; near it only the likeliest is left
                next_id = logits.argmax(dim=-1, keepdim=True)
            else:
                # of the k likeliest only: the rest are each unlikely, but together they are not
                probs = F.softmax(logits / temperature, dim=-1)
                topk_probs, topk_indices = torch.topk(probs, min(top_k or n_vocab, n_vocab))
                choice = torch.multinomial(topk_probs, 1, generator=generator)
                next_id = torch.gather(topk_indices, -1, choice)
            idx = torch.cat((idx, next_id), dim=1)
            yield next_id

    def flops_per_token(self, T):
        """Of training: 6 per weight, 12 L C T for attention (PaLM, arXiv 2204.02311, app. B)."""
        c, names = self.config, self.named_parameters()
        # an embedding that only looks up multiplies nothing
        n = sum(p.numel() for name, p in names if name not in self.looked_up())
        # forward: a product and a sum for each weight; backward: twice that
        return 6 * n + 12 * c.n_layer * c.n_embd * T

    def looked_up(self):
        """Weights that no product uses; wte is not among them, as it is the head too."""
        return {"transformer.wpe.weight"}

    @classmethod
    def from_pretrained(cls, model_type):
        """gpt2, gpt2-medium, gpt2-large or gpt2-xl: OpenAI's weights by way of Hugging Face; or a
        checkpoint's path. Raises UserError."""
        return cls.load(checkpoint.read_weights(model_type), model_type)

    @classmethod
    def load(cls, weights, path):
        """The model in an opened checkpoint; `path` is for the message where it does not fit."""
        arch = weights.get("arch", "gpt2")
        if arch != cls.arch:
            raise UserError(f"{path} holds a model of {program(arch)}: use that with it, not "
                            f"{program(cls.arch)}")
        try:
            model = cls(GPTConfig(**weights["config"]))
            model.load_state_dict(weights["model"])
        except (RuntimeError, TypeError) as e:
            why = one_line(e)
            raise UserError(f"the weights in {path} do not fit its config ({why})") from None
        return model

    def configure_optimizers(self, weight_decay, learning_rate, device_type, skip=(), zero=False):
        """AdamW: matrices and embeddings decay, biases and norms do not. `skip`: parameters that
        another optimizer takes; `zero`: shard the state over the processes."""
        skip = set(skip)
        # Decay pulls what multiplies (matrices, embeddings: two dimensions) towards zero, so that
        # no single weight carries too much. What shifts or scales has no such need.
        params = [p for p in self.parameters() if p.requires_grad and p not in skip]
        decay = [p for p in params if p.dim() >= 2]
        nodecay = [p for p in params if p.dim() < 2]
        for name, group in (("decayed", decay), ("non-decayed", nodecay)):
            say(f"num {name} parameter tensors: {len(group)}, with "
                f"{sum(p.numel() for p in group):,} parameters")
        groups = [{"params": decay, "weight_decay": weight_decay},
                  {"params": nodecay, "weight_decay": 0.0}]
        fused = device_type in ("cuda", "cpu", "mps")  # one kernel for all tensors, not one each
        say(f"using fused AdamW: {fused}")
        # the second beta is GPT-3's: an average over 20 steps forgets sooner than Adam's 0.999
        return machine.make_optimizer(torch.optim.AdamW, groups, zero, lr=learning_rate,
                                      betas=(0.9, 0.95), eps=1e-8, fused=fused)

    def make_optimizers(self, cfg, device_type, zero):
        """{"adamw": ...}; with --optimizer muon also {"muon": ...}, for the blocks' matrices."""
        matrices = [p for p in self.transformer.h.parameters() if p.dim() == 2]
        matrices = matrices if cfg.optimizer == "muon" else []
        optimizers = {"adamw": self.configure_optimizers(
            cfg.weight_decay, cfg.max_lr, device_type, skip=matrices, zero=zero)}
        if matrices:
            machine.describe_muon(matrices, steps=5, zero=zero)
            # match_rms_adamw scales Muon's updates so that AdamW's learning rate suits both
            optimizers["muon"] = machine.make_optimizer(
                torch.optim.Muon, matrices, zero, lr=cfg.max_lr, weight_decay=cfg.weight_decay,
                adjust_lr_fn="match_rms_adamw")
        return optimizers

    def schedule(self, it, cfg):
        """Learning rate of update `it`; a parameter group with a "ratio" takes that share of it."""
        return get_lr(it, cfg.max_lr, cfg.min_lr, cfg.warmup_steps, cfg.max_steps)


# -----------------------------------------------------------------------------
# The loss, and why not all the logits. With B = 64 and T = 1024 the logits of a micro-step are
# 64 * 1024 rows of 50304 numbers: 13 GB, by far its largest tensor, and as much again for their
# gradient. But each row is only needed until its own loss and gradient are known, so a chunk of
# rows at a time does, and the same numbers come out.

CHUNK_ROWS = {"cpu": 256, "cuda": 4096}  # least rows of logits alive together


def soft_cap(z, cap):
    """Logits z -> the same near zero, and never beyond cap; None is no cap (modern.py has one)."""
    return z if cap is None else cap * z * (z.square() + cap**2).rsqrt()


def head_cross_entropy(h, weight, targets, bias=None, cap=None):
    """Mean cross-entropy of the logits soft_cap(h @ weight.T + bias), in nats.

    h (B, T, C), weight (V, C), targets (B, T) -> scalar. Where the rows fit into one chunk it is
    F.cross_entropy. So it is under torch.compile, which fuses the loss into the product and keeps
    the logits in half precision: measured faster than chunks. An Apple GPU needs the chunks, for
    the sake of hardware.product.
    """
    h, targets = h.flatten(0, 1), targets.flatten()  # B * T predictions, each by itself
    kind = h.device.type
    # A chunk costs a pass over the weight's gradient: its logits may be as large as that.
    chunk = max(CHUNK_ROWS.get(kind, CHUNK_ROWS["cpu"]), weight.size(1))
    if kind != "mps" and (h.size(0) <= chunk or torch.compiler.is_compiling()):
        # float(): CUDA's autocast, unlike the CPU's, would take the softmax in half precision
        return F.cross_entropy(soft_cap(F.linear(h, weight, bias).float(), cap), targets)
    low = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if low else weight.dtype
    wants_grad = torch.is_grad_enabled() and (h.requires_grad or weight.requires_grad)
    return ChunkedCrossEntropy.apply(h, weight, bias, targets, cap, chunk, dtype, wants_grad)


class ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of the logits soft_cap(h @ weight.T + bias), a chunk of rows at a time.

    h (N, C), weight (V, C), bias (V,) or None, targets (N,) -> scalar. The gradients are taken in
    the forward pass, while the logits are at hand. The weight's is summed in the weight's own dtype
    (float32): in bfloat16 the sum over chunks would lose digits.
    """

    @staticmethod
    def forward(ctx, h, weight, bias, targets, cap, chunk, dtype, wants_grad):
        total = torch.zeros((), dtype=weight.dtype, device=h.device)
        w = weight.to(dtype)
        grad_h = torch.empty_like(h, dtype=dtype) if wants_grad else None
        grad_w = torch.zeros_like(weight) if wants_grad else None
        grad_b = torch.zeros_like(bias) if wants_grad and bias is not None else None
        with torch.autocast(h.device.type, enabled=False):
            for rows in (slice(i, i + chunk) for i in range(0, h.size(0), chunk)):
                x, target = h[rows].to(dtype), targets[rows].unsqueeze(1)
                g = (x @ w.T).to(weight.dtype)  # logits; everything after is done in their place
                if bias is not None:
                    g += bias
                if cap is not None:
                    slope = g.square().add_(cap**2).rsqrt_().mul_(cap)
                    g *= slope
                top, picked = g.amax(dim=1, keepdim=True), g.gather(1, target)
                z = g.sub_(top).exp_().sum(dim=1, keepdim=True)
                total += (top + z.log() - picked).sum()
                if not wants_grad:
                    continue
                # d loss / d logits = softmax - 1 at the target. Of the sum, not yet of the mean:
                # such small numbers would suffer in float16.
                g = g.div_(z).scatter_add_(1, target, -torch.ones_like(z))
                if cap is not None:
                    g *= slope.pow_(3)
                if bias is not None:
                    grad_b += g.sum(dim=0)
                g = g.to(dtype)
                grad_h[rows] = hardware.product(g, w, h.device.type)
                if dtype == grad_w.dtype:
                    grad_w.addmm_(g.T, x)
                else:
                    grad_w += g.T @ x
        if wants_grad:
            ctx.save_for_backward(grad_h, grad_w, grad_b)
            ctx.h_dtype = h.dtype
        return total / h.size(0)

    @staticmethod
    def backward(ctx, grad):
        grad_h, grad_w, grad_b = ctx.saved_tensors
        scale = grad / grad_h.size(0)
        grad_b = None if grad_b is None else grad_b.mul_(scale)
        return (grad_h * scale).to(ctx.h_dtype), grad_w.mul_(scale), grad_b, *[None] * 5


# -----------------------------------------------------------------------------
# The schedule; the optimizers are GPT.make_optimizers


def get_lr(it, max_lr=6e-4, min_lr=6e-5, warmup_steps=715, max_steps=19073):
    """Learning rate of update `it`: linear warm-up, then a cosine down to min_lr at max_steps."""
    # AdamW's averages know little at first: small steps until they do
    if it < warmup_steps:
        return max_lr * (it + 1) / warmup_steps
    if it >= max_steps:
        return min_lr
    # then from 1 to 0 along half a cosine: slow, fast, slow
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

    tokens: a TokenStream of at least T + 1 tokens, else UserError. shuffle: "none", or "windows":
    one permutation per epoch, the same on all processes, drawn from (seed, epoch).
    """

    def __init__(self, B, T, process_rank, num_processes, tokens, rows_per_step=None,
                 shuffle="none", seed=1337, vocab_size=65536):
        self.B, self.T, self.tokens = B, T, tokens
        self.process_rank, self.num_processes = process_rank, num_processes
        self.rows_per_step = rows_per_step or B * num_processes
        self.grad_accum_steps = self.rows_per_step // (B * num_processes)
        self.shuffle, self.seed, self.vocab_size = shuffle, seed, vocab_size
        self.n_windows = (len(tokens) - 1) // T  # the last input needs a target too
        if self.n_windows < 1:
            raise UserError(f"{', '.join(tokens.names[:3])}: {len(tokens):,} tokens are less than "
                            f"one window of T + 1 = {T + 1}: lower --T or give more data")
        self.orders = {}
        self.reset()

    def reset(self, step=0):
        """Make the first batch of `step` the next one."""
        self.next_micro_step = step * self.grad_accum_steps

    def next_batch(self):
        """This process's share of the next micro-step; the counter is all the state there is."""
        step, micro_step = divmod(self.next_micro_step, self.grad_accum_steps)
        self.next_micro_step += 1
        first = step * self.rows_per_step  # of the step, over all processes
        first += (micro_step * self.num_processes + self.process_rank) * self.B
        return self.read(self.windows(np.arange(first, first + self.B)))

    def windows(self, rows):
        """Window numbers of global rows, both int64 arrays."""
        # rows are counted through all epochs: the quotient is the epoch, the rest the place in it
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
            # one token more than the inputs: each input's target is the token behind it
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
# Evaluation: on the raw module, but for batches of the very shape that the compiled one is trained
# with; so that one never meets another shape. Nothing in the model depends on train or eval mode.


def autocast(cfg, device):
    """The forward pass in cfg.dtype where that is safe; the weights stay float32.

    Products in bfloat16 are several times as fast. It has float32's range and three digits: enough
    for a product, too few for a weight, whose updates are smaller than that.
    """
    dtype = getattr(torch, cfg.dtype)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


class Evaluator:
    """What a model is worth: validation loss, HellaSwag and samples, as far as they are on.

    loader: of the val split, or None; examples: of HellaSwag; prompt: token ids, on the main
    process. An empty one is off. A signal in between raises Stopped on all processes.
    whole_batch_model: the compiled one, where there is one; it knows the shape of a whole batch.
    """

    def __init__(self, cfg, dist, model, loader, examples, prompt, tokenizer, stop):
        self.cfg, self.dist, self.model, self.loader = cfg, dist, model, loader
        self.examples, self.prompt, self.tokenizer, self.stop = examples, prompt, tokenizer, stop
        self.whole_batch_model = model
        wanted = cfg.val_tokens
        if wanted is None:
            wanted = 65536 if dist.device.type == "cpu" else 10485760  # build-nanogpt's, on 8 GPUs
        self.val_windows = 0
        if loader:
            self.val_windows = min(max(1, wanted // loader.T), loader.n_windows)
            self.whole_split = self.val_windows < wanted // loader.T
            loader.read(np.arange(1))  # what is wrong with the split is said before training

    @contextlib.contextmanager
    def quick(self):
        """No graph, low precision, and no attention kernel that plans anew for each shape."""
        low_precision = autocast(self.cfg, self.dist.device)
        with torch.no_grad(), low_precision, hardware.attention_of_any_shape():
            yield

    def validate(self):
        """Mean loss over the first val_tokens of the split: the same for any B and world size."""
        if not self.val_windows:
            return None
        loader, dist, n = self.loader, self.dist, self.val_windows
        total = torch.zeros((), device=dist.device)
        for first in range(0, n, loader.B * dist.world_size):  # as often on every process
            self.stop.check()
            mine = first + dist.rank * loader.B
            windows = np.arange(mine, min(mine + loader.B, n))
            if len(windows):
                x, y = (t.to(dist.device) for t in loader.read(windows))
                whole = len(windows) == loader.B
                with self.quick():
                    _, loss = (self.whole_batch_model if whole else self.model)(x, y)
                # the last batch may be smaller: weigh by rows, so that every token counts alike
                total += loss * len(windows)
        # each process has seen its share: the sum over all of them is the whole
        loss = dist.sum([total.item()])[0] / n
        over = f" over all {n * loader.T:,} tokens there are" if self.whole_split else ""
        say(f"validation loss: {loss:.4f}{over}")
        return loss

    def score_hellaswag(self, details=False):
        """Accuracy (acc_norm); the examples are shared out over the processes."""
        if not self.examples:
            return None
        dist = self.dist
        with self.quick():
            if details and dist.master_process:
                hellaswag.show_examples(self.model, self.examples, dist.device,
                                        self.tokenizer.decode)
            result = hellaswag.evaluate(self.model, self.examples, dist.device, dist.rank,
                                        dist.world_size, between=self.stop.check,
                                        progress=dist.master_process)
        correct, correct_norm, total, cropped = (int(n) for n in dist.sum(list(result)))
        say(f"HellaSwag accuracy: {correct_norm}/{total}={correct_norm / total:.4f}")
        if details:
            if cropped:
                say(f"{cropped} cut on the left to {self.model.config.block_size} tokens")
            say("\n".join(hellaswag.score_lines(correct, correct_norm, total)))
        return correct_norm / total

    def sample(self, live=None):
        """The prompt continued num_samples times: texts, on the main process.

        live(ids) is given the tokens of sample 0 as they come. The generator is its own, seeded 42
        every time: no other random state moves.
        """
        if not self.prompt:
            return []
        cfg, device = self.cfg, self.dist.device
        idx = torch.tensor(self.prompt, device=device).repeat(cfg.num_samples, 1)
        generator = torch.Generator(device=device).manual_seed(42)
        n_new = tokens.sample_length(cfg, self.tokenizer) - idx.size(1)
        columns = [idx]
        with self.quick():
            for column in self.model.generate(idx, n_new, cfg.temperature, cfg.top_k,
                                              self.tokenizer.n_vocab, generator):
                columns.append(column)
                if live:
                    live(column[0].tolist())
        return [self.tokenizer.decode(row) for row in torch.cat(columns, dim=1).tolist()]


def evaluate_only(evaluator):
    """Validation loss, HellaSwag and samples of loaded weights; writes nothing."""
    evaluator.validate()
    evaluator.score_hellaswag(details=True)
    if not evaluator.prompt:
        return
    decode = evaluator.tokenizer.stream()
    print(f"sample 0: {decode(evaluator.prompt)}", end="", flush=True)
    texts = evaluator.sample(live=lambda ids: print(decode(ids), end="", flush=True))
    print()
    for i, text in enumerate(texts[1:], start=1):
        print(f"sample {i}: {text}")


# -----------------------------------------------------------------------------
# One step


class Trainer:
    """A run in progress: its weights, its optimizers, and the next batch.

    raw_model is the model itself, for checkpoints, samples and batches of any shape; model is the
    same in DDP and compiled. facts: what every checkpoint of this run says of it. saved: a
    checkpoint to go on from, or None.
    """

    def __init__(self, cfg, dist, raw_model, loader, stop, facts, saved=None):
        self.cfg, self.dist, self.raw_model, self.loader = cfg, dist, raw_model, loader
        self.stop, self.facts = stop, facts
        self.saver = checkpoint.Saver(cfg.log_dir)
        self.step = 0  # completed updates
        self.val_loss = None  # at this step
        self.model, self.compiled = machine.wrap(raw_model, dist, cfg.compile)
        self.optimizers = raw_model.make_optimizers(cfg, dist.device.type,
                                                    cfg.zero and dist.world_size > 1)
        # float16 takes small gradients for zero: the scaler makes the loss, and so them, larger
        self.scaler = torch.amp.GradScaler(dist.device.type, enabled=cfg.dtype == "float16")
        if saved:
            self.restore(saved)
        # nothing but the step is needed to know which tokens come next
        loader.reset(self.step)
        self.fetch_batch()

    def restore(self, saved):
        """Optimizers, random state and step of a checkpoint; the model has its weights already."""
        for kind, state in saved.pop("optimizer").items():
            machine.load_optimizer(self.optimizers[kind], state)
        self.scaler.load_state_dict(saved["scaler"])
        torch.set_rng_state(saved["rng"])
        self.step = saved["step"]

    def fetch_batch(self):
        """Read the next batch while the device works, and queue its copy behind that work."""
        cuda = self.dist.device.type == "cuda"
        # Only a pinned copy may be left to itself: an Apple GPU would read memory that has been
        # given away by then (github.com/pytorch/pytorch/issues/189690).
        self.batch = [(t.pin_memory() if cuda else t).to(self.dist.device, non_blocking=cuda)
                      for t in self.loader.next_batch()]

    def update(self, lr):
        """One update from total_batch_size tokens: (loss, gradient norm before clipping).

        The loss is the mean over micro-steps and processes. Neither a loss nor a norm that is not
        finite reaches the weights.
        """
        cfg, device, grad_accum_steps = self.cfg, self.dist.device, self.loader.grad_accum_steps
        loss_accum = torch.zeros((), device=device)
        for micro_step in range(grad_accum_steps):
            x, y = self.batch  # it came while the last micro-step ran
            # Gradients add up on each process by themselves; exchanging them once, behind the last
            # micro-step, is enough. DDP reads that decision in its forward, so it wraps both.
            alone = self.dist.world_size > 1 and micro_step < grad_accum_steps - 1
            with self.model.no_sync() if alone else contextlib.nullcontext():
                with autocast(cfg, device):
                    _, loss = self.model(x, y)
                # F.cross_entropy takes the mean over its B * T tokens, and backward() adds up over
                # the micro-steps. A sum of means is no mean: dividing each of them makes it that of
                # the whole batch, as if it had gone through at once.
                loss = loss / grad_accum_steps
                self.scaler.scale(loss).backward()
            loss_accum += loss.detach()
            self.fetch_batch()
        # the gradients are those of the whole batch now, the same on all processes
        loss, norm = self.clip_and_agree(loss_accum)
        self.check_finite(loss, norm)
        # the update itself, with the rate of this step; then the gradients are forgotten
        for optimizer in self.optimizers.values():
            for param_group in optimizer.param_groups:
                param_group["lr"] = lr * param_group.get("ratio", 1.0)
            if math.isfinite(norm):  # in float16 one may overflow: then no optimizer steps
                self.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()
        self.step, self.val_loss = self.step + 1, None
        return loss, norm

    def clip_and_agree(self, loss_accum):
        """Clip the gradients; (mean loss over the processes, norm before clipping) as numbers."""
        for optimizer in self.optimizers.values():
            self.scaler.unscale_(optimizer)
        # One strange batch must not rule the optimizer's averages for many steps: its gradient gets
        # no longer than this.
        norm = nn.utils.clip_grad_norm_(self.raw_model.parameters(), self.cfg.grad_clip or math.inf)
        # whether a signal came rides along, so that all processes stop behind the same step
        stop = loss_accum.new_full((), float(self.stop.here()))
        shared = torch.stack([loss_accum, stop])
        if self.dist.world_size > 1:
            torch.distributed.all_reduce(shared)
        loss, stop, norm = torch.cat([shared, norm.view(1)]).tolist()  # the one wait for the device
        self.stop.agreed = stop > 0
        return loss / self.dist.world_size, norm

    def check_finite(self, loss, norm):
        """End the run before a loss or a norm that is not finite spoils the weights."""
        if math.isfinite(loss) and (math.isfinite(norm) or self.scaler.get_scale() > 1):
            return  # float16 overflowed: update() skips this step, and the scaler halves its scale
        rows, names = list(self.loader.where(self.step)), self.loader.tokens.names
        (*_, first, start), (*_, last, end) = rows[0], rows[-1]
        raise RunError(
            f"step {self.step}: loss {loss}, gradient norm {norm}. The weights were not updated, "
            f"the last good checkpoint in {self.cfg.log_dir} is as it was. The step reads "
            f"{names[first]} offset {start} to {names[last]} offset {end + self.cfg.T}; --inspect "
            f"{self.step} shows it")

    def save(self, keep=False, must=False):
        """Write a checkpoint, while training goes on; with `must` it is written on return.

        All processes call it: under --zero each gives its share.
        """
        optimizers = {k: machine.optimizer_state(o, self.dist) for k, o in self.optimizers.items()}
        if self.dist.master_process:
            finished = self.step == self.cfg.max_steps and keep
            self.saver.save(self.facts | dict(
                model=self.raw_model.state_dict(), optimizer=optimizers,
                scaler=self.scaler.state_dict(), step=self.step, val_loss=self.val_loss,
                rng=torch.get_rng_state(), finished=finished), keep, must)


# -----------------------------------------------------------------------------
# The loop


def train(cfg, dist, trainer, evaluator, reporter, stop):
    """Do what is due, then one update, until max_steps updates are done.

    The last round only evaluates and saves: so the final weights are seen, and a resume at step s
    begins with what is due at s. reporter: on the main process.
    """
    while True:
        step, last_step = trainer.step, trainer.step == cfg.max_steps

        # once in a while: how good is it on text that it is not trained on, and what does it write?
        if step % cfg.eval_every == 0 or last_step:
            val_loss = evaluator.validate()
            # ... and does it know how everyday sentences go on?
            hella = evaluator.score_hellaswag()
            trainer.val_loss = val_loss
            if dist.master_process:
                reporter.scalars(step, val=val_loss, hella=hella)
                # an untrained model writes noise: no samples at step 0
                texts = evaluator.sample() if step > 0 else []
                for i, text in enumerate(texts):
                    reporter.sample(step, i, text)
                if 0 < step < cfg.max_steps:  # at its end a run draws anyway
                    reporter.draw()

        # once in a while: everything that a resume needs goes to the disk; some of it stays there
        keep = last_step or is_due(step, cfg.checkpoint_every)  # under a name of its own
        if keep or is_due(step, cfg.save_every):
            trainer.save(keep, must=last_step)
        # the weights behind the last update have been evaluated and saved: that is the end
        if last_step:
            return

        # one step of optimization; its time is all that dt counts
        t0 = time.perf_counter()
        lr = trainer.raw_model.schedule(step, cfg)
        loss, norm = trainer.update(lr)
        dt = time.perf_counter() - t0
        if dist.master_process:
            reporter.update(step, loss, norm, lr, dt)

        # Ctrl-C or SIGTERM, on any process: all of them leave here
        if stop.agreed:
            raise Stopped


def is_due(step, every):
    """Whether something that happens every so many steps happens now; never at 0, 0 = never."""
    return step > 0 and every > 0 and step % every == 0


# -----------------------------------------------------------------------------
# Setting up. Every check comes before anything is written, and every process makes the same ones by
# itself; so a mistake is found by all of them (plumbing/errors.py).


def make_config(given, saved, weights, dist, model_class):
    """The TrainConfig of this call."""
    preset = saved["flags"]["preset"] if saved else given.get("preset", "auto")
    if preset == "auto":
        preset, why = choose_preset(given, dist, SHARDS)
        if not given.get("eval_only") and not given.get("export_hf"):
            say(f"preset {preset}: {why}" + ("; for the real run: python fineweb.py --ready 10, "
                                             "then this command on a GPU" * (preset == "smoke")))
    cfg = settle(TrainConfig, model_class.presets, preset, given, saved, weights)
    if "T" not in given:
        cfg["T"] = min(cfg["T"], cfg["block_size"])
    if "data" in given:
        cfg["data"] = os.path.abspath(given["data"])
    if saved and cfg["dtype"] == "auto":
        cfg["dtype"] = saved["flags"]["dtype"]
    return TrainConfig(**cfg)


def choose_B(cfg, rows, model, dist):
    """Rows per micro-step: what --B says, or the largest power of two that divides and fits."""
    if cfg.B or cfg.eval_only:
        return cfg.B or 8
    # the smaller B is, the more micro-steps make up the same step: the result does not change
    sizes = [b for b in (64, 32, 16, 8, 4, 2, 1) if rows % b == 0]
    if dist.device.type != "cuda":
        return next(b for b in sizes if b <= 4)

    def one_step(B):
        idx = torch.zeros(B, cfg.T, dtype=torch.long, device=dist.device)
        with autocast(cfg, dist.device):
            _, loss = model(idx, idx)
        loss.backward()

    # beside it must fit: AdamW's state, DDP's buckets, and the logits, which a compiled step keeps
    # whole and in half precision
    aside = (8 + 4 * (dist.world_size > 1)) * sum(p.numel() for p in model.parameters())
    per_row = 2 * cfg.T * cfg.vocab_size * (cfg.compile is not False)
    fitting = (B for B in sizes if hardware.fits_gpu(one_step, B, aside + B * per_row, dist.device))
    B = min(dist.gather(next(fitting, 0)))
    model.zero_grad(set_to_none=True)
    if not B:
        raise UserError("not even --B 1 fits the GPU: use a smaller --T or a smaller model")
    return B


def examples_wanted(cfg, device):
    """Number of HellaSwag examples per evaluation."""
    automatic = 0 if device.type == "cpu" else 10042
    return automatic if cfg.hellaswag is None else cfg.hellaswag


def open_hellaswag(cfg, tokenizer, dist):
    """The prepared examples. Where they cannot be had a run goes on without them, after a warning;
    who asks for nothing else is refused."""
    n = examples_wanted(cfg, dist.device)
    if not n:
        return []
    errors = []
    if tokenizer is None or tokenizer.name != "gpt2" or cfg.vocab_size < tokenizer.n_vocab:
        errors = ["it needs GPT-2's vocabulary"]
    errors = errors or dist.once_per_machine(lambda: hellaswag.download("val"))
    if errors and cfg.eval_only and cfg.hellaswag:
        raise UserError(f"--hellaswag {n}: {errors[0]}")
    if errors:
        warn(f"HellaSwag is off: {errors[0]}")
        return []
    return hellaswag.load_examples(hellaswag.data_file("val"), n, cfg.block_size, tokenizer.encode)


# -----------------------------------------------------------------------------
# Main, downward in the order of time


def program(arch):
    """The file that trains an architecture."""
    return "train_gpt2.py" if arch == "gpt2" else f"{arch}.py"


def main(argv=None, model_class=GPT):
    """The command. model_class: GPT, or a class that has what it has (modern.py)."""
    run_main(program(model_class.arch), lambda: command(argv, model_class))


def command(argv, model_class):
    """What the flags ask for: where weights and data come from. Returns the exit status."""
    given = parse_flags(argv, model_class)
    with machine.processes(given.get("device", "auto")) as dist:
        # where the weights come from: a run to go on with, a checkpoint, Hugging Face, or chance
        init, log_dir = given.get("init", "scratch"), given.get("log_dir", TrainConfig.log_dir)
        saved = checkpoint.find_checkpoint(log_dir) if given.get("resume") else None
        weights = checkpoint.read_weights(init) if init != "scratch" and not saved else None
        source, path = (saved, saved["path"]) if saved else (weights, init)
        cfg = make_config(given, saved, weights, dist, model_class)
        if (cfg.eval_only or cfg.export_hf) and not source:
            raise UserError(f"--{'eval_only' if cfg.eval_only else 'export_hf'} needs weights: "
                            "--init PATH, or --resume and a --log_dir that holds a checkpoint")
        if cfg.export_hf:
            model = model_class.load(source, path)
            return checkpoint.export_hf(model, cfg.export_hf) if dist.master_process else 0
        goes_on = saved is not None and not cfg.eval_only
        if goes_on:
            checkpoint.check_flags(cfg, saved)
            if cfg.inspect is None and checkpoint.is_finished(saved, log_dir):
                return 0

        # the data; and here the processes compare what may differ between them by accident
        place = cfg.data or SHARDS
        data = tokens.Data(place) if needs_data(cfg, place, "data" in given) else None
        dist.check_same({f"--{k}": v for k, v in given.items()} | {
            "the checkpoint (--log_dir must be on storage that all nodes share)": saved and path,
            "the data": data and data.fingerprint})
        decodes = cfg.num_samples or examples_wanted(cfg, dist.device) or cfg.inspect is not None
        tokenizer = open_tokens(data, source, dist, needed=decodes)
        if goes_on:
            now, then = (checkpoint.describe_data(d) for d in (data.identity, saved["data"]))
            checkpoint.check_resume({"--data": now}, {"--data": then})
        if cfg.inspect is not None:
            check_batch(replace(cfg, B=1), 1)
            loader = DataLoaderLite(1, cfg.T, 0, 1, data.train, cfg.total_batch_size // cfg.T,
                                    cfg.shuffle, cfg.seed)
            return tokens.inspect_step(loader, tokenizer, cfg.inspect) if dist.master_process else 0
        if cfg.dtype == "auto":
            cfg = replace(cfg, dtype=hardware.best_dtype(dist))
        return run(cfg, dist, model_class, source, path, data, tokenizer, goes_on)


def run(cfg, dist, model_class, source, path, data, tokenizer, goes_on):
    """Evaluate a model, or train it. Returns the exit status."""
    rows = None if cfg.eval_only else check_batch(cfg, dist.world_size)
    check_memory(cfg, dist.device)
    if cfg.wandb and not cfg.eval_only:
        optional_import("wandb", "--wandb")
    # stdin belongs to the main process, and only that one samples
    prompt = encode_prompt(cfg, tokenizer) if dist.master_process else []
    examples = open_hellaswag(cfg, tokenizer, dist)

    # the model, and how many rows of tokens fit beside it
    torch.manual_seed(cfg.seed)  # the same weights on every process, and in every run
    shape = {f.name: getattr(cfg, f.name) for f in fields(GPTConfig)}
    model = model_class.load(source, path) if source else model_class(GPTConfig(**shape))
    if source:
        del source["model"]  # once in memory is enough
    model.to(dist.device)
    B = choose_B(cfg, rows, model, dist)
    check_apple(cfg, B, dist.device)
    share = B, cfg.T, dist.rank, dist.world_size

    # what it is worth
    val_loader = None
    if data and cfg.val_tokens != 0:
        val_loader = DataLoaderLite(*share, data.val, vocab_size=cfg.vocab_size)
    stop = StopFlag(dist)  # Ctrl-C and SIGTERM raise it, once training has begun
    evaluator = Evaluator(cfg, dist, model, val_loader, examples, prompt, tokenizer, stop)
    if cfg.eval_only:
        evaluate_only(evaluator)
        return 0

    # what trains it
    loader = DataLoaderLite(*share, data.train, cfg.total_batch_size // cfg.T, cfg.shuffle,
                            cfg.seed, cfg.vocab_size)
    # what every checkpoint says of the run, beside its state
    facts = dict(arch=model.arch, config=asdict(model.config), flags=asdict(cfg),
                 tokenizer=tokenizer.name if tokenizer else "gpt2", data=data.identity)
    trainer = Trainer(cfg, dist, model, loader, stop, facts, source if goes_on else None)
    if trainer.compiled:
        evaluator.whole_batch_model = trainer.model
    if goes_on:
        say(f"resuming from {path}, step {trainer.step}")

    # the loop, with the folder of the run opened and closed around it
    reporter = open_reporter(cfg, dist, trainer, data)
    try:
        return train_to_the_end(cfg, dist, trainer, evaluator, reporter, stop)
    finally:
        if reporter:
            reporter.close()


def train_to_the_end(cfg, dist, trainer, evaluator, reporter, stop):
    """The loop, and what is said and saved at its end, whatever ends it. Returns the status."""
    stop.install()
    try:
        train(cfg, dist, trainer, evaluator, reporter, stop)
    except Stopped:
        trainer.save(must=True)
        say(f"stopped by a signal at step {trainer.step}; the same command with --resume goes on")
        return stop.status
    except torch.OutOfMemoryError:
        rows = trainer.loader.rows_per_step // dist.world_size
        smaller = [f"--B {b}" for b in range(1, trainer.loader.B) if rows % b == 0]
        raise UserError(f"out of GPU memory with --B {trainer.loader.B}: use "
                        f"{smaller[-1] if smaller else 'a smaller --T or model'}, a step stays "
                        f"{cfg.total_batch_size} tokens") from None
    if reporter:
        rate = reporter.tokens_per_second
        rate = f", {rate:,.0f} tok/s" if rate else ""
        loss = "" if trainer.val_loss is None else f", validation loss {trainer.val_loss:.4f}"
        say(f"done: {cfg.max_steps} steps, {cfg.max_steps * cfg.total_batch_size:,} tokens{rate}"
            f"{loss}")
        say(f"try next: {what_next(cfg, dist.device, program(trainer.raw_model.arch))}")
    return 0


if __name__ == "__main__":
    main()
