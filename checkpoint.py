"""
Weights and checkpoints as files: written whole, proved whole when read, and harmless to open.

A checkpoint is a dict of plain data that torch.load(weights_only=True) reads without this code:

    model       weights under GPT-2's names, without the prefixes of torch.compile and DDP
    optimizer   {"adamw": state_dict, ...}, the same with and without --zero
    scaler      state of the float16 scaler, {} without one
    step        completed updates
    config      shape of the model; flags: all flags of the run
    tokenizer   "gpt2" or "bytes"; data: which tokens the run reads, whatever the path
    val_loss    at this step, None where it was not taken; rng: torch's random state
"""

import glob
import hashlib
import json
import math
import os
import pickle
import platform
import re
import time
import zipfile
import zlib

import torch

from common import (
    RunError, UserError, atomic_write, keep_copy, one_line, optional_import, say, warn,
)


class PickledConfig:
    """What build-nanogpt's pickled GPTConfig becomes here: an object with the same attributes."""


def read_checkpoint(path):
    """Open a checkpoint, ours or build-nanogpt's, and prove it whole (zip CRC) and harmless.

    Returns its dict, the config as a plain dict and the names of the weights without the prefixes
    of torch.compile and DDP. Raises UserError for anything else: a damaged file, a file of another
    kind, a pickle that wants to run code.
    """
    allowed = [(PickledConfig, f"{m}.GPTConfig") for m in ("__main__", "train_gpt2", "model")]
    try:
        with zipfile.ZipFile(path) as archive:
            # A CRC covers the data, not these attributes: torch would take an entry for a folder.
            odd = (i.filename for i in archive.infolist() if i.external_attr)
            damaged = archive.testzip() or next(odd, None)
        if damaged:
            raise ValueError(f"damaged in {damaged}")
        with torch.serialization.safe_globals(allowed):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(checkpoint, dict):
            raise TypeError(f"it holds a {type(checkpoint).__name__}")
        config = checkpoint["config"]
        checkpoint["config"] = dict(config if isinstance(config, dict) else vars(config))
        checkpoint["model"] = {re.sub(r"^(_orig_mod\.|module\.)+", "", k): v
                               for k, v in checkpoint["model"].items()}
        return checkpoint
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such checkpoint") from None
    except pickle.UnpicklingError:
        raise UserError(f"{path} holds more than plain data; it was not opened") from None
    except (OSError, EOFError, ValueError, RuntimeError, LookupError, TypeError, AttributeError,
            zipfile.BadZipFile, zlib.error) as e:
        raise UserError(f"{path} is not a good checkpoint ({one_line(e)})") from None


def save_checkpoint(state, folder, keep=False, must=False):
    """Write `state` to last.pt, and with `keep` to model_{step:05d}.pt too.

    A save that fails leaves the older files as they were. It is a warning, or with `must` a
    RunError.
    """
    start, step, last = time.perf_counter(), state["step"], os.path.join(folder, "last.pt")
    try:
        first = os.path.join(folder, f"model_{step:05d}.pt") if keep else last
        with atomic_write(first) as f:
            torch.save(state, f)
        if keep:
            keep_copy(first, last)
        say(f"saved {last}: step {step}, {os.path.getsize(last) / 1e6:,.0f} MB in "
            f"{time.perf_counter() - start:.2f} s")
    except (OSError, RuntimeError) as e:
        message = (f"step {step} could not be saved ({one_line(e)}); the last good checkpoint in "
                   f"{folder} is as it was")
        if must:
            raise RunError(f"{message}: make room, then go on with --resume") from None
        warn(f"{message}; training goes on and the next save tries again")


def saved_step(path):
    """The step of a checkpoint: from its name, or from the file without reading its tensors. A
    file that cannot be read counts as the newest, so that a resume tries it and names it."""
    number = re.search(r"model_(\d+)\.pt$", path)
    try:
        return int(number[1] if number else torch.load(path, mmap=True, weights_only=True)["step"])
    except Exception:  # a damaged pickle raises whatever it likes
        return math.inf


