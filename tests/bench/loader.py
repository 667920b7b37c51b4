"""
DataLoaderLite against build-nanogpt's way of feeding (a whole shard read and converted to int64):
time of a batch, shard borders included, and resident memory.

    python tests/bench/loader.py [--tokens 100000000] [--B 64] [--T 1024]

Both sides run in processes of their own over the same two shards, across the border.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def resident():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def whole_shards(folder, B, T):
    """A shard at a time as one int64 tensor."""
    import torch

    pos, tokens = 0, None
    for path in sorted(Path(folder).glob("*train*")):
        tokens, pos = torch.tensor(np.load(path).astype(np.int32), dtype=torch.long), 0
        while pos + B * T + 1 <= len(tokens):
            buf = tokens[pos:pos + B * T + 1]
            yield buf[:-1].view(B, T), buf[1:].view(B, T)
            pos += B * T


def by_position(folder, B, T, shuffle):
    from plumbing.tokens import open_shards
    from train_gpt2 import DataLoaderLite

    loader = DataLoaderLite(B, T, 0, 1, open_shards(folder, "train"), shuffle=shuffle)
    while True:
        yield loader.next_batch()


def side(name, folder, B, T, batches):
    import torch  # noqa: F401

    import train_gpt2  # noqa: F401

    base, peak, times = resident(), 0.0, []
    feed = whole_shards(folder, B, T) if name == "whole" else by_position(folder, B, T, name)
    for _ in range(batches):
        start = time.perf_counter()
        batch = next(feed, None)
        if batch is None:
            break
        times.append(1000 * (time.perf_counter() - start))
        peak = max(peak, resident() - base)
    print(f"{name:8} batches {len(times):5}  median {np.median(times):7.3f} ms  "
          f"99th percentile {np.percentile(times, 99):8.3f} ms  largest {max(times):9.3f} ms  "
          f"resident +{peak:.0f} MB", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=100_000_000)
    parser.add_argument("--B", type=int, default=64)
    parser.add_argument("--T", type=int, default=1024)
    parser.add_argument("--side", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    batches = 2 * args.tokens // (args.B * args.T)
    if args.side:
        return side(*args.side, args.B, args.T, batches)
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        for i in range(3):
            name = f"x_{'train' if i else 'val'}_{i:06d}.npy"
            size = args.tokens if i else 2000
            np.save(Path(folder) / name, rng.integers(0, 50257, size, dtype=np.uint16))
        for name in ("whole", "none", "windows"):
            subprocess.run([sys.executable, __file__, "--side", name, folder, f"--B={args.B}",
                            f"--T={args.T}", f"--tokens={args.tokens}"], check=True)


if __name__ == "__main__":
    main()
