"""What the tests share: a tiny model's flags, fake shards, runs, and how two runs are compared.

Which promise is held where:

    test_train         the numbers are build-nanogpt's; the smoke run; evaluate, sample, export
    test_model         the model, its loss, sampling and schedule, against formulas and other code
    test_modern        the sequel's recipe, and that it is a run like any other
    test_data          the batch of a step; test_tokens: how text, shards and manifests are read
    test_kills         killed anywhere or stopped by a signal, a run goes on as if nothing had been
    test_disk          a disk that is full or fails takes nothing that was good
    test_checkpoint    a checkpoint is plain data, proved whole, and yesterday's still serve
    test_errors        a mistake is one line that names the fix, and status 2, before time is spent
    test_ranks         so it is on several processes; whatever one of them does, none hangs
    test_distributed   any number of processes, sharded or compiled, makes the same run
    test_house         who may import whom, how long a function may be, what an import costs
    test_readme        what the README says to type can be typed
    test_fineweb, test_ready, test_hellaswag, test_plot: the other commands

processes.py starts the runs, and stops them where a test says.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from processes import ROOT, Forks

SHARED = ROOT.parent / "shared"
if (SHARED / "tiktoken").is_dir():
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken"))
# What a script starts in the background ignores Ctrl-C, and would hand that on to the runs.
signal.signal(signal.SIGINT, signal.default_int_handler)
# One thread each: the tests start many processes on few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

TINY = [
    "--preset=gpt2", "--device=cpu", "--dtype=float32", "--n_layer=2", "--n_head=2", "--n_embd=32",
    "--vocab_size=512", "--block_size=32", "--T=16", "--B=2", "--total_batch_size=256",
    "--max_lr=3e-3", "--warmup_steps=3", "--max_steps=12", "--eval_every=5", "--val_tokens=512",
    "--num_samples=0", "--save_every=4", "--checkpoint_every=8",
]  # fmt: skip


def has_vocabulary():
    """Whether GPT-2's vocabulary can be had without a network."""
    folder = os.environ.get("TIKTOKEN_CACHE_DIR")
    return folder is not None and os.path.isdir(folder)


def write_shards(folder, sizes=(3000,), val=1000, high=500, seed=0):
    """Shards of random token ids below `high`: one of val, len(sizes) of train. Returns folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i, n in enumerate((val, *sizes)):
        name = f"edufineweb_{'train' if i else 'val'}_{i:06d}.npy"
        np.save(folder / name, (rng.random(n) ** 3 * high).astype(np.uint16))
    return str(folder)


def command(*flags, processes=1):
    """The command line of train_gpt2.py, under torchrun for several processes."""
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*start, str(ROOT / "train_gpt2.py"), *map(str, flags)]


def train(*flags, cwd, processes=1, timeout=900, **env):
    """Run train_gpt2.py to its end; a CompletedProcess with text output."""
    return subprocess.run(command(*flags, processes=processes), cwd=cwd, capture_output=True,
                          text=True, timeout=timeout, env=os.environ | env,
                          stdin=subprocess.DEVNULL)


def read_log(folder, name="log.txt"):
    """log.txt as {(step, stream): value as written}."""
    lines = (Path(folder) / name).read_text().splitlines()
    return {(int(step), stream): value for step, stream, value in (x.split() for x in lines)}


# The files that take long come first, short ones behind them, so that the cores end together.
ORDER = ("train ranks fineweb kills tokens disk house distributed modern hellaswag errors ready "
         "data checkpoint model plot").split()


def pytest_configure(config):
    config.option.loadscopereorder = False  # of pytest-xdist, which begins with the most tests
    if not hasattr(config, "workerinput"):  # the process that the user sees
        config.pluginmanager.register(TimeToGo())


class TimeToGo:
    """Every half minute a line: how many tests are done, and about how long the rest will take."""

    def __init__(self):
        self.start = self.said = time.monotonic()
        self.done = self.total = 0

    def pytest_collection_finish(self, session):
        self.total = len(session.items)

    def pytest_xdist_node_collection_finished(self, ids):
        self.total = len(ids)

    def pytest_runtest_logfinish(self):
        self.done += 1
        now = time.monotonic()
        if now - self.said > 30:
            left = (now - self.start) / self.done * (self.total - self.done)
            minutes, seconds = divmod(round(left), 60)
            # the long ones come first: nothing can be told of the rest before there are some
            guess = f", about {minutes}:{seconds:02} to go" if 5 * self.done > self.total else ""
            print(f"\n{self.done} of {self.total} tests{guess}")
            self.said = now


def pytest_collection_modifyitems(items):
    names = [f"test_{name}" for name in ORDER]
    items.sort(key=lambda item: names.index(item.path.stem) if item.path.stem in names else 99)


# -----------------------------------------------------------------------------
# Runs, and what is compared


@pytest.fixture(scope="session")
def forks(tmp_path_factory):
    """Starts runs in a moment: see processes.py."""
    forks = Forks(tmp_path_factory.mktemp("console"))
    yield forks
    forks.close()


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Three odd-sized shards of 95 windows in all: the runs of 192 rows end the epoch twice."""
    return write_shards(tmp_path_factory.mktemp("data"), sizes=(700, 500, 333), val=1001)


@pytest.fixture
def flags(data):
    return [*TINY, f"--data={data}"]


@pytest.fixture(scope="session")
def undisturbed(forks, data, tmp_path_factory):
    """The log_dir of a run that nobody disturbs; lines.json beside it counts what it executed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    count = f"count_lines({str(folder / 'lines.json')!r})"
    forks.run(*TINY, f"--data={data}", cwd=folder, patch=count).good()
    return folder / "log"


@pytest.fixture
def rng():
    """For what a test draws by chance; where it fails, pytest shows the seed."""
    seed = int(os.environ.get("TEST_SEED", random.randrange(10**6)))
    print(f"TEST_SEED={seed}")
    return random.Random(seed)


def weights(folder, name="last.pt"):
    """A checkpoint as torch alone reads it."""
    import torch

    return torch.load(Path(folder) / name, weights_only=True)


def equal(a, b):
    """Two nests of plain data, tensors compared bit by bit."""
    if hasattr(a, "dtype"):
        return a.dtype == b.dtype and a.equal(b)
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


def assert_close(log, reference):
    """Two logs of another number of processes, or another B: the same but for rounding."""
    assert log.keys() == reference.keys()
    for (step, stream), value in reference.items():
        atol = dict(train=1e-5, val=1.1e-4, norm=2e-3)[stream]
        assert abs(float(log[step, stream]) - float(value)) <= atol, (step, stream)


def copy_until_8(undisturbed, folder):
    """A log_dir as a run killed after its save at step 8 leaves it."""
    folder = Path(folder)
    shutil.copytree(undisturbed, folder)
    (folder / "model_00012.pt").unlink()
    (folder / "last.pt").unlink()
    os.link(folder / "model_00008.pt", folder / "last.pt")
    assert weights(folder)["step"] == 8
    return folder


@pytest.fixture
def shards(tmp_path):
    """A folder of three odd-sized train shards and one of val."""
    return write_shards(tmp_path / "shards", sizes=(1111, 777, 1500))
