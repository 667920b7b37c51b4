"""Run train_gpt2.py as real processes that start in 20 ms and stop at named points of the code.

`Forks` is a process that has torch and train_gpt2 imported and forks a run on request. `start` returns one
Run, `ranks` the runs of one job, `torchrun` the job as a user starts it.

No test depends on timing. A run executes its `patch` first: Python code with the names of this module, which
can stop, kill or signal the run at the nth call of a function or the nth execution of a line.

    patch='at("os.replace", kill, match="last.pt")'
    patch='at("train_gpt2.DataLoaderLite.read", wait, nth=5)'      run.arrived().kill(); run.release()
    patch='at_line("train_gpt2.py:66", 2, kill)'
"""

import builtins
import contextlib
import errno
import functools
import importlib
import io
import itertools
import json
import os
import pkgutil
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINUX = sys.platform == "linux"  # for tests that read /proc
KILL = signal.SIGKILL
HANG_TIMEOUT_S = 300  # only ends a test that hangs
sleep = time.sleep  # a patch may replace time.sleep
job = {}  # the order of this run


def wait_until(condition, report):
    """Wait until condition() holds; report() is the message if that takes too long."""
    deadline = time.monotonic() + HANG_TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, report()
        sleep(0.01)


# In the run: named points and the actions there


def kill():
    os.kill(os.getpid(), KILL)


def no_space():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def raises(signum):
    """The action of receiving a signal; its handler has run when this returns."""
    return lambda: signal.raise_signal(signum)


def wait():
    """Wait until the test calls release()."""
    Path(job["out"] + ".arrived").touch()
    wait_until(lambda: os.path.exists(job["out"] + ".go"), lambda: "the test did not call release()")


def evaluating():
    import torch

    return not torch.is_grad_enabled()


def at(name, action, nth=1, match="", before=True, when=lambda: True):
    """Do `action` at the nth call of, for example, "os.replace" whose path arguments contain `match`, among
    the calls for which when() holds."""
    module, _, attribute = name.rpartition(".")
    owner = pkgutil.resolve_name(module)
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
    """Make torch.save write half a file and then do `action`, at the calls n for which when(n, state)."""
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
    """Write seven bytes to log.txt and then do `action`, at the writes n for which when(n)."""
    real, calls = open, itertools.count(1)

    class Torn(io.FileIO):
        def write(self, data):
            if not when(next(calls)):
                return super().write(data)
            n = super().write(bytes(data)[:7])
            action()
            return n

    def opened(path, mode="r", *args, **kwargs):
        torn = str(path).endswith("log.txt") and mode == "ab"
        return io.BufferedWriter(Torn(path, "ab"), 1 << 20) if torn else real(path, mode, *args, **kwargs)

    builtins.open = opened


def trace(seen):
    """Call seen("train_gpt2.py:123") before every line of the product's code."""
    product = {str(p): p.name for p in ROOT.glob("*.py")}

    def local(frame, event, arg):
        if event == "line":
            seen(f"{product[frame.f_code.co_filename]}:{frame.f_lineno}")
        return local

    sys.settrace(lambda frame, event, arg: local if frame.f_code.co_filename in product else None)


def count_lines(path):
    """Write how often each line was executed when the run exits."""
    lines = Counter()
    trace(lambda line: lines.update([line]))
    at("train_gpt2.exit_process", lambda: Path(path).write_text(json.dumps(lines)))


def at_line(line, nth, action):
    """Do `action` before the nth execution of a line, or at exit if it is executed less often."""
    executions = itertools.count(1)
    trace(lambda this: this == line and next(executions) == nth and action())
    at("train_gpt2.exit_process", action)


def at_exit(function):
    """Write what function() returns to {name of the run}.json when the run exits normally."""
    at("train_gpt2.exit_process", lambda: Path(job["out"] + ".json").write_text(json.dumps(function())))


