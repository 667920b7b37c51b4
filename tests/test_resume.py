"""A run that cannot be lost: kills, signals, faults of the disk, bad files, resumes.

Most runs here are forks of one process that has imported train_gpt2.py: real processes, killed for
real, but they start in a moment. What torchrun starts is the command as a user types it.
"""

import contextlib
import dataclasses
import errno
import io
import json
import os
import pickle
import random
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, command, read_log, write_shards

import checkpoint
import common

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs Linux")

TINY = [*TINY, "--val_tokens=4000"]  # an evaluation long enough to be hit

# -----------------------------------------------------------------------------
# Runs as forks

FORKS = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
import torch, torch._dynamo
import train_gpt2, common

def measure_matmul(*args):
    return 1e9
for module in (train_gpt2, common):  # half a second that tells nothing here
    if hasattr(module, "measure_matmul"):
        module.measure_matmul = measure_matmul

def child(job):
    os.setsid()
    os.chdir(job["cwd"])
    os.environ.update(job["env"])
    for number, path in enumerate((os.devnull, job["out"], job["err"])):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        os.dup2(fd, number)
        os.close(fd)
    sys.stdin = open(0, closefd=False)
    sys.modules["matplotlib"] = None  # no curves: they take seconds
    exec(job["patch"], {})
    try:
        train_gpt2.main(job["flags"])
    except SystemExit as e:  # anything else ends as in a script of its own
        sys.stdout.flush()
        os._exit(e.code or 0)

for line in iter(sys.stdin.readline, ""):
    job = json.loads(line)
    if "poll" in job:
        pid, status = os.waitpid(job["poll"], os.WNOHANG)
        print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
        continue
    pid = os.fork()
    if not pid:
        child(job)
    print(pid, flush=True)
"""


class Forks:
    """Starts runs of train_gpt2.py from a process that has it imported."""

    def __init__(self, folder, root=ROOT):
        self.n, self.folder, self.live = 0, Path(folder), set()
        self.process = subprocess.Popen([sys.executable, "-c", FORKS, str(root)], text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def ask(self, **job):
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, *flags, cwd, patch="", **env):
        """A Run; patch: Python code that the process executes first."""
        self.n += 1
        out, err = (str(self.folder / f"{self.n}.{kind}") for kind in ("out", "err"))
        for path in (out, err):
            Path(path).touch()
        pid = self.ask(flags=list(map(str, flags)), cwd=str(cwd), patch=patch, env=env, out=out,
                       err=err)
        self.live.add(pid)
        return Run(self, pid, Path(out), Path(err))

    def run(self, *flags, **how):
        """A run to its end."""
        return self.start(*flags, **how).end()

    def close(self):
        for pid in self.live:
            os.killpg(pid, signal.SIGKILL)
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(10)


class Run:
    """One run: its process, what it has said so far, and its status (negative: the signal)."""

    def __init__(self, forks, pid, out, err):
        self.forks, self.pid, self.paths, self.status = forks, pid, (out, err), None

    @property
    def stdout(self):
        return self.paths[0].read_text()

    @property
    def stderr(self):
        return self.paths[1].read_text()

    def poll(self):
        if self.status is None:
            self.status = self.forks.ask(poll=self.pid)
            if self.status is not None:
                self.forks.live.discard(self.pid)
        return self.status

    def until(self, text, seconds=60):
        """Wait for a text on the console, or for the end."""
        deadline = time.monotonic() + seconds
        while text not in self.stdout and self.poll() is None:
            assert time.monotonic() < deadline, f"no {text!r}: {self.stdout} {self.stderr}"
            time.sleep(0.002)
        return self

    def end(self, seconds=60):
        deadline = time.monotonic() + seconds
        while self.poll() is None:
            assert time.monotonic() < deadline, f"does not end: {self.stdout} {self.stderr}"
            time.sleep(0.005)
        return self

    def kill(self, signum=signal.SIGKILL):
        if self.poll() is None:
            os.kill(self.pid, signum)
        return self

    def good(self):
        assert self.status == 0, f"{self.status}: {self.stdout} {self.stderr}"
        return self

    def refused(self, *words, status=2):
        """One line (a table may follow) that holds all the words; no traceback; exit 2."""
        error = self.stderr
        assert self.status == status, f"{self.status}: {self.stdout} {error}"
        assert "Traceback" not in error
        first, *rest = [x for x in error.splitlines() if not x.startswith("warning: ")]
        assert first.startswith("train_gpt2.py: error: ")
        assert all(" | " in line for line in rest)
        for word in words:
            assert str(word) in error, f"{word} is not in {error}"
        return self


# Code for `patch`: what goes wrong in a run, and when.


def at(name, action, nth=1, match="", before=True):
    """`action` at the nth call of e.g. os.replace whose arguments name `match`."""
    module, attribute = name.rsplit(".", 1)
    return f"""
import os, signal, time, torch
import {module} as module
real, calls = module.{attribute}, []
def call(*args, **kwargs):
    names = [os.readlink(f"/proc/self/fd/{{a}}") if type(a) is int else str(a) for a in args]
    if {match!r} in " ".join(names):
        calls.append(names)
        if {before} and len(calls) == {nth}:
            {action}
    result = real(*args, **kwargs)
    if not {before} and len(calls) == {nth}:
        {action}
    return result
