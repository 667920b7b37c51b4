"""
Files that are written whole or not at all, and locks that die with their process.
"""

import contextlib
import os
import shutil

from plumbing.errors import UserError

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # the folder of the commands


@contextlib.contextmanager
def atomic_write(path):
    """A binary file that replaces `path` when it is complete and on the disk; else nothing does."""
    tmp = f"{path}.tmp"
    try:
        with open(tmp, "w+b") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)  # after the close: Windows renames no open file
        sync_folder(path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(tmp)
        raise


def sync_folder(path):
    """Make the name of a new file durable, where a system knows how."""
    if os.name == "posix":
        fd = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def keep_copy(source, path):
    """A second name for the same bytes; a copy where the file system cannot link."""
    # not atomic_write's name: where the rename fails, that one is opened, and source emptied by it
    tmp = path + ".link.tmp"
    try:
        with contextlib.suppress(FileNotFoundError):
            os.remove(tmp)  # of a save that was killed
        os.link(source, tmp)
        os.replace(tmp, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.remove(tmp)
        with open(source, "rb") as old, atomic_write(path) as new:
            shutil.copyfileobj(old, new)


def lock(path, refusal):
    """A lock file, held until release() or the end of this process; else UserError(refusal)."""
    from filelock import FileLock, Timeout

    held = FileLock(path)
    try:
        held.acquire(timeout=2.0)  # whose process was just killed may need a moment to go
    except Timeout:
        raise UserError(refusal) from None
    except NotImplementedError:  # some network file systems know no locks
        pass
    return held
