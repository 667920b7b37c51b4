"""
Which of the later recipes help? A small model on a real text, equal tokens, one table.

    python tests/bench/recipes.py --text tinyshakespeare.txt                # each recipe by itself
    python tests/bench/recipes.py --text tinyshakespeare.txt --only faithful,all,modern --seeds 3
    python tests/bench/recipes.py --text english.txt.gz --bpe --n_layer 6 --n_embd 384 \\
           --T 256 --steps 400 --B 16 --only faithful,all,modern --seeds 1

Without --bpe the text is read as bytes, so that the small model has no vocabulary of 50,000 to
learn first. Each run is the command line of train_gpt2.py, or of modern.py with its own rates. The
learning rate of the others is 1e-3, not tuned. "to faithful" is the share of the faithful run's
tokens after which a run's validation loss, interpolated between evaluations, has come down to the
faithful one's last; over the speed it gives the time. Small models, small texts: this says nothing
about 124M.
"""

import argparse
import gzip
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from plumbing.tokens import get_tokenizer  # noqa: E402

SINGLE = {
    "windows": ["--shuffle=windows"],
    "rope": ["--pos=rope"],
    "rmsnorm": ["--norm=rmsnorm"],
    "swiglu": ["--mlp=swiglu"],
    "muon": ["--optimizer=muon"],
}
# --shuffle is a matter of the data, so modern.py has it too.
RECIPES = {"faithful": [], **SINGLE, "all": [flag for flags in SINGLE.values() for flag in flags],
           "modern": ["--shuffle=windows"]}


def write_shards(args, folder):
    """The text's tokens as one shard of train (nine tenths) and one of val."""
    opened = gzip.open if args.text.endswith(".gz") else open
    with opened(args.text, "rt", encoding="utf-8") as f:
        ids = get_tokenizer("gpt2" if args.bpe else "bytes").encode(f.read())
    folder.mkdir()
    cut = int(0.9 * len(ids))
    np.save(folder / "text_train_000001.npy", ids[:cut])
    np.save(folder / "text_val_000000.npy", ids[cut:])
    return folder


def command_of(name, args, seed, folder):
    tokens_per_step = args.T * args.B
    own = [] if name == "modern" else ["--max_lr=1e-3", f"--warmup_steps={args.steps // 25}"]
    return [
        sys.executable, str(ROOT / ("modern.py" if name == "modern" else "train_gpt2.py")),
        f"--log_dir={folder}", f"--data={args.shards}", "--preset=smoke",
        f"--vocab_size={50304 if args.bpe else 256}", f"--n_layer={args.n_layer}",
        f"--n_head={max(1, args.n_embd // args.head)}", f"--n_embd={args.n_embd}",
        f"--block_size={args.T}", f"--T={args.T}", f"--B={min(args.B, 8)}",
        f"--total_batch_size={tokens_per_step}", f"--max_steps={args.steps}", f"--seed={seed}",
        f"--eval_every={max(1, args.steps // 12)}", "--val_tokens=16384", "--num_samples=0",
        "--save_every=0", "--checkpoint_every=0", f"--device={args.device}",
        f"--dtype={args.dtype}", *own, *RECIPES[name]]  # fmt: skip


def run(name, args, seed, folder):
    """[(tokens, validation loss)] of a run, and its tokens per second."""
    result = subprocess.run(command_of(name, args, seed, folder), capture_output=True, text=True)
    if result.returncode:
        sys.exit(result.stderr)
    lines = [x.split() for x in (Path(folder) / "log.txt").read_text().splitlines()]
    curve = [(int(s) * args.T * args.B, float(v)) for s, stream, v in lines if stream == "val"]
    rates = [float(x.split("tok/sec: ")[1].split()[0]) for x in result.stdout.splitlines()
             if "tok/sec" in x]
    return curve, statistics.median(rates)


def tokens_to(curve, target):
    """Tokens at which the curve first reaches `target`, interpolated; None where it never does."""
    for (t0, v0), (t1, v1) in zip(curve, curve[1:], strict=False):
        if v1 <= target:
            return t0 + (t1 - t0) * (v0 - target) / (v0 - v1) if v0 > v1 else t1
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, help="a text file, or one in .gz")
    parser.add_argument("--bpe", action="store_true", help="GPT-2's tokens in place of bytes")
    parser.add_argument("--only", default=",".join(RECIPES), help="recipes, separated by commas")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--n_layer", type=int, default=4)
    parser.add_argument("--n_embd", type=int, default=128)
    parser.add_argument("--head", type=int, default=32, help="width of a head")
    parser.add_argument("--T", type=int, default=128)
    parser.add_argument("--B", type=int, default=8, help="rows per step")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args()
    runs = {}
    with tempfile.TemporaryDirectory() as tmp:
        args.shards = write_shards(args, Path(tmp) / "shards")
        for seed in range(args.seeds):  # seed by seed: the machine's speed drifts for all alike
            for name in args.only.split(","):
                curve, rate = run(name, args, 1337 + seed, f"{tmp}/{name}_{seed}")
                runs.setdefault(name, []).append((curve, rate))
                print(f"{name:10} seed {1337 + seed}: val {curve[-1][1]:.4f}, {rate:.0f} tok/s",
                      flush=True)
    report(runs, args)


def report(runs, args):
    target = statistics.mean(curve[-1][1] for curve, _ in runs["faithful"])
    total = runs["faithful"][0][0][-1][0]
    base_rate = statistics.median(rate for _, rate in runs["faithful"])
    kind = "tokens" if args.bpe else "bytes"
    print(f"\n{args.n_layer} layers, {args.n_embd} wide, {total:,} {kind}"
          f", {args.seeds} seeds, the faithful run's last validation loss {target:.4f}")
    titles = ("val loss", "spread", "to faithful", "tok/s", "speed", "time")
    print(f"{'recipe':10} " + " ".join(map("{:>{}}".format, titles, (9, 7, 11, 7, 6, 6))))
    for name, results in runs.items():
        values = [curve[-1][1] for curve, _ in results]
        spread = f"{max(values) - min(values):.3f}" if len(values) > 1 else ""
        reached = [tokens_to(curve, target) for curve, _ in results]
        rate = statistics.median(r for _, r in results)
        share = None if None in reached else statistics.mean(reached) / total
        speed = rate / base_rate
        time = f"{share / speed:6.2f}" if share else ""
        print(f"{name:10} {statistics.mean(values):9.4f} {spread:>7} "
              f"{f'{share:.2f}' if share else 'never':>11} {rate:7.0f} {speed:6.2f} {time:>6}")


if __name__ == "__main__":
    main()
