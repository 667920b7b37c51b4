"""Run train_gpt2.py as real processes that start in 20 ms and stop at named points of the code.

`Forks` is a process that has torch and train_gpt2 imported and forks a run on request. `start` returns
one Run, `ranks` the runs of one job, `torchrun` the job as a user starts it.

No test depends on timing. A run executes its `patch` first: Python code with the names of this module,
which can stop, kill or signal the run at the nth call of a function or the nth execution of a line.

    patch='at("os.replace", kill, match="last.pt")'
    patch='at("train_gpt2.DataLoaderLite.read", wait, nth=5)'      run.arrived().kill(); run.release()
    patch='at_line("train_gpt2.py:66", 2, kill)'

The timeouts below only end a test that hangs.
"""

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
LINUX = sys.platform == "linux"  # elsewhere a run is a new process, and nothing is killed
KILL = getattr(signal, "SIGKILL", signal.SIGTERM)
HANG_TIMEOUT_S = 300
sleep = time.sleep  # a patch may replace time.sleep

# -----------------------------------------------------------------------------
# In the run: named points and the actions there

job = {}  # the order of this run


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
    for _ in range(100 * HANG_TIMEOUT_S):
        if os.path.exists(job["out"] + ".go"):
            return
        sleep(0.01)
    kill()


def owner_of(name):
    module, _, attribute = name.rpartition(".")
    return pkgutil.resolve_name(module), attribute


def evaluating():
    import torch

    return not torch.is_grad_enabled()


def at(name, action, nth=1, match="", before=True, when=lambda: True):
    """Do `action` at the nth call of, for example, "os.replace" whose path arguments contain `match`,
    among the calls for which when() holds."""
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
    import builtins

    real, calls = open, itertools.count(1)

    class Torn(io.FileIO):
        def write(self, data):
            if not when(next(calls)):
                return super().write(data)
            n = super().write(bytes(data)[:7])
            action()
            return n

    def opened(path, mode="r", *args, **kwargs):
        if str(path).endswith("log.txt") and mode == "ab":
            return io.BufferedWriter(Torn(path, "ab"), 1 << 20)
        return real(path, mode, *args, **kwargs)

    builtins.open = opened


def trace(seen):
    """Call seen("train_gpt2.py:123") before every line of the product's code."""
    product = {str(p): p.name for p in ROOT.glob("*.py")}

    def local(frame, event, arg):
        if event == "line":
            seen(f"{product[frame.f_code.co_filename]}:{frame.f_lineno}")
        return local

    def called(frame, event, arg):
        return local if frame.f_code.co_filename in product else None

    sys.settrace(called)


def count_lines(path):
    """Write how often each line was executed when the run exits."""
    lines = Counter()
    trace(lambda line: lines.update([line]))
    at("train_gpt2.exit_process", lambda: Path(path).write_text(json.dumps(lines)))


def at_line(line, nth, action):
    """Do `action` before the nth execution of a line, or at exit if it is executed less often."""
    left = [nth]

    def seen(this):
        if this == line:
            left[0] -= 1
            if not left[0]:
                action()

    trace(seen)
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
    sys.modules["matplotlib"] = None  # drawing takes seconds
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


# -----------------------------------------------------------------------------
# The process that forks


