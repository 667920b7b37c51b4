"""
What the commands of this project share: one-line errors, flags, files written whole, the folder of
a run, and the processes of a run. Nothing here knows what a language model is.
"""

import argparse
import contextlib
import difflib
import glob
import hashlib
import importlib
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import field, fields
from datetime import timedelta

HERE = os.path.dirname(os.path.abspath(__file__))

# -----------------------------------------------------------------------------
# Talking to the user


class UserError(Exception):
    """A user's mistake: one line that names the thing and the fix; commands exit with status 2."""


class AgreedError(UserError):
    """A UserError that all processes of a run know of: only the main process prints it."""


class RunError(Exception):
    """A run that cannot go on, through no mistake of the user's: one line, exit status 1."""


def is_main_process():
    return os.environ.get("RANK", "0") == "0"


def say(*words):
    """Print, on the main process only."""
    if is_main_process():
        print(*words, flush=True)


def warn(message):
    if is_main_process():
        print(f"warning: {message}", file=sys.stderr, flush=True)


def one_line(error, length=200):
    """An exception as one short line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:length]


def optional_import(name, what_for):
    """A package that is not in requirements.txt, or a UserError with the command that installs."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"{what_for} needs {name}: pip install {name}") from None


def run_main(program, command):
    """Exit with command()'s status; a known error is one line on stderr, from one process."""
    try:
        status = command() or 0
    except (UserError, RunError) as e:
        status = 2 if isinstance(e, UserError) else 1
        if not is_main_process():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(10)  # torchrun ends this process once the main one has printed and gone
        if is_main_process() or not isinstance(e, AgreedError):
            print(f"{program}: error: {e}", file=sys.stderr, flush=True)
    except BrokenPipeError:  # as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except (RuntimeError, MemoryError) as e:
        if re.search("allocate memory|nable to allocate|enough memory|out of memory|"
                     "size calculation overflow", str(e)):
            status = 2
            print(f"{program}: error: out of memory ({one_line(e)}): use a smaller model, --B or "
                  "--T", file=sys.stderr, flush=True)
        elif re.search("onnection (closed|reset|refused)", str(e)):
            print(f"{program}: rank {os.environ.get('RANK')} stops: another process is gone",
                  file=sys.stderr, flush=True)
            sys.stdout.flush()
            os._exit(1)  # a process group whose peer is dead may wait for it when taken down
        else:
            raise
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    torch = sys.modules.get("torch")
    if status and torch and torch.distributed.is_initialized():
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


# -----------------------------------------------------------------------------
# Flags


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations that answers a mistake with one line and a likely name."""

    def __init__(self, description, usage="%(prog)s [--flag value ...]"):
        super().__init__(
            description=description,
            usage=usage,
            allow_abbrev=False,
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
                prog, max_help_position=28, width=100
            ),
        )

    def parse_args(self, args=None):
        """Takes --total-batch-size for --total_batch_size."""
        args = sys.argv[1:] if args is None else args
        return super().parse_args([self.underscored(a) if a[:2] == "--" else a for a in args])

    @staticmethod
    def underscored(argument):
        name, equals, value = argument[2:].partition("=")
        no = "no-" * name.startswith("no-")
        return f"--{no}{name.removeprefix(no).replace('-', '_')}{equals}{value}"

    def error(self, message):
        hint = ""
        if message.startswith("unrecognized arguments: "):
            unknown = message.split(": ")[1].split()[0].split("=")[0]
            known = difflib.get_close_matches(unknown, self._option_string_actions, 1, 0.7)
            hint = f"; did you mean {known[0]}?" if known else ""
        raise UserError(f"{message}{hint} (--help lists the flags)")


def flag(default, text, kind=None, ge=None, gt=None, le=None, choices=None, shown=None,
         empty=False):
    """A field of a dataclass of flags. kind: its type where the default is None; ge, gt: the least
    value, inclusive or not; le: the largest; shown: the default in words; empty: whether an empty
    text is a value."""
    kind, shown = kind or type(default), str(default) if shown is None else shown
    return field(default=default, metadata=dict(text=text, kind=kind, ge=ge, gt=gt, le=le,
                                                choices=choices, shown=shown, empty=empty))


def not_empty(text):
    """The type of a flag that takes a text: an empty one is most often an unset shell variable."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def add_flags(parser, cls, groups):
    """Add the fields of `cls` as flags; `groups` maps the first flag of each group to its title."""
    group = None
    for f in fields(cls):
        meta, kind = f.metadata, f.metadata["kind"]
        if f.name in groups:
            group = parser.add_argument_group(groups[f.name])
        how = dict(action=argparse.BooleanOptionalAction)
        if kind is list:
            how = dict(type=not_empty, nargs="+", metavar="PATH")
        elif kind is not bool:
            how = dict(type=kind, choices=meta["choices"])
            if kind is str and not meta["empty"]:
                how["type"] = not_empty
            how["metavar"] = None if meta["choices"] else kind.__name__.upper()
        text = meta["text"] + (f" (default: {meta['shown']})" if meta["shown"] else "")
        group.add_argument(f"--{f.name}", default=argparse.SUPPRESS, help=text, **how)


