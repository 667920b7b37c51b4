"""
What a command says to its user, and how it ends.

A user's mistake is one line on stderr that names the thing and the fix, and exit status 2. On
several processes every process makes the same checks by itself and none of them communicates, so a
mistake that all of them make is found by all: the main process says it and torchrun ends the
others, which wait a few seconds before they speak. What only one process meets, it says itself.
"""

import importlib
import io
import os
import re
import signal
import sys
import threading
import time
import traceback


class UserError(Exception):
    """A user's mistake: one line that names the thing and the fix; exit status 2."""


class RunError(Exception):
    """A run that cannot go on, through no mistake of the user's: one line, exit status 1."""


def rank(name="RANK"):
    """This process's number among all (RANK) or on its machine (LOCAL_RANK), as torchrun says."""
    number = os.environ.get(name, "0")
    return int(number) if number.isdigit() else 0


def say(message, stream="stdout"):
    """Print, on the main process only."""
    if rank() == 0:
        # in one piece: a save beside the training may speak at the same time
        print(f"{message}\n", end="", file=getattr(sys, stream), flush=True)


def warn(message):
    say(f"warning: {message}", "stderr")


def one_line(error, length=200):
    """An exception as one short line."""
    kind, text = type(error).__name__, " ".join(str(error).split())
    return (f"{kind}: {text}" if text else kind)[:length]


def optional_import(name, what_for):
    """A package that is not in requirements.txt, or a UserError with the command that installs."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"{what_for} needs {name}: pip install {name}") from None


# -----------------------------------------------------------------------------
# The end of a command

SAVING = "save"  # the thread that writes a checkpoint
NO_MEMORY = re.compile(
    "out of memory|allocate memory|enough memory|size calculation overflow|"
    "CUBLAS_STATUS_ALLOC_FAILED|cudaErrorMemoryAllocation"
)
LOST_PEER = re.compile("onnection (closed|reset) by peer")


def is_out_of_memory(error):
    """Whether Python, numpy, torch or the GPU's driver says that there is no memory left."""
    said = isinstance(error, RuntimeError) and NO_MEMORY.search(str(error))
    return isinstance(error, MemoryError) or bool(said)


def run_main(program, command, smaller="a smaller model, --B or --T"):
    """Run command() and end this process with the status that it returns or that its error has.

    smaller: what to use where memory did not do.
    """
    prepare_streams()
    error = None
    try:
        status = command() or 0
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except Exception as e:
        error = e
        status = 2 if isinstance(e, UserError) or is_out_of_memory(e) else 1
    if error:
        # our own words may hold the same of a download
        own = isinstance(error, (UserError, RunError))
        lost_peer = not own and LOST_PEER.search(str(error))
        if rank() > 0 or lost_peer:
            let_others_speak()
        if not (lost_peer and "TORCHELASTIC_RUN_ID" in os.environ):  # torchrun reports that one
            print(describe(program, error, smaller), file=sys.stderr, flush=True)
    leave(status)


def describe(program, error, smaller):
    """An error as the user reads it: one line, or the traceback of a fault in this program."""
    where = f"on rank {rank()}: " if rank() else ""
    if is_out_of_memory(error):
        error = f"out of memory ({one_line(error)}): use {smaller}"
    elif not isinstance(error, (UserError, RunError)):
        return where + "".join(traceback.format_exception(error))
    # a name may hold a line end; the rows of a table, which begin with two blanks, are lines
    error = re.sub(r"[\r\n](?!  )", lambda end: repr(end[0])[1:-1], str(error))
    return f"{program}: error: {where}{error}"


def let_others_speak():
    """Wait: whose fault it is says so meanwhile, and torchrun then ends this process."""
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, signal.SIG_DFL)
    time.sleep(3 + rank("LOCAL_RANK"))


def leave(status):
    """End this process; among several at once and without Python's own taking down."""
    for thread in threading.enumerate():
        if thread.name == SAVING:  # what a run that failed had begun to save is good
            thread.join()
    status = status or int(Output.lost)  # whoever waits for what we say shall know
    if os.environ.get("WORLD_SIZE", "1") == "1" and "TORCHELASTIC_RUN_ID" not in os.environ:
        sys.exit(status)
    # gloo's threads outlive the process group: one that lets go of a tensor while the interpreter
    # is taken down would abort a process that has done its work.
    for stream in (sys.stdout, sys.stderr):
        if stream:
            stream.flush()
    os._exit(status)


class Output(io.FileIO):
    """A descriptor to print to. What a full disk, a terminal that hung up or a reader that has gone
    does not take is lost, and the run goes on: Ctrl-C ends the `| tee` of a run that must still
    save."""

    lost = False

    def write(self, data):
        try:
            return super().write(data) or len(data)  # None: it would have to wait
        except OSError:
            Output.lost = True
            return len(data)


def prepare_streams():
    """Printing never fails: not on a terminal without Unicode, not with a stream closed or full."""
    for fd in range(3):  # a closed one would be given to the next file that is opened
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for fd, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        buffer = getattr(stream, "buffer", None)
        if stream is None or type(getattr(buffer, "raw", buffer)) is io.FileIO:
            raw, encoding = Output(fd, "w", closefd=False), getattr(stream, "encoding", "utf-8")
            setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(raw), encoding,
                                                "backslashreplace", line_buffering=True))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
