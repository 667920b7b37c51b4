"""
Kill runs with SIGKILL at random moments, resume them, and count what differs in the end.

    python tests/bench/stress.py                       # 20 kills over five kinds of run
    python tests/bench/stress.py --kills 6 --only eager,processes --seed 3

Each kind of run is made once without a disturbance; then the same command with --resume is killed
at uniformly random moments of its life (start-up, steps, evaluations, saves, teardown) until it has
had its share of kills, and goes on to its end. Every run crosses the end of an epoch several times.
With two processes, the victim is a random rank or torchrun itself.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]
from conftest import TINY, write_shards  # noqa: E402
from test_resume import (  # noqa: E402
    Forks, Torchrun, differing_lines, equal, gone, weights, workers_of,
)

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


def one_process(forks, flags, folder, kills, seconds, rng):
    """Kill and resume; returns the moments of the kills."""
    moments = []
    while True:
        run = forks.start(*flags, "--log_dir=log", "--resume", cwd=folder)
        if len(moments) == kills:
            run.end(600).good()
            return moments
        time.sleep(rng.uniform(0, seconds))
        if run.kill().end().status == -signal.SIGKILL:
            moments.append(moment(run.stdout))
        elif run.status:
            sys.exit(run.stderr)


def two_processes(flags, folder, kills, seconds, rng):
    flags, moments = [*flags, f"--log_dir={folder / 'log'}", "--resume"], []
    while True:
        with Torchrun(*flags, cwd=folder) as job:
            if len(moments) < kills:
                time.sleep(rng.uniform(0, seconds))
                workers = [*workers_of(job.process.pid).values(), job.process.pid]
                if job.process.poll() is None:
                    os.kill(rng.choice(workers), signal.SIGKILL)
            start = time.monotonic()
            status = job.process.wait(600 if len(moments) == kills else 60)
            if not gone(str(folder / "log"), 60):
                sys.exit("a process was left behind for 60 s")
            if status == 0:
                return moments
            if len(moments) == kills:
                sys.exit(job.text)
            moments.append(f"{moment(job.text.split('W1')[0])}")
            print(f"  all gone {time.monotonic() - start:.1f} s after the kill")


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
            start = time.monotonic()
            if kind == "processes":
                with Torchrun(*flags, f"--log_dir={here / 'whole'}", cwd=here) as job:
                    assert job.process.wait(600) == 0, job.text
            else:
                forks.run(*flags, "--log_dir=whole", cwd=here).good()
                if kind == "compile":  # now the compiler's cache is warm: only this time counts
                    start = time.monotonic()
                    forks.run(*flags, "--log_dir=again", cwd=here).good()
                    total["lines"] += differing_lines(here / "again", here / "whole")
            seconds = time.monotonic() - start
            if kind == "processes":
                moments = two_processes(flags, here, kills, seconds, rng)
            else:
                moments = one_process(forks, flags, here, kills, seconds, rng)
            lines = differing_lines(here / "log", here / "whole")
            a, b = weights(here / "log"), weights(here / "whole")
            tensors = sum(not equal(a["model"][k], b["model"][k]) for k in b["model"])
            tensors += not equal(a["optimizer"], b["optimizer"])
            total.update(runs=1, kills=len(moments), lines=lines, tensors=tensors)
            print(f"{kind}: {len(moments)} kills ({', '.join(moments)}), run of {seconds:.1f} s, "
                  f"{lines} differing lines, {tensors} differing tensors", flush=True)
        forks.close()
    print(f"{total['runs']} runs, {total['kills']} kills, {total['lines']} differing lines, "
          f"{total['tensors']} differing tensors")
    return bool(total["lines"] or total["tensors"])


if __name__ == "__main__":
    sys.exit(main())
