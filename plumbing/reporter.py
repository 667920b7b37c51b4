"""
The folder of a run and all that a run tells: log.txt, samples.txt, config.json, curves.png, W&B.
"""

import contextlib
import glob
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import asdict
from datetime import timedelta

import torch

from plumbing.checks import check_steps
from plumbing.errors import RunError, UserError, one_line, optional_import, say, warn
from plumbing.files import HERE, atomic_write, lock
from plumbing.hardware import device_name, measure_matmul, share_of_peak
from plumbing.tokens import MANIFEST

# -----------------------------------------------------------------------------
# The folder of a run


def open_log_dir(folder, resumed):
    """Make `folder` ready; an older run in it is moved to the first free folder.N. Returns its
    lock, which dies with this process. UserError where a live run holds it."""
    folder = os.path.normpath(folder)
    path = os.path.join(folder, ".lock")
    refusal = f"another run is writing to {folder}: wait for its end, or choose another --log_dir"
    marks = ("log.txt", "config.json", "last.pt", "model_*.pt")
    old_run = any(glob.glob(os.path.join(glob.escape(folder), mark)) for mark in marks)
    try:
        if old_run and not resumed:
            lock(path, refusal).release()
            n = next(n for n in range(1, 10**6) if not os.path.exists(f"{folder}.{n}"))
            os.rename(folder, f"{folder}.{n}")
            say(f"the older run in {folder} is now in {folder}.{n}")
        os.makedirs(folder, exist_ok=True)
        return lock(path, refusal)
    except OSError as e:
        raise UserError(f"--log_dir {folder} cannot be written ({one_line(e)})") from None


class RunLog:
    """A text file of lines that begin with a step, so that a resume can cut it at a step.

    A write that fails (disk full) is tried again with the next line; nothing is lost meanwhile.
    """

    def __init__(self, path, from_step):
        self.path, self.pending, self.warned = path, b"", False
        lines = []
        if os.path.exists(path):
            with open(path, "rb") as f:
                lines = [x for x in f if x.endswith(b"\n") and x.split(b" ")[0].isdigit()]
        kept = b"".join(line for line in lines if int(line.split()[0]) < from_step)
        with atomic_write(path) as f:
            f.write(kept)
        self.good = len(kept)  # bytes known to be right: a torn write is overwritten from there

    def close(self):
        """Say so where lines could not be written to the end."""
        self.write("")
        if self.pending:
            warn(f"{self.path}: its last {self.pending.count(10)} lines could not be written")

    def write(self, line):
        self.pending += line.encode() + b"\n" * bool(line)
        try:
            with open(self.path, "r+b") as f:
                f.seek(self.good)
                f.write(self.pending)
                f.truncate()
            self.good, self.pending = self.good + len(self.pending), b""
        except OSError as e:
            if not self.warned:
                warn(f"{self.path} cannot be written now ({one_line(e)}); trying again each step")
            self.warned = True