def enter(order):
    """Set the working directory and environment of a run; None unsets a variable."""
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
    """Start runs from a process that has train_gpt2 imported."""

    def __init__(self, folder, warm=True):
        """warm: import everything that a run may need, including the compiler."""
        self.n, self.folder, self.popen = 0, Path(folder), {}
        if LINUX:
            self.process = subprocess.Popen([sys.executable, __file__, *["warm"] * warm], text=True,
                                            stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def ask(self, **order):
        if not LINUX:
            return self.ask_popen(**order)
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def ask_popen(self, poll=None, **order):
        """The same on systems without fork."""
        if poll:
            return self.popen[poll].poll()
        line = [__file__, json.dumps(order)]
        if order["torchrun"]:
            line = ["-m", "torch.distributed.run", *order["torchrun"]]
        env = {k: v for k, v in (os.environ | order["env"]).items() if v is not None}
        with open(order["out"], "a") as out, open(order["err"], "a") as err:
            process = subprocess.Popen([sys.executable, *line], cwd=order["cwd"], env=env,
                                       stdin=subprocess.DEVNULL, stdout=out, stderr=err)
        self.popen[process.pid] = process
        return process.pid

    def start(self, *flags, cwd, patch="", torchrun=None, kind=None, script=None, **env):
        """Start a Run. patch: Python code that it executes first, with the names of this module."""
        self.n += 1
        out, err = (str(self.folder / f"{self.n}.{stream}") for stream in ("out", "err"))
        for path in (out, err):
            Path(path).touch()
        order = dict(flags=list(map(str, flags)), cwd=str(cwd), patch=patch, env=env, out=out,
                     err=err, torchrun=torchrun, script=script)
        return (kind or Run)(self, order)

    def run(self, *flags, **how):
        """Run to the end."""
        return self.start(*flags, **how).end()

    def ranks(self, n, *flags, cwd, patch="", of=None, **env):
        """Start the Ranks of a job of n processes, without torchrun.

        of: {rank: what differs there}, a dict of extra flags, cwd, and a patch after the common one.
        """
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
        """Start torchrun with n processes; patch="none" runs the script itself, as a user does."""
        start, out = [*options, f"--nproc_per_node={n}"], str(self.folder / f"{self.n + 1}.out")
        line = [*start, *fresh_run(*flags, cwd=cwd, patch=patch, out=out)]
        if patch == "none":
            line = [*start, str(ROOT / "train_gpt2.py"), *map(str, flags)]
        return self.start(cwd=cwd, torchrun=line, kind=Torchrun, **env)

    def close(self):
        for process in self.popen.values():
            process.kill()
            process.wait()
        if LINUX:
            self.process.stdin.close()
            self.process.wait(HANG_TIMEOUT_S)
            self.process.stdout.close()


class Run:
    """One run: its process, its output so far, and its exit status (negative: killed by that signal)."""

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
    def result(self):
        """What at_exit() wrote."""
        path = Path(self.out + ".json")
        assert path.exists(), f"{self.status}: {self.stdout} {self.stderr}"
        return json.loads(path.read_text())

    def poll(self):
        if self.status is None:
            self.status = self.forks.ask(poll=self.pid)
        return self.status

    def wait_for(self, what):
        deadline = time.monotonic() + HANG_TIMEOUT_S
        while not what():
            assert time.monotonic() < deadline, f"hangs: {self.stdout} {self.stderr}"
            sleep(0.005)
        return self

    def end(self):
        return self.wait_for(lambda: self.poll() is not None)

    def arrived(self):
        """Wait until the run reaches wait()."""
        self.wait_for(lambda: os.path.exists(self.out + ".arrived") or self.poll() is not None)
        assert self.status is None, f"{self.status}: {self.stdout} {self.stderr}"
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
        assert self.status == 0, f"{self.status}: {self.stdout} {self.stderr}"
        return self

    def killed(self):
        assert self.status == -KILL, f"{self.status}: {self.stdout} {self.stderr}"
        return self

    def refused(self, *words, status=2):
        """Assert one error line (a table may follow) with all the words, no traceback, and the status."""
        error = self.stderr
        assert self.status == status, f"{self.status}: {self.stdout} {error}"
        assert "Traceback" not in error, error
        first, *rest = [x for x in error.splitlines() if not x.startswith("warning: ")]
        assert re.match(r"\w+\.py: error: ", first), error
        assert all(" | " in line for line in rest), error
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

    @property
    def errors(self):
        """The lines of stderr of each process."""
        return [run.stderr.splitlines() for run in self]

    @property
    def statuses(self):
        return [run.status for run in self]

    def good(self):
        """Assert that all succeeded and only rank 0 printed."""
        for run in self:
            run.good()
        assert {(run.stdout, run.stderr) for run in self[1:]} <= {("", "")}
        return self


class Torchrun(Run):
    """A torchrun; its workers share its output files."""

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
        """The error lines of train_gpt2.py, without torchrun's own report."""
        return [x for x in self.stderr.splitlines() if x.startswith("train_gpt2.py: error: ")]


def fresh_run(*flags, cwd, patch="", out=None):
    """The arguments for Python, or torchrun, that start a run without a Forks."""
    order = dict(flags=list(map(str, flags)), cwd=str(cwd), patch=patch, env={}, out=out)
    return [__file__, json.dumps(order)]


# Below the ephemeral ports, and a range of its own for each pytest worker: nothing else takes a port
# between its choice and its use.
WORKER = int("0" + os.environ.get("PYTEST_XDIST_WORKER", "")[2:])
PORTS = itertools.cycle(range(20000 + 1000 * (WORKER % 10), 21000 + 1000 * (WORKER % 10)))
for _ in range(os.getpid() % 1000):
    next(PORTS)


def free_port():
    for port in PORTS:
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def left_behind(word):
    """Command lines of live processes that contain `word`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if word in line and path.parent.name != str(os.getpid()):
                found.append(line)
    return found


def assert_gone(word):
    """Wait until no process whose command line contains `word` is left."""
    deadline = time.monotonic() + HANG_TIMEOUT_S
    while left_behind(word):
        assert time.monotonic() < deadline, left_behind(word)
        sleep(0.02)


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    if sys.argv[1:] in ([], ["warm"]):
        serve(sys.argv[1:])
    else:  # see fresh_run()
        do(json.loads(sys.argv[1]))
