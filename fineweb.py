"""
Create the token shards that train_gpt2.py trains on: download pretokenized shards, or tokenize FineWeb-Edu,
another dataset or your own files.

    python fineweb.py --pretokenized 10     # fastest: val and 10 train shards (1B tokens), 2.2 GB
    python fineweb.py --pretokenized        # all of FineWeb-Edu's sample-10BT, 20 GB
    python fineweb.py                       # tokenize sample-10BT here: 28 GB to download
    python fineweb.py --streaming           # the same without a copy of the dataset on disk
    python fineweb.py --streaming --max_tokens 200000000    # only the first two shards
    python fineweb.py --files 'texts/*.txt' --out mine      # your own files
    python fineweb.py --verify              # check the size and sha256 of every shard

A shard is a 1-D uint16 .npy file of GPT-2 token ids. Each document is <|endoftext|> followed by its tokens.
Documents are concatenated and may continue in the next shard. The first shard is the validation split. For
FineWeb-Edu the names are edufineweb_val_000000.npy, edufineweb_train_000001.npy, ..., and for other sources
tokens_val_000000.npy, ... Pretokenized shards are llm.c's .bin files: the tokens after a 1,024-byte header.
The string "<|endoftext|>" inside a text is encoded as seven ordinary tokens, never as a document boundary.

manifest.json in the same directory records the settings and, for each shard, its tokens, documents, sha256,
and the source positions where it starts and ends. Safe to interrupt: a rerun of the same command continues
after the last completed shard and creates the same bytes.
"""

import argparse
import contextlib
import functools
import glob
import gzip
import hashlib
import itertools
import json
import os
import re
import sys
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

DATASET, CONFIG = "HuggingFaceFW/fineweb-edu", "sample-10BT"
PRETOKENIZED = "kjj0/finewebedu10B-gpt2"  # the tokens of that sample
SHARDS_DIR = os.path.join(os.path.dirname(os.path.abspath(__file__)), "edu_fineweb10B")
NUM_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
ALL = sys.maxsize  # --pretokenized without N
EOT = 50256  # <|endoftext|>, the first token of every document
MANIFEST, MANIFEST_FORMAT = "manifest.json", "fineweb.py 1"
TEXT_COPY = ".documents.arrow"  # temporary copy of the texts of --files
STREAM_BUFFER = 10_000  # documents that --streaming --shuffle samples from
JOB_DOCUMENTS = 200  # documents that a thread tokenizes at a time, 50 ms of FineWeb-Edu
MAX_PENDING = max(32, 3 * NUM_CORES)  # tokenization jobs: enough work while a shard is written


class UserError(Exception):
    """Invalid input. The message is one line with the value and the fix; exit status 2."""


def print_line(message, file=None):
    """Print above the progress bar. A closed terminal or pipe does not stop the run."""
    with contextlib.suppress(OSError):
        tqdm.write(message, file=file)


