"""
Compare the trainer's step at 124M between two checkouts of this project.

    python tests/bench/step.py --against ../before                  # 15 minutes on 2 cores
    python tests/bench/step.py --against ../before --dtypes float32 --eager_only --rounds 3

For float32 and bfloat16, eager and compiled, both trainers run as processes and take turns: while
one of them trains, the other is stopped (SIGSTOP). The first step of a turn is discarded, because
the process was stopped in the middle of it. The order changes every round. Prints the median dt of
each side and the ratio of the medians. Linux and macOS. Flags after -- go to both trainers.
"""

import os
import signal
import statistics
import subprocess
import tempfile
from pathlib import Path

from runs import ROOT, STEP, command, make_parser, write_shards


class Side:
    """One checkout's trainer as a process that trains only during its turns."""

    def __init__(self, checkout, log_dir, flags):
        self.times = []
        self.process = subprocess.Popen(
            command([Path(checkout) / "train_gpt2.py"], *flags, f"--log_dir={log_dir}"),
            stdout=subprocess.PIPE, text=True, start_new_session=True,
            env=os.environ | dict(PYTHONUNBUFFERED="1"))
        for _ in range(3):  # compiles, and lets the allocator reach its final size
            self.read_step()
        os.killpg(self.process.pid, signal.SIGSTOP)

    def read_step(self):
        """dt of the next step in ms."""
        for line in self.process.stdout:
            if match := STEP.match(line):
                return float(match[2])
        raise SystemExit("a trainer ended early; its message is above")

    def turn(self):
        os.killpg(self.process.pid, signal.SIGCONT)
        self.read_step()
        self.times += [self.read_step() for _ in range(3)]
        os.killpg(self.process.pid, signal.SIGSTOP)

    def close(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def compare(args, flags, work_dir):
    """Print the median ms per step of both checkouts."""
    sides = []
    try:
        for i, checkout in enumerate((ROOT, args.against)):
            sides.append(Side(checkout, f"{work_dir}/log{i}", flags))
        for i in range(args.rounds):
            for side in sides if i % 2 == 0 else sides[::-1]:
                side.turn()
    finally:
        for side in sides:
            side.close()
    here, other = (statistics.median(side.times) for side in sides)
    print(f"{here:.1f} ms per step, {args.against} {other:.1f} ms, ratio {here / other:.3f}",
          flush=True)


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--against", required=True, help="path of the other checkout")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--eager_only", dest="modes", action="store_const", const=["--no-compile"],
                        default=["--no-compile", "--compile"], help="leave out --compile")
    parser.add_argument("--rounds", type=int, default=6, help="turns of three steps per side (6)")
    parser.add_argument("flags", nargs="*", help="flags of the trainers, after --")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work_dir:
        data = write_shards(Path(work_dir) / "data", 2_000_000)
        flags = ["--preset=gpt2", f"--data={data}", "--B=4", "--T=256", "--total_batch_size=1024",
                 "--val_tokens=0", "--hellaswag=0", "--num_samples=0", *args.flags]
        for dtype in args.dtypes:
            for mode in args.modes:
                print(f"{dtype} {mode.strip('-')}: ", end="", flush=True)
                compare(args, [*flags, f"--dtype={dtype}", mode], work_dir)


if __name__ == "__main__":
    main()