def check_ranges(config):
    """Raise UserError for the first flag that is not among its choices or outside its range."""
    for f in fields(config):
        value, meta = getattr(config, f.name), f.metadata
        if meta["choices"] and value not in meta["choices"]:
            raise UserError(f"--{f.name} {value}: choose from {', '.join(meta['choices'])}")
        if value is None or isinstance(value, (str, bool, list)):
            continue
        largest = sys.float_info.max if isinstance(value, float) else meta["le"] or 2**63 - 1
        if value > largest and value != math.inf:
            raise UserError(f"--{f.name} {value}: must be at most {largest}")
        if meta["gt"] is not None and not meta["gt"] < value <= largest:  # nan is neither
            raise UserError(f"--{f.name} {value}: must be a number above {meta['gt']}")
        if meta["ge"] is not None and not meta["ge"] <= value <= largest:
            raise UserError(f"--{f.name} {value}: must be a number of at least {meta['ge']}")


# -----------------------------------------------------------------------------
# Files: written whole or not at all, and locked while somebody is at work


def put_in_place(f, path):
    """Make a written temporary file durable and give it its name."""
    f.flush()
    os.fsync(f.fileno())
    f.close()  # before the rename: Windows renames no open file
    os.replace(f.name, path)
    if os.name == "posix":  # the new name is on the disk when its folder is
        fd = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