def do(order):
    """One run, in its own process. job["script"]: train_gpt2 or modern."""
    import train_gpt2

    job.update(order)
    enter(job)
    train_gpt2.PARENT_PID = os.getppid()
    train_gpt2.RunLog.draw_curves = lambda self, timeout=0.0: None  # takes seconds
    script = importlib.import_module(job.get("script") or "train_gpt2")
    exec(job["patch"], globals())
    try:
        train_gpt2.run_script(f"{script.__name__}.py", lambda: script.main(job["flags"]))
    except SystemExit as e:
        if "TORCHELASTIC_RUN_ID" in os.environ or job.get("full_teardown"):
            raise
        if sys.stdout:
            sys.stdout.flush()
        os._exit(e.code)  # Python's teardown with torch takes a second


def use_bytes(name="bytes"):
    """Replace GPT-2's tokenizer by the byte tokenizer, which needs no vocabulary."""
    import train_gpt2

    tokenizer = train_gpt2.get_tokenizer("bytes")
    tokenizer.name = name
    train_gpt2.get_tokenizer = lambda name="gpt2": tokenizer


# The process that forks


def enter(order):
    """Set the working directory and environment of a run; None unsets a variable."""
    os.chdir(order["cwd"])
    for name in order["env"]:
        os.environ.pop(name, None)
    os.environ.update({name: value for name, value in order["env"].items() if value is not None})


def child(order):
    os.setsid()
    for number, path in enumerate((os.devnull, order["out"], order["err"])):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        os.dup2(fd, number)
        os.close(fd)
    sys.stdin = open(0, closefd=False)
    if not order["torchrun"]:
        return do(order)
    enter(order)
    importlib.import_module("torch.distributed.run").main(order["torchrun"])


def serve(modules):
    """Import the modules. Then start a run, or print a status, for each line of stdin."""
    for module in modules:
        importlib.import_module(module)
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


# In the test


class Forks:
    """Start runs from a process that has train_gpt2 imported."""

    def __init__(self, folder, warm=True):
        """warm: import everything that a run may need, including the compiler."""
        self.n, self.folder = 0, Path(folder)
        modules = ["torch._dynamo", "torch.distributed.optim", "torch.distributed.run"] if warm else []
        self.process = subprocess.Popen([sys.executable, __file__, "serve", "train_gpt2", *modules],
                                        text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def ask(self, **order):
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, *flags, cwd, patch="", torchrun=None, kind=None, script=None, **env):
        """Start a Run. patch: Python code that it executes first, with the names of this module."""
        self.n += 1
        out, err = self.folder / f"{self.n}.out", self.folder / f"{self.n}.err"
        out.touch()
        err.touch()
        order = dict(flags=list(map(str, flags)), cwd=str(cwd), patch=patch, env=env, torchrun=torchrun,
                     script=script, out=str(out), err=str(err))
        return (kind or Run)(self, order)

    def run(self, *flags, **how):
        """Run to the end."""
        return self.start(*flags, **how).end()

    def ranks(self, n, *flags, cwd, patch="", of=None, **env):
        """Start the Ranks of a job of n processes, without torchrun.

        of: {rank: what differs there}, a dict of extra flags, cwd, and a patch after the common one.
        """
        runs, size = Ranks(), str(n)
        env |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), WORLD_SIZE=size,
                    LOCAL_WORLD_SIZE=size)
        for rank in range(n):
            own = (of or {}).get(rank, {})
            runs.append(self.start(*flags, *own.get("flags", ()), cwd=own.get("cwd", cwd), RANK=str(rank),
                                   patch=patch + "\n" + own.get("patch", ""), LOCAL_RANK=str(rank), **env))
        return runs

    def torchrun(self, n, *flags, cwd, patch="", options=("--standalone",), **env):
        """Start torchrun with n processes; patch="none" runs the script itself, as a user does."""
        run = [ROOT / "train_gpt2.py", *flags]
        if patch != "none":
            run = fresh_run(*flags, cwd=cwd, patch=patch, out=str(self.folder / f"{self.n + 1}.out"))
        line = [*options, f"--nproc_per_node={n}", *map(str, run)]
        return self.start(cwd=cwd, torchrun=line, kind=Torchrun, **env)

    def close(self):
        self.process.stdin.close()
        self.process.wait(HANG_TIMEOUT_S)
        self.process.stdout.close()


