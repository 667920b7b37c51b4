"""What gpu_check.py measures inside a process: each function is a command of its own."""

import builtins
import importlib
import json
import math
import os
import platform
import re
import shutil
import sys
import time
from pathlib import Path

import torch
from runs import ROOT, run_process

sys.path.insert(0, str(ROOT))


def train(script, report, *flags):
    """Call a script's main() in this process. On rank 0 append to `report`, after each step and
    validation: compiled graphs, peak CUDA memory since the last entry, seconds in next_batch()."""
    import train_gpt2

    loader, entries, loading, real_print = train_gpt2.DataLoaderLite, [], [0.0], print
    model_class = getattr(importlib.import_module(script), "ModernGPT", train_gpt2.GPT)
    next_batch = loader.next_batch

    def timed_next_batch(self):
        start = time.perf_counter()
        batch = next_batch(self)
        loading[0] += time.perf_counter() - start
        return batch

    def watched_print(*args, **kwargs):
        real_print(*args, **kwargs)
        kind = re.match("step |validation loss", str(args[0]) if args else "")
        if kind and os.environ.get("RANK", "0") == "0":
            dynamo = sys.modules.get("torch._dynamo.utils")
            entries.append(dict(
                kind=kind[0].strip(), loading=loading[0], peak=torch.cuda.max_memory_allocated(),
                graphs=dynamo.counters["stats"]["unique_graphs"] if dynamo else 0))
            if torch.cuda.is_initialized():
                torch.cuda.reset_peak_memory_stats()
            Path(report).write_text(json.dumps(entries))

    loader.next_batch, builtins.print = timed_next_batch, watched_print
    status = train_gpt2.main(list(flags), model_class)
    sys.stdout.flush()
    if "RANK" in os.environ:
        os._exit(status or 0)  # like the scripts: backend threads can abort a finished process
    return status


def card(device):
    """Print, as JSON, the device, its peak and its rate in a large matmul."""
    from train_gpt2 import Dist, peak_flops

    peak = peak_flops(Dist(0, 0, 1, torch.device(device)), "bfloat16")
    figures = {"torch": torch.__version__, "device": platform.machine(), "cores": os.cpu_count(),
               "data-sheet peak TFLOP/s": peak / 1e12 if peak else "unknown"}
    if device == "cpu":
        return print(json.dumps(figures))
    properties = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = run_process(query).lines[0][1] if shutil.which(query[0]) else "unknown"
    a, best = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16), math.inf
    for _ in range(30):
        torch.cuda.synchronize()
        start = time.perf_counter()
        a @ a
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    print(json.dumps(figures | {
        "device": properties.name, "memory GB": properties.total_memory / 1e9,
        "CUDA": torch.version.cuda, "driver": driver,
        "measured bfloat16 matmul TFLOP/s": 2 * 8192**3 / best / 1e12}))


def sampling(device):
    """Print, as JSON, how many greedy tokens agree and how long both ways take."""
    from train_gpt2 import GPT, GPTConfig

    torch.manual_seed(1337)
    size = {} if device == "cuda" else dict(n_layer=2, n_head=2, n_embd=64)
    model, n_new = GPT(GPTConfig(**size)).to(device), 200 if device == "cuda" else 24
    prompt = torch.arange(100, 108, device=device).repeat(4, 1)

    def sample(use_cache, n_new):
        start = time.perf_counter()
        tokens = list(model.generate(prompt, n_new, temperature=0, use_cache=use_cache))
        return torch.cat(tokens, dim=-1).cpu(), time.perf_counter() - start

    sample(True, 2), sample(False, 2)
    (a, cached), (b, recomputed) = sample(True, n_new), sample(False, n_new)
    print(json.dumps({"tokens": a.numel(), "equal": int((a == b).sum()), "with cache s": cached,
                      "without s": recomputed}))


if __name__ == "__main__":
    function, *arguments = sys.argv[1:]
    sys.exit(dict(train=train, card=card, sampling=sampling)[function](*arguments))
