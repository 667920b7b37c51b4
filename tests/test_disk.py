"""A disk that is full or fails: what was good stays good, and the run says what it could not do."""

import copy
import errno
import io
import os
import threading

import pytest
import torch
from conftest import assert_same_end, copy_until_8, equal, weights
from processes import LINUX

from plumbing import checkpoint, hardware
from plumbing.errors import RunError
from plumbing.files import atomic_write

needs_linux = pytest.mark.skipif(not LINUX, reason="needs Linux")


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
        if mode == "w+b" and target in str(path):
            return io.BufferedRandom(Torn(path, "w+"), 16)
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
    with pytest.raises(OSError), atomic_write(str(path)) as f:
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
    with pytest.raises(RunError, match="step 12 .*is as it was.*--resume") as final:
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


def test_a_rename_that_fails_once_takes_no_kept_checkpoint(monkeypatch, tmp_path):
    """As where another process has last.pt open on Windows."""
    state, real = dict(step=4, model={"w": torch.arange(1000.0)}), os.replace
    checkpoint.save_checkpoint(state, str(tmp_path))
    failed = []

    def replace(source, target):
        if str(target).endswith("last.pt") and not failed:
            failed.append(target)
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    checkpoint.save_checkpoint(state | {"step": 8}, str(tmp_path), keep=True)
    assert failed and weights(tmp_path, "model_00008.pt")["step"] == 8
    assert weights(tmp_path)["step"] in (4, 8)
    assert sorted(os.listdir(tmp_path)) == ["last.pt", "model_00008.pt"]


def test_what_is_saved_is_a_copy(monkeypatch, tmp_path):
    """Training changes the weights meanwhile; what shares its memory is written once."""
    w = torch.arange(4900.0).view(70, 70)
    state = dict(step=4, model={"wte": w, "lm_head": w.view(70, 70), "t": w.t()}, betas=(0.9, 0.95))
    saver, expected = checkpoint.Saver(str(tmp_path)), copy.deepcopy(state)
    changed, real = threading.Event(), torch.save
    monkeypatch.setattr(torch, "save", lambda *args: changed.wait() and real(*args))
    saver.save(state)
    w.zero_()
    changed.set()
    saver.wait()
    assert equal(weights(tmp_path), expected)
    assert (tmp_path / "last.pt").stat().st_size < 2.5 * w.nbytes


def test_room_in_a_container(monkeypatch, tmp_path):
    """Its limit counts, and what the system keeps of files does not."""
    monkeypatch.setattr(hardware, "Path", lambda _, name: tmp_path / name)
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 750\nactive_file 100\ninactive_file 50\n")
    for limit, room in (("1000\n", 250), ("max\n", None)):
        (tmp_path / "memory.max").write_text(limit)
        assert hardware.free_memory() == room or (not room and hardware.free_memory() > 1000)


def refuse(*_):
    raise RuntimeError("can't start new thread")


@pytest.mark.parametrize("name, fault", [
    ("checkpoint.free_memory", lambda: 0),
    ("checkpoint.copy_to_host", lambda _: torch.empty(2**60)),
    ("checkpoint.threading.Thread.start", refuse),
], ids=["no memory", "no memory after all", "no thread"])
def test_without_room_for_a_copy_a_save_is_made_at_once(monkeypatch, tmp_path, name, fault):
    monkeypatch.setattr(f"plumbing.{name}", fault)
    state, saver = dict(step=4, model={"w": torch.ones(3)}), checkpoint.Saver(str(tmp_path))
    saver.save(state, keep=True)
    assert equal(weights(tmp_path), state) and equal(weights(tmp_path, "model_00004.pt"), state)
    saver.wait()


# -----------------------------------------------------------------------------
# Whole runs


def test_failed_periodic_save(forks, undisturbed, flags, tmp_path):
    """Warns, goes on, and the next save is good."""
    patch = "torn_save(no_space, when=lambda n, state: n == 1)"
    run = forks.run(*flags, cwd=tmp_path, patch=patch).good()
    assert "warning: step 4 could not be saved" in run.stderr and "No space left" in run.stderr
    assert_same_end(tmp_path / "log", undisturbed)


@needs_linux
def test_failed_last_save(forks, undisturbed, flags, tmp_path):
    """No file may grow beyond 100 kB, for real: log.txt can be written, a checkpoint cannot."""
    log = copy_until_8(undisturbed, tmp_path / "log")
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
    run = forks.run(*flags, "--resume", "--save_every=5", cwd=tmp_path, patch=limit)
    run.refused("step 12 could not be saved", "File too large", "is as it was", status=1)
    assert "warning: step 10 could not be saved" in run.stderr
    assert weights(log)["step"] == 8 and not list(log.glob("*.tmp"))
    forks.run(*flags, "--resume", cwd=tmp_path).good()
    assert_same_end(log, undisturbed)


def test_log_on_a_full_disk(forks, undisturbed, flags, tmp_path):
    """Lines wait until there is room again; a torn one is overwritten."""
    run = forks.run(*flags, cwd=tmp_path,
                    patch="torn_log(no_space, when=lambda n: 5 <= n < 15)").good()
    assert run.stderr.count("log.txt cannot be written now") == 1 and "No space left" in run.stderr
    assert_same_end(tmp_path / "log", undisturbed)


def test_log_on_a_disk_that_stays_full(forks, flags, tmp_path):
    """That lines are missing is said again at the end, where it is seen."""
    run = forks.run(*flags, cwd=tmp_path, patch="torn_log(no_space, when=lambda n: n >= 5)").good()
    assert "Traceback" not in run.stderr
    first, *_, last = run.stderr.splitlines()
    assert "log.txt cannot be written now" in first
    # 28 lines there are: 24 of updates and 4 of evaluations, and 4 of them were written before
    assert "log.txt: its last 24 lines could not be written" in last


@needs_linux
def test_killed_with_half_a_line_in_the_log(forks, undisturbed, flags, tmp_path):
    """The log could not be written, the checkpoint could, then came the kill: lines are missing,
    and none is wrong."""
    full = "torn_log(no_space, when=lambda n: n >= 5)"
    dies = 'at("train_gpt2.Trainer.update", kill_saved, nth=7)'
    forks.run(*flags, cwd=tmp_path, patch=f"{full}\n{dies}").killed()
    log = tmp_path / "log" / "log.txt"
    assert weights(tmp_path / "log")["step"] == 4 and not log.read_bytes().endswith(b"\n")
    forks.run(*flags, "--resume", cwd=tmp_path).good()
    whole = (undisturbed / "log.txt").read_text().splitlines()
    lines = log.read_text().splitlines()
    assert [x for x in whole if x in lines] == lines and len(lines) == 4 + 19


@needs_linux
def test_start_on_a_full_disk(forks, undisturbed, flags, tmp_path):
    """No traceback, and nothing that was good is lost."""
    log = copy_until_8(undisturbed, tmp_path / "log")
    before = (log / "log.txt").read_bytes()
    for name in ("log.txt", "config.json"):
        os.symlink("/dev/full", log / f"{name}.tmp")
        run = forks.run(*flags, "--resume", cwd=tmp_path)
        run.refused("log", "No space left", status=1)
        assert name != "log.txt" or (log / "log.txt").read_bytes() == before
    assert weights(log)["step"] == 8
    forks.run(*flags, "--resume", cwd=tmp_path).good()
    assert_same_end(log, undisturbed)
