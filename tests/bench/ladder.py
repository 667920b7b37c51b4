"""
The lecture's ladder of speed-ups as one command: each rung adds one to the rung before.

    python tests/bench/ladder.py                                # small model on a CPU, 3 minutes
    python tests/bench/ladder.py --n_layer 12 --B 4 --T 256 --only shipped,ours,compiled
    python tests/bench/ladder.py --device cuda                  # 124M, B=16, T=1024
    python tests/bench/ladder.py --memory --n_layer 12 --B 4    # peak memory, a process a rung

Each rung is a process of its own. On a CPU all of them are timed in turn, round after round, so
that a machine whose speed drifts slows them alike; on a GPU, which is steady and has less memory,
one after the other. What does not fit says so. Printed: median ms per step, tokens/s, mfu
(train_gpt2.py's definition: model FLOPs over the rate of a large matrix product in --dtype on this
device), and the ratio to the first rung and to "shipped": build-nanogpt's own configuration.
--dtype float32 leaves autocast out of every rung, for a CPU whose bfloat16 is emulated.
"""

import argparse
import contextlib
import math
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train_gpt2  # noqa: E402
from plumbing.errors import is_out_of_memory  # noqa: E402
from plumbing.hardware import keep_freed_memory, measure_matmul, synchronize  # noqa: E402
from train_gpt2 import GPT, GPTConfig  # noqa: E402

LEAN = dict(train_gpt2.CHUNK_ROWS)
PLAIN = dict(tf32=False, bf16=False, compile=False, flash=False, vocab=50257, fused=False,
             lean=False, prefetch=False, kept=False)
STEPS = [("tf32", dict(tf32=True)), ("bf16", dict(bf16=True)), ("compile", dict(compile=True)),
         ("flash", dict(flash=True)), ("vocab 50304", dict(vocab=50304)),
         ("fused AdamW", dict(fused=True)), ("prefetch", dict(prefetch=True))]


def rungs(device_type):
    """{name: settings}: the ladder, build-nanogpt as it ships, and what train_gpt2.py runs."""
    found, settings = {"float32": PLAIN}, PLAIN
    for name, change in STEPS:
        if device_type == "cuda" or name not in ("tf32", "prefetch"):
            settings = settings | change
            found[name] = settings
    full = PLAIN | dict(tf32=True, bf16=True, flash=True, vocab=50304, fused=True, prefetch=True)
    found["shipped"] = full | dict(fused=device_type == "cuda", prefetch=False)
    found["ours"] = full | dict(lean=True, kept=True)  # --no-compile
    found["compiled"] = found["ours"] | dict(compile=True)  # --compile; the compiler fuses
    return found


class Rung:
    """A model with its optimizer; step() is one update from one micro-batch."""

    def __init__(self, settings, args):
        self.s, self.args = settings, args
        torch.manual_seed(1337)
        config = GPTConfig(vocab_size=settings["vocab"], **width(args))
        self.model = GPT(config).to(args.device)
        decay = [p for p in self.model.parameters() if p.dim() >= 2]
        rest = [p for p in self.model.parameters() if p.dim() < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
            lr=6e-4, betas=(0.9, 0.95), fused=settings["fused"])
        self.net = torch.compile(self.model) if settings["compile"] else self.model
        self.cpu_batch = torch.randint(0, 50257, (args.B, args.T + 1))
        self.batch = self.fetch()

    def fetch(self):
        ids = self.cpu_batch
        if self.s["prefetch"] and self.args.device == "cuda":
            ids = ids.pin_memory()
        ids = ids.to(self.args.device, non_blocking=self.s["prefetch"])
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def step(self):
        s, kind = self.s, torch.device(self.args.device).type
        torch.set_float32_matmul_precision("high" if s["tf32"] and kind == "cuda" else "highest")
        train_gpt2.CHUNK_ROWS = LEAN if s["lean"] else dict.fromkeys(LEAN, 2**40)
        sdpa = contextlib.nullcontext() if s["flash"] else sdpa_kernel(SDPBackend.MATH)
        x, y = self.batch if s["prefetch"] else self.fetch()
        low = s["bf16"] and self.args.dtype == "bfloat16"
        with torch.autocast(kind, torch.bfloat16, enabled=low), sdpa:
            _, value = self.net(x, y)
        value.backward()
        if s["prefetch"]:
            self.batch = self.fetch()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        value.item()

    def timed_step(self):
        synchronize(torch.device(self.args.device))
        start = time.perf_counter()
        self.step()
        synchronize(torch.device(self.args.device))
        return time.perf_counter() - start


