"""
Memory of each rank during a resume against a fresh start: 124M, two ranks on a CPU. Linux only.

    python tests/bench/memory.py                    # 3 minutes, 8 GB of memory, 3 GB of disk
    python tests/bench/memory.py --n_layer=2        # flags go to train_gpt2.py

Three steps from a fresh start, then steps 2 and 3 again from the checkpoint of the first. Prints
the peaks of RssAnon (private memory) and Pss (which also counts this rank's share of the pages of a
mapped checkpoint) per rank.
"""

import os
import re
import sys
import tempfile
import threading
from pathlib import Path

from runs import ROOT, last_line, run_script, write_shards


def read_memory(log_dir):
    """Yield (rank, {kind: MB}) of each trainer process with this --log_dir."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            cmdline = (process / "cmdline").read_bytes().split(b"\0")
            if f"--log_dir={log_dir}".encode() not in cmdline:
                continue
            env, status, rollup = ((process / name).read_text(errors="replace")
                                   for name in ("environ", "status", "smaps_rollup"))
        except OSError:  # it ended, or belongs to another user
            continue
        if rank := re.search(r"\0LOCAL_RANK=(\d+)", env):
            found = re.findall(r"^(RssAnon|Pss):\s+(\d+)", status + rollup, re.M)
            yield rank[1], {kind: int(kb) / 1024 for kind, kb in found}


def measure(log_dir, *flags):
    """{(rank, kind): peak MB} of a run."""
    peaks, ended = {}, threading.Event()

    def watch():
        while not ended.wait(0.05):
            for rank, memory in read_memory(log_dir):
                for kind, mb in memory.items():
                    peaks[rank, kind] = max(mb, peaks.get((rank, kind), 0))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run = run_script([ROOT / "train_gpt2.py"], *flags, log_dir=log_dir, ranks=2)
    finally:
        ended.set()
        watcher.join()
    if run.status:
        sys.exit(f"a run failed: {last_line(run.stderr)}\n{run.stderr[-2000:]}")
    return peaks


def main():
    with tempfile.TemporaryDirectory() as work_dir:
        work_dir = Path(work_dir)
        data = write_shards(work_dir / "data", 100_000)
        flags = ["--preset=gpt2", f"--data={data}", "--B=1", "--T=256",
                 "--total_batch_size=512", "--max_steps=3", "--val_tokens=0",
                 "--hellaswag=0", "--num_samples=0", "--warmup_steps=0", "--checkpoint_every=1",
                 "--device=cpu", "--dtype=float32", *sys.argv[1:]]
        fresh = measure(work_dir / "fresh", *flags)
        (work_dir / "resumed").mkdir()
        os.link(work_dir / "fresh" / "model_00001.pt", work_dir / "resumed" / "model_00001.pt")
        resumed = measure(work_dir / "resumed", *flags, "--resume")
    for (rank, kind), mb in sorted(fresh.items()):
        print(f"rank {rank}, peak {kind}: fresh {mb:,.0f} MB, "
              f"resumed {resumed[rank, kind]:,.0f} MB, ratio {resumed[rank, kind] / mb:.2f}")


if __name__ == "__main__":
    main()