@contextlib.contextmanager
def atomic_write(path):
    """A binary file that replaces `path` when it is complete and on the disk; else nothing does."""
    tmp = f"{path}.tmp"
    try:
        with open(tmp, "wb") as f:
            yield f
            put_in_place(f, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(tmp)
        raise


def keep_copy(source, path):
    """A second name for the same bytes; a copy where the file system cannot link."""
    with contextlib.suppress(FileNotFoundError):
        os.remove(path + ".tmp")  # of a save that was killed
    try:
        os.link(source, path + ".tmp")
        os.replace(path + ".tmp", path)
    except OSError:
        with open(source, "rb") as old, atomic_write(path) as new:
            shutil.copyfileobj(old, new)


def try_lock(f):
    """Lock an open file, or False where another process has it. The lock dies with its process."""
    try:
        if os.name == "posix":
            import fcntl

            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            import msvcrt

            f.seek(0)
            msvcrt.locking(f.fileno(), msvcrt.LK_NBLCK, 1)
        return True
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # some network file systems know no locks
        return os.name == "posix"


# -----------------------------------------------------------------------------
# The folder of a run


def lock_log_dir(folder):
    """Refuse a second live run on `folder`; returns the open lock file."""
    f = open(os.path.join(folder, ".lock"), "a+")
    for _ in range(20):  # a worker that torchrun has just killed may need a moment to go
        if try_lock(f):
            return f
        time.sleep(0.1)
    f.close()
    raise UserError(f"another run is writing to {folder}: wait for its end, or choose another "
                    "--log_dir")


def open_log_dir(folder, resumed):
    """Make `folder` ready and locked; an older run in it is moved to the first free folder.N."""
    folder = os.path.normpath(folder)
    marks = ("log.txt", "config.json", "last.pt", "model_*.pt")
    old_run = any(glob.glob(os.path.join(glob.escape(folder), mark)) for mark in marks)
    try:
        if old_run and not resumed:
            lock_log_dir(folder).close()
            n = next(n for n in range(1, 10**6) if not os.path.exists(f"{folder}.{n}"))
            os.rename(folder, f"{folder}.{n}")
            say(f"the older run in {folder} is now in {folder}.{n}")
        os.makedirs(folder, exist_ok=True)
        return lock_log_dir(folder)
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
    """All that a run tells: log.txt, samples.txt, curves.png, Weights & Biases. Main process."""

    DIGITS = dict(train=6, val=4, hella=4, norm=4)

    def __init__(self, folder, settings, from_step, project=""):
        self.log = RunLog(os.path.join(folder, "log.txt"), from_step)
        self.samples = RunLog(os.path.join(folder, "samples.txt"), from_step)
        path = os.path.join(folder, "config.json")
        with contextlib.suppress(OSError, ValueError), open(path, encoding="utf-8") as f:
            settings["wandb_id"] = json.load(f)["wandb_id"]  # a resumed run is the same run there
        settings.setdefault("wandb_id", os.urandom(4).hex())
        with atomic_write(path) as f:
            f.write(json.dumps(settings, indent=1).encode())
        self.plot, self.drawing = [sys.executable, os.path.join(HERE, "plot.py"), folder], None
        self.can_draw = importlib.util.find_spec("matplotlib") is not None
        self.wandb = None
        if project:
            try:
                self.wandb = optional_import("wandb", "--wandb").init(
                    project=project, dir=folder, config=settings, id=settings["wandb_id"],
                    resume="allow")
            except Exception as e:  # no login, no network: wandb has its own kinds
                raise RunError(f"--wandb {project}: {one_line(e)}") from None

    def scalars(self, step, **values):
        """`{step} {name} {value}` in log.txt for the four that are kept there; all to W&B."""
        for name, digits in self.DIGITS.items():
            if name in values:
                self.log.write(f"{step} {name} {values[name]:.{digits}f}")
        if self.wandb:
            self.wandb.log(values, step=step)

    def update(self, step, max_steps, loss, norm, lr, dt, tokens, mfu, clock):
        """The console line and the log lines of one update; now and then the time to go."""
        rate = tokens / dt
        self.scalars(step, train=loss, norm=norm, lr=lr, dt=dt, tok_per_sec=rate, mfu=mfu)
        print(f"step {step:5d} | loss: {loss:.6f} | lr {lr:.4e} | norm: {norm:.4f} | "
              f"dt: {dt * 1000:.2f}ms | tok/sec: {rate:.2f} | mfu: {100 * mfu:.1f}%", flush=True)
        done = step + 1
        if clock.mean and (clock.steps == 7 or done % max(25, max_steps // 50) == 0):
            left = timedelta(seconds=round(clock.mean * (max_steps - done)))
            print(f"{100 * done / max_steps:.1f}% done, {left} of training to go", flush=True)

    def sample(self, step, i, text):
        print(f"rank 0 sample {i}: {text}", flush=True)
        self.samples.write(f"{step} sample {i}: {json.dumps(text, ensure_ascii=False)}")
        if self.wandb:
            self.wandb.log({f"sample {i}": text}, step=step)

    def draw(self, wait=False):
        """Redraw curves.png in a process of its own: training neither waits nor fails."""
        if self.drawing and (wait or self.drawing.poll() is not None):
            self.finish_drawing()
        if self.can_draw and not self.drawing:
            self.drawing = subprocess.Popen(self.plot, stdout=subprocess.DEVNULL,
                                            stderr=subprocess.PIPE, text=True,
                                            start_new_session=True)  # Ctrl-C is not for it
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


def open_reporter(folder, *args):
    """A Reporter, or a RunError where the disk is full."""
    try:
        return Reporter(folder, *args)
    except OSError as e:
        raise RunError(f"{folder} cannot be written ({one_line(e)}); the checkpoints in it are as "
                       "they were") from None


def is_due(step, every):
    """Whether something that happens every so many steps happens now; never at 0, 0 = never."""
    return step > 0 and every > 0 and step % every == 0


class Clock:
    """Seconds of training steps; the first ones (compilation) and evaluation do not count."""

    def __init__(self, warm_up=3):
        self.steps, self.seconds = -warm_up, 0.0

    def add(self, dt):
        self.steps += 1
        self.seconds += dt if self.steps > 0 else 0.0

    @property
    def mean(self):
        """Seconds per step; 0.0 as long as it is not known."""
        return self.seconds / self.steps if self.steps > 0 else 0.0


def versions(*files):
    """What a run ran on, for config.json: git commit, Python, torch, sha256 of files that exist."""
    import torch

    found = dict(python=sys.version.split()[0], torch=torch.__version__, git=None, sha256={})
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        found["git"] = subprocess.run(
            ["git", "-C", HERE, "describe", "--always", "--dirty"], timeout=10,
            capture_output=True, text=True, check=True).stdout.strip()
    for path in files:
        with contextlib.suppress(OSError), open(path, "rb") as f:
            found["sha256"][os.path.basename(path)] = hashlib.sha256(f.read()).hexdigest()
    return found
