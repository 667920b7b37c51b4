"""Runs of train_gpt2.py as processes of their own: started in a moment, stopped where a test says.

A `Forks` is a process that has torch and train_gpt2 imported and forks a run from itself whenever
it is asked: a real process, killed for real, but there in 20 ms. `start` gives one Run, `ranks` the
runs of one job, `torchrun` the job as a user types it.

No test races a clock. A run comes by named points (the third call of os.replace, half a checkpoint
written, a line of the code), and there it does by itself what its `patch` says: Python code that it
executes first, with the names of this module.

    patch='at("os.replace", kill, match="last.pt")'
    patch='at("train_gpt2.DataLoaderLite.read", wait, nth=5)'      run.arrived().kill(); run.go_on()
    patch='at_line("checkpoint.py:66", 2, kill)'

The times below are no part of any test: they end a test that hangs.
"""

import contextlib
import errno
import functools
import io
import itertools
import json
import os
import pkgutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINUX = sys.platform == "linux"  # elsewhere a run is a new process, and nothing is killed
KILL = getattr(signal, "SIGKILL", signal.SIGTERM)
HANGS = 300  # seconds after which something that should have happened never will
PAUSE = time.sleep  # a patch may replace the other one

# -----------------------------------------------------------------------------
# In the run: points, and what happens there

job = {}  # what this process was asked for


def kill():
    os.kill(os.getpid(), KILL)


def kill_saved():
    """The same when what is being saved is on the disk."""
    for thread in threading.enumerate():
        if thread.name == "save":
            thread.join()
    kill()


def no_space():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def raises(signum):
    """The action of getting a signal just there; its handler has run when this returns."""
    return lambda: signal.raise_signal(signum)


def wait():
    """Stay here until the test says go_on()."""
    Path(job["out"] + ".arrived").touch()
    for _ in range(100 * HANGS):
        if os.path.exists(job["out"] + ".go"):
            return
        PAUSE(0.01)
    kill()


def owner_of(name):
    module, _, attribute = name.rpartition(".")
    return pkgutil.resolve_name(module), attribute


def evaluating():
    import torch

    return not torch.is_grad_enabled()


def at(name, action, nth=1, match="", before=True, when=lambda: True):
    """`action` at the nth call of e.g. "os.replace" whose arguments name `match`, of those `when`
    something holds."""
    owner, attribute = owner_of(name)
    real, calls = getattr(owner, attribute), itertools.count(1)

    @functools.wraps(real)
    def call(*args, **kwargs):
        names = " ".join(str(a) for a in args if isinstance(a, (str, os.PathLike)))
        now = match in names and when() and next(calls) == nth
        if now and before:
            action()
        result = real(*args, **kwargs)
        if now and not before:
            action()
        return result

    setattr(owner, attribute, call)


