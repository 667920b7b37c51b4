"""
Making shards: build-nanogpt's way against fineweb.py's, on the same documents.

    python tests/bench/prep.py [--megabytes 300] [--rounds 3] [--files] [--other FOLDER]

The old way: half the cores, each document pickled to a worker as a row of the data set, its tokens
pickled back, a shard saved when its array is full. Ours is the whole command, from its start to its
end, with imports, hashes, fsyncs and the manifest; "without start" leaves out what the same command
takes for a single token. --other names another copy of the project, whose fineweb.py takes its turn
too. "tiktoken alone" is encode_ordinary on a part of the documents in one
process. Needs GPT-2's vocabulary, and a machine that does nothing else.
"""

import argparse
import contextlib
import multiprocessing
import os
import pathlib
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import fineweb  # noqa: E402
from plumbing.tokens import get_tokenizer  # noqa: E402


def write_documents(path, megabytes):
    """A parquet file of documents of about 4,800 characters, cut from the smoke run's text."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    words = (ROOT / "input.txt").read_text(encoding="utf-8").split(" ")
    rng, schema = random.Random(0), pa.schema([("id", pa.int64()), ("text", pa.string())])
    documents = megabytes * 1_000_000 // 4800
    with pq.ParquetWriter(path, schema) as writer:
        for first in range(0, documents, 1000):
            texts = [some_text(words, rng) for _ in range(min(1000, documents - first))]
            ids = list(range(first, first + len(texts)))
            writer.write_table(pa.table({"id": ids, "text": texts}, schema), row_group_size=1000)


def some_text(words, rng):
    size = min(int(rng.expovariate(1 / 900)) + 20, len(words) // 2)
    first = rng.randrange(len(words) - size)
    return " ".join(words[first : first + size])


def old_start():
    global encoding  # one per process, as the old script has it
    import tiktoken

    encoding = tiktoken.get_encoding("gpt2")


def old_tokenize(row):
    tokens = [encoding.eot_token]
    tokens.extend(encoding.encode_ordinary(row["text"]))
    tokens = np.array(tokens)
    assert (0 <= tokens).all() and (tokens < 2**16).all()
    return tokens.astype(np.uint16)


def old_way(data, folder, shard_size):
    """Number of tokens written."""
    total, filled, index = 0, 0, 0
    shard = np.empty(shard_size, dtype=np.uint16)
    context = multiprocessing.get_context("fork" if os.name == "posix" else "spawn")
    with context.Pool(max(1, os.cpu_count() // 2), old_start) as pool:
        for tokens in pool.imap(old_tokenize, data, chunksize=16):
            total += len(tokens)
            while filled + len(tokens) >= shard_size:
                room = shard_size - filled
                shard[filled:] = tokens[:room]
                np.save(os.path.join(folder, fineweb.shard_name(index)), shard)
                tokens, filled, index = tokens[room:], 0, index + 1
            shard[filled : filled + len(tokens)] = tokens
            filled += len(tokens)
    if filled:
        np.save(os.path.join(folder, fineweb.shard_name(index)), shard[:filled])
    return total


def our_way(root, folder, *flags):
    """(seconds, most resident memory of the parent in MB) of the command in the project `root`."""
    began, peak = time.perf_counter(), 0
    command = [sys.executable, os.path.join(root, "fineweb.py"), "--out", folder, *flags]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        with contextlib.suppress(OSError, IndexError):  # Linux only
            status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
            peak = int(status.split("VmHWM:")[1].split()[0]) / 1e3
        time.sleep(0.01)
    assert process.returncode == 0
    return time.perf_counter() - began, peak


def tiktoken_alone(texts):
    """Tokens per second of one process."""
    import tiktoken

    encode = tiktoken.get_encoding("gpt2").encode_ordinary
    began = time.perf_counter()
    tokens = sum(len(encode(t)) for t in texts)
    return tokens / (time.perf_counter() - began)


def measure(top, args):
    """
    Make the shards `rounds` times in each way; yields ("way", tokens/s, MB or 0). The ways take
    turns, so that a machine that slows down slows all of them.
    """
    import datasets

    source = os.path.join(top, "data")
    path = os.path.join(source, "train.parquet")
    os.mkdir(source)
    write_documents(path, args.megabytes)
    datasets.disable_progress_bars()
    data = datasets.load_dataset(source, split="train")  # before the clock starts, for both
    sample = data[: len(data) // 8]["text"]
    flags = ["--files", path] if args.files else ["--dataset", source]
    flags += ["--shard_size", str(args.shard_size)]
    roots = {"ours": ROOT, **({"the other copy": args.other} if args.other else {})}
    for i in range(args.rounds):
        old, new, short = (os.path.join(top, f"{kind}{i}") for kind in ("old", "new", "short"))
        os.mkdir(old)
        yield "tiktoken alone, one process", tiktoken_alone(sample), 0
        began = time.perf_counter()
        tokens = old_way(data, old, args.shard_size)
        yield "the old way", tokens / (time.perf_counter() - began), 0
        for way, root in roots.items():
            start, _ = our_way(root, short, *flags, "--max_tokens", "1")
            seconds, peak = our_way(root, new, *flags)
            yield way, tokens / seconds, peak
            yield f"{way} without start", tokens / (seconds - start), peak
            for name in os.listdir(old):
                a, b = (pathlib.Path(folder, name).read_bytes() for folder in (old, new))
                assert a == b, f"{name} differs"
            shutil.rmtree(short)
            shutil.rmtree(new)
        shutil.rmtree(old)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("--megabytes", type=int, default=300, help="of text (300)")
    parser.add_argument("--rounds", type=int, default=3, help="of which the median counts (3)")
    parser.add_argument("--shard_size", type=int, default=20_000_000, help="tokens (20000000)")
    parser.add_argument("--files", action="store_true", help="ours reads the parquet file itself")
    parser.add_argument("--other", metavar="FOLDER", help="another copy of the project")
    args = parser.parse_args()
    if why := get_tokenizer().why:
        sys.exit(f"prep.py: error: GPT-2's vocabulary is needed: {why}")
    rates, peaks = {}, {}
    with tempfile.TemporaryDirectory() as top:
        os.environ["HF_HOME"] = os.path.join(top, "hf")
        for way, rate, mb in measure(top, args):
            rates.setdefault(way, []).append(rate)
            peaks[way] = max(peaks.get(way, 0), mb)
    median = {way: statistics.median(r) for way, r in rates.items()}
    alone = fineweb.cores() * median["tiktoken alone, one process"]
    print(f"{fineweb.cores()} cores, {args.megabytes} MB of text, medians of {args.rounds}; "
          "the shards are the same bytes")  # fmt: skip
    for way, rate in median.items():
        ratios = f"  {rate / median['the old way']:.2f} x the old way  {rate / alone:.2f} x cores"
        memory = f" x tiktoken  parent at most {peaks[way]:.0f} MB" if peaks[way] else ""
        print(f"{way:28s} {rate / 1e6:6.2f} M tokens/s" + (ratios + memory if memory else ""))


if __name__ == "__main__":
    main()
