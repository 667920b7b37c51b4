"""
Which of the later recipes help? A small model on a real text, equal tokens, one table.

    python tests/bench/recipes.py --text tinyshakespeare.txt [--steps 600] [--n_embd 256]

The text is read as bytes, so that the small model has no vocabulary of 50,000 to learn first. Each
run is train_gpt2.py's own command line. The
learning rate is 1e-3, not tuned; x2.5 with a shorter warm-up is source 004's change to its own.
"to baseline" is the share of the baseline's tokens after which a run's validation loss,
interpolated between evaluations, has come down to the baseline's last; times tokens per second
gives the time. The combination takes what helped by itself. The baseline and the best two are
repeated with other seeds. Small model, small text: it says nothing about 124M.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tokens import Tokenizer  # noqa: E402

LR = 1e-3
ROPE = ["--pos=rope"]
RECIPES = {
    "baseline": [],
    "lr x2.5": ["lr"],
    "windows": ["--shuffle=windows"],
    "rope": ROPE,
    "rmsnorm": ["--norm=rmsnorm"],
    "swiglu": ["--mlp=swiglu"],
    "muon": ["--optimizer=muon"],
}


def flags_of(recipe, args, seed):
    fast = "lr" in recipe
    warmup = args.steps // (60 if fast else 25)
    own = [f for f in recipe if f.startswith("--")]
    return [
        f"--data={args.shards}", "--preset=smoke", "--vocab_size=256",
        f"--n_layer={args.n_layer}", "--n_head=4", f"--n_embd={args.n_embd}",
        "--block_size=128", "--T=128", f"--B={args.B}",
        f"--total_batch_size={128 * args.B}", f"--max_steps={args.steps}",
        f"--warmup_steps={warmup}", f"--max_lr={LR * (2.5 if fast else 1)}", f"--seed={seed}",
        f"--eval_every={max(1, args.steps // 12)}", "--val_tokens=8192", "--num_samples=0",
        "--save_every=0", "--checkpoint_every=0", f"--device={args.device}", *own]  # fmt: skip


def write_shards(text, folder):
    """The text's bytes as one shard of train (nine tenths) and one of val."""
    ids = Tokenizer().encode(Path(text).read_text())
    folder.mkdir()
    cut = int(0.9 * len(ids))
    np.save(folder / "text_train_000001.npy", ids[:cut])
    np.save(folder / "text_val_000000.npy", ids[cut:])
    return folder


def run(recipe, args, seed, folder):
    """[(tokens, validation loss)] of a run, and its tokens per second."""
    command = [sys.executable, str(ROOT / "train_gpt2.py"), f"--log_dir={folder}",
               *flags_of(recipe, args, seed)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        sys.exit(result.stderr)
    lines = [x.split() for x in (Path(folder) / "log.txt").read_text().splitlines()]
    curve = [(int(s) * 128 * args.B, float(v)) for s, stream, v in lines if stream == "val"]
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
    parser.add_argument("--text", required=True)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--n_layer", type=int, default=4)
    parser.add_argument("--n_embd", type=int, default=256)
    parser.add_argument("--B", type=int, default=8)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    runs = {}
    with tempfile.TemporaryDirectory() as tmp:
        args.shards = write_shards(args.text, Path(tmp) / "shards")

        def add(name, recipe, seed=1337):
            curve, rate = run(recipe, args, seed, f"{tmp}/{len(runs)}_{seed}_{name.split()[0]}")
            runs.setdefault(name, []).append((curve, rate))
            print(f"{name:24} seed {seed}: val {curve[-1][1]:.4f}, {rate:.0f} tok/s", flush=True)

        for name, recipe in RECIPES.items():
            add(name, recipe)
        last = {n: r[0][0][-1][1] for n, r in runs.items()}
        helped = [n for n in RECIPES if last[n] < last["baseline"]]
        if len(helped) > 1:
            print("helped:", ", ".join(helped))
            RECIPES["all that helped"] = [f for n in helped for f in RECIPES[n]]
            add("all that helped", RECIPES["all that helped"])
        last = {n: r[0][0][-1][1] for n, r in runs.items()}
        best = sorted((n for n in last if n != "baseline"), key=last.get)[:2]
        for seed in range(1, args.seeds):
            for name in ("baseline", *best):
                add(name, RECIPES[name], seed)
    report(runs, args)


def report(runs, args):
    target = statistics.mean(curve[-1][1] for curve, _ in runs["baseline"])
    total, base_rate = runs["baseline"][0][0][-1][0], runs["baseline"][0][1]
    print(f"\n{args.n_layer} layers, {args.n_embd} wide, {total:,} tokens, "
          f"baseline's last validation loss {target:.4f}")
    titles = ("val loss", "spread", "to baseline", "speed", "time")
    print(f"{'recipe':36} " + " ".join(map("{:>{}}".format, titles, (9, 7, 11, 6, 6))))
    for name, results in runs.items():
        values = [curve[-1][1] for curve, _ in results]
        spread = f"{max(values) - min(values):.3f}" if len(values) > 1 else ""
        reached = [tokens_to(curve, target) for curve, _ in results]
        rate = statistics.median(r for _, r in results) / base_rate
        share = None if None in reached else statistics.mean(reached) / total
        columns = f"{share:11.2f} {rate:6.2f} {share / rate:6.2f}" if share else f"{'never':>11}"
        print(f"{name:36} {statistics.mean(values):9.4f} {spread:>7} {columns}")


if __name__ == "__main__":
    main()
