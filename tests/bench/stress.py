"""
Kill runs with SIGKILL at random moments, resume them, and count what differs in the end.

    python tests/bench/stress.py                       # 20 kills over five kinds of run
    python tests/bench/stress.py --kills 6 --only eager,processes --seed 3

Each kind of run is made once without a disturbance; then the same command with --resume is killed
again and again at random moments (start-up, steps, evaluations, saves, teardown) until it has had
its share of kills, and goes on to its end. Every run crosses the end of an epoch several times.
With two processes, the victim is a random rank or torchrun itself.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]
from conftest import TINY, differing_lines, equal, weights, write_shards  # noqa: E402
from processes import Forks, assert_gone  # noqa: E402

FLAGS = [*TINY, "--total_batch_size=512", "--max_steps=40", "--val_tokens=4000", "--save_every=3",
         "--checkpoint_every=9"]
KINDS = {
    "eager": [],
    "bfloat16": ["--dtype=bfloat16", "--shuffle=windows"],
    "muon": ["--optimizer=muon", "--shuffle=windows"],
    "compile": ["--compile"],
    "processes": ["--shuffle=windows"],
}


def moment(text):
    """What a run was at, by the last line it had said."""
    last = text.strip().rsplit("\n", 1)[-1]
    for start, name in (("step", "steps"), ("saved", "after a save"), ("validation", "evaluation"),
                        ("done", "teardown"), ("try next", "teardown")):
        if last.startswith(start):
            return name
    return "start-up"


def start(forks, kind, flags, folder):
    if kind == "processes":
        return forks.torchrun(2, *flags, cwd=folder)
    return forks.start(*flags, cwd=folder)


def killed(forks, kind, flags, folder, seconds, rng):
    """One run with --resume, killed at a random moment: that moment, or None where it ended."""
    run = start(forks, kind, [*flags, "--log_dir=log", "--resume"], folder)
    end = time.monotonic() + rng.uniform(0, seconds)
    while time.monotonic() < end and run.poll() is None:
        time.sleep(0.001)
    if kind != "processes":
        if run.kill().end().status == -signal.SIGKILL:
            return moment(run.stdout)
        return run.good() and None
    if run.poll() is not None:
        return run.good() and None
    workers, said, begin = run.workers(), run.stdout, time.monotonic()
    victim = rng.choice([*workers, "torchrun"])
    os.kill(workers.get(victim, run.pid), signal.SIGKILL)
    run.end()
    assert_gone(run.out)
    return f"{moment(said)} of {victim}, all gone {time.monotonic() - begin:.1f} s later"


def whole(forks, kind, flags, folder, name):
    """One run to its end; its seconds."""
    begin = time.monotonic()
    start(forks, kind, [*flags, f"--log_dir={folder / name}"], folder).end().good()
    return time.monotonic() - begin


def compare(folder, total):
    """Count what differs between the run that was killed and the whole one."""
    lines = differing_lines(folder / "log", folder / "whole")
    a, b = weights(folder / "log"), weights(folder / "whole")
    tensors = sum(not equal(a["model"][k], b["model"][k]) for k in b["model"])
    tensors += not equal(a["optimizer"], b["optimizer"])
    total.update(runs=1, lines=lines, tensors=tensors)
    print(f"  a run's end: {lines} differing lines, {tensors} differing tensors", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--only", default=",".join(KINDS), help="kinds of run, by commas")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    args = parser.parse_args()
    kinds, rng = args.only.split(","), random.Random(args.seed)
    print(f"seed {args.seed}")
    total = Counter()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        forks = Forks(folder)
        data = write_shards(folder / "data", sizes=(1111, 777, 1500), val=4001)
        for i, kind in enumerate(kinds):
            flags, here = [*FLAGS, f"--data={data}", *KINDS[kind]], folder / kind
            here.mkdir()
            kills = args.kills // len(kinds) + (i < args.kills % len(kinds))
            seconds = whole(forks, kind, flags, here, "whole")
            if kind == "compile":  # now the compiler's cache is warm: only this time counts
                seconds = whole(forks, kind, flags, here, "warm")
            print(f"{kind}: {seconds:.1f} s undisturbed", flush=True)
            while kills:
                done = killed(forks, kind, flags, here, 0.8 * seconds, rng)
                if done:
                    kills, total["kills"] = kills - 1, total["kills"] + 1
                    print(f"  killed: {done}", flush=True)
                else:  # it has reached its end: once more from the beginning
                    compare(here, total)
                    shutil.rmtree(here / "log")
            whole(forks, kind, [*flags, "--resume"], here, "log")
            compare(here, total)
        forks.close()
    print(f"{total['runs']} runs, {total['kills']} kills, {total['lines']} differing lines, "
          f"{total['tensors']} differing tensors")
    return bool(total["lines"] or total["tensors"])


if __name__ == "__main__":
    sys.exit(main())