def serve(args):
    """In a process of its own: a rung's peak memory in GB, then for each line read the seconds of a
    step; "none" where it does not fit."""
    device = torch.device(args.device)
    settings = rungs(device.type)[args.child]
    if settings["kept"] and device.type == "cpu":
        keep_freed_memory()
    try:
        rung = Rung(settings, args)
        for _ in range(3):
            rung.step()
    except RuntimeError as e:
        if not is_out_of_memory(e):
            raise
        return print("none", flush=True)
    if device.type == "cuda":
        print(torch.cuda.max_memory_allocated() / 1e9, flush=True)
    else:
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, flush=True)
    for _ in sys.stdin:
        print(rung.timed_step(), flush=True)


class Child:
    """A rung in a process of its own; peak in GB, None where it does not fit."""

    def __init__(self, name, args):
        command = [sys.executable, __file__, "--child", name, "--device", args.device]
        command += [f"--{k}={getattr(args, k)}" for k in ("dtype", "n_layer", "n_embd", "B", "T")]
        self.process = subprocess.Popen(command, text=True, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE)
        peak = self.process.stdout.readline().strip()
        if not peak:
            sys.exit(f"{name} has failed")  # and said why
        self.peak, self.times = None if peak == "none" else float(peak), []

    def step(self):
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        self.times.append(float(self.process.stdout.readline()))

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def peak_memory(args, names):
    """Peak memory of three steps, a rung at a time."""
    shipped = None
    for name in sorted(names, key=lambda n: n != "shipped"):
        child = Child(name, args)
        child.close()
        shipped = shipped or child.peak
        ratio = child.peak and f"peak {child.peak:6.2f} GB   {child.peak / shipped:.2f} of shipped"
        print(f"{name:12} {ratio or 'out of memory'}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--n_layer", type=int)
    parser.add_argument("--n_embd", type=int, default=768)
    parser.add_argument("--B", type=int)
    parser.add_argument("--T", type=int)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--only", default="", help="names of rungs, with commas")
    parser.add_argument("--memory", action="store_true", help="peak memory instead of time")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    big = args.device.startswith("cuda")
    for name, value in dict(n_layer=12 if big else 2, B=16 if big else 2, T=1024 if big else 256,
                            rounds=20 if big else 5).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.child:
        return serve(args)
    names = rungs(torch.device(args.device).type)
    if args.only:
        names = {n: names[n] for n in args.only.split(",")}
    elif args.memory:
        names = {n: names[n] for n in ("shipped", "ours", "compiled")}
    if args.memory:
        return peak_memory(args, names)
    rates, times = [], {}
    groups = [[n] for n in names] if big else [list(names)]  # of rungs that are there together
    for group in groups:
        times |= time_together(group, args, rates)
    report(times, statistics.median(rates or [math.nan]), args)


def time_together(names, args, rates):
    """{rung: seconds of each step}, timed in turn; none for a rung that does not fit."""
    children = {n: Child(n, args) for n in names}
    for _ in range(args.rounds):
        rates.append(measure_matmul(torch.device(args.device), getattr(torch, args.dtype)))
        for child in children.values():
            if child.peak:
                child.step()
    for child in children.values():
        child.close()
    return {n: child.times for n, child in children.items()}


def report(times, rate, args):
    tokens = args.B * args.T
    medians = {n: t and statistics.median(t) for n, t in times.items()}
    first, shipped = next(filter(None, medians.values()), None), medians.get("shipped")
    print(f"{args.n_layer} layers, {args.n_embd} wide, B={args.B}, T={args.T}, {args.device}, "
          f"torch {torch.__version__}; large {args.dtype} product {rate / 1e12:.3f} TFLOP/s")
    print(f"{'rung':12} {'ms/step':>9} {'tok/s':>9} {'mfu':>6} {'x first':>8} {'x shipped':>9}")
    for name, seconds in medians.items():
        if not seconds:
            print(f"{name:12} out of memory at B={args.B}")
            continue
        mfu = flops_per_token(args) * tokens / seconds / rate
        ratio = f"{shipped / seconds:9.2f}" if shipped else " " * 9
        print(f"{name:12} {1000 * seconds:9.1f} {tokens / seconds:9.0f} {100 * mfu:5.1f}% "
              f"{first / seconds:8.2f} {ratio}")


def flops_per_token(args):
    """Of the model of the last rungs, whose vocabulary is padded."""
    with torch.device("meta"):
        return GPT(GPTConfig(vocab_size=50304, **width(args))).flops_per_token(args.T)


def width(args):
    return dict(n_head=args.n_embd // 64, n_embd=args.n_embd, n_layer=args.n_layer)


if __name__ == "__main__":
    main()
