"""
Sampling with the KV cache against recomputing every prefix, in one process, in turn.

    python tests/bench/sample.py [--device cuda] [--rows 4] [--tokens 200] [--n_layer 12]
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from plumbing.hardware import synchronize  # noqa: E402
from train_gpt2 import GPT, GPTConfig  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--n_layer", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.manual_seed(1337)
    model = GPT(GPTConfig(n_layer=args.n_layer)).to(device)
    prompt = torch.tensor([[15496, 11, 314, 1101, 257, 3303, 2746, 11]], device=device)
    prompt = prompt.repeat(args.rows, 1)

    def seconds(n, use_cache):
        synchronize(device)
        start = time.perf_counter()
        out = torch.cat(list(model.generate(prompt, n, temperature=0, use_cache=use_cache)), dim=1)
        synchronize(device)
        return time.perf_counter() - start, out

    seconds(3, True), seconds(3, False)
    runs = [(seconds(args.tokens, True), seconds(args.tokens, False)) for _ in range(args.rounds)]
    cached, plain = (statistics.median(r[i][0] for r in runs) for i in (0, 1))
    same = torch.equal(runs[0][0][1], runs[0][1][1])
    print(f"{args.rows} rows, {args.tokens} new tokens, {args.n_layer} layers, {device}: cache "
          f"{cached:.2f} s, recomputed {plain:.2f} s, ratio {plain / cached:.1f}, "
          f"greedy output {'equal' if same else 'DIFFERENT'}")


if __name__ == "__main__":
    main()
