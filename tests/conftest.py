"""Shared by the tests: flags of a tiny model, synthetic shards, runs, and comparisons of two runs."""

import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from processes import ROOT, Forks

SHARED = ROOT.parent / "shared"
if (SHARED / "tiktoken").is_dir():
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken"))
# A background job ignores SIGINT, and the runs would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
# One thread per run: the tests start many processes on few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

TINY = [
    "--preset=gpt2", "--device=cpu", "--dtype=float32", "--n_layer=2", "--n_head=2", "--n_embd=32", "--T=16",
    "--B=2", "--vocab_size=512", "--block_size=32", "--total_batch_size=256", "--max_lr=3e-3",
    "--warmup_steps=3", "--max_steps=12", "--eval_every=5", "--val_tokens=512", "--num_samples=0",
    "--save_every=4", "--checkpoint_every=8",
]  # fmt: skip


def has_vocabulary():
    """Whether GPT-2's vocabulary is available without a network."""
    return os.path.isdir(os.environ.get("TIKTOKEN_CACHE_DIR", ""))


def write_shards(folder, sizes=(3000,), val=1000, high=500, seed=0):
    """Write one val shard and len(sizes) train shards of random ids below `high`. Returns folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i, n in enumerate((val, *sizes)):
        name = f"edufineweb_{'train' if i else 'val'}_{i:06d}.npy"
        np.save(folder / name, (rng.random(n) ** 3 * high).astype(np.uint16))
    return str(folder)


def train(*flags, cwd, **env):
    """Run train_gpt2.py; returns a CompletedProcess with text output."""
    return subprocess.run([sys.executable, ROOT / "train_gpt2.py", *map(str, flags)], cwd=cwd, text=True,
                          capture_output=True, timeout=900, env=os.environ | env, stdin=subprocess.DEVNULL)


def read_log(folder, name="log.txt"):
    """log.txt as {(step, stream): value as written}."""
    lines = (Path(folder) / name).read_text().splitlines()
    return {(int(step), stream): value for step, stream, value in (x.split() for x in lines)}


# Long files first, so that the workers finish at the same time.
ORDER = ("train ranks fineweb kills tokens disk structure distributed modern hellaswag errors pretokenized "
         "data checkpoint resume model plot").split()


def pytest_configure(config):
    config.option.loadscopereorder = False  # of pytest-xdist, which begins with the most tests


def pytest_collection_modifyitems(items):
    names = [f"test_{name}" for name in ORDER]
    items.sort(key=lambda item: names.index(item.path.stem) if item.path.stem in names else 99)


@pytest.fixture(scope="session")
def forks(tmp_path_factory):
    """Starts runs quickly: see processes.py."""
    forks = Forks(tmp_path_factory.mktemp("console"))
    yield forks
    forks.close()


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Three odd-sized shards of 95 windows; the runs of 192 sequences cross two epoch boundaries."""
    return write_shards(tmp_path_factory.mktemp("data"), sizes=(700, 500, 333), val=1001)


@pytest.fixture
def flags(data):
    return [*TINY, f"--data={data}"]


@pytest.fixture(scope="session")
def uninterrupted(forks, data, tmp_path_factory):
    """The log_dir of an uninterrupted run; lines.json next to it counts the executed lines."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    count = f"count_lines({str(folder / 'lines.json')!r})"
    forks.run(*TINY, f"--data={data}", cwd=folder, patch=count).good()
    return folder / "log"


@pytest.fixture
def rng():
    """Random choices of a test; pytest prints the seed if it fails."""
    seed = int(os.environ.get("TEST_SEED", random.randrange(10**6)))
    print(f"TEST_SEED={seed}")
    return random.Random(seed)


def weights(folder, name="last.pt"):
    """Load a checkpoint with torch alone."""
    import torch

    return torch.load(Path(folder) / name, weights_only=True)


def equal(a, b):
    """Compare nested plain data, tensors bit by bit."""
    if hasattr(a, "dtype"):
        return a.dtype == b.dtype and a.equal(b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def assert_same_end(folder, uninterrupted):
    """Assert that log, weights and optimizer of a finished run equal the uninterrupted run's."""
    folder, uninterrupted = Path(folder), Path(uninterrupted)
    assert (folder / "log.txt").read_bytes() == (uninterrupted / "log.txt").read_bytes()
    a, b = weights(folder), weights(uninterrupted)
    for part in ("step", "model", "optimizer", "val_loss", "rng"):
        assert equal(a[part], b[part]), part
    names, expected = ({p.name for p in x.glob("model_*.pt")} for x in (folder, uninterrupted))
    assert names == expected and not list(folder.glob("*.tmp"))


def assert_close(log, reference):
    """Assert that logs of different world sizes or B agree up to float32 rounding."""
    assert log.keys() == reference.keys()
    for (step, stream), value in reference.items():
        atol = dict(train=1e-5, val=1.1e-4, norm=2e-3)[stream]
        assert abs(float(log[step, stream]) - float(value)) <= atol, (step, stream)


def copy_until_8(uninterrupted, folder):
    """Make a log_dir as left by a run that was killed after its save at step 8."""
    folder = Path(folder)
    shutil.copytree(uninterrupted, folder)
    (folder / "model_00012.pt").unlink()
    (folder / "last.pt").unlink()
    os.link(folder / "model_00008.pt", folder / "last.pt")
    assert weights(folder)["step"] == 8
    return folder


@pytest.fixture
def shards(tmp_path):
    """A directory with three odd-sized train shards and one val shard."""
    return write_shards(tmp_path / "shards", sizes=(1111, 777, 1500))
