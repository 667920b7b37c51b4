"""
Does a resume need more memory than a fresh start? Peak resident memory of both, 124M on a CPU:

    python tests/bench/memory.py                          # a minute or two
    python tests/bench/memory.py --optimizer muon         # flags go to train_gpt2.py

Three steps undisturbed, then the same run told to stop (SIGTERM) at its first step, and gone on
with to the same end. Each run saves. Needs Linux or macOS, 3 GB of memory and of disk.
"""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def peak(*flags, stop=False):
    """Peak memory in MB of a run; with `stop` it is signalled at its first step."""
    process = subprocess.Popen([sys.executable, str(ROOT / "train_gpt2.py"), *flags],
                               stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if stop and line.startswith("validation loss"):
            process.send_signal(signal.SIGTERM)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == (128 + signal.SIGTERM if stop else 0), process.returncode
    return usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def main():
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--preset=gpt2", f"--data={ROOT / 'input.txt'}", "--B=1", "--T=256",
                 "--total_batch_size=256", "--val_tokens=256", "--num_samples=0",
                 "--hellaswag=0", "--max_steps=3", "--warmup_steps=0", "--device=cpu",
                 *sys.argv[1:]]
        fresh = peak(*flags, f"--log_dir={folder}/a")
        peak(*flags, f"--log_dir={folder}/b", stop=True)
        resumed = peak(*flags, f"--log_dir={folder}/b", "--resume")
    print(f"peak memory: fresh {fresh:,.0f} MB, resumed {resumed:,.0f} MB, "
          f"ratio {resumed / fresh:.2f}")


if __name__ == "__main__":
    main()