def torn_save(action, when=lambda n, state: True):
    """torch.save that writes half a file and then does `action`, at those calls n = 1, 2, ..."""
    import torch

    real, calls = torch.save, itertools.count(1)

    def save(state, f, *args, **kwargs):
        if not when(next(calls), state):
            return real(state, f, *args, **kwargs)
        whole = io.BytesIO()
        real(state, whole)
        f.write(whole.getvalue()[:whole.tell() // 2])
        f.flush()
        action()

    torch.save = save


def torn_log(action, when=lambda n: True):
    """Seven bytes of what log.txt is to get, and then `action`, at those writes n = 1, 2, ..."""
    import builtins

    real, calls = open, itertools.count(1)

    class Torn(io.FileIO):
        def write(self, data):
            super().write(bytes(data)[:7])
            action()

    def opened(path, mode="r", *args, **kwargs):
        if str(path).endswith("log.txt") and mode == "r+b" and when(next(calls)):
            return Torn(path, "r+")
        return real(path, mode, *args, **kwargs)

    builtins.open = opened


def trace(seen):
    """Call seen("train_gpt2.py:123") before every line of the product's code."""
    product = {str(p): p.name for p in [*ROOT.glob("*.py"), *ROOT.glob("plumbing/*.py")]}

    def local(frame, event, arg):
        if event == "line":
            seen(f"{product[frame.f_code.co_filename]}:{frame.f_lineno}")
        return local

    def called(frame, event, arg):
        return local if frame.f_code.co_filename in product else None

    sys.settrace(called)
    threading.settrace(called)  # of the thread that saves


def count_lines(path):
    """At the end of the run, write how often it came by each line."""
    lines = Counter()
    trace(lambda line: lines.update([line]))
    at("plumbing.errors.leave", lambda: Path(path).write_text(json.dumps(lines)))


def at_line(place, nth, action):
    """`action` before the nth time that the line at `place` is executed; at the end of a run that
    does not come by so often."""
    left = [nth]

    def seen(line):
        if line == place:
            left[0] -= 1
            if not left[0]:
                action()

    trace(seen)
    at("plumbing.errors.leave", action)


def at_end(tell):
    """Write what tell() returns to {name of the run}.json when the run ends by itself."""
    at("plumbing.errors.leave", lambda: Path(job["out"] + ".json").write_text(json.dumps(tell())))


def do(order):
    """One run, in a process of its own."""
    import plumbing.hardware
    import plumbing.machine
    import plumbing.reporter
    import train_gpt2

    job.update(order)
    enter(job)
    plumbing.machine.PARENT = os.getppid()
    sys.modules["matplotlib"] = None  # no curves: they take seconds
    plumbing.reporter.measure_matmul = lambda *_: 1e9  # so does this
    plumbing.hardware.measure_matmul = lambda *_, **__: 1e9
    exec(job["patch"], globals())
    try:
        train_gpt2.main(job["flags"])
    except SystemExit as e:
        if "TORCHELASTIC_RUN_ID" in os.environ or job.get("whole_end"):
            raise
        if sys.stdout:
            sys.stdout.flush()
        os._exit(e.code)  # taking Python and torch down takes a second


# -----------------------------------------------------------------------------
# The process that forks


def enter(order):
    """The folder and the environment of a run; None: not there."""
    os.chdir(order["cwd"])
    for name, value in order["env"].items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def child(order):
    os.setsid()
    for number, path in enumerate((os.devnull, order["out"], order["err"])):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        os.dup2(fd, number)
        os.close(fd)
    sys.stdin = open(0, closefd=False)
    if order["torchrun"]:
        from torch.distributed.run import main

        enter(order)
        return main(order["torchrun"])
    do(order)


def serve(warm):
    import train_gpt2  # noqa: F401

    if warm:
        import torch._dynamo
        import torch.distributed.optim  # noqa: F401
        import torch.distributed.run  # noqa: F401

    live = set()
    for line in iter(sys.stdin.readline, ""):
        order = json.loads(line)
        if "poll" in order:
            pid, status = os.waitpid(order["poll"], os.WNOHANG)
            live.discard(pid)
            print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
            continue
        pid = os.fork()
        if not pid:
            return child(order)
        live.add(pid)
        print(pid, flush=True)
    for pid in live:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, KILL)


# -----------------------------------------------------------------------------
# In the test


class Forks:
    """Starts runs from a process that has train_gpt2 imported."""

    def __init__(self, folder, warm=True):
        """warm: with all imported that any run may need, the compiler too."""
        self.n, self.folder, self.anew = 0, Path(folder), {}
        if LINUX:
            self.process = subprocess.Popen([sys.executable, __file__, *["warm"] * warm], text=True,
                                            stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def ask(self, **order):
        if not LINUX:
            return self.ask_anew(**order)
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def ask_anew(self, poll=None, **order):
        """The same where processes are not forked."""
        if poll:
            return self.anew[poll].poll()
        line = [__file__, json.dumps(order)]
        if order["torchrun"]:
            line = ["-m", "torch.distributed.run", *order["torchrun"]]
        env = {k: v for k, v in (os.environ | order["env"]).items() if v is not None}
        with open(order["out"], "a") as out, open(order["err"], "a") as err:
            process = subprocess.Popen([sys.executable, *line], cwd=order["cwd"], env=env,
                                       stdin=subprocess.DEVNULL, stdout=out, stderr=err)
        self.anew[process.pid] = process
        return process.pid

    def start(self, *flags, cwd, patch="", torchrun=None, kind=None, **env):
        """A Run; patch: Python code that it executes first, with the names of this module."""
        self.n += 1
        out, err = (str(self.folder / f"{self.n}.{stream}") for stream in ("out", "err"))
        for path in (out, err):
            Path(path).touch()
        order = dict(flags=list(map(str, flags)), cwd=str(cwd), patch=patch, env=env, out=out,
                     err=err, torchrun=torchrun)
        return (kind or Run)(self, order)

    def run(self, *flags, **how):
        """A run to its end."""
        return self.start(*flags, **how).end()

    def ranks(self, n, *flags, cwd, patch="", of=None, **env):
        """The Ranks of a job of n processes, without torchrun. of: {rank: what is other there}, a
        dict of flags (more of them), cwd, patch (after the common one)."""
        port, runs = free_port(), Ranks()
        for rank in range(n):
            own = (of or {}).get(rank, {})
            runs.append(self.start(
                *flags, *own.get("flags", ()), cwd=own.get("cwd", cwd),
                patch=patch + "\n" + own.get("patch", ""), RANK=str(rank), LOCAL_RANK=str(rank),
                WORLD_SIZE=str(n), LOCAL_WORLD_SIZE=str(n), MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port), **env))
        return runs

    def torchrun(self, n, *flags, cwd, patch="", options=("--standalone",), **env):
        """A Torchrun of n processes; with patch="none" of the very script that a user starts."""
        start, out = [*options, f"--nproc_per_node={n}"], str(self.folder / f"{self.n + 1}.out")
        line = [*start, *anew(*flags, cwd=cwd, patch=patch, out=out)]
        if patch == "none":
            line = [*start, str(ROOT / "train_gpt2.py"), *map(str, flags)]
        return self.start(cwd=cwd, torchrun=line, kind=Torchrun, **env)

    def close(self):
        for process in self.anew.values():
            process.kill()
            process.wait()
        if LINUX:
            self.process.stdin.close()
            self.process.wait(HANGS)
            self.process.stdout.close()


class Run:
    """One run: its process, what it has said so far, and its status (negative: the signal)."""

    def __init__(self, forks, order):
        self.forks, self.out, self.err, self.status = forks, order["out"], order["err"], None
        self.pid = forks.ask(**order)

    @property
    def stdout(self):
        return Path(self.out).read_text(errors="replace")

    @property
    def stderr(self):
        return Path(self.err).read_text(errors="replace")

    @property
    def told(self):
        """What at_end() wrote."""
        path = Path(self.out + ".json")
        assert path.exists(), f"{self.status}: {self.stdout} {self.stderr}"
        return json.loads(path.read_text())

    def poll(self):
        if self.status is None:
            self.status = self.forks.ask(poll=self.pid)
        return self.status

    def wait_for(self, what):
        deadline = time.monotonic() + HANGS
        while not what():
            assert time.monotonic() < deadline, f"hangs: {self.stdout} {self.stderr}"
            PAUSE(0.005)
        return self

    def end(self):
        return self.wait_for(lambda: self.poll() is not None)

    def arrived(self):
        """Wait until the run is where its patch lets it wait()."""
        self.wait_for(lambda: os.path.exists(self.out + ".arrived") or self.poll() is not None)
        assert self.status is None, f"{self.status}: {self.stdout} {self.stderr}"
        return self

    def go_on(self):
        Path(self.out + ".go").touch()
        return self

    def kill(self, signum=KILL):
        if self.poll() is None:
            os.kill(self.pid, signum)
        return self

    def good(self):
        assert self.status == 0, f"{self.status}: {self.stdout} {self.stderr}"
        return self

    def killed(self):
        assert self.status == -KILL, f"{self.status}: {self.stdout} {self.stderr}"
        return self

    def refused(self, *words, status=2):
        """One line (a table may follow) that holds all the words; no traceback; exit 2."""
        error = self.stderr
        assert self.status == status, f"{self.status}: {self.stdout} {error}"
        assert "Traceback" not in error, error
        first, *rest = [x for x in error.splitlines() if not x.startswith("warning: ")]
        assert first.startswith("train_gpt2.py: error: "), error
        assert all(" | " in line for line in rest), error
        for word in words:
            assert str(word) in error, f"{word} is not in {error}"
        return self


class Ranks(list):
    """The Runs of one job, by rank."""

    def end(self, as_torchrun=False):
        """Wait for all; `as_torchrun`: when one has failed, the others are told to end."""

        def over():
            statuses = [run.poll() for run in self]
            return None not in statuses or (as_torchrun and any(statuses))

        self[0].wait_for(over)
        for run in self:
            run.kill(signal.SIGTERM).end()
        return self

    @property
    def errors(self):
        """What the processes have said on stderr, a list of lines for each."""
        return [run.stderr.splitlines() for run in self]

    @property
    def statuses(self):
        return [run.status for run in self]

    def good(self):
        """All ended well, and only the main process has said something."""
        for run in self:
            run.good()
        assert {(run.stdout, run.stderr) for run in self[1:]} <= {("", "")}
        return self


class Torchrun(Run):
    """A torchrun; its workers write where it writes."""

    def workers(self):
        """{rank: pid} of its workers."""
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if (path / "stat").read_text().rsplit(")", 1)[1].split()[1] == str(self.pid):
                    env = dict(x.partition("=")[::2] for x in
                               (path / "environ").read_text(errors="replace").split("\0"))
                    if "LOCAL_RANK" in env:
                        found[int(env["RANK"])] = int(path.name)
        return found

    def errors(self):
        """The lines of train_gpt2.py, without torchrun's own report."""
        return [x for x in self.stderr.splitlines() if x.startswith("train_gpt2.py: error: ")]


def anew(*flags, cwd, patch="", out=None):
    """The arguments for Python, or for torchrun, that make a run without a Forks."""
    order = dict(flags=list(map(str, flags)), cwd=str(cwd), patch=patch, env={}, out=out)
    return [__file__, json.dumps(order)]


# Below those that the system gives out by itself, and each process of pytest has its own thousand:
# between the choice and the use nobody else takes it.
WORKER = int("0" + os.environ.get("PYTEST_XDIST_WORKER", "")[2:])
PORTS = itertools.cycle(range(20000 + 1000 * (WORKER % 10), 21000 + 1000 * (WORKER % 10)))
for _ in range(os.getpid() % 1000):
    next(PORTS)


def free_port():
    for port in PORTS:
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def left_behind(word):
    """Command lines of living processes that hold `word`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if word in line and path.parent.name != str(os.getpid()):
                found.append(line)
    return found


def assert_gone(word):
    """No process that names `word` is left, in the end."""
    deadline = time.monotonic() + HANGS
    while left_behind(word):
        assert time.monotonic() < deadline, left_behind(word)
        PAUSE(0.02)


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    if sys.argv[1:] in ([], ["warm"]):
        serve(sys.argv[1:])
    else:  # see anew()
        do(json.loads(sys.argv[1]))
