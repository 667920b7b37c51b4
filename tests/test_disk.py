"""Full disks and failing writes: what was saved stays valid, and one line names what failed."""

import errno
import os
from unittest.mock import Mock

import pytest
import torch
from conftest import assert_same_end, copy_until_8, equal, weights
from processes import LINUX

from train_gpt2 import RunError, save_checkpoint

pytestmark = pytest.mark.skipif(not LINUX, reason="needs Linux")
STATE = dict(step=4, model={"w": torch.arange(1000.0)})


@pytest.fixture
def full_disk():
    """full_disk(n): files longer than n bytes fail with EFBIG after a short write; -1: no limit."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda n: resource.setrlimit(resource.RLIMIT_FSIZE, (n, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("fault", ["File too large", "fsync", "replace"])
def test_failed_save_keeps_the_old_file(monkeypatch, tmp_path, capsys, full_disk, fault):
    """A periodic save warns, the final one raises, and the previous checkpoint stays."""
    save_checkpoint(STATE, str(tmp_path), False, False)
    capsys.readouterr()
    if fault == "File too large":
        full_disk(1000)
    else:
        monkeypatch.setattr(os, fault, Mock(side_effect=OSError(errno.EIO, fault)))
    save_checkpoint(STATE | {"step": 8}, str(tmp_path), True, False)
    with pytest.raises(RunError, match="step 12.* intact.*--resume") as final:
        save_checkpoint(STATE | {"step": 12}, str(tmp_path), True, True)
    full_disk(-1)
    warning = capsys.readouterr().err
    assert warning.startswith("warning: ") and "step 8" in warning and warning.count("\n") == 1
    assert fault in warning and fault in str(final.value)
    assert equal(weights(tmp_path), STATE) and os.listdir(tmp_path) == ["last.pt"]


def test_storage_without_links(monkeypatch, tmp_path, full_disk):
    """The second name is then a copy; a copy that fails leaves last.pt valid and no temporary file."""
    monkeypatch.setattr(os, "link", Mock(side_effect=OSError(errno.EPERM, "no links")))
    save_checkpoint(STATE, str(tmp_path), True, True)
    assert equal(weights(tmp_path), STATE) and equal(weights(tmp_path, "model_00004.pt"), STATE)
    os.link.side_effect = lambda *args: full_disk(1000) or os.stat("/nowhere")  # raises OSError
    save_checkpoint(STATE | {"step": 8}, str(tmp_path), True, False)
    assert weights(tmp_path)["step"] == 8 and weights(tmp_path, "model_00004.pt")["step"] == 4
    assert sorted(os.listdir(tmp_path)) == ["last.pt", "model_00004.pt"]


def test_storage_without_locks(forks, uninterrupted, flags, tmp_path):
    """One warning, and the run continues."""
    patch = """
import filelock
def acquire(*args, **kwargs): raise OSError(errno.ENOLCK, "refused")
filelock.FileLock.acquire = acquire"""
    run = forks.run(*flags, cwd=tmp_path, patch=patch).good()
    assert run.stderr.count("warning: ") == 1 and "refused" in run.stderr


def test_full_disk_during_a_run(forks, uninterrupted, flags, tmp_path):
    """A log that cannot be opened ends the run. After failed saves training continues, except at the end."""
    log, flags = copy_until_8(uninterrupted, tmp_path / "log"), [*flags, "--resume"]
    for name in ("config.json", "log.txt"):
        os.symlink("/dev/full", log / f"{name}.tmp")
        forks.run(*flags, cwd=tmp_path).refused("No space left", status=1)
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
    run = forks.run(*flags, "--save_every=5", cwd=tmp_path, patch=limit)
    run.refused("step 12", "File too large", "intact", "--resume", "warning: ", "step 10", status=1)
    assert weights(log)["step"] == 8 and not list(log.glob("*.tmp"))
    run = forks.run(*flags, cwd=tmp_path, patch="torn_save(no_space, when=lambda n, _: n == 1)").good()
    assert "warning: " in run.stderr and "step 8" in run.stderr
    assert_same_end(log, uninterrupted)


def test_log_on_a_full_disk(forks, uninterrupted, flags, tmp_path):
    """A line that fails halfway is completed later; no line is lost or merged with another."""
    patch = """
import resource
limit = lambda n: resource.setrlimit(resource.RLIMIT_FSIZE, (n, resource.RLIM_INFINITY))
at("torch.nn.utils.clip_grad_norm_", lambda: limit(os.path.getsize("log/log.txt") + 7), nth=9)
at("torch.nn.utils.clip_grad_norm_", lambda: limit(resource.RLIM_INFINITY), nth=11)"""
    assert forks.run(*flags, cwd=tmp_path, patch=patch).good().stderr.count("log.txt") == 1
    assert_same_end(tmp_path / "log", uninterrupted)
