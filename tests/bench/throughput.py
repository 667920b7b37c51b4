"""
The lecture's speed-ups one after another, and build-nanogpt's configuration against ours.

    python tests/bench/throughput.py                        # small model on a CPU, 3 minutes
    python tests/bench/throughput.py --n_layer 12 --B 4 --T 256 --only shipped,ours,compiled
    python tests/bench/throughput.py --device cuda          # 124M, B=16, T=1024

Each rung adds one change to the rung before. "shipped" is build-nanogpt as published (on a CPU
without fused AdamW); "ours" and "compiled" are train_gpt2.py with --no-compile and --compile. Each
rung is a process. On a CPU they step in turn, in an order that rotates every round; on a GPU they
run one after the other. Prints medians, the share of the rate of a large matmul measured in the
same rounds (6N + 12LCT FLOPs per token), peak memory, and the speed-up over the first rung and over
"shipped".
"""

import argparse
import contextlib
import ctypes
import resource
import statistics
import subprocess
import sys
import time

import torch
from runs import ROOT, make_parser
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(ROOT))

from train_gpt2 import GPT, GPTConfig  # noqa: E402

BASE = dict(bf16=False, compile=False, flash=False, vocab=50257, fused=False, keep_memory=False)
CHANGES = {"bf16": dict(bf16=True), "compile": dict(compile=True), "flash": dict(flash=True),
           "vocabulary padding": dict(vocab=50304), "fused AdamW": dict(fused=True)}


def make_rungs(on_cuda):
    """{name: settings}, in the order of the table."""
    rungs = {"float32": BASE}
    for name, change in CHANGES.items():
        rungs[name] = list(rungs.values())[-1] | change
    shipped = BASE | dict(bf16=True, flash=True, vocab=50304, fused=on_cuda)
    ours = shipped | dict(fused=True, keep_memory=True)
    return rungs | {"shipped": shipped, "ours": ours, "compiled": ours | dict(compile=True)}


class Rung:
    """A model and its optimizer; step() is one update from one micro-batch."""

    def __init__(self, settings, args):
        self.settings, self.args = settings, args
        torch.manual_seed(1337)
        self.model = GPT(GPTConfig(vocab_size=settings["vocab"], n_layer=args.n_layer,
                                   n_embd=args.n_embd, n_head=args.n_embd // 64)).to(args.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=6e-4, betas=(0.9, 0.95),
                                           weight_decay=0.1, fused=settings["fused"])
        self.net = torch.compile(self.model) if settings["compile"] else self.model
        tokens = torch.randint(0, 50257, (args.B, args.T + 1), device=args.device)
        self.x, self.y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step(self):
        autocast = self.settings["bf16"] and self.args.dtype == "bfloat16"
        math = contextlib.nullcontext() if self.settings["flash"] else sdpa_kernel(SDPBackend.MATH)
        with torch.autocast(self.args.device, torch.bfloat16, enabled=autocast), math:
            loss = self.net(self.x, self.y)[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        loss.item()


def timed(function, device):
    """Seconds of one call."""
    getattr(torch, device).synchronize()
    start = time.perf_counter()
    function()
    getattr(torch, device).synchronize()
    return time.perf_counter() - start


def serve(args):
    """In a rung's process: print peak memory in GB, then seconds of a step for each stdin line."""
    settings = make_rungs(args.device == "cuda")[args.rung]
    if settings["keep_memory"]:  # as train_gpt2.py does on a CPU
        with contextlib.suppress(AttributeError, OSError, TypeError):  # not glibc
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(-4, 0)  # M_MMAP_MAX
            mallopt(-1, -1)  # M_TRIM_THRESHOLD
    rung = Rung(settings, args)
    for _ in range(3):
        rung.step()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # on Linux in KiB
    print((torch.cuda.max_memory_allocated() if args.device == "cuda" else peak) / 1e9, flush=True)
    for _ in sys.stdin:
        print(timed(rung.step, args.device), flush=True)


class Child:
    """A rung in a process of its own."""

    def __init__(self, name, args):
        flags = [f"--{k}={v}" for k, v in vars(args).items() if k not in ("only", "rung", "rounds")]
        self.process = subprocess.Popen([sys.executable, __file__, "--rung", name, *flags],
                                        text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.times, peak = [], self.process.stdout.readline()
        if not peak:
            sys.exit(f"{name} failed; its message is above. Out of memory: use a smaller --B")
        self.peak = float(peak)

    def step(self):
        print("step", file=self.process.stdin, flush=True)
        self.times.append(float(self.process.stdout.readline()))


def report(children, matmul_rate, args):
    tokens, C, L = args.B * args.T, args.n_embd, args.n_layer
    flops = tokens * (6 * (12 * L * C * C + 50304 * C) + 12 * L * C * args.T)
    medians = {name: statistics.median(child.times) for name, child in children.items()}
    first, shipped = next(iter(medians.values())), medians.get("shipped", 0)
    print(f"{L} layers, {C} wide, B={args.B}, T={args.T}, {args.device}, torch "
          f"{torch.__version__}, large {args.dtype} matmul {matmul_rate / 1e12:.3f} TFLOP/s")
    print(f"{'rung':18} {'ms/step':>9} {'tok/s':>9} {'of matmul':>9} {'peak GB':>8} {'x first':>8} "
          f"{'x shipped':>9}")
    for name, s in medians.items():
        print(f"{name:18} {1e3 * s:9.1f} {tokens / s:9.0f} {flops / s / matmul_rate:9.1%} "
              f"{children[name].peak:8.2f} {first / s:8.2f} {shipped / s:9.2f}")


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"),
                        help="float32: no rung uses bfloat16")
    parser.add_argument("--n_embd", type=int, default=768)
    parser.add_argument("--only", default="", help="names of rungs, separated by commas")
    parser.add_argument("--rung", help=argparse.SUPPRESS)
    for flag, gpu, cpu in (("n_layer", 12, 2), ("B", 16, 2), ("T", 1024, 256), ("rounds", 20, 7)):
        parser.add_argument(f"--{flag}", type=int, help=f"default: {gpu} on a GPU, {cpu} on a CPU",
                            default=gpu if torch.cuda.is_available() else cpu)
    args = parser.parse_args()
    on_cuda = args.device == "cuda"
    if args.rung:
        return serve(args)
    names = args.only.split(",") if args.only else list(make_rungs(on_cuda))
    n, children, rates = 8192 if on_cuda else 2048, {}, []
    a = torch.randn(n, n, dtype=getattr(torch, args.dtype), device=args.device)
    for group in [[name] for name in names] if on_cuda else [names]:
        children |= {name: Child(name, args) for name in group}
        for i in range(args.rounds):
            rates.append(2 * n**3 / min(timed(lambda: a @ a, args.device) for _ in range(3)))
            for name in group[i % len(group):] + group[:i % len(group)]:
                children[name].step()
        for name in group:
            children[name].process.communicate()  # closes stdin, which ends the process
    report(children, statistics.median(rates), args)


if __name__ == "__main__":
    main()