class Reporter:
    """All that a run tells, by its main process.

    settings: what config.json keeps. peak_steps: steps a second if every product ran at the
    measured rate of a large one; mfu is the share of it.
    """

    DIGITS = dict(train=6, val=4, hella=4, norm=4)

    def __init__(self, cfg, settings, from_step, peak_steps):
        folder = cfg.log_dir
        self.max_steps, self.tokens_per_step = cfg.max_steps, cfg.total_batch_size
        self.peak_steps = peak_steps
        self.timed, self.seconds = -3, 0.0  # steps and their time; the first three compile
        self.lock = open_log_dir(folder, resumed=cfg.resume)
        try:
            self.open_files(folder, settings, from_step)
        except OSError as e:
            raise RunError(f"{folder} cannot be written ({one_line(e)}); the checkpoints in it are "
                           "as they were") from None
        self.plot, self.drawing = [sys.executable, os.path.join(HERE, "plot.py"), folder], None
        self.can_draw = importlib.util.find_spec("matplotlib") is not None
        self.wandb = self.open_wandb(cfg.wandb, folder, settings) if cfg.wandb else None

    def open_files(self, folder, settings, from_step):
        self.log = RunLog(os.path.join(folder, "log.txt"), from_step)
        self.samples = RunLog(os.path.join(folder, "samples.txt"), from_step)
        path = os.path.join(folder, "config.json")
        other = OSError, ValueError, LookupError, TypeError  # no file, or another program's
        with contextlib.suppress(*other), open(path, encoding="utf-8") as f:
            settings["wandb_id"] = json.load(f)["wandb_id"]  # a resumed run is the same run there
        settings.setdefault("wandb_id", os.urandom(4).hex())
        with atomic_write(path) as f:
            f.write(json.dumps(settings, indent=1).encode())

    def open_wandb(self, project, folder, settings):
        try:
            return optional_import("wandb", "--wandb").init(
                project=project, dir=folder, config=settings, id=settings["wandb_id"],
                resume="allow")
        except Exception as e:  # no login, no network: wandb has its own kinds
            raise RunError(f"--wandb {project}: {one_line(e)}") from None

    def scalars(self, step, **values):
        """`{step} {name} {value}` in log.txt for the four that are kept there; all to W&B."""
        for name, digits in self.DIGITS.items():
            if values.get(name) is not None:
                self.log.write(f"{step} {name} {values[name]:.{digits}f}")
        if self.wandb:
            self.wandb.log(values, step=step)

    def update(self, step, loss, norm, lr, dt):
        """The console line and the log lines of one update; now and then the time to go."""
        self.timed += 1
        self.seconds += dt if self.timed > 0 else 0.0
        rate, mfu = self.tokens_per_step / dt, 1 / dt / self.peak_steps
        self.scalars(step, train=loss, norm=norm, lr=lr, dt=dt, tok_per_sec=rate, mfu=mfu)
        say(f"step {step:5d} | loss: {loss:.6f} | lr {lr:.4e} | norm: {norm:.4f} | "
            f"dt: {dt * 1000:.2f}ms | tok/sec: {rate:.2f} | mfu: {100 * mfu:.1f}%")
        done = step + 1
        if self.timed == 7 or (self.timed > 0 and done % max(25, self.max_steps // 50) == 0):
            left = timedelta(seconds=round(self.seconds / self.timed * (self.max_steps - done)))
            say(f"{100 * done / self.max_steps:.1f}% done, {left} of training to go")

    @property
    def tokens_per_second(self):
        """Of the steps so far; 0.0 as long as it is not known."""
        return self.tokens_per_step * self.timed / self.seconds if self.seconds else 0.0

    def sample(self, step, i, text):
        say(f"rank 0 sample {i}: {text}")
        self.samples.write(f"{step} sample {i}: {json.dumps(text, ensure_ascii=False)}")
        if self.wandb:
            self.wandb.log({f"sample {i}": text}, step=step)

    def draw(self, wait=False):
        """Redraw curves.png in a process of its own: training neither waits nor fails."""
        if self.drawing and (wait or self.drawing.poll() is not None):
            self.finish_drawing()
        if self.can_draw and not self.drawing:
            try:
                self.drawing = subprocess.Popen(self.plot, stdout=subprocess.DEVNULL,
                                                stderr=subprocess.PIPE, text=True,
                                                start_new_session=True)  # Ctrl-C is not for it
            except OSError as e:  # no room for one more process
                self.can_draw = False
                return warn(f"curves.png is not drawn any more ({one_line(e)})")
            if wait:
                self.finish_drawing()

    def finish_drawing(self):
        try:
            errors = self.drawing.communicate(timeout=60)[1]
        except subprocess.TimeoutExpired:
            self.drawing.kill()
            errors = self.drawing.communicate()[1]
        if self.drawing.returncode:
            warn(f"curves.png is not drawn any more: {errors.strip()[-200:] or 'it took 60 s'}")
            self.can_draw = False
        self.drawing = None

    def close(self):
        self.draw(wait=True)
        self.log.close()
        self.samples.close()
        if self.wandb:
            self.wandb.finish()
        self.lock.release()


def open_reporter(cfg, dist, trainer, data):
    """The Reporter of a run: on the main process, else None. Behind the last check of all."""
    matmul_rate = measure_matmul(dist.device, getattr(torch, cfg.dtype))
    settings = describe_run(cfg, dist, trainer, data, matmul_rate)
    check_steps(cfg, trainer.loader.rows_per_step, trainer.loader.n_windows)
    flops_per_step = trainer.raw_model.flops_per_token(cfg.T) * cfg.total_batch_size
    dist.barrier()  # every process has passed every check: from here on files are written
    reporter = None
    if dist.master_process:
        reporter = Reporter(cfg, settings, trainer.step,
                            matmul_rate * dist.world_size / flops_per_step)
    dist.barrier()  # the folder is there now
    if not all(dist.gather(os.path.isdir(cfg.log_dir))):
        warn(f"not every node sees {cfg.log_dir}: a resume will need it on shared storage")
    return reporter


def describe_run(cfg, dist, trainer, data, matmul_rate):
    """The start-up block; returns what config.json keeps, enough to repeat the run."""
    loader, name = trainer.loader, device_name(dist.device)
    say(f"using device: {dist.device} ({name}), {cfg.dtype}, "
        f"compile {'on' if trainer.compiled else 'off'}; {matmul_rate / 1e12:.2f} TFLOP/s in a "
        f"large matrix product{share_of_peak(name, cfg.dtype, matmul_rate)}")
    say(f"total desired batch size: {cfg.total_batch_size}")
    say(f"=> calculated gradient accumulation steps: {loader.grad_accum_steps} "
        f"(B {loader.B}, T {cfg.T}, processes {dist.world_size})")
    for split, stream in (("train", data.train), ("val", data.val)):
        say(f"found {len(stream.names)} shards for split {split}: {len(stream):,} tokens")
    return dict(flags=asdict(cfg), model=asdict(trainer.raw_model.config), B=loader.B,
                processes=dist.world_size, device=f"{dist.device} ({name})",
                compile=trainer.compiled, data=data.identity,
                tokenizer=trainer.facts["tokenizer"],
                **versions(os.path.join(data.path, MANIFEST)))


def versions(*files):
    """What a run ran on, for config.json: git commit, Python, torch, sha256 of files that exist."""
    found = dict(python=sys.version.split()[0], torch=torch.__version__, git=None, sha256={})
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        found["git"] = subprocess.run(
            ["git", "-C", HERE, "describe", "--always", "--dirty"], timeout=10,
            capture_output=True, text=True, check=True).stdout.strip()
    for path in files:
        with contextlib.suppress(OSError), open(path, "rb") as f:
            found["sha256"][os.path.basename(path)] = hashlib.sha256(f.read()).hexdigest()
    return found
