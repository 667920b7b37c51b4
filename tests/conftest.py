"""What the tests share: a tiny model's flags, fake shards, and the commands run as a user does."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
if (SHARED / "tiktoken").is_dir():
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken"))
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


def train(*flags, cwd, processes=1, timeout=180, **env):
    """Run train_gpt2.py to its end; a CompletedProcess with text output."""
    return subprocess.run(command(*flags, processes=processes), cwd=cwd, capture_output=True,
                          text=True, timeout=timeout, env=os.environ | env,
                          stdin=subprocess.DEVNULL)


def read_log(folder, name="log.txt"):
    """log.txt as {(step, stream): value as written}."""
    lines = (Path(folder) / name).read_text().splitlines()
    return {(int(step), stream): value for step, stream, value in (x.split() for x in lines)}


@pytest.fixture
def shards(tmp_path):
    """A folder of three odd-sized train shards and one of val."""
    return write_shards(tmp_path / "shards", sizes=(1111, 777, 1500))