class Run:
    """One run: its process, its output so far, and its exit status (negative: killed by that signal)."""

    def __init__(self, forks, order):
        self.forks, self.out, self.err, self.status = forks, order["out"], order["err"], None
        self.pid = forks.ask(**order)

    stdout = property(lambda self: Path(self.out).read_text(errors="replace"))
    stderr = property(lambda self: Path(self.err).read_text(errors="replace"))

    def __str__(self):
        return f"{self.status}: {self.stdout} {self.stderr}"

    @property
    def result(self):
        """What at_exit() wrote."""
        path = Path(self.out + ".json")
        assert path.exists(), str(self)
        return json.loads(path.read_text())

    def poll(self):
        if self.status is None:
            self.status = self.forks.ask(poll=self.pid)
        return self.status

    def wait_for(self, what):
        wait_until(what, lambda: f"hangs: {self}")
        return self

    def end(self):
        return self.wait_for(lambda: self.poll() is not None)

    def arrived(self):
        """Wait until the run reaches wait()."""
        self.wait_for(lambda: os.path.exists(self.out + ".arrived") or self.poll() is not None)
        assert self.status is None, str(self)
        return self

    def release(self):
        """Let a run that is in wait() continue."""
        Path(self.out + ".go").touch()
        return self

    def kill(self, signum=KILL):
        if self.poll() is None:
            os.kill(self.pid, signum)
        return self

    def good(self):
        assert self.status == 0, str(self)
        return self

    def killed(self):
        assert self.status == -KILL, str(self)
        return self

    def refused(self, *words, status=2):
        """Assert one error line (a table may follow) with all the words, no traceback, and the status."""
        error = self.stderr
        assert self.status == status and "Traceback" not in error, str(self)
        first, *rest = [x for x in error.splitlines() if not x.startswith("warning: ")]
        assert re.match(r"\w+\.py: error: ", first) and all(" | " in line for line in rest), error
        for word in words:
            assert str(word) in error, f"{word} is not in {error}"
        return self


class Ranks(list):
    """The Runs of one job, by rank."""

    def end(self, as_torchrun=False):
        """Wait for all; as_torchrun: once one has failed, SIGTERM the others."""

        def over():
            statuses = [run.poll() for run in self]
            return None not in statuses or (as_torchrun and any(statuses))

        self[0].wait_for(over)
        for run in self:
            run.kill(signal.SIGTERM).end()
        return self

    errors = property(lambda self: [run.stderr.splitlines() for run in self])  # lines of each process
    statuses = property(lambda self: [run.status for run in self])

    def good(self):
        """Assert that all succeeded and only rank 0 printed."""
        for run in self:
            run.good()
        assert {(run.stdout, run.stderr) for run in self[1:]} <= {("", "")}
        return self


class Torchrun(Run):
    """A torchrun; its workers share its output files."""

    def errors(self):
        """The error lines of train_gpt2.py, without torchrun's own report."""
        return [x for x in self.stderr.splitlines() if x.startswith("train_gpt2.py: error: ")]


def fresh_run(*flags, cwd, patch="", out=None):
    """The arguments for Python, or torchrun, that start a run without a Forks."""
    order = dict(flags=list(map(str, flags)), cwd=str(cwd), patch=patch, env={}, out=out)
    return [__file__, json.dumps(order)]


# Below the ephemeral ports, and a range of its own for each pytest worker: nothing else takes a port between
# its choice and its use.
FIRST_PORT = 20000 + 1000 * (int("0" + os.environ.get("PYTEST_XDIST_WORKER", "")[2:]) % 10)
PORTS = itertools.islice(itertools.cycle(range(FIRST_PORT, FIRST_PORT + 1000)), os.getpid() % 1000, None)


def free_port():
    for port in PORTS:
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def assert_gone(word):
    """Wait until no process whose command line contains `word` is left."""

    def left():
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if word in line and path.parent.name != str(os.getpid()):
                    yield line

    wait_until(lambda: not any(left()), lambda: list(left()))


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    if sys.argv[1] == "serve":
        serve(sys.argv[2:])
    else:  # see fresh_run()
        do(json.loads(sys.argv[1]))
