"""
Weights and checkpoints as files: written whole, proved whole when read, and harmless to open.

A checkpoint is a dict of plain data that torch.load(weights_only=True) reads without this code:

    arch        "gpt2" (also where it is missing) or "modern": which command it belongs to
    model       weights under GPT-2's names, without the prefixes of torch.compile and DDP
    optimizer   {"adamw": state_dict, ...}, the same with and without --zero
    scaler      state of the float16 scaler, {} without one
    step        completed updates
    config      shape of the model; flags: all flags of the run
    tokenizer   "gpt2" or "bytes"; data: which tokens the run reads, whatever the path
    val_loss    at this step, None where it was not taken; rng: torch's random state
    finished    whether the run is at its end and has evaluated there
"""

import glob
import hashlib
import json
import math
import os
import pickle
import re
import threading
import time
import zipfile
import zlib
from dataclasses import asdict

import torch

from plumbing.errors import (
    SAVING, RunError, UserError, one_line, optional_import, rank, say, warn,
)
from plumbing.files import atomic_write, keep_copy
from plumbing.flags import MATHEMATICS, names_of
from plumbing.hardware import free_memory, synchronize


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
    except (OSError, RuntimeError, MemoryError) as e:
        message = (f"step {step} could not be saved ({one_line(e)}); the last good checkpoint in "
                   f"{folder} is as it was")
        if must:
            raise RunError(f"{message}: make room, then go on with --resume") from None
        warn(f"{message}; training goes on and the next save tries again")


class Saver:
    """Writes the checkpoints of a run beside the training, one after the other."""

    def __init__(self, folder):
        self.folder, self.thread = folder, None

    def save(self, state, keep=False, must=False):
        """Write `state` behind the caller's back; with `must` before this returns."""
        self.wait()
        if must or not self.start(state, keep):
            save_checkpoint(state, self.folder, keep, must)

    def start(self, state, keep):
        """Begin to write a copy, as the next update changes the weights; False without the room."""
        try:
            if copied_bytes(state) > free_memory():
                return False
            thread = threading.Thread(target=save_checkpoint, name=SAVING,
                                      args=(copy_to_host(state), self.folder, keep))
            thread.start()
        except (RuntimeError, MemoryError):  # no memory after all, or no room for a thread
            return False
        self.thread = thread
        return True

    def wait(self):
        """Until what is being written is on the disk, or has failed."""
        if self.thread:
            self.thread.join()


def copied_bytes(state):
    """Of host memory that copy_to_host takes, at most: pinned memory comes in powers of two."""
    if isinstance(state, dict):
        state = list(state.values())
    if isinstance(state, (list, tuple)):
        return sum(copied_bytes(value) for value in state)
    return (1 + state.is_cuda) * state.nbytes if isinstance(state, torch.Tensor) else 0


