"""Shared by the benchmarks: synthetic data, and running the project's scripts as a user would."""

import argparse
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

ROOT = Path(__file__).resolve().parents[2]  # holds train_gpt2.py and modern.py
STEP = re.compile(r"step +(\d+) \|.*dt: ([\d.]+)ms \| tok/sec: [\d.]+(?: \| mfu: ([\d.]+)%)?")
TORCHRUN = re.compile("(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|TORCHELASTIC_.*|MASTER_.*")


def make_parser(doc):
    return argparse.ArgumentParser(description=doc,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)


def command(target, *flags, ranks=0):
    """The command line of a script with its flags, under torchrun if `ranks` is given."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [sys.executable, *launcher * bool(ranks), *map(str, [*target, *flags])]


def run_process(command, cwd=None, timeout=3600, on_line=None, **env):
    """Run a command to its end: exit status, (seconds since start, line) of stdout, stderr.

    on_line(line, process) is called for each line of stdout. After `timeout` seconds the process
    group gets SIGTERM, 10 seconds later (35 for torchrun) SIGKILL, and TimeoutError is raised.
    """
    env = {k: v for k, v in os.environ.items() if not TORCHRUN.fullmatch(k)} | env
    env |= dict(PYTHONUNBUFFERED="1")
    start, timed_out, ended, lines = time.monotonic(), threading.Event(), threading.Event(), []
    with tempfile.TemporaryFile("w+", errors="replace") as stderr:
        process = subprocess.Popen(
            command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=stderr, text=True, errors="replace", start_new_session=True)

        def kill():
            timed_out.set()
            for signum in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signum)
                if ended.wait(35 if "torch.distributed.run" in command else 10):
                    return

        timer = threading.Timer(timeout, kill)
        timer.daemon = True
        timer.start()
        try:
            for line in process.stdout:
                lines.append((time.monotonic() - start, line.rstrip()))
                if on_line:
                    on_line(line, process)
            status = process.wait()
        finally:  # Ctrl-C as well
            ended.set()
            timer.cancel()
            process.kill()
        if timed_out.is_set():
            raise TimeoutError
        stderr.seek(0)
        return SimpleNamespace(status=status, lines=lines, stderr=stderr.read())


def run_script(target, *flags, log_dir, ranks=0, **how):
    """Run train_gpt2.py or modern.py, directly or through probes.py, and parse what they print.

    steps: (seconds since start, dt in seconds, mfu in percent or None) of each step line.
    """
    run = run_process(command(target, f"--log_dir={log_dir}", *flags, ranks=ranks), **how)
    matches = [(at, STEP.match(line)) for at, line in run.lines]
    run.steps = [(at, float(m[2]) / 1e3, m[3] and float(m[3])) for at, m in matches if m]
    run.text, run.log = "\n".join(line for _, line in run.lines), read_log(log_dir)
    return run


def read_log(log_dir):
    """log.txt as {(step, stream): value}; empty if there is none."""
    path = Path(log_dir) / "log.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    return {(int(step), stream): float(value) for step, stream, value in map(str.split, lines)}


def last_line(text):
    return (text.strip().splitlines() or ["nothing on stderr"])[-1][:200]


def write_shards(path, n_tokens):
    """A val and a train shard of skewed random ids; n_tokens=20,000 gives those of GOLDEN."""
    rng = np.random.default_rng(1234)
    path.mkdir()
    for split in ("val_000000", "train_000001"):
        np.save(path / f"x_{split}.npy", (rng.random(n_tokens) ** 6 * 50257).astype(np.uint16))
    return path


def write_hellaswag(path, n):
    """n examples in HellaSwag's format, of about its mean length, drawn from input.txt."""
    words, rng = (ROOT / "input.txt").read_text(encoding="utf-8").split(), random.Random(0)

    def phrase(n_words):
        start = rng.randrange(len(words) - n_words)
        return " ".join(words[start:start + n_words])

    examples = [dict(ctx=phrase(rng.randint(15, 62)), label=rng.randrange(4),
                     endings=[phrase(rng.randint(8, 42)) for _ in range(4)]) for _ in range(n)]
    path.write_text("\n".join(map(json.dumps, examples)), encoding="utf-8")
    return path
