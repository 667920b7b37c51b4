"""
How does training scale over processes, and what does --zero save? Run by hand on an idle machine:

    python tests/bench/scaling.py                        # 1, 2 processes; on GPUs 1, 2, 4, ... all
    python tests/bench/scaling.py --processes 1 8 --B 64 --T 1024 --micro_steps 8 --compile
    python tests/bench/scaling.py --n_layer 2 --n_embd 64 --n_head 2 --vocab_size 512 --T 32

The work of a process is fixed: micro_steps x B x T tokens a step, on random shards. Every number
of processes is a run of its own under torchrun, of the trainer's own step on a model of its own
making. Printed for each: tokens/s, and against one process; the share of a step spent on
communication, which is what a step costs more than the same step without its all-reduce (the two
taken in turn, medians); the bytes that one all-reduce moves; and the bytes of optimizer state per
process without and with --zero, counted after a step. At the end the same for 8 processes, worked
out from the split by whole tensors, largest first, each to the process that has least. --modern
takes modern.py's model, and prints the share of a step that Muon takes without and with --zero.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import modern  # noqa: E402
import train_gpt2  # noqa: E402
from plumbing.errors import leave  # noqa: E402
from plumbing.hardware import synchronize  # noqa: E402

MODEL = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("--processes", type=int, nargs="+")
    parser.add_argument("--B", type=int, help="default: 16 on GPUs, 1 on a CPU")
    parser.add_argument("--micro_steps", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12, help="of each kind; the first 3 are lost")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--modern", action="store_true", help="modern.py's model and optimizers")
    parser.add_argument("--no-zero", action="store_true", help="leave out the runs with --zero")
    parser.add_argument("--T", type=int, help="default: 1024 on GPUs, 128 on a CPU")
    for name, default in zip(MODEL, (12, 12, 768, 1024, 50304), strict=True):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.cuda = torch.cuda.is_available()
    count = torch.cuda.device_count() if args.cuda else 2
    args.processes = args.processes or [n for n in (1, 2, 4, 8, 16) if n <= count]
    args.B = args.B or (16 if args.cuda else 1)
    args.T = args.T or (1024 if args.cuda else 128)
    return args


def state_bytes(optimizers):
    """Bytes of the optimizer state that this process holds."""
    owners = [getattr(o, "optim", o) for o in optimizers.values()]
    return sum(v.numel() * v.element_size()
               for o in owners for state in o.state.values() for v in state.values())


def measure(dist, trainer):
    """Steps of the trainer on one process -> the figures of this number of processes."""
    seconds, muon = {"with": [], "without": []}, []
    if "muon" in trainer.optimizers:
        time_steps(trainer.optimizers["muon"], muon, dist.device)

    def step(kind):
        alone = dist.world_size > 1 and kind == "without"
        dist.barrier()  # all begin together
        start = time.perf_counter()
        with trainer.model.no_sync() if alone else contextlib.nullcontext():
            trainer.update(1e-9)  # ends with a wait for the device
        synchronize(dist.device)
        seconds[kind].append(time.perf_counter() - start)

    for _ in range(ARGS.steps):
        step("with")
        if dist.world_size > 1:
            step("without")  # the ranks drift apart from here on: the time is all that counts
    everybody = dist.gather(state_bytes(trainer.optimizers))
    medians = {k: statistics.median(v[3:]) for k, v in seconds.items() if v}
    shares = dist.gather(statistics.median(muon[3:]) if muon else 0.0)
    return dict(seconds=max(dist.gather(medians["with"])), state=everybody, muon=max(shares),
                alone=max(dist.gather(medians.get("without", medians["with"]))),
                gradient=4 * sum(p.numel() for p in trainer.raw_model.parameters()))


def time_steps(optimizer, seconds, device):
    """Note how long each step of an optimizer takes."""
    step = optimizer.step

    def timed(*args, **kwargs):
        synchronize(device)
        start = time.perf_counter()
        step(*args, **kwargs)
        synchronize(device)
        seconds.append(time.perf_counter() - start)

    optimizer.step = timed


def worker(path):
    """One process of a run: the trainer as far as its loop, which is replaced by measure()."""

    def loop(cfg, dist, trainer, *_):
        found = measure(dist, trainer)
        if dist.master_process:
            Path(path).with_suffix(".out").write_text(json.dumps(found))
        dist.barrier()
        leave(0)  # no closing line about a run that never was

    train_gpt2.train = loop
    model_class = modern.ModernGPT if ARGS.modern else train_gpt2.GPT
    train_gpt2.main(json.loads(Path(path).read_text()), model_class)


def launch(args, folder, world_size, zero):
    tokens = world_size * args.B * args.T * args.micro_steps
    flags = ["--preset=gpt2", f"--data={folder}/shards", f"--log_dir={folder}/log", f"--B={args.B}",
             f"--T={args.T}", f"--total_batch_size={tokens}", "--max_steps=1000000",
             "--device=" + ("cuda" if args.cuda else "cpu"), "--num_samples=0", "--hellaswag=0",
             "--compile" if args.compile else "--no-compile", *["--zero"] * zero,
             *(f"--{name}={getattr(args, name)}" for name in MODEL)]  # fmt: skip
    path = Path(folder) / f"run_{world_size}_{zero}.json"
    path.write_text(json.dumps(flags))
    again = [a for a in sys.argv[1:] if a != "--worker"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone",
         f"--nproc_per_node={world_size}", __file__, *again, "--worker", str(path)],
        env=os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
        capture_output=True, text=True)  # fmt: skip
    out = path.with_suffix(".out")
    if not out.exists():
        sys.exit(f"{world_size} processes failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(out.read_text())


def split(sizes, world_size):
    """Elements per process where tensors go whole, largest first, to the one that has least."""
    load = [0] * world_size
    for n in sorted(sizes, reverse=True):
        load[load.index(min(load))] += n
    return load


def main(args):
    with tempfile.TemporaryDirectory() as folder:
        shards = Path(folder) / "shards"
        shards.mkdir()
        ids = np.random.default_rng(0).integers(0, min(args.vocab_size, 50257), 2**20)
        for name in ("train_000001", "val_000000"):
            np.save(shards / f"random_{name}.npy", ids.astype(np.uint16))
        print("processes   tok/s   of linear   ms/step   communication   all-reduce   "
              "optimizer MB per process: plain, --zero")
        single = None
        for n in args.processes:
            found = launch(args, folder, n, zero=False)
            tokens = n * args.B * args.T * args.micro_steps
            rate = tokens / found["seconds"]
            single = single or rate / n
            share = 1 - found["alone"] / found["seconds"]
            states = f"{max(found['state']) / 1e6:.1f}"
            if n > 1 and not args.no_zero:
                zero = launch(args, folder, n, zero=True)
                states += ", " + " ".join(f"{x / 1e6:.1f}" for x in zero["state"])
                if args.modern:
                    shares = (f["muon"] / f["seconds"] for f in (found, zero))
                    states += "   Muon {:.0%}, {:.0%} of a step".format(*shares)
            print(f"{n:9} {rate:7,.0f} {rate / n / single:11.0%} {1000 * found['seconds']:9.1f} "
                  f"{share:15.1%} {found['gradient'] / 1e6:9.1f} MB   {states}", flush=True)
    with torch.device("meta"):
        model = train_gpt2.GPT(train_gpt2.GPTConfig(**{k: getattr(args, k) for k in MODEL}))
    sizes = [p.numel() for p in model.parameters()]
    print(f"worked out for {sum(sizes):,} parameters in {len(sizes)} tensors, AdamW:")
    for n in (2, 8):
        load = [8 * x / 1e6 for x in split(sizes, n)]
        print(f"{n} processes: {8 * sum(sizes) / 1e6:.1f} MB plain; with --zero "
              f"{', '.join(f'{x:.1f}' for x in load)} MB, at most {max(load) / sum(load):.1%}")


if __name__ == "__main__":
    ARGS = parse_args()
    worker(ARGS.worker) if ARGS.worker else main(ARGS)