module.{attribute} = call
"""


KILL = "os.kill(os.getpid(), signal.SIGKILL)"
NO_SPACE = "raise OSError(28, 'No space left on device')"


def torn_save(action, nth="True"):
    """torch.save that writes half a file, then `action`, where `nth` (of n) holds."""
    return f"""
import errno, io, os, signal, torch
real, n = torch.save, 0
def save(state, f, *args, **kwargs):
    global n
    n += 1
    if not ({nth}):
        return real(state, f, *args, **kwargs)
    whole = io.BytesIO()
    real(state, whole)
    with open(f, "wb") if isinstance(f, str) else f as f:
        f.write(whole.getvalue()[:whole.tell() // 2])
        f.flush()
        {action}
torch.save = save
"""


PACE = """
import time, torch
clip = torch.nn.utils.clip_grad_norm_
def slow(*args, **kwargs):
    time.sleep({})
    return clip(*args, **kwargs)
torch.nn.utils.clip_grad_norm_ = slow
"""


# -----------------------------------------------------------------------------
# What is compared


def weights(folder, name="last.pt"):
    return torch.load(Path(folder) / name, weights_only=True)


def equal(a, b):
    """Two nests of plain data, tensors compared bit by bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def differing_lines(a, b, name="log.txt"):
    a, b = ((Path(x) / name).read_bytes().split(b"\n") for x in (a, b))
    return sum(x != y for x, y in zip(a, b, strict=False)) + abs(len(a) - len(b))


def assert_same_end(folder, undisturbed):
    """Log, weights and optimizer of a finished run are those of the undisturbed one."""
    folder, undisturbed = Path(folder), Path(undisturbed)
    assert (folder / "log.txt").read_bytes() == (undisturbed / "log.txt").read_bytes()
    a, b = weights(folder), weights(undisturbed)
    for part in ("step", "model", "optimizer", "val_loss", "rng"):
        assert equal(a[part], b[part]), part
    kept = {p.name for p in undisturbed.glob("model_*.pt")}
    assert {p.name for p in folder.glob("model_*.pt")} == kept
    assert not list(folder.glob("*.tmp"))


def left_behind(word):
    """Command lines of living processes that hold `word`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if word in line and path.parent.name != str(os.getpid()):
                found.append(line)
    return found


def gone(word, seconds):
    """Whether no process that names `word` is left within so many seconds."""
    deadline = time.monotonic() + seconds
    while left_behind(word):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    forks = Forks(tmp_path_factory.mktemp("console"))
    yield forks
    forks.close()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three odd-sized shards of 95 windows in all: the runs of 192 rows end the epoch twice."""
    return write_shards(tmp_path_factory.mktemp("data"), sizes=(700, 500, 333), val=4001)


@pytest.fixture(scope="module")
def undisturbed(forks, data, tmp_path_factory):
    """The log_dir of a run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    forks.run(*TINY, f"--data={data}", cwd=folder).good()
    return folder / "log"


@pytest.fixture
def flags(data):
    return [*TINY, f"--data={data}"]


def copy_until(undisturbed, folder, step):
    """A log_dir as a run killed after its save at `step` (4 or 8) leaves it."""
    folder = Path(folder)
    shutil.copytree(undisturbed, folder)
    for path in folder.glob("model_*.pt"):
        if int(path.stem[6:]) > step:
            path.unlink()
    saved = weights(undisturbed, "model_00008.pt")
    assert saved["step"] == step == 8
    os.remove(folder / "last.pt")
    os.link(folder / "model_00008.pt", folder / "last.pt")
    return folder


# -----------------------------------------------------------------------------
# 1. SIGKILL at any moment


def test_kill_anywhere(forks, undisturbed, flags, tmp_path):
    rng = random.Random()
    early, late = 0.1 * rng.random(), 0.1 * rng.random()
    log, kills = tmp_path / "log", 0

    def killed(text="", patch="", wait=0.0):
        nonlocal kills
        before = tmp_path / "before"
        for _ in range(10):  # a run that was at its end before the signal came is done again
            shutil.rmtree(before, ignore_errors=True)
            if log.exists():
                shutil.copytree(log, before)
            run = forks.start(*flags, "--resume", cwd=tmp_path, patch=patch)
            if not patch:
                run.until(text)
                time.sleep(wait)
                run.kill()
            if run.end().status != 0:
                break
            shutil.rmtree(log)
            if before.exists():
                shutil.copytree(before, log)
        assert run.status == -signal.SIGKILL, f"{run.status} {run.stdout} {run.stderr}"
        kills += 1

    killed(wait=early)  # start-up or the first steps
    killed(patch=torn_save(KILL))  # half a checkpoint on the disk
    killed(patch=at("os.replace", KILL, match="last.pt"))  # written, not renamed
    assert not (log / "last.pt").exists()
    killed(patch=at("os.replace", KILL, match="last.pt", before=False))  # renamed, not synced
    assert weights(log)["step"] == 4
    killed("step     4 |", wait=late)  # in the evaluation at step 5, or in the next epoch
    killed("step     6 |")
    killed(patch=at("os.replace", KILL, match="model_00008"))  # one of two names is missing
    assert not (log / "model_00008.pt").exists()
    killed(patch=torn_save(KILL, nth="state['step'] == 12"))  # the last save
    killed(patch=at("os.replace", KILL, match="model_00012"))  # the last save but for the kept copy
    forks.run(*flags, "--resume", cwd=tmp_path).good()
    assert_same_end(log, undisturbed)
    assert os.stat(log / "model_00012.pt").st_ino == os.stat(log / "last.pt").st_ino

    forks.start(*flags, "--resume", cwd=tmp_path).until("finished").kill().end()
    assert_same_end(log, undisturbed)
    print(f"{kills} kills, {early:.3f} s and {late:.3f} s")


@pytest.mark.parametrize("variant", [
    ["--dtype=bfloat16", "--shuffle=windows", "--optimizer=muon"],
    ["--compile", "--n_layer=1"],
], ids=["bfloat16-windows-muon", "compile"])
def test_kill_variants(forks, data, tmp_path, variant):
    # for --compile the compiler's front and autograd but not its C++: that takes a minute
    patch = """
import functools, torch
torch.compile = functools.partial(torch.compile, backend="aot_eager")
"""
    flags = [*TINY, f"--data={data}", *variant]
    whole = forks.start(*flags, "--log_dir=whole", cwd=tmp_path, patch=patch)
    places = random.sample(range(1, 11), 1 if "--compile" in variant else 2)
    for place in sorted(places):
        run = forks.start(*flags, "--resume", cwd=tmp_path, patch=patch)
        run.until(f"step {place:5d} |")
        time.sleep(0.05 * random.random())
        assert run.kill().end().status in (-signal.SIGKILL, 0)
    forks.run(*flags, "--resume", cwd=tmp_path, patch=patch).good()
    whole.end().good()
    assert_same_end(tmp_path / "log", tmp_path / "whole")


# -----------------------------------------------------------------------------
# 2. SIGTERM and Ctrl-C


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT], ids=["TERM", "INT"])
def test_signals(forks, undisturbed, flags, tmp_path, signum):
    # in a step
    run = forks.start(*flags, cwd=tmp_path, patch=PACE.format(0.05)).until("step     1 |")
    assert run.kill(signum).end(10).status == 128 + signum
    saved = weights(tmp_path / "log")
    assert 2 <= saved["step"] <= 4
    assert f"at step {saved['step']}" in run.stdout and "--resume" in run.stdout
    assert "Traceback" not in run.stderr and "error" not in run.stderr
    # in the evaluation at step 5, which is abandoned and redone
    slow = """
import time, torch, train_gpt2
read = train_gpt2.DataLoaderLite.read
def slow(self, windows):
    if not torch.is_grad_enabled():
        time.sleep(0.008)
    return read(self, windows)
train_gpt2.DataLoaderLite.read = slow
"""
    run = forks.start(*flags, "--resume", cwd=tmp_path, patch=slow).until("step     4 |")
    time.sleep(0.1)
    assert run.kill(signum).end(10).status == 128 + signum
    assert weights(tmp_path / "log")["step"] == 5
    assert (5, "val") not in read_log(tmp_path / "log")
    assert (4, "train") in read_log(tmp_path / "log")
    # in the last evaluation: all steps are done, but the run is not
    run = forks.start(*flags, "--resume", cwd=tmp_path, patch=slow).until("step    11 |")
    time.sleep(0.1)
    assert run.kill(signum).end(10).status == 128 + signum
    forks.run(*flags, "--resume", cwd=tmp_path).good()
    assert_same_end(tmp_path / "log", undisturbed)


def test_second_signal_stops_at_once(forks, flags, tmp_path):
    run = forks.start(*flags, cwd=tmp_path, patch=PACE.format("len(str(time)) and 30"))
    run.until("validation loss")
    time.sleep(0.2)
    run.kill(signal.SIGTERM)
    time.sleep(0.3)
    run.kill(signal.SIGTERM)  # torchrun hands on what the worker has already got: not a second one
    time.sleep(0.9)
    assert run.poll() is None
    start = time.monotonic()
    assert run.kill(signal.SIGINT).end(10).status == 128 + signal.SIGINT
    assert time.monotonic() - start < 3
    assert not (tmp_path / "log" / "last.pt").exists()


def test_signal_and_a_full_disk(forks, flags, tmp_path):
    run = forks.start(*flags, cwd=tmp_path, patch=torn_save(NO_SPACE)).until("step     1 |")
    run.kill(signal.SIGTERM).end(20).refused("could not be saved", "No space left", status=1)


# -----------------------------------------------------------------------------
# 3. Several processes


def workers_of(agent):
    """{rank: pid} of the workers of a torchrun."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (path / "stat").read_text().rsplit(")", 1)[1].split()[1] == str(agent):
                env = dict(x.partition("=")[::2] for x in
                           (path / "environ").read_text(errors="replace").split("\0"))
                if "LOCAL_RANK" in env:
                    found[int(env["RANK"])] = int(path.name)
    return found


class Torchrun:
    """A torchrun of two processes, as a user types it."""

    def __init__(self, *flags, cwd, options=(), **env):
        self.out = Path(cwd) / f"torchrun.{time.monotonic_ns()}"
        line = command(*flags, processes=2)
        script = line.index(str(ROOT / "train_gpt2.py"))
        site = Path(cwd) / "site"  # no curves: they take seconds
        site.mkdir(exist_ok=True)
        (site / "sitecustomize.py").write_text("import sys\nsys.modules['matplotlib'] = None\n")
        env["PYTHONPATH"] = f"{site}:{os.environ.get('PYTHONPATH', '')}"
        with open(self.out, "w") as f:
            self.process = subprocess.Popen([*line[:script], *options, *line[script:]], cwd=cwd,
                                            stdin=subprocess.DEVNULL, stdout=f, stderr=f,
                                            start_new_session=True, env=os.environ | env)

    @property
    def text(self):
        return self.out.read_text()

    def until(self, text, seconds=90):
        deadline = time.monotonic() + seconds
        while text not in self.text:
            assert self.process.poll() is None and time.monotonic() < deadline, self.text
            time.sleep(0.002)
        return self

    def kill_worker(self):
        rank, pid = random.choice(sorted(workers_of(self.process.pid).items()))
        os.kill(pid, signal.SIGKILL)
        return rank

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for pid in workers_of(self.process.pid).values():
            os.kill(pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()


@pytest.fixture
def one_process(undisturbed):
    """What one process logs when nobody disturbs it."""
    return read_log(undisturbed)


def assert_close(log, reference):
    assert log.keys() == reference.keys()
    for (step, stream), value in reference.items():
        atol = dict(train=1e-5, val=1.1e-4, norm=2e-3)[stream]
        assert abs(float(log[step, stream]) - float(value)) <= atol, (step, stream)


def test_torchrun(forks, flags, one_process, tmp_path):
    """Its workers go with it; with --max_restarts it survives the death of any worker."""
    flags = [*flags, f"--log_dir={tmp_path / 'log'}", "--resume"]
    with Torchrun(*flags, cwd=tmp_path) as job:
        job.until("step     2 |").process.kill()  # torchrun itself
        assert gone(str(tmp_path / "log"), 15), "workers outlive torchrun"
        stopped = weights(tmp_path / "log")["step"]
        assert 3 <= stopped < 12, job.text
    with Torchrun(*flags, cwd=tmp_path, options=["--max_restarts=3"],
                  TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1") as job:
        rank = job.until("step     7 |").kill_worker()
        assert job.process.wait(120) == 0, f"rank {rank}: {job.text}"
        assert gone(str(tmp_path / "log"), 15)
        assert job.text.count("resuming from") == 2
    assert_close(read_log(tmp_path / "log"), one_process)


def test_two_processes_agree_on_a_signal(forks, flags, one_process, tmp_path):
    """SIGTERM to one of two: both save at the same step and exit 143. Then one is killed: the
    other ends by itself, and one process with another B goes on."""
    flags = [*flags, "--B=1", "--resume"]

    def pair(patch=""):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        return [forks.start(*flags, cwd=tmp_path, patch=patch, RANK=str(r), LOCAL_RANK=str(r),
                            WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                            MASTER_PORT=port) for r in (0, 1)]

    main, other = pair(PACE.format(0.05))
    main.until("step     4 |")
    other.kill(signal.SIGTERM)
    assert (main.end(20).status, other.end(20).status) == (143, 143), main.stderr + other.stderr
    step = weights(tmp_path / "log")["step"]
    assert step in (5, 6) and f"step {step}" in main.stdout and other.stdout == ""
    both = pair(PACE.format(0.05))
    both[0].until(f"step {step + 1:5d} |")
    victim = random.choice(both)
    victim.kill()
    assert all(run.end(60).status for run in both)
    forks.run(*flags, "--B=4", cwd=tmp_path).good()
    assert_close(read_log(tmp_path / "log"), one_process)


# -----------------------------------------------------------------------------
# 4. A disk that fails


class Torn(io.FileIO):
    """A file that takes a few bytes, then no more: a short write, and after it ENOSPC."""

    def write(self, data):
        if self.tell() > 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(bytes(data)[:20])


def fail(number):
    def call(*args, **kwargs):
        raise OSError(number, os.strerror(number))
    return call


def break_open(monkeypatch, target):
    real = open

    def torn(path, mode="r", *args, **kwargs):
        if mode == "wb" and target in str(path):
            return io.BufferedWriter(Torn(path, "w"), 16)
        return real(path, mode, *args, **kwargs)

    monkeypatch.setattr("builtins.open", torn)


FAULTS = {
    "no space": lambda m: break_open(m, ".pt"),
    "fsync": lambda m: m.setattr(os, "fsync", fail(errno.EIO)),
    "rename": lambda m: m.setattr(os, "replace", fail(errno.EIO)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_atomic_write_keeps_the_old_file(monkeypatch, tmp_path, fault):
    path = tmp_path / "last.pt"
    path.write_bytes(b"old")
    FAULTS[fault](monkeypatch)
    with pytest.raises(OSError), common.atomic_write(str(path)) as f:
        for _ in range(100):
            f.write(b"new" * 10)
    monkeypatch.undo()
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["last.pt"]


@pytest.mark.parametrize("fault", FAULTS)
def test_save_checkpoint_keeps_the_old_file(monkeypatch, tmp_path, capsys, fault):
    state = dict(step=4, model={"w": torch.arange(1000.0)})
    checkpoint.save_checkpoint(state, str(tmp_path))
    FAULTS[fault](monkeypatch)
    capsys.readouterr()
    checkpoint.save_checkpoint(state | {"step": 8}, str(tmp_path), keep=True)
    with pytest.raises(common.RunError, match="step 12 .*is as it was.*--resume") as final:
        checkpoint.save_checkpoint(state | {"step": 12}, str(tmp_path), must=True)
    monkeypatch.undo()
    warning = capsys.readouterr().err
    reason = "No space left" if fault == "no space" else "Input/output error"
    assert warning.startswith("warning: step 8 could not be saved")
    assert reason in warning and reason in str(final.value)
    assert equal(weights(tmp_path), state) and os.listdir(tmp_path) == ["last.pt"]


def test_kept_copy_without_links(monkeypatch, tmp_path):
    """Where the file system cannot link: a copy; a failing one leaves last.pt alone."""
    state = dict(step=4, model={"w": torch.arange(1000.0)})
    monkeypatch.setattr(os, "link", fail(errno.EPERM))
    checkpoint.save_checkpoint(state, str(tmp_path), keep=True)
    assert equal(weights(tmp_path), state) and equal(weights(tmp_path, "model_00004.pt"), state)
    break_open(monkeypatch, "model_00008.pt")
    checkpoint.save_checkpoint(state | {"step": 8}, str(tmp_path), keep=True)
    monkeypatch.undo()
    assert weights(tmp_path)["step"] in (4, 8)
    assert sorted(os.listdir(tmp_path)) == ["last.pt", "model_00004.pt"]


def test_failed_periodic_save(forks, undisturbed, flags, tmp_path):
    """Warns, goes on, and the next save is good."""
    run = forks.run(*flags, cwd=tmp_path, patch=torn_save(NO_SPACE, nth="n == 1")).good()
    assert "warning: step 4 could not be saved" in run.stderr and "No space left" in run.stderr
    assert_same_end(tmp_path / "log", undisturbed)


def test_failed_last_save(forks, undisturbed, flags, tmp_path):
    """No file may grow beyond 100 kB, for real: log.txt can be written, a checkpoint cannot."""
    log = copy_until(undisturbed, tmp_path / "log", 8)
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
    run = forks.run(*flags, "--resume", "--save_every=5", cwd=tmp_path, patch=limit)
    run.refused("step 12 could not be saved", "File too large", "is as it was", status=1)
    assert "warning: step 10 could not be saved" in run.stderr
    assert weights(log)["step"] == 8 and not list(log.glob("*.tmp"))
    forks.run(*flags, "--resume", cwd=tmp_path).good()
    assert_same_end(log, undisturbed)


TORN_LOG = """
import builtins, io, os
real, n = open, 0
class Torn(io.FileIO):
    def write(self, data):
        super().write(bytes(data)[:7])
        raise OSError(28, "No space left on device")
def opened(path, mode="r", *args, **kwargs):
    global n
    if str(path).endswith("log.txt") and ("+" in mode or "a" in mode):
        n += 1
        if n in range(5, {}):
            return Torn(path, mode.replace("b", ""))
    return real(path, mode, *args, **kwargs)
builtins.open = opened
"""


def test_log_on_a_full_disk(forks, undisturbed, flags, tmp_path):
    """Lines wait until there is room again; a torn one is overwritten."""
    run = forks.run(*flags, cwd=tmp_path, patch=TORN_LOG.format(15)).good()
    assert "log.txt" in run.stderr and "No space left" in run.stderr
    assert_same_end(tmp_path / "log", undisturbed)


def test_log_on_a_disk_that_stays_full(forks, flags, tmp_path):
    """That lines are missing is said again at the end, where it is seen."""
    run = forks.run(*flags, cwd=tmp_path, patch=TORN_LOG.format(999))
    assert "Traceback" not in run.stderr
    assert run.stderr.count("log.txt") >= 2, run.stderr


def test_start_on_a_full_disk(forks, undisturbed, flags, tmp_path):
    """No traceback, and nothing that was good is lost."""
    log = copy_until(undisturbed, tmp_path / "log", 8)
    before = (log / "log.txt").read_bytes()
    for name in ("log.txt", "config.json"):
        os.symlink("/dev/full", log / f"{name}.tmp")
        run = forks.run(*flags, "--resume", cwd=tmp_path)
        run.refused("log", "No space left", status=1)
        assert name != "log.txt" or (log / "log.txt").read_bytes() == before
    assert weights(log)["step"] == 8


# -----------------------------------------------------------------------------
# 5. Bad input


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def bad_files(folder, good):
    """{name: path} of files that are no checkpoints of this project."""
    state = torch.load(good, weights_only=True)
    contents = {
        "truncated": Path(good).read_bytes()[:-1000],
        "empty": b"",
        "random": random.Random(0).randbytes(5000),
        "text": b"hello\n" * 100,
        "tensor": torch.ones(3),
        "list": [1, 2, 3],
        "state": {"w": torch.ones(3)},
        # nanoGPT's: its config is that of the run, the shape is in model_args
        "nanogpt": dict(model=state["model"], optimizer={}, model_args=dict(n_layer=2), iter_num=5,
                        best_val_loss=torch.tensor(3.0), config=dict(out_dir="out", n_layer=2)),
        "no shape": dict(model=state["model"], config={}, step=1),
        "strange model": dict(state, model=[1, 2]),
        "strange config": dict(state, config=[1, 2]),
        "missing weight": dict(state, step=8, model={"w": torch.ones(3)}),
        "bomb": dict(state, val_loss=Bomb(str(folder / "bombed"))),
    }
    paths = {}
    for name, content in contents.items():
        paths[name] = folder / f"{name}.pt"
        if isinstance(content, bytes):
            paths[name].write_bytes(content)
        else:
            torch.save(content, paths[name])
    paths["plain bomb"] = folder / "plain bomb.pt"
    paths["plain bomb"].write_bytes(pickle.dumps(Bomb(str(folder / "bombed"))))
    paths["folder"] = folder
    paths["missing"] = folder / "nothing.pt"
    return paths


@pytest.mark.filterwarnings("error")
def test_bad_checkpoints(forks, undisturbed, flags, tmp_path):
    """One line that names the file, exit 2, for --init and for --resume; nothing runs."""
    paths, wrong = bad_files(tmp_path, undisturbed / "last.pt"), []
    for name in paths.keys() - {"nanogpt", "no shape", "missing weight"}:
        try:
            checkpoint.read_checkpoint(str(paths[name]))
            wrong.append(f"{name} was read")
        except common.UserError as e:
            assert str(paths[name]) in str(e) and "\n" not in str(e)
        except Exception as e:
            wrong.append(f"{name}: {common.one_line(e)}")
    runs = {}
    for name in ("nanogpt", "no shape", "missing weight", "bomb", "truncated"):
        runs["--init", name] = forks.run("--device=cpu", f"--init={paths[name]}", "--eval_only",
                                         cwd=tmp_path), paths[name]
        if name == "missing weight":
            continue
        folder = tmp_path / f"log of {name}"
        folder.mkdir()
        shutil.copy(paths[name], folder / "last.pt")
        runs["--resume", name] = forks.run(*flags, "--resume", f"--log_dir={folder}",
                                           cwd=tmp_path), folder
        assert (folder / "last.pt").read_bytes() == paths[name].read_bytes()
        assert os.listdir(folder) == ["last.pt"]
    for what, (run, path) in runs.items():
        try:
            run.refused(path)
        except AssertionError as e:
            wrong.append(f"{what}: {str(e)[-300:]}")
    assert not (tmp_path / "bombed").exists(), "a pickle ran"
    assert not wrong, "\n".join(wrong)


def test_flipped_bits(tmp_path):
    """A flipped bit anywhere is noticed, or is where it does no harm; never a traceback."""
    path = tmp_path / "small.pt"
    state = dict(model={"w": torch.arange(300.0)}, config=dict(n_layer=1), step=3, flags={},
                 optimizer={}, data={})
    torch.save(state, path)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        weight = next(i for i in archive.infolist() if i.filename.endswith("data/0"))
        directory = archive.start_dir
    first = whole.index(state["model"]["w"].numpy().tobytes())
    inside = range(first, first + weight.file_size)
    rng, strange = random.Random(), []
    entry = whole.index(b"data/0", directory) - 52  # all of this entry in the directory, every bit
    for offset in {*range(entry, entry + 60), *rng.sample(range(len(whole)), 300)}:
        for bit in range(8) if entry <= offset < entry + 60 else [rng.randrange(8)]:
            path.write_bytes(whole[:offset] + bytes([whole[offset] ^ 1 << bit]) +
                             whole[offset + 1:])
            try:
                read = checkpoint.read_checkpoint(str(path))
                assert offset not in inside, f"offset {offset} bit {bit} was not noticed"
                assert equal(read, state), f"offset {offset} bit {bit} changed what was read"
            except common.UserError as e:
                assert str(path) in str(e) and "\n" not in str(e)
            except Exception as e:
                strange.append(f"offset {offset} of {len(whole)} bit {bit}: {common.one_line(e)}")
    assert not strange, f"{len(strange)}: " + "\n".join(strange[:5])


def test_damaged_newest_checkpoint(forks, undisturbed, flags, tmp_path):
    """The next older good one is used, the bad one named."""
    log = tmp_path / "log"
    shutil.copytree(undisturbed, log)  # not linked: each file has its own bytes
    for name in ("last.pt", "model_00012.pt"):
        with open(log / name, "r+b") as f:
            size = f.seek(0, os.SEEK_END)
            if name == "last.pt":
                f.truncate(size - 100)
            else:
                f.seek(size // 2)
                byte = f.read(1)[0]
                f.seek(size // 2)
                f.write(bytes([byte ^ 4]))
    run = forks.run(*flags, "--resume", cwd=tmp_path).good()
    assert "last.pt" in run.stderr and "model_00012.pt" in run.stderr
    assert run.stderr.count("is not a good checkpoint") == 2
    assert re.search(r"resuming from .*model_00008.pt, step 8", run.stdout)
    assert_same_end(log, undisturbed)


def test_newest_is_the_largest_step(tmp_path):
    state = dict(model={}, config={}, optimizer={}, flags={}, data={}, tokenizer="gpt2", scaler={},
                 rng=0)
    for step in (95000, 100000):
        torch.save(state | {"step": step}, tmp_path / f"model_{step:05d}.pt")
    path, found = checkpoint.find_checkpoint(str(tmp_path))
    assert found["step"] == 100000 and path.endswith("model_100000.pt")
    for step, newest in ((99000, "model_100000.pt"), (100000, "last.pt"), (100001, "last.pt")):
        torch.save(state | {"step": step}, tmp_path / "last.pt")  # a kill between the two writes
        assert checkpoint.find_checkpoint(str(tmp_path))[0] == str(tmp_path / newest)


@dataclasses.dataclass
class GPTConfig:
    """What build-nanogpt pickles."""

    block_size: int = 32
    vocab_size: int = 512
    n_layer: int = 2
    n_head: int = 2
    n_embd: int = 32


def test_build_nanogpt_checkpoint(forks, undisturbed, data, tmp_path, monkeypatch):
    """Its pickled config and the prefixes of its wrappers are read."""
    monkeypatch.setattr(sys.modules["__main__"], "GPTConfig", GPTConfig, raising=False)
    monkeypatch.setattr(GPTConfig, "__module__", "__main__")
    state = {f"_orig_mod.{k}": v for k, v in weights(undisturbed)["model"].items()}
    torch.save(dict(model=state, config=GPTConfig(), step=12, val_loss=6.0), tmp_path / "old.pt")
    values = []
    for path in (undisturbed / "last.pt", tmp_path / "old.pt"):
        run = forks.run("--device=cpu", f"--init={path}", f"--data={data}", "--eval_only", "--T=16",
                        "--val_tokens=4000", "--num_samples=0", cwd=tmp_path).good()
        values += re.findall(r"validation loss: (\S+)", run.stdout)
    assert len(values) == 2 and values[0] == values[1]
    assert float(values[0]) == float(read_log(undisturbed)[12, "val"])


CHANGED = dict(n_layer=1, n_head=4, n_embd=64, block_size=64, vocab_size=640, pos="rope",
               mlp="swiglu", norm="rmsnorm", T=8, total_batch_size=512, max_lr=1e-3, min_lr=1e-5,
               warmup_steps=4, max_steps=24, weight_decay=0.2, grad_clip=0.5, optimizer="muon",
               seed=1, dtype="bfloat16", shuffle="windows")


def test_resume_with_other_mathematics(forks, undisturbed, flags, data, tmp_path):
    """Refused with a table of flag, checkpoint, now."""
    log = copy_until(undisturbed, tmp_path / "log", 8)
    before = {p.name: p.read_bytes() for p in log.iterdir()}
    everything = [f"--{k}={v}" for k, v in CHANGED.items()]
    run = forks.run(*flags, *everything, "--resume", cwd=tmp_path).refused("checkpoint", "now")
    saved = weights(log)["flags"]
    rows = {r[0].strip(): r[1:] for r in (x.split(" | ") for x in run.stderr.splitlines()) if r[1:]}
    for name, value in CHANGED.items():
        old, new = rows[f"--{name}"]
        assert (old.strip(), new.strip()) == (str(saved[name]), str(value))
    assert len(rows) == len(CHANGED) + 1
    for name in ("seed", "total_batch_size", "max_lr", "dtype"):
        run = forks.run(*flags, f"--{name}={CHANGED[name]}", "--resume", cwd=tmp_path)
        run.refused(f"--{name}", CHANGED[name])
        assert run.stderr.count(" | ") == 4
    other = write_shards(tmp_path / "other", sizes=(700, 500, 334), val=4001)
    forks.run(*flags, f"--data={other}", "--resume", cwd=tmp_path).refused("--data", "1,534")
    moved = tmp_path / "moved"
    shutil.copytree(data, moved)
    # what may differ; the same data elsewhere
    assert before == {p.name: p.read_bytes() for p in log.iterdir()}
    forks.run(*flags, f"--data={moved}", "--B=4", "--save_every=3", "--resume", cwd=tmp_path).good()
    assert float(read_log(log)[11, "train"]) == pytest.approx(
        float(read_log(undisturbed)[11, "train"]), abs=1e-5)


def test_finished_run(forks, undisturbed, flags, tmp_path):
    log = tmp_path / "log"
    shutil.copytree(undisturbed, log)
    before = {p.name: p.read_bytes() for p in log.iterdir()}
    run = forks.run(*flags, "--resume", cwd=tmp_path).good()
    assert "is finished" in run.stdout and run.stderr == ""
    assert len(run.stdout.splitlines()) == 1
    run = forks.run(*flags, "--max_steps=24", "--resume", cwd=tmp_path).refused("--max_steps", 24)
    assert "schedule" in run.stderr
    assert {p.name: p.read_bytes() for p in log.iterdir()} == before


def test_log_dir_that_cannot_be_written(forks, flags, tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder in ("file", "file/log"):
        for more in ([], ["--resume"]):
            forks.run(*flags, f"--log_dir={folder}", *more, cwd=tmp_path).refused(folder)
    forks.run(*flags, "--log_dir=/proc/log", cwd=tmp_path).refused("/proc/log")
    assert (tmp_path / "file").read_text() == "mine"
    if os.geteuid():  # root may write anywhere
        (tmp_path / "shut").mkdir()
        os.chmod(tmp_path / "shut", stat.S_IRUSR | stat.S_IXUSR)
        forks.run(*flags, "--log_dir=shut", cwd=tmp_path).refused("shut")


def test_one_log_dir_one_live_run(forks, flags, tmp_path):
    """A second run is refused; an older one is moved, the first to log.1, the next to log.2."""
    short = [*flags, "--max_steps=2"]
    live = forks.start(*short, cwd=tmp_path, patch=PACE.format(60)).until("validation loss")
    others = [forks.start(*short, *more, cwd=tmp_path) for more in ([], ["--resume"])]
    for run in others:
        run.end().refused("log")
    assert live.poll() is None
    live.kill().end()
    first = (tmp_path / "log" / "log.txt").read_bytes()
    assert first.startswith(b"0 val ")
    # a start that is refused moves nothing
    forks.run(*short, f"--init={tmp_path}/nothing.pt", cwd=tmp_path).refused("nothing.pt")
    assert not (tmp_path / "log.1").exists()
    run = forks.run(*short, "--seed=1", cwd=tmp_path).good()
    assert "log.1" in run.stdout
    second = (tmp_path / "log" / "log.txt").read_bytes()
    forks.run(*short, "--seed=2", "--log_dir=log/", cwd=tmp_path).good()
    third = (tmp_path / "log" / "log.txt").read_bytes()
    assert (tmp_path / "log.1" / "log.txt").read_bytes() == first
    assert (tmp_path / "log.2" / "log.txt").read_bytes() == second
    assert len({first, second, third}) == 3
    # --init from the folder that moves: opened before
    forks.run(*short, "--init=log/last.pt", cwd=tmp_path).good()
    assert (tmp_path / "log.3" / "log.txt").read_bytes() == third


# -----------------------------------------------------------------------------
# 6. A loss or a gradient that is not finite

NAN_LOSS = """
import torch
real, n = torch.nn.functional.cross_entropy, 0
def cross_entropy(*args, **kwargs):
    global n
    n += torch.is_grad_enabled()
    return real(*args, **kwargs) * (float("nan") if n == 8 * 5 + 3 else 1)
torch.nn.functional.cross_entropy = cross_entropy
"""
INF_GRADIENT = """
import torch
clip, n = torch.nn.utils.clip_grad_norm_, 0
def clip_grad_norm_(parameters, *args, **kwargs):
    global n
    n, parameters = n + 1, list(parameters)
    if n == 6:
        parameters[3].grad.view(-1)[0] = float("inf")
    return clip(parameters, *args, **kwargs)
torch.nn.utils.clip_grad_norm_ = clip_grad_norm_
"""


@pytest.mark.parametrize("patch", [NAN_LOSS, INF_GRADIENT], ids=["loss", "gradient"])
def test_not_finite(forks, undisturbed, flags, tmp_path, patch):
    log = tmp_path / "log"
    run = forks.run(*flags, "--save_every=5", cwd=tmp_path, patch=patch)
    run.refused("step 5", "nan" if patch is NAN_LOSS else "inf", "edufineweb_train_000001",
                "offset", status=1)
    assert (5, "train") not in read_log(log)
    assert weights(log)["step"] == 5
    forks.run(*flags, "--resume", cwd=tmp_path).good()
    assert_same_end(log, undisturbed)


def test_far_too_large_lr(forks, flags, tmp_path):
    run = forks.run(*flags, "--max_lr=1e30", "--save_every=1", cwd=tmp_path)
    run.refused("weights were not updated", "offset", status=1)
    saved = weights(tmp_path / "log")
    assert f"step {saved['step']}:" in run.stderr
    assert all(v.isfinite().all() for v in saved["model"].values())
    run = forks.run(*flags, "--max_lr=1e30", "--save_every=1", "--resume", cwd=tmp_path)
    run.refused("step", "offset", status=1)


# -----------------------------------------------------------------------------
# 7. What a checkpoint is


def test_checkpoint_is_plain_data(undisturbed):
    """torch.load(weights_only=True) reads it, and JSON can hold all but the tensors."""
    saved = torch.load(undisturbed / "last.pt", weights_only=True)
    assert all(type(v) is torch.Tensor for v in saved["model"].values())
    assert saved["optimizer"]["adamw"]["state"]
    keys, names = saved.keys(), saved["model"]
    config, flags, data, tokenizer, step, val_loss = json.loads(json.dumps(
        [saved[k] for k in ("config", "flags", "data", "tokenizer", "step", "val_loss")]))
    assert {"model", "optimizer", "step", "config", "flags", "tokenizer", "data", "val_loss",
            "rng"} <= keys
    assert "transformer.wte.weight" in names and "transformer.h.0.attn.c_attn.weight" in names
    assert not [n for n in names if n.startswith(("_orig_mod", "module"))]
    assert (config["n_layer"], config["vocab_size"], flags["max_lr"]) == (2, 512, 3e-3)
    assert (tokenizer, step) == ("gpt2", 12)
    assert f"{val_loss:.4f}" == read_log(undisturbed)[12, "val"]
    assert [n for _, n in data["shards"]] == [700, 500, 333] and data["tokens"] == 1533


def test_kept_checkpoints_share_bytes(undisturbed):
    last, kept, older = (os.stat(undisturbed / name) for name in
                         ("last.pt", "model_00012.pt", "model_00008.pt"))
    assert last.st_ino == kept.st_ino and last.st_nlink == 2
    assert older.st_ino != last.st_ino and older.st_nlink == 1
    assert weights(undisturbed, "model_00008.pt")["step"] == 8