def copy_to_host(state):
    """A nest of plain data with its tensors copied into the host's memory.

    What shares its memory (the embedding and the head) shares it in the copy too.
    """
    copies = {}

    def copied(value):
        if isinstance(value, dict):
            return {k: copied(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(map(copied, value))
        if not isinstance(value, torch.Tensor):
            return value
        place = value.device, value.data_ptr(), value.dtype, value.shape, value.stride()
        if place not in copies:
            # from a GPU into pinned memory, all on their way together
            copies[place] = value.detach().to("cpu", non_blocking=True, copy=True)
        return copies[place]

    whole = copied(state)
    for device in {device for device, *_ in copies}:
        synchronize(device)
    return whole


def peek(path):
    """The dict of a checkpoint without its tensors; whatever torch raises where it is damaged."""
    return torch.load(path, map_location="meta", mmap=True, weights_only=True)


def saved_step(path):
    """The step of a checkpoint. One that cannot be read counts as the newest, so that a resume
    tries it and names it."""
    number = re.search(r"model_(\d+)\.pt$", path)
    try:
        return int(number[1] if number else peek(path)["step"])
    except Exception:  # a damaged pickle raises whatever it likes
        return math.inf


def find_checkpoint(folder):
    """The newest good checkpoint in `folder`, with its "path"; None where there is none."""
    paths = glob.glob(os.path.join(glob.escape(folder), "model_*.pt"))
    last = os.path.join(folder, "last.pt")
    if os.path.exists(last):  # older than model_N.pt where a save was killed between the two
        paths.insert(0, last)
    paths.sort(key=saved_step, reverse=True)
    for path in paths:
        try:
            checkpoint = read_checkpoint(path)
            needed = {"optimizer", "flags", "data", "step", "tokenizer", "scaler", "rng"}
            if not needed <= checkpoint.keys():
                raise UserError(f"{path} holds weights only: start from it with --init")
            return checkpoint | {"path": path}
        except UserError as e:
            warn(f"{e}" + ("; trying the next older one" if path != paths[-1] else ""))
    if paths:
        raise UserError(f"none of the {len(paths)} checkpoints in {folder} can be resumed; to "
                        "start afresh, leave out --resume")
    return None


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


def check_flags(cfg, saved):
    """UserError with a table where a resume would change the mathematics of the run."""
    then = asdict(type(cfg)()) | saved["flags"]
    names = sorted(names_of(type(cfg), *MATHEMATICS))
    check_resume({f"--{k}": getattr(cfg, k) for k in names}, {f"--{k}": then[k] for k in names})


def is_finished(saved, folder):
    """Whether a run is at its end and has evaluated there; says so."""
    loss, steps = saved["val_loss"], saved["flags"]["max_steps"]
    if not saved.get("finished", saved["step"] == steps and loss is not None):
        return False
    last = os.path.join(folder, "last.pt")
    if saved["path"] != last and rank() == 0:  # the save was killed between its two names
        try:
            keep_copy(saved["path"], last)
        except OSError as e:
            raise RunError(f"{last} could not be written ({one_line(e)}): the end of the run is in "
                           f"{saved['path']}") from None
    loss = "" if loss is None else f", validation loss {loss:.4f}"
    say(f"the run in {folder} is finished: {steps} steps{loss}")
    return True


def describe_data(identity):
    """A data identity in one line, so that two can be compared by eye."""
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]
    return f"{identity['kind']}, {identity['tokens']:,} tokens, {digest}"


# -----------------------------------------------------------------------------
# Hugging Face

PRETRAINED = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")


def read_weights(name):
    """A checkpoint from a path, or OpenAI's weights by name from Hugging Face in the same form."""
    if name not in PRETRAINED:
        return read_checkpoint(name)
    transformers = optional_import("transformers", name)
    try:
        hf = transformers.GPT2LMHeadModel.from_pretrained(name)
    except (OSError, ValueError) as e:
        raise UserError(f"{name} cannot be had from Hugging Face ({one_line(e)})") from e
    return from_hf(hf)


def from_hf(hf):
    """A transformers GPT2LMHeadModel as a checkpoint: config, weights, tokenizer, no flags."""
    c = hf.config
    config = dict(block_size=c.n_positions, vocab_size=c.vocab_size, n_layer=c.n_layer,
                  n_head=c.n_head, n_embd=c.n_embd)
    state = {k: v for k, v in hf.state_dict().items()
             if not k.endswith((".attn.bias", ".attn.masked_bias"))}
    return dict(config=config, model=swap_conv1d(state), tokenizer="gpt2", flags={})


def swap_conv1d(state):
    """OpenAI's checkpoints hold these four as (in, out), nn.Linear holds (out, in): transpose."""
    four = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    return {k: v.t().contiguous() if k.endswith(four) else v for k, v in state.items()}


def export_hf(model, folder):
    """Write `folder` so that transformers loads it as a GPT-2; padding rows are cut off."""
    c = model.config
    if model.arch != "gpt2" or (c.pos, c.mlp, c.norm) != ("learned", "gelu", "layernorm"):
        raise UserError(f"Hugging Face's GPT-2 knows no {model.arch} with --pos {c.pos} --mlp "
                        f"{c.mlp} --norm {c.norm}: only the faithful model can be exported")
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
