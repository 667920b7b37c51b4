"""
How long does a save hold up training? The longest step beside a save against the median step.

    python tests/bench/saving.py                                # 124M on a CPU, 2 minutes
    python tests/bench/saving.py --device cuda --B 64 --T 1024

Two runs of the trainer in this process: one whose saves are written before the next update, and one
whose saves are written beside the updates that follow. A "step" is all that passes from the
beginning of one update to that of the next.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train_gpt2  # noqa: E402
from plumbing import checkpoint  # noqa: E402

EVERY = 6  # steps between saves: the next one has to wait for none


def gaps(args, folder, waits):
    """Seconds from each update to the next, as (those with a save between, those without)."""
    began, saved, real_save = [], [], checkpoint.Saver.save
    real_update = train_gpt2.Trainer.update

    def update(trainer, lr):
        began.append(time.perf_counter())
        return real_update(trainer, lr)

    def save(saver, state, keep=False, must=False):
        saved.append(len(began))
        real_save(saver, state, keep, must or waits)

    train_gpt2.Trainer.update, checkpoint.Saver.save = update, save
    tokens_per_step = args.B * args.T
    try:
        train_gpt2.main([
            "--preset=gpt2", f"--data={folder}", f"--log_dir={folder}/log", f"--B={args.B}",
            f"--T={args.T}", f"--total_batch_size={tokens_per_step}", f"--device={args.device}",
            f"--max_steps={(args.saves + 1) * EVERY}", f"--save_every={EVERY}", "--val_tokens=0",
            f"--n_layer={args.n_layer}", "--num_samples=0", "--hellaswag=0", "--warmup_steps=1",
            "--checkpoint_every=0", "--dtype=" + args.dtype])  # fmt: skip
    except SystemExit as e:
        assert not e.code, e.code
    finally:
        train_gpt2.Trainer.update, checkpoint.Saver.save = real_update, real_save
    steps = dict(enumerate(np.diff(began), start=1))  # the first is behind update 1
    beside = {n + i for n in saved for i in range(EVERY)}  # a save may last for all of them
    return [steps[n] for n in steps if n in beside], [steps[n] for n in steps if 1 < n < EVERY]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--n_layer", type=int, default=12)
    parser.add_argument("--B", type=int, default=2)
    parser.add_argument("--T", type=int, default=256)
    parser.add_argument("--saves", type=int, default=3)
    args = parser.parse_args()
    rng, results = np.random.default_rng(0), {}
    with tempfile.TemporaryDirectory() as folder:
        for split in ("train", "val"):
            ids = rng.integers(0, 50257, 200_000).astype(np.uint16)
            np.save(f"{folder}/{split}_000000.npy", ids)
        for waits in (True, False):
            results[waits] = gaps(args, folder, waits)
    print()
    for waits, (beside, alone) in results.items():
        longest, median = max(beside), statistics.median(alone)
        extra = sum(beside) / args.saves - len(beside) / args.saves * median
        name = "training waits" if waits else "beside training"
        print(f"{name:16} longest step {longest:6.2f} s, median without a save {median:6.2f} s: "
              f"{longest / median:5.2f} times; a save costs {extra:5.2f} s in all")


if __name__ == "__main__":
    main()
