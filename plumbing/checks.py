"""
What is looked at before a run: what a user can have got wrong is said before time is spent.

`cfg` is the trainer's TrainConfig, by the names of its flags.
"""

import os
import shlex
import sys

import torch

from plumbing.errors import UserError, say, warn
from plumbing.files import HERE
from plumbing.hardware import memory_bytes
from plumbing.tokens import open_tokenizer, sample_length, shard_names


LONGER = "--max_steps 1000"  # of the smoke preset: ten minutes on a laptop


def choose_preset(given, dist, shards):
    """(preset, why) where --preset is auto; shards: the folder where they are by default. Several
    processes are no smoke run by accident."""
    kind = dist.device.type
    if kind == "cpu" and dist.world_size > 1 and "data" not in given:
        raise UserError(f"{dist.world_size} processes on a CPU: say --preset gpt2 or --preset "
                        "smoke")
    if kind == "cpu":
        return "smoke", "there is no GPU"
    if "data" in given or "resume" in given or dist.world_size > 1 or shard_names(shards):
        return "gpt2", f"there is an accelerator, {kind}"
    return "smoke", f"there are no shards in {shards}"


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


def check_memory(cfg, device):
    """UserError where not even the weights, gradients and optimizer state can fit."""
    C, positions = cfg.n_embd, cfg.block_size if cfg.pos == "learned" else 0
    n = 12 * cfg.n_layer * C * C + (cfg.vocab_size + positions) * C
    # float32: the weight; while training its gradient and AdamW's two averages, and what the
    # forward pass keeps of each token and layer, 20 numbers of 2 bytes a channel at the least
    wanted = 4 * n if cfg.eval_only else 16 * n + 40 * cfg.B * cfg.T * C * cfg.n_layer
    there = memory_bytes(device)
    if wanted > there:
        raise UserError(f"{n / 1e6:,.0f}M parameters need {wanted / 1e9:,.0f} GB at least and "
                        f"{device} has {there / 1e9:,.0f} GB: use a smaller model, --B or --T")


def check_apple(cfg, B, device):
    """UserError for what torch is known to compute wrongly on an Apple GPU."""
    if device.type != "mps":
        return
    if not cfg.eval_only and B * cfg.T >= 32767:  # of which the weights' gradients are the sum
        raise UserError(f"{B} rows of {cfg.T} tokens: an M1 or M2 adds up no 32,767 of them right "
                        "(pytorch issue 195163): use a smaller --B or --T")
    if cfg.dtype != "float32" and torch.__version__ < (2, 13):
        raise UserError(f"--dtype {cfg.dtype} on mps: up to torch 2.12 tokens see later ones there "
                        "(pytorch issue 195910): use torch 2.13, or start with --dtype float32")


def check_steps(cfg, rows_per_step, n_windows):
    """What the size of the data says about the flags."""
    epochs = cfg.max_steps * rows_per_step / n_windows
    say(f"max_steps {cfg.max_steps} is {epochs:.3f} epochs of {n_windows:,} windows")
    if rows_per_step > 1000 * n_windows:
        raise UserError(f"--total_batch_size {cfg.total_batch_size}: one step would read all "
                        f"{n_windows:,} windows of the data over a thousand times; lower it")
    if cfg.warmup_steps > cfg.max_steps:
        warn(f"--warmup_steps {cfg.warmup_steps} is beyond --max_steps {cfg.max_steps}: the "
             "learning rate never reaches its peak")


def needs_data(cfg, place, typed):
    """Whether a command reads the tokens at `place`; weights can be sampled without any."""
    if not cfg.eval_only:
        return True
    wanted, there = cfg.val_tokens != 0, typed or os.path.exists(place)
    if wanted and not there:
        say(f"no data at {place}: no validation")
    return wanted and there


def open_tokens(data, source, dist, needed):
    """The tokenizer for this data and these weights, or None; a text is cut into tokens with it.

    data: a tokens.Data, or None; source: an opened checkpoint, or None. needed: whether tokens of
    shards are ever to be decoded.
    """
    wanted = source.get("tokenizer", "gpt2") if source else None
    if data and not data.is_text:
        if wanted == "bytes":
            raise UserError(f"the checkpoint's tokens are the byte fallback's, those in {data.path}"
                            " are GPT-2's: give the text file that it was trained on with --data")
        return open_tokenizer("gpt2", dist, required=False) if needed else None
    tokenizer = open_tokenizer(wanted, dist, required=True)
    if data:
        data.tokenize(tokenizer)
    return tokenizer


def encode_prompt(cfg, tokenizer):
    """Token ids of cfg.prompt (- = stdin); empty where samples are off."""
    if not cfg.num_samples or tokenizer is None:
        return []
    prompt = cfg.prompt
    if prompt == "-":
        prompt = sys.stdin.read() if sys.stdin else ""
    ids = tokenizer.encode(prompt).tolist()
    if not ids:
        raise UserError("--prompt is empty: give it at least one character")
    if max(ids) >= cfg.vocab_size:
        warn(f"no samples: the prompt has token {max(ids)}, beyond --vocab_size {cfg.vocab_size}")
        return []
    longest = sample_length(cfg, tokenizer) - 1
    for limit, name in ((cfg.block_size, "block_size"), (longest, "sample_length")):
        if len(ids) > limit:
            raise UserError(f"--prompt has {len(ids)} tokens, too many for --{name} "
                            f"{limit + (name == 'sample_length')}")
    return ids


# -----------------------------------------------------------------------------
# And behind it


def what_next(cfg, device, program):
    """The one command that makes sense after a run of `program`."""
    last = shlex.quote(os.path.join(cfg.log_dir, "last.pt"))
    if cfg.preset != "smoke":
        return f"python hellaswag.py -m {last}"
    if device.type == "cuda":
        return f"python fineweb.py --ready 10 && python {program}   (the real run)"
    if cfg.max_steps <= 100 and os.path.dirname(cfg.data) != HERE:  # a text of the user's own
        return f"python {program} --data {shlex.quote(cfg.data)} {LONGER}"
    if cfg.max_steps <= 100:
        return f"python {program} {LONGER}   (in ten minutes it reads like the play)"
    return f'python {program} --init {last} --eval_only --prompt "The sea" --sample_length 100'