def find_checkpoint(folder):
    """(path, checkpoint) of the newest good one in `folder`, (None, None) where there is none."""
    paths = glob.glob(os.path.join(glob.escape(folder), "model_*.pt"))
    paths.sort(key=saved_step, reverse=True)
    last = os.path.join(folder, "last.pt")
    if os.path.exists(last):  # older than model_N.pt where a save was killed between the two
        step = saved_step(last)
        paths.insert(sum(saved_step(path) > step for path in paths), last)
    for path in paths:
        try:
            checkpoint = read_checkpoint(path)
            needed = {"optimizer", "flags", "data", "step", "tokenizer", "scaler", "rng"}
            if not needed <= checkpoint.keys():
                raise UserError(f"{path} holds weights only: start from it with --init")
            return path, checkpoint
        except UserError as e:
            warn(f"{e}" + ("; trying the next older one" if path != paths[-1] else ""))
    if paths:
        raise UserError(f"none of the {len(paths)} checkpoints in {folder} can be resumed; to "
                        "start afresh, leave out --resume")
    return None, None


def load_for_resume(folder, dist):
    """The checkpoint that --resume goes on from, the same on all processes; None: there is none."""
    path, checkpoint = dist.together(
        lambda: find_checkpoint(folder) if dist.master_process else (None, None))
    path = dist.broadcast(path)

    def load():
        if path and not os.path.exists(path):
            raise UserError(f"{path} is not there on {platform.node()}: on several nodes --log_dir "
                            "must be on shared storage")
        return checkpoint if dist.master_process or not path else read_checkpoint(path)

    checkpoint = dist.together(load)
    return checkpoint and checkpoint | {"path": path}


def check_resume(now, then):
    """UserError with a table of what differs between two dicts of settings, {flag: value}."""
    rows = [(k, then.get(k), v) for k, v in now.items() if v != then.get(k)]
    if rows:
        table = "".join(f"\n  {flag:20} | {old!s:36} | {new}" for flag, old, new in
                        [("flag", "checkpoint", "now"), *rows])
        why = ""
        if any(row[0] == "--max_steps" for row in rows):
            why = " (another --max_steps is another learning rate schedule)"
        raise UserError(f"this run cannot go on with other settings{why}: leave the flags out, or "
                        f"start a new run in another --log_dir{table}")


def describe_data(identity):
    """A data identity in one line, so that two can be compared by eye."""
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]
    return f"{identity['kind']}, {identity['tokens']:,} tokens, {digest}"


# -----------------------------------------------------------------------------
# Hugging Face


def swap_conv1d(state):
    """OpenAI's checkpoints hold these four as (in, out), nn.Linear holds (out, in): transpose."""
    four = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    return {k: v.t().contiguous() if k.endswith(four) else v for k, v in state.items()}


def export_hf(model, folder):
    """Write `folder` so that transformers loads it as a GPT-2; padding rows are cut off."""
    c = model.config
    if (c.pos, c.mlp, c.norm) != ("learned", "gelu", "layernorm"):
        raise UserError(f"Hugging Face's GPT-2 knows no --pos {c.pos} --mlp {c.mlp} --norm "
                        f"{c.norm}: only the faithful model can be exported")
    transformers = optional_import("transformers", "--export_hf")
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as e:
        raise UserError(f"--export_hf {folder} cannot be written ({one_line(e)})") from None
    n_vocab = min(c.vocab_size, 50257)
    hf = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=n_vocab, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer,
        n_head=c.n_head, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    state = swap_conv1d(model.state_dict())
    for name in ("transformer.wte.weight", "lm_head.weight"):
        state[name] = state[name][:n_vocab]
    hf.load_state_dict(state)
    try:
        hf.save_pretrained(folder)
    except OSError as e:
        raise RunError(f"{folder} could not be written ({one_line(e)}); it is not whole") from None
    say(f"wrote {folder}: GPT2LMHeadModel.from_pretrained({folder!r}) loads it")