def one_line(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (--help lists the flags)")


def integer(low):
    """Return an argparse type for integers of at least `low`."""

    def integer(text):  # the name is part of argparse's message: invalid integer value
        if int(text) < low:
            raise argparse.ArgumentTypeError(f"{text} is less than {low}")
        return int(text)

    return integer


def build_parser():
    parser = Parser(
        prog="fineweb.py", usage="%(prog)s [--flag value ...]", allow_abbrev=False,
        description="Create token shards for train_gpt2.py. Safe to interrupt: rerun to continue.",
    )  # fmt: skip
    add = parser.add_argument_group("download pretokenized shards").add_argument
    add("--pretokenized", nargs="?", type=integer(1), const=ALL, metavar="N",
        help="val shard and first N train shards (no N = all), 200 MB each; a larger N adds more")
    add("--ready", dest="pretokenized", nargs="?", type=integer(1), const=ALL, help=argparse.SUPPRESS)
    add = parser.add_argument_group("source and destination").add_argument
    add("--dataset", metavar="NAME",
        help=f"Hugging Face dataset or local directory (default: {DATASET}; with --pretokenized: "
        f"{PRETOKENIZED}, also: kjj0/fineweb10B-gpt2, karpathy/fineweb-edu-100B-gpt2-token-shards)")
    add("--revision", help="branch, tag or commit of the dataset (default: as recorded in --out, else main)")
    add("--out", metavar="DIR", default=SHARDS_DIR,
        help="output directory (default: edu_fineweb10B in the directory of fineweb.py)")
    add("--verify", action="store_true", help="only check size and sha256 of the shards in --out")
    add = parser.add_argument_group("tokenizing (not with --pretokenized)").add_argument
    add("--name", help=f"configuration of the dataset (default: {CONFIG}, 10 billion tokens, of {DATASET})")
    add("--split", default="train", help="split of the dataset (default: train)")
    add("--text_column", metavar="NAME", default="text", help="column of the text (default: text)")
    add("--streaming", action="store_true",
        help=f"read the dataset over the network (default: download it first; {CONFIG}: 75 GB on disk)")
    add("--files", nargs="+", metavar="PATH",
        help="paths or glob patterns, read in this order instead of a dataset: .parquet, .jsonl, .jsonl.gz "
        "(one document per row), .txt (one document). Their texts are copied to --out temporarily")
    add("--shard_size", type=integer(1), metavar="N",
        help="tokens per shard (default: as recorded in --out, else 100000000, or a tenth of few tokens)")
    add("--max_tokens", type=integer(0), metavar="N", default=0,
        help="stop after N tokens (default: 0 = all)")
    add("--shuffle", type=integer(0), metavar="SEED",
        help=f"shuffle the documents (--streaming: the files, and {STREAM_BUFFER:,} documents at a time)")
    add("--num_proc", type=integer(1), metavar="N", default=NUM_CORES,
        help=f"tokenizer threads (default: one per core, {NUM_CORES})")
    return parser


def parse_args(argv=None):
    """Parse and check the flags. Raises UserError."""
    parser = build_parser()
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        if value in ("", [""]):  # usually an unset shell variable
            raise UserError(f"--{name} must not be empty")
        general = name in ("pretokenized", "dataset", "revision", "out", "verify")
        if args.pretokenized and not general and value != parser.get_default(name):
            raise UserError(f"--pretokenized excludes --{name}: the shards are already tokenized")
    if args.files and (args.dataset or args.name or args.revision or args.streaming):
        raise UserError("--files excludes --dataset, --name, --revision and --streaming")
    if args.dataset in (None, DATASET):  # its default configuration has 1.3T tokens
        args.name = args.name or CONFIG
    args.dataset = args.dataset or (PRETOKENIZED if args.pretokenized else DATASET)
    return args


# -----------------------------------------------------------------------------
# Files and the manifest


@contextlib.contextmanager
def locked_dir(path):
    """Create and lock the output directory. Afterwards remove the text copy, and the directory if empty."""
    from filelock import FileLock, Timeout

    os.makedirs(path, exist_ok=True)
    lock = FileLock(os.path.join(path, ".lock"))
    try:
        lock.acquire(timeout=2.0)  # a killed process may hold it for a moment
    except Timeout:
        raise UserError(f"another fineweb.py is writing to {path}; wait until it ends") from None
    except (OSError, NotImplementedError) as e:  # storage without locks
        print_line(f"warning: could not lock {path} ({one_line(e)}); run only one fineweb.py there at a time",
                   sys.stderr)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.remove(os.path.join(path, TEXT_COPY))
        lock.release()
        with contextlib.suppress(OSError):
            if os.listdir(path) == [".lock"]:
                os.remove(lock.lock_file)
                os.rmdir(path)


@contextlib.contextmanager
def atomic_write(path):
    """Open a temporary binary file that replaces `path` once it is complete and on disk."""
    with open(f"{path}.tmp", "wb") as f:
        yield f
        f.flush()
        os.fsync(f.fileno())
    os.replace(f"{path}.tmp", path)


def split_of(name):
    """Return "train" or "val" for the file name of a shard, None for any other file."""
    if name.startswith(".") or not name.endswith((".npy", ".bin")):
        return None
    return ([None] + re.findall(r"(?<![a-zA-Z])(train|val)(?![a-zA-Z])", name))[-1]


def sha256_of(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def shard_problem(folder, entry, check_sha256=False):
    """Return how a shard differs from its manifest entry, None if it does not."""
    path = os.path.join(folder, entry["name"])
    header = 1024 if path.endswith(".bin") else 128
    if not os.path.isfile(path):
        return "missing"
    if os.path.getsize(path) != header + 2 * entry["tokens"]:
        return "wrong size"
    if check_sha256 and sha256_of(path) != entry["sha256"]:
        return "wrong sha256"


def load_manifest(folder):
    """Return the manifest of a directory, or a new one if it has no shards. Raises UserError."""
    path = os.path.join(folder, MANIFEST)
    if not os.path.exists(path):
        if os.path.isdir(folder) and any(map(split_of, os.listdir(folder))):
            raise UserError(f"{folder} contains shards from another source; use another --out")
        return {"format": MANIFEST_FORMAT, "settings": {}, "complete": False, "shards": []}
    with contextlib.suppress(ValueError, LookupError, TypeError), open(path, encoding="utf-8") as f:
        manifest = json.load(f)
        if manifest["format"] == MANIFEST_FORMAT:
            return manifest
    raise UserError(f"{path} was not written by this version of fineweb.py; use another --out")


def check_settings(folder, manifest, settings):
    """Raise UserError if the listed shards were created with other settings. Otherwise record them."""
    old = manifest["settings"]
    differ = [f"{k} {old.get(k)!r}, not {settings.get(k)!r}"
              for k in {**old, **settings} if old.get(k) != settings.get(k)]  # fmt: skip
    if not manifest["shards"]:
        manifest["settings"] = settings
    elif differ:
        raise UserError(f"{folder} was created with {', '.join(differ)[:500]}; use another --out")
    manifest.pop("note", None)  # written by earlier versions


def save_manifest(folder, manifest, complete=False):
    for key in ("tokens", "documents"):
        manifest[key] = sum(entry[key] for entry in manifest["shards"])
    manifest["complete"] = complete
    with atomic_write(os.path.join(folder, MANIFEST)) as f:
        f.write(json.dumps(manifest, indent=1).encode())


def record_shard(folder, manifest, name, tokens, positions=(), hub_sha256=None):
    """Add a completed shard to the manifest. A shard whose sha256 is not that of the hub or of its
    earlier version is deleted, because a rerun compares only sizes."""
    path = os.path.join(folder, name)
    entry = {"name": name, "tokens": len(tokens), "documents": int(np.count_nonzero(tokens == EOT)),
             "sha256": sha256_of(path), **dict(positions)}  # fmt: skip
    listed = {old["name"]: old["sha256"] for old in manifest["shards"]}
    if entry["sha256"] != (hub_sha256 or listed.get(name, entry["sha256"])):
        os.remove(path)
        raise UserError(f"{name} has another sha256 than expected; rerun, or use another --out if its source "
                        "has changed")
    if name not in listed:
        manifest["shards"].append(entry)
    save_manifest(folder, manifest)
    print_line(f"{name}: {len(tokens):,} tokens")


def verify(folder):
    """Compare size and sha256 of all shards with the manifest. Raises UserError."""
    manifest = load_manifest(folder)
    if not manifest["shards"]:
        raise UserError(f"no shards in {folder}; check --out")
    problems = dict.fromkeys(filter(split_of, os.listdir(folder)), "not in the manifest")
    for entry in manifest["shards"]:
        problems[entry["name"]] = shard_problem(folder, entry, check_sha256=True)
    bad = [f"{name} ({problem})" for name, problem in sorted(problems.items()) if problem]
    if bad:
        raise UserError(f"bad shards in {folder}: {', '.join(bad)}; delete them and rerun the command that "
                        "created them")
    state = "" if manifest["complete"] else "; incomplete, rerun the command that created them"
    print_line(f"{folder}: {len(problems)} shards, {manifest['tokens']:,} tokens, valid{state}")


# -----------------------------------------------------------------------------
# Sources: documents in a fixed order


def resolve_settings(args, recorded):
    """Return all settings that determine the bytes of the shards. Sets args.files, args.shard_size and
    args.revision: the commit of --revision, else the recorded one, else that of main."""
    import datasets

    tokens = args.max_tokens or sys.maxsize
    if args.files:
        args.files = expand_patterns(args.files)
        source = {"files": [[os.path.basename(p), os.path.getsize(p)] for p in args.files]}
        # English text has 4 bytes per token.
        tokens = min(tokens, sum(size for _, size in source["files"]) // 4)
    else:
        if args.revision is None and recorded.get("dataset") == args.dataset:
            args.revision = recorded["revision"]
        elif not os.path.isdir(args.dataset) and not datasets.config.HF_HUB_OFFLINE:
            args.revision = dataset_info(args).sha
        source = {k: getattr(args, k) for k in ("dataset", "name", "split", "revision")}
    # The first shard is validation data: a tenth of the tokens if they are few.
    few = args.files or tokens <= 10**8
    default_size = min(10**8, max(1, tokens // 10)) if few else 10**8
    args.shard_size = args.shard_size or recorded.get("shard_size") or default_size
    shuffle = None if args.shuffle is None else f"seed {args.shuffle}"
    if shuffle and args.streaming:
        shuffle += f", buffer of {STREAM_BUFFER:,}, datasets {datasets.__version__}"
    rest = {k: getattr(args, k) for k in ("text_column", "shard_size", "max_tokens")}
    return {**source, **rest, "shuffle": shuffle, "tokenizer": "gpt2"}


def expand_patterns(patterns):
    """Return the files that match paths and glob patterns, in order, without duplicates."""
    paths = []
    for pattern in patterns:
        paths += sorted(glob.glob(pattern, recursive=True)) or [pattern]  # a name can contain [ ]
    for path in paths:
        if not os.path.isfile(path) or not path.endswith((".parquet", ".jsonl", ".jsonl.gz", ".txt")):
            raise UserError(f"{path}: no such .parquet, .jsonl, .jsonl.gz or .txt file; check --files")
    return list(dict.fromkeys(paths))


def dataset_info(args):
    from huggingface_hub import HfApi

    with hub_errors(args.dataset):
        return HfApi().dataset_info(args.dataset, revision=args.revision, files_metadata=True, timeout=60)


@contextlib.contextmanager
def hub_errors(dataset):
    """Convert exceptions to UserError (unknown dataset, configuration or revision) or ConnectionError."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as e:
        # ValueError: unknown configuration or split
        unknown = "(Dataset|DataFiles|Repository|Revision)NotFound|ValueError"
        kind = UserError if re.match(unknown, type(e).__name__) else ConnectionError
        raise kind(f"could not load {dataset} ({one_line(e)}); check its name, the network and the free disk "
                   "space, or log in: hf auth login") from e


def open_data(args):
    """Return the documents as a datasets.Dataset, or as an IterableDataset with --streaming."""
    import datasets

    if args.files:
        data = datasets.Dataset.from_file(copy_texts(args))
    else:
        with hub_errors(args.dataset):
            data = datasets.load_dataset(args.dataset, args.name, split=args.split, revision=args.revision,
                                         streaming=args.streaming)
            row = next(iter(data), {args.text_column: None})
        text_of(row, args.text_column, args.dataset)
        data = data.select_columns([args.text_column])
    if args.shuffle is None:
        return data
    if args.streaming:
        return data.shuffle(args.shuffle, buffer_size=STREAM_BUFFER)
    # RandomState, unlike default_rng, guarantees the same permutation in every version.
    return data.select(np.random.RandomState(args.shuffle).permutation(len(data)))


def copy_texts(args):
    """Copy all texts of --files to an Arrow file, which `datasets` maps into memory, and return its path.
    A damaged file is thus reported before the first shard is created."""
    import pyarrow as pa

    schema = pa.schema([(args.text_column, pa.large_string())])
    copy = os.path.join(args.out, TEXT_COPY)
    texts = itertools.chain.from_iterable(read_texts(path, args.text_column) for path in args.files)
    with pa.OSFile(copy, "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        while batch := list(itertools.islice(texts, JOB_DOCUMENTS)):
            writer.write_batch(pa.record_batch([batch], schema=schema))
    return copy


def read_texts(path, column):
    """Yield the texts of a file, None for a null. Raises UserError."""
    where = path  # for the error
    try:
        if path.endswith(".txt"):
            with open(path, encoding="utf-8-sig") as f:
                yield f.read()
        elif path.endswith(".parquet"):
            from pyarrow.parquet import ParquetFile

            with ParquetFile(path) as f:
                # Without the column, text_of lists all columns.
                columns = [column] if column in f.schema_arrow.names else None
                for batch in f.iter_batches(batch_size=JOB_DOCUMENTS, columns=columns):
                    yield from (text_of(row, column, path) for row in batch.to_pylist())
        else:
            with (gzip.open if path.endswith(".gz") else open)(path, "rb") as f:
                for number, line in enumerate(f, 1):
                    where = f"{path} line {number}"
                    if line.strip():
                        yield text_of(json.loads(line), column, where)
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as e:  # includes errors of pyarrow
        raise UserError(f"could not read {where} ({one_line(e)}); repair it or omit the file") from e


def text_of(row, column, where):
    """Return the text of a row, None for a null. Raises UserError."""
    if not isinstance(row, dict):
        raise UserError(f"{where} is not a JSON object; repair it")
    if not isinstance(row.get(column, 0), str | None):
        found = ", ".join(f"{name} ({type(value).__name__})" for name, value in row.items())
        raise UserError(f"{where} has no text in column {column}, only {found}; set --text_column")
    # Unpaired surrogates, which JSON can contain, become U+FFFD as in tiktoken.
    return row[column] and row[column].encode("utf-16", "surrogatepass").decode("utf-16", "replace")


# -----------------------------------------------------------------------------
# Shards


def load_encode():
    """Return a function from text to GPT-2 tokens (n,). Raises UserError."""
    import tiktoken

    try:
        bpe = tiktoken.get_encoding("gpt2")
    except Exception as e:
        raise UserError(f"could not download the GPT-2 vocabulary ({one_line(e)}); set TIKTOKEN_CACHE_DIR to "
                        "a directory that contains it") from e
    # 15% faster than encode_ordinary, which creates a list
    return functools.partial(bpe.encode_to_numpy, disallowed_special=())


def tokenize(encode, texts):
    """Return (tokens uint16 (n,), tokens per document)."""
    # A null has no tokens but is counted as a document, so that positions stay row numbers.
    parts = [[] if text is None else np.append(np.uint16(EOT), encode(text)) for text in texts]
    return np.concatenate(parts, dtype=np.uint16, casting="unsafe"), [len(part) for part in parts]


def tokenize_batches(batches, encode, args, bar, counts):
    """Yield (tokens, tokens per document) of each batch, in order."""
    pending = []
    with ThreadPoolExecutor(args.num_proc) as pool:  # tiktoken releases the GIL
        while True:
            with hub_errors("the copied texts" if args.files else args.dataset):
                for batch in itertools.islice(batches, MAX_PENDING - len(pending)):
                    pending.append(pool.submit(tokenize, encode, batch[args.text_column]))
            if not pending:
                return
            tokens, lengths = pending.pop(0).result()
            bar.update(len(lengths))
            counts["null"] += lengths.count(0)
            yield tokens, lengths


def pack_shards(batches, size, start, limit):
    """Pack tokenized documents into shards of `size` tokens, at most `limit` tokens in total.

    Yields (tokens, {"start": position, "end": position}); the array of tokens is reused. A position
    {"document": d, "token": t} means that token t of document d comes next.
    """
    shard = np.empty(min(size, limit), dtype=np.uint16)
    filled, document, skip, end = 0, start["document"], start["token"], start
    for tokens, lengths in batches:
        edges = np.concatenate([[0], np.cumsum(lengths)])  # document boundaries in `tokens`
        a, skip = skip, 0
        while a < len(tokens) and limit:
            b = min(len(tokens), a + len(shard) - filled, a + limit)
            shard[filled : filled + b - a] = tokens[a:b]
            filled, limit = filled + b - a, limit - (b - a)
            d = int(np.searchsorted(edges, b, side="right")) - 1  # the document of token b
            end = {"document": document + d, "token": b - int(edges[d])}
            a = b
            if filled == len(shard):
                yield shard, {"start": start, "end": end}
                filled, start = 0, end
        document += len(lengths)
        if not limit:  # without waiting for the next batch
            break
    if filled:
        yield shard[:filled], {"start": start, "end": end}


def create_shards(args, manifest):
    """Create the listed shards that are missing or damaged, then all that are not listed yet."""
    shards = manifest["shards"]
    todo = [(i, entry["start"], entry["tokens"]) for i, entry in enumerate(shards)
            if shard_problem(args.out, entry)]  # fmt: skip
    if not manifest["complete"]:
        start = shards[-1]["end"] if shards else {"document": 0, "token": 0}
        limit = (args.max_tokens or sys.maxsize) - sum(entry["tokens"] for entry in shards)
        todo.append((len(shards), start, limit))
    if not todo:  # requires neither the network nor the vocabulary
        return
    prefix = "edufineweb" if args.dataset == DATASET and not args.files else "tokens"
    if shards:  # all shards of a directory have one prefix
        prefix = shards[0]["name"].rsplit("_", 2)[0]
    encode, data = load_encode(), open_data(args)
    bar = tqdm(unit=" documents", initial=todo[-1][1]["document"], disable=None,
               total=None if args.streaming or args.max_tokens else len(data))
    counts = Counter()
    with bar:
        for index, start, limit in todo:
            first = start["document"]
            if args.streaming:
                if first:
                    print_line(f"skipping {first:,} documents of completed shards")
                batches = data.skip(first).iter(JOB_DOCUMENTS)
            else:  # Dataset.skip refuses to skip all
                batches = (data[i : i + JOB_DOCUMENTS] for i in range(first, len(data), JOB_DOCUMENTS))
            batches = tokenize_batches(batches, encode, args, bar, counts)
            for tokens, positions in pack_shards(batches, args.shard_size, start, limit):
                if not shards:  # a rerun refuses shards without a manifest
                    save_manifest(args.out, manifest)
                name = f"{prefix}_{'train' if index else 'val'}_{index:06d}.npy"
                with atomic_write(os.path.join(args.out, name)) as f:
                    np.save(f, tokens)
                record_shard(args.out, manifest, name, tokens, positions)
                index += 1
    if counts["null"]:
        print_line(f"skipped {counts['null']:,} rows whose text is null")
    if not shards:
        raise UserError("no documents to read; check --files or --dataset")
    save_manifest(args.out, manifest, complete=True)


def download_shards(args, manifest):
    """Download the requested shards that are missing or damaged."""
    from huggingface_hub import hf_hub_download

    if args.revision is None and manifest["settings"].get("ready") == args.dataset:
        args.revision = manifest["settings"]["revision"]
    info = dataset_info(args)
    check_settings(args.out, manifest, {"ready": args.dataset, "revision": info.sha})
    files = {file.rfilename: file for file in info.siblings}
    names = sorted(name for name in files if name.endswith(".bin") and "/" not in name)
    val, train = ([name for name in names if split_of(name) == s] for s in ("val", "train"))
    number = len(train) if args.pretokenized == ALL else args.pretokenized
    if number > len(train) or not val or not train:
        raise UserError(f"{args.dataset} has {len(val)} val and {len(train)} train shards (.bin); "
                        "check --pretokenized and --dataset")
    problems = {entry["name"]: shard_problem(args.out, entry) for entry in manifest["shards"]}
    wanted = dict.fromkeys([*val, *train[:number], *problems])
    missing = [files[name] for name in wanted if problems.get(name, "not listed")]
    if missing:
        size = sum(file.size for file in missing) / 1e9
        print_line(f"downloading {len(missing)} shards of {args.dataset}, {size:.1f} GB, to {args.out}")
        save_manifest(args.out, manifest)  # incomplete until all are there
    for file in missing:
        path = os.path.join(args.out, file.rfilename)
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)  # not in the manifest, or of the wrong size
        with hub_errors(args.dataset):
            hf_hub_download(args.dataset, file.rfilename, repo_type="dataset", revision=info.sha,
                            local_dir=args.out)
        tokens = np.fromfile(path, "<u2")[512:]  # after the header
        record_shard(args.out, manifest, file.rfilename, tokens, hub_sha256=file.lfs and file.lfs.sha256)
    save_manifest(args.out, manifest, complete=True)


def run(args):
    """Create, download or verify shards."""
    if args.verify:
        return verify(args.out)
    with locked_dir(args.out):
        manifest = load_manifest(args.out)
        if args.pretokenized:
            download_shards(args, manifest)
        else:
            check_settings(args.out, manifest, resolve_settings(args, manifest["settings"]))
            create_shards(args, manifest)
    tokens, number = manifest["tokens"], len(manifest["shards"])
    print_line(f"{args.out}: {tokens:,} tokens of {manifest['documents']:,} documents in {number} shards")
    if number == 1:
        print_line("warning: all tokens are in the validation shard, none are left to train on; delete "
                   f"{args.out} and rerun with --shard_size {max(tokens // 10, 1)} or less", sys.stderr)


def main(argv=None):
    """Run the command. Errors exit with status 1 (environment), 2 (invalid input) or 130 (interrupted)."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
    os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", "300")
    if not sys.stderr or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    rerun = "completed shards are safe, rerun to continue"
    try:
        return run(parse_args(argv))
    except (UserError, ValueError) as e:  # ValueError: tiktoken fails on a million consecutive spaces
        status, message = 2, f"error: {e}"
    except ImportError as e:
        status, message = 2, f"error: {e}; run pip install -r requirements.txt"
    except (FileExistsError, NotADirectoryError) as e:
        status, message = 2, f"error: {e}; check --out"
    except MemoryError as e:
        status, message = 1, f"error: out of memory ({e}); reduce --shard_size or --num_proc; {rerun}"
    except OSError as e:
        status, message = 1, f"error: {e}; {rerun}"
    except KeyboardInterrupt:
        status, message = 130, f"interrupted; {rerun}"
    with contextlib.suppress(OSError):
        print(f"fineweb.py: {' '.join(message.splitlines())}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
