"""
FineWeb-Edu, or any text, as token shards: this file makes them, checks them and reads them.

    python fineweb.py                              # 10B tokens -> edu_fineweb10B/ beside this file
    python fineweb.py --max_tokens 200000000       # a first try: two shards
    python fineweb.py --streaming                  # no copy of the data set on disk
    python fineweb.py --files 'texts/*.txt' --out mine --shard_size 1000000
    python fineweb.py --verify                     # sizes and sha256 of what was made

A shard is a plain 1-D uint16 .npy file of GPT-2 token ids. A document is <|endoftext|> and then its
ordinary tokens; documents follow each other and run on from one shard into the next. The first
shard is the validation split: edufineweb_val_000000.npy, edufineweb_train_000001.npy, ...

manifest.json, beside the shards, says what was asked for and, for each shard, its tokens,
documents, sha256 and where in the source it begins and ends. Killed at any moment, a rerun goes on
behind the last shard listed there, and the result is the same bytes.
"""

import argparse
import bisect
import collections
import concurrent.futures
import contextlib
import functools
import glob
import gzip
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import zlib
from typing import NamedTuple

import numpy as np

EOT = 50256  # <|endoftext|>, the one special token of GPT-2; it stands before each document
DATASET, CONFIG = "HuggingFaceFW/fineweb-edu", "sample-10BT"
OUT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "edu_fineweb10B")
MANIFEST, MANIFEST_FORMAT = "manifest.json", "fineweb.py 1"
LOCK, SHUFFLE_COPY = ".lock", ".documents.arrow"
TEMPORARY = ".tmp"  # ends the name of a file until it is whole


class UserError(Exception):
    """A user's mistake: one line that names the thing and the fix; commands exit with status 2."""


class Fault(Exception):
    """A fault of the environment (full disk, broken network), in one line; exit status 1."""


# -----------------------------------------------------------------------------
# Tokenizer: tiktoken's gpt2, or GPT-2's own 256 single-byte tokens where there is no vocabulary

HOW_TO_GET_GPT2 = (
    'where there is a network, run `TIKTOKEN_CACHE_DIR=bpe python -c "import tiktoken; '
    "tiktoken.get_encoding('gpt2')\"`, copy the folder bpe here and set TIKTOKEN_CACHE_DIR to it"
)


def byte_of_id():
    """(256,) uint8: the byte that GPT-2's token ids 0..255 stand for, printable bytes first."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return np.array(printable + sorted({*range(256)} - {*printable}), dtype=np.uint8)


class Tokenizer:
    """
    Text to GPT-2 token ids and back. `name` is 'gpt2' (BPE) or 'bytes' (ids 0..255 only: valid
    GPT-2 ids, about four times as many of them). `n_vocab` counts the ids that may be sampled;
    `why` says why the bytes are used where nobody asked for them.
    """

    def __init__(self, bpe=None, why=None):
        self.name, self.n_vocab = ("gpt2", 50257) if bpe else ("bytes", 256)
        self.why = why
        self._bpe = bpe
        self._byte_of_id = byte_of_id()
        self._id_of_byte = np.argsort(self._byte_of_id).astype(np.uint16)

    def encode(self, text):
        """The tokens of a text as uint16 (n,); '<|endoftext|>' in it is text like any other."""
        if not self._bpe:
            return self._id_of_byte[np.frombuffer(text.encode("utf-8", "replace"), np.uint8)]
        try:  # the same as encode_ordinary, 15 % faster: it makes no list
            return self._bpe.encode_to_numpy(text, disallowed_special=()).astype(np.uint16)
        except (UnicodeEncodeError, AttributeError):  # half a surrogate pair; an old tiktoken
            return np.array(self._bpe.encode_ordinary(text), dtype=np.uint16)

    def decode_bytes(self, ids):
        """The bytes of token ids; a token may be part of a character."""
        if self._bpe:
            return self._bpe.decode_bytes([int(i) for i in ids])
        known = dict(enumerate(bytes([b]) for b in self._byte_of_id))
        known[EOT] = b"<|endoftext|>"
        return b"".join(known.get(int(i), b"\xef\xbf\xbd") for i in ids)  # or U+FFFD

    def decode(self, ids):
        """The text of token ids, with U+FFFD for what is not a whole character."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


def get_tokenizer(name=None, timeout=10.0):
    """
    The tokenizer called `name`: 'gpt2', or a UserError saying how to provide it; 'bytes'; or None,
    gpt2 where its vocabulary can be had within `timeout` seconds and else bytes, with `why` set.
    """
    if name not in (None, "gpt2", "bytes"):
        raise UserError(f"tokenizer {name!r} is not known; there are gpt2 and bytes")
    bpe, why = (None, None) if name == "bytes" else load_bpe(timeout)
    if bpe is None and name == "gpt2":
        raise UserError(f"GPT-2's vocabulary cannot be had ({why}); {HOW_TO_GET_GPT2}")
    return Tokenizer(bpe, why)


def load_bpe(timeout):
    """(tiktoken's gpt2 encoding, None), or (None, the reason) when it is not there in time."""
    try:
        import tiktoken
    except ImportError:
        return None, "tiktoken is not installed: pip install tiktoken"
    bpe, why = [], [f"no answer from the network within {timeout:g} s"]

    def load():
        try:
            bpe.append(tiktoken.get_encoding("gpt2"))
        except Exception as e:  # whatever a network, a proxy or a cache folder comes up with
            why.insert(0, first_line(e, 100))

    # tiktoken downloads without a time limit: behind a silent proxy it would hang for ever.
    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    thread.join(timeout)
    return (bpe[0], None) if bpe else (None, why[0])


def first_line(e, length=250):
    """An exception as one short line."""
    return f"{type(e).__name__}: {' '.join(str(e).split())}"[:length]


# -----------------------------------------------------------------------------
# Reading: the shards of a split are one long stream of tokens

BIN_HEADER_BYTES = 256 * 4  # of llm.c's .bin: 256 int32, first magic, version and token count
BIN_MAGIC, BIN_VERSION = 20240520, 1
MAX_OPEN_FILES = 64
PIECE = 1 << 16  # tokens looked at together when a whole shard is read: 128 KB


class Shard(NamedTuple):
    """Tokens in a file (uint16, little-endian, from byte `start` on), or in memory."""

    name: str
    count: int
    path: str | None = None
    start: int = 0
    array: np.ndarray | None = None


class TokenStream:
    """
    The tokens of a split as one stream, read by position. Reading is seek and read, not a memory
    map: pages of a map count as resident memory, and a run would end up with all of the data in it.
    """

    def __init__(self, shards):
        self.names = [s.name for s in shards]
        self.counts = [s.count for s in shards]
        self._shards = shards
        self._starts = [0, *itertools.accumulate(self.counts)]
        self._files = collections.OrderedDict()  # shard index -> open file, least recent first
        self._lock = threading.Lock()  # a file has one position, and a loader may prefetch
        self._counted = (0, 0, 0)  # shard, tokens looked at, EOTs among them

    def __len__(self):
        return self._starts[-1]

    def locate(self, pos):
        """(shard index, offset in that shard) of a position of the stream."""
        assert 0 <= pos < len(self), (pos, len(self))
        i = bisect.bisect_right(self._starts, pos) - 1
        return i, pos - self._starts[i]

    def read(self, start, count):
        """Tokens [start, start + count) as a new uint16 array (count,); may straddle shards."""
        assert start >= 0 and count >= 0 and start + count <= len(self), (start, count, len(self))
        out = np.empty(count, dtype="<u2")
        done = 0
        while done < count:
            i, offset = self.locate(start + done)
            n = min(count - done, self.counts[i] - offset)
            self._read_into(i, offset, out[done : done + n])
            done += n
        return out

    def _read_into(self, i, offset, out):
        shard = self._shards[i]
        if shard.array is not None:
            out[:] = shard.array[offset : offset + len(out)]
            return
        view = memoryview(out).cast("B")
        try:
            with self._lock:
                file = self._open(i)
                file.seek(shard.start + 2 * offset)
                while view.nbytes and (n := file.readinto(view)):
                    view = view[n:]
        except OSError as e:
            raise UserError(f"{shard.path} cannot be read any more: {e.strerror or e}") from e
        if view.nbytes:
            raise UserError(
                f"{shard.path} is shorter than when it was opened ({shard.count:,} tokens then); "
                "stop what is changing it, and start again"
            )

    def _open(self, i):
        if i in self._files:
            self._files.move_to_end(i)
        else:
            if len(self._files) >= MAX_OPEN_FILES:
                self._files.popitem(last=False)[1].close()
            self._files[i] = open(self._shards[i].path, "rb", buffering=0)
        return self._files[i]

    def documents_before(self, shard_index, offset):
        """
        Number of EOT tokens in a shard at positions 0..offset: which document of the shard that
        token is in, counted from 1, with 0 for the rest of the previous shard's last one. Reads in
        pieces, and goes on from the last answer where that lies before this one.
        """
        shard, end, n = self._counted
        if shard != shard_index or end > offset + 1:
            end, n = 0, 0
        while end <= offset:
            size = min(PIECE, offset + 1 - end)
            n += int(np.count_nonzero(self.read(self._starts[shard_index] + end, size) == EOT))
            end += size
        self._counted = (shard_index, end, n)
        return n


def split_of(name):
    """'train' or 'val' for the file name of a shard, None for any other file."""
    if name.startswith(".") or not name.endswith((".npy", ".bin")):
        return None
    return ([None] + re.findall(r"(?<![a-zA-Z])(train|val)(?![a-zA-Z])", name))[-1]


def open_shards(folder, split):
    """
    The shards of a split ('train' or 'val') in a folder, sorted by name, as a TokenStream. Formats
    and sizes are checked, and compared with the manifest where there is one, without reading the
    tokens. Raises UserError.
    """
    folder, found = os.fspath(folder), []
    with contextlib.suppress(OSError):
        found = sorted(n for n in os.listdir(folder) if split_of(n))
    mine = [n for n in found if split_of(n) == split]
    if not mine:
        hint = "run `python fineweb.py`, or name the folder that holds them"
        raise UserError(f"no {split} shards in {folder}; {hint}")
    kinds = {n[-4:]: n for n in found}
    if len(kinds) > 1:
        both = " and ".join(kinds.values())
        raise UserError(f"{folder} holds two data sets, {both}; keep the .npy or the .bin files")
    shards = [open_shard(os.path.join(folder, n)) for n in mine]
    compare_with_manifest(folder, split, {s.name: s.count for s in shards})
    return TokenStream(shards)


def open_shard(path):
    """The Shard in a .npy or .bin file, from its header and its size. Raises UserError."""
    try:
        with open(path, "rb") as f:
            count = (read_npy_header if path.endswith(".npy") else read_bin_header)(f, path)
            start, size = f.tell(), os.fstat(f.fileno()).st_size
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror or e}") from e
    if count == 0:
        raise UserError(f"{path} holds no tokens; delete it")
    if size != start + 2 * count:
        raise UserError(
            f"{path} has {size:,} bytes and its header says {start + 2 * count:,}: it is damaged; "
            "delete it and make or copy it again"
        )
    return Shard(os.path.basename(path), count, path, start)


def read_npy_header(f, path):
    """Number of tokens in a .npy file; leaves it open at the first of them."""
    form = np.lib.format
    try:
        read = {1: form.read_array_header_1_0, 2: form.read_array_header_2_0}
        shape, _, dtype = read[form.read_magic(f)[0]](f)
    except Exception as e:  # numpy promises ValueError, and a garbled header gives others too
        raise UserError(f"{path} is not a .npy file of tokens; delete it or move it away") from e
    if dtype != np.dtype("<u2") or len(shape) != 1:
        raise UserError(
            f"{path} holds {dtype} {shape}, not uint16 (tokens,); save it with "
            "np.save(path, tokens.astype(np.uint16).reshape(-1))"
        )
    return shape[0]


def read_bin_header(f, path):
    """The same for a .bin file as llm.c and modded-nanogpt write them."""
    header = np.frombuffer(f.read(BIN_HEADER_BYTES).ljust(BIN_HEADER_BYTES, b"\0"), dtype="<i4")
    if header[0] != BIN_MAGIC or header[1] != BIN_VERSION or header[2] < 0:
        raise UserError(
            f"{path} is not a .bin file of GPT-2 tokens (256 int32: {BIN_MAGIC}, {BIN_VERSION}, "
            "token count; then uint16); delete it or move it away"
        )
    return int(header[2])


def load_manifest(folder):
    """manifest.json of a folder as a dict, None where there is none. Raises UserError."""
    path = os.path.join(folder, MANIFEST)
    try:
        with open(path, encoding="utf-8") as f:
            manifest = json.load(f)
        assert manifest["format"] == MANIFEST_FORMAT
        assert all({"name", "tokens", "sha256"} <= set(s) for s in manifest["shards"])
        return manifest
    except FileNotFoundError:
        return None
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror or e}") from e
    except (ValueError, KeyError, TypeError, AssertionError) as e:
        raise UserError(f"{path} is not a manifest of this fineweb.py; move it away") from e


def compare_with_manifest(folder, split, counts):
    """Refuse shards ({name: tokens}) that differ from the manifest, where there is one."""
    manifest = load_manifest(folder)
    if manifest is None:
        return
    listed = {s["name"]: s["tokens"] for s in manifest["shards"] if split_of(s["name"]) == split}
    faults = [
        f"{name} " + ("is missing" if name not in counts else "is not listed" if name not in listed
                      else f"has {counts[name]:,} tokens, not {listed[name]:,}")
        for name in sorted({*counts, *listed}) if counts.get(name) != listed.get(name)
    ]  # fmt: skip
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise UserError(
            f"{folder} differs from its {MANIFEST}: {', '.join(faults[:3])}{more}; "
            "see `python fineweb.py --verify`"
        )


def open_text(path, encode):
    """
    (train stream, val stream, sha256 hex) of one UTF-8 text file, in memory: the first
    int(0.9 * tokens) tokens and the rest, no EOT. Line ends are read as '\\n' on every system, and
    the hash is that of the text so read. Raises UserError.
    """
    try:
        with open(path, encoding="utf-8") as f:
            text = f.read()
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror or e}") from e
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text (byte {e.start:,}); convert it to UTF-8") from e
    tokens = encode(text)
    n = int(0.9 * len(tokens))
    if n == 0:
        raise UserError(f"{path} holds {len(tokens)} tokens, too few to train on; use more text")
    name = os.path.basename(path)
    train, val = (TokenStream([Shard(name, len(t), array=t)]) for t in (tokens[:n], tokens[n:]))
    return train, val, hashlib.sha256(text.encode("utf-8")).hexdigest()


# -----------------------------------------------------------------------------
# Documents: texts in an order that never changes, given out as jobs for the workers

JOB_TOKENS = 1 << 17  # about what a worker is given at a time: 30 ms of work
JOB_DOCUMENTS = 1000
STREAM_BUFFER = 10_000  # documents that --streaming --shuffle draws from


class Texts:
    """Documents that this process reads; `read(k)` iterates over the texts from document k on."""

    def __init__(self, read, total=None, mark=lambda: None):
        self.read, self.total = read, total
        self.mark = mark  # gives a note, for the manifest, of how far the source has been read

    def jobs(self, first):
        """Yields (first document, list of texts, note of where the source was before them)."""
        texts, chars, mark = [], 0, None
        for text in self.read(first):
            texts.append(text)
            chars += len(text or "")
            if chars >= 4 * JOB_TOKENS or len(texts) >= JOB_DOCUMENTS:
                yield first, texts, mark
                first, texts, chars, mark = first + len(texts), [], 0, self.mark()
        if texts:
            yield first, texts, mark


class Table:
    """
    Documents of a memory-mapped datasets.Dataset, in its order or in that of `seed`. The workers
    read them: pages of a map count as resident memory, and this process would end up with all.
    """

    def __init__(self, dataset, column, seed=None):
        self.dataset, self.column, self.total = dataset, column, len(dataset)
        self.per_job = 16  # documents, before anything is known of their length
        # RandomState, unlike default_rng, promises the same permutation in every version.
        self.order = None if seed is None else np.random.RandomState(seed).permutation(self.total)

    def jobs(self, first):
        """Yields (first document, (first document, end), None)."""
        while first < self.total:
            end = min(first + self.per_job, self.total)
            yield first, (first, end), None
            first = end

    def texts(self, first, end):
        rows = slice(first, end) if self.order is None else self.order[first:end]
        return self.dataset[rows][self.column]


def expand(patterns):
    """The files that paths and globs stand for, in order, each once. Raises UserError."""
    paths = []
    for pattern in patterns:
        found = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not found:
            raise UserError(f"no file {pattern}; check --files")
        paths += found
    for path in paths:
        if not path.endswith((".parquet", ".jsonl", ".jsonl.gz", ".txt")):
            raise UserError(f"{path} is not .parquet, .jsonl, .jsonl.gz or .txt; check --files")
    return list(dict.fromkeys(paths))


def open_lines(path):
    return (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8")


def documents_in(path):
    """Number of documents in a file: rows of a .parquet, lines of a .jsonl, 1 for a .txt."""
    if path.endswith(".txt"):
        return 1
    if path.endswith(".parquet"):
        import pyarrow.parquet as pq

        return pq.read_metadata(path).num_rows
    with open_lines(path) as f:
        return sum(not line.isspace() for line in f)


def read_file(path, column):
    """Iterates over the texts of one file."""
    if path.endswith(".txt"):
        with open(path, encoding="utf-8") as f:
            yield f.read()
    elif path.endswith(".parquet"):
        import pyarrow.parquet as pq

        with pq.ParquetFile(path) as f:
            check_column(path, column, {field.name: str(field.type) for field in f.schema_arrow})
            for batch in f.iter_batches(batch_size=256, columns=[column]):
                yield from batch.column(0).to_pylist()
    else:
        with open_lines(path) as f:
            for number, line in enumerate(f, 1):
                if not line.isspace():
                    row = json.loads(line) if line.lstrip().startswith("{") else {}
                    if not isinstance(row.get(column), str):
                        types = {k: type(v).__name__ for k, v in row.items()}
                        check_column(f"{path} line {number}", column, types)
                    yield row[column]


def check_column(where, column, types):
    """Refuse a column that is not among {name: name of its type}, or holds no text."""
    if column not in types:
        names = ", ".join(types) or "nothing"
        raise UserError(f"{where} has no column {column}, it has {names}; set --text_column")
    if types[column] not in ("string", "large_string", "string_view", "str"):
        raise UserError(f"column {column} of {where} holds {types[column]}, not text")


def read_files(paths, column, first=0):
    """Iterates over the texts of files, from document `first` on. Raises UserError."""
    for path in paths:
        try:
            if first and (n := documents_in(path)) <= first:
                first -= n
                continue
            yield from itertools.islice(read_file(path, column), first, None)
            first = 0
        except (OSError, EOFError, ValueError, zlib.error) as e:  # pyarrow's errors are among them
            raise UserError(f"{path} cannot be read: {first_line(e)}") from e


def open_files(args):
    """--files as a source: Texts, or with --shuffle a Table of a copy that can be read anywhere."""
    for path in args.files:  # first of all: a wrong column or a damaged file is seen at once
        next(read_files([path], args.text_column), None)
    lines = any(".jsonl" in os.path.basename(p) for p in args.files)  # to count them takes long
    texts = Texts(
        functools.partial(read_files, args.files, args.text_column),
        None if lines else sum(documents_in(p) for p in args.files),
    )
    if args.shuffle is None:
        return texts
    import datasets
    import pyarrow as pa

    path, schema = os.path.join(args.out, SHUFFLE_COPY), pa.schema([("text", pa.large_string())])
    with writing(path), pa.OSFile(path, "wb") as sink, pa.ipc.new_stream(sink, schema) as copy:
        for _, some, _ in texts.jobs(0):
            copy.write_batch(pa.record_batch([pa.array(some, pa.large_string())], schema=schema))
    return Table(datasets.Dataset.from_file(path), "text", args.shuffle)


def open_hub(args, note):
    """
    --dataset as a source: a Table of the downloaded set, or with --streaming Texts. `note` is what
    the manifest says about how far the stream was read.
    """
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    where = {"split": args.split, "revision": args.revision, "streaming": args.streaming}
    try:
        data = datasets.load_dataset(args.dataset, args.name, **where)
    except Exception as e:
        raise hub_error(args.dataset, e) from e
    if data.features:
        types = {k: getattr(v, "dtype", type(v).__name__) for k, v in data.features.items()}
        check_column(args.dataset, args.text_column, types)
        data = data.select_columns([args.text_column])
    if not args.streaming:
        return Table(data, args.text_column, args.shuffle)
    total = getattr((data.info.splits or {}).get(args.split), "num_examples", None)
    if args.shuffle is not None:
        print(f"--streaming shuffles the files and a buffer of {STREAM_BUFFER:,} documents")
        data = data.shuffle(seed=args.shuffle, buffer_size=STREAM_BUFFER)
        note = None
    seen = [0]  # documents read

    def mark():
        if args.shuffle is None:  # the state of a shuffled stream lacks its buffer
            return {"datasets": datasets.__version__, "document": seen[0], "at": data.state_dict()}

    return Texts(functools.partial(read_stream, data, args, note, seen), total, mark)


def read_stream(data, args, note, seen, first):
    """Iterates over the texts of a streamed data set from document `first` on. Raises Fault."""
    import datasets

    near = note and note["datasets"] == datasets.__version__ and note["document"] <= first
    seen[0] = note["document"] if near else 0
    data.load_state_dict(note["at"] if near else None)
    try:
        for row in data:
            seen[0] += 1
            if seen[0] > first:
                if args.text_column not in row:
                    check_column(args.dataset, args.text_column, dict.fromkeys(row, "str"))
                yield row[args.text_column]
    except UserError:
        raise
    except Exception as e:
        raise Fault(f"{args.dataset} cannot be read on: {first_line(e)}") from e


def hub_error(dataset, e):
    """The error to raise for one of the hub's: the user's, where a name is wrong, or a Fault."""
    kinds = {t.__name__ for t in type(e).__mro__}
    if kinds & {"DatasetNotFoundError", "RepositoryNotFoundError", "RevisionNotFoundError"}:
        hint = "check --dataset and --revision, or log in with `hf auth login`"
        return UserError(f"no dataset {dataset} that can be read ({first_line(e, 120)}); {hint}")
    if "ValueError" in kinds and "ArrowException" not in kinds:  # an unknown config or split
        return UserError(f"{dataset}: {first_line(e)}; check --name and --split")
    return Fault(f"{dataset} cannot be had from the hub: {first_line(e)}; check the network")


def resolve_revision(args):
    """The commit of the dataset, so that a rerun reads what this run reads; None for a folder."""
    from huggingface_hub import HfApi, constants

    if os.path.isdir(args.dataset) or constants.HF_HUB_OFFLINE:
        return args.revision
    try:
        return HfApi().dataset_info(args.dataset, revision=args.revision, timeout=60).sha
    except Exception as e:
        raise hub_error(args.dataset, e) from e


# -----------------------------------------------------------------------------
# Workers: texts in, tokens out, in order

WORKER = {}  # in a worker process: what start_worker was given


def start_worker(encode, table):
    """Runs first in each worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    threading.Thread(target=end_with_parent, daemon=True).start()
    WORKER.update(encode=encode, table=table)


def end_with_parent():
    multiprocessing.parent_process().join()  # however it ends, a SIGKILL included
    os._exit(1)


def tokenize(texts, encode):
    """Documents as (tokens uint16 (n,), lengths (documents,)); each is EOT and its own tokens."""
    eot, parts = np.array([EOT], dtype=np.uint16), []
    for text in texts:
        if not isinstance(text, str):
            raise UserError(f"a document is {type(text).__name__}, not text; see --text_column")
        parts += [eot, encode(text)]
    return np.concatenate(parts), np.array([1 + len(p) for p in parts[1::2]])


def run_job(job):
    texts = job if isinstance(job, list) else WORKER["table"].texts(*job)
    return tokenize(texts, WORKER["encode"])


def start_workers(num_proc, encode, source):
    # Spawned everywhere: a fork would copy locks that threads of pyarrow or of the hub hold.
    return concurrent.futures.ProcessPoolExecutor(
        min(num_proc, 61) if os.name == "nt" else num_proc,  # Windows waits for 61 at most
        multiprocessing.get_context("spawn"),
        start_worker,
        (encode, source if isinstance(source, Table) else None),
    )


def tokenized(source, pool, ahead, first):
    """
    Yields (first document, tokens, lengths, note) for all documents from `first` on, in order,
    with up to `ahead` jobs given out beyond the one that is waited for. Where the source breaks
    off, what it gave before comes first and then its error.
    """
    pending, broken, jobs = collections.deque(), None, source.jobs(first)
    try:
        while True:
            try:
                while broken is None and len(pending) <= ahead and (job := next(jobs, None)):
                    pending.append((job[0], pool.submit(run_job, job[1]), job[2]))
            except (UserError, Fault) as e:
                broken = e
            if not pending:
                break
            document, result, mark = pending.popleft()
            tokens, lengths = result.result()
            per_job = JOB_TOKENS * len(lengths) // len(tokens)
            source.per_job = max(1, min(JOB_DOCUMENTS, per_job))
            yield document, tokens, lengths, mark
        if broken:
            raise broken
    finally:
        jobs.close()
        for _, result, _ in pending:
            result.cancel()


# -----------------------------------------------------------------------------
# Writing: shards that are whole or not there


@contextlib.contextmanager
def writing(path):
    """Says in a Fault what could not be written, and why."""
    try:
        yield
    except OSError as e:
        raise Fault(f"{path} cannot be written: {e.strerror or e}") from e


def put_in_place(f, path):
    """Make a written temporary file durable and give it its name."""
    f.flush()
    os.fsync(f.fileno())
    f.close()  # before the rename: Windows renames no open file
    os.replace(f.name, path)
    if os.name != "nt":
        folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def shard_name(index):
    return f"edufineweb_{'train' if index else 'val'}_{index:06d}.npy"


def npy_header(count):
    """What np.save writes before `count` uint16 tokens: 128 bytes for any count."""
    f = io.BytesIO()
    form = {"descr": "<u2", "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(f, form)
    return f.getvalue()


def hash_file(f, seen=lambda n: None):
    """sha256 hex of an open file, read in pieces; `seen` is told the bytes of each."""
    sha256 = hashlib.sha256()
    while piece := f.read(1 << 20):
        sha256.update(piece)
        seen(len(piece))
    return sha256.hexdigest()


class ShardWriter:
    """A shard on its way to disk, written as the tokens come."""

    def __init__(self, folder, index):
        self.path = os.path.join(folder, shard_name(index))
        self.tokens = self.documents = 0
        with writing(self.path):
            self._file = open(self.path + TEMPORARY, "w+b")
            self._file.write(bytes(len(npy_header(0))))  # room for the header

    def add(self, tokens, documents):
        with writing(self.path):
            self._file.write(tokens.data)
        self.tokens += len(tokens)
        self.documents += documents

    def finish(self, start, end):
        """The shard is on disk under its name; returns its entry in the manifest."""
        with writing(self.path):
            self._file.seek(0)
            self._file.write(npy_header(self.tokens))
            self._file.seek(0)
            entry = {
                "name": os.path.basename(self.path),
                "tokens": self.tokens,
                "documents": self.documents,  # that begin in it
                "sha256": hash_file(self._file),
                "start": start,
                "end": end,
            }
            put_in_place(self._file, self.path)
        return entry

    def discard(self):
        with contextlib.suppress(OSError):
            self._file.close()  # may fail to write its last bytes
        with contextlib.suppress(OSError):
            os.remove(self.path + TEMPORARY)


def pieces(batches, skip, size, left):
    """
    Cut tokenized documents into shards of `size` tokens, leaving out the first `skip` tokens and
    all after `left` tokens. Yields (tokens, how many documents begin in them, position behind them,
    note). A position {"document", "token"} says that this token of this document comes next.
    """
    room = size
    for first, tokens, lengths, mark in batches:
        ends = np.cumsum(lengths)
        begins = ends - lengths
        a, skip = skip, 0
        while a < len(tokens):
            b = min(a + room, a + left, len(tokens))
            d = int(np.searchsorted(ends, b, side="right"))  # documents that end by b
            end = {"document": first + d, "token": b - int(begins[d]) if d < len(begins) else 0}
            yield tokens[a:b], int(np.sum((begins >= a) & (begins < b))), end, mark
            left -= b - a
            room = room - (b - a) or size
            a = b
            if not left:
                return


def write_shards(batches, folder, size, index, start, left, progress):
    """
    Write the shards from number `index` and position `start` on, `left` tokens at most. Yields
    (manifest entry, note) when a shard is on disk; tells `progress` (tokens, document).
    """
    shard = None
    try:
        for tokens, documents, end, mark in pieces(batches, start["token"], size, left):
            shard = shard or ShardWriter(folder, index)
            shard.add(tokens, documents)
            progress(len(tokens), end["document"])
            if shard.tokens == size:
                yield shard.finish(start, end), mark
                shard, start, index = None, end, index + 1
        if shard:
            yield shard.finish(start, end), None
            shard = None
    finally:
        batches.close()
        if shard:
            shard.discard()


# -----------------------------------------------------------------------------
# The manifest, and a run


def save_manifest(folder, manifest):
    path = os.path.join(folder, MANIFEST)
    with writing(path), open(path + TEMPORARY, "w", encoding="utf-8") as f:
        json.dump(manifest, f, indent=1)
        put_in_place(f, path)


def settings_of(args, old):
    """What decides the bytes of the shards. Without --revision a rerun keeps to that of `old`."""
    shuffle = None if args.shuffle is None else f"seed {args.shuffle}"
    if shuffle and args.streaming:
        import datasets

        shuffle += f", buffer of {STREAM_BUFFER:,}, datasets {datasets.__version__}"
    if args.files:
        source = {"files": [[os.path.basename(p), os.path.getsize(p)] for p in args.files]}
    else:
        known = args.revision is None and old.get("dataset") == args.dataset
        args.revision = old.get("revision") if known else resolve_revision(args)
        source = {k: getattr(args, k) for k in ("dataset", "name", "split", "revision")}
    rest = {k: getattr(args, k) for k in ("text_column", "shard_size", "max_tokens")}
    return {**source, **rest, "shuffle": shuffle, "tokenizer": "gpt2"}


def open_manifest(args):
    """The manifest that a run into --out goes on from. Raises UserError, before time is spent."""
    manifest = load_manifest(args.out)
    old = manifest["settings"] if manifest else {}
    settings = settings_of(args, old)
    differ = [k for k in {**old, **settings} if old.get(k) != settings.get(k)]
    if manifest is None and any(split_of(n) for n in os.listdir(args.out)):
        raise UserError(f"{args.out} holds shards made by something else; choose another --out")
    if manifest is None:
        empty = {"complete": False, "tokens": 0, "documents": 0, "shards": [], "note": None}
        return {"format": MANIFEST_FORMAT, "settings": settings, **empty}
    if differ:
        what = ", ".join(f"{k} {old.get(k)!r}, not {settings.get(k)!r}" for k in differ)[:500]
        raise UserError(f"{args.out} was made with {what}; choose another --out, or delete it")
    return manifest


@contextlib.contextmanager
def only_writer(folder):
    """Holds a lock on the folder that ends with this process, where the system has such locks."""
    try:
        os.makedirs(folder, exist_ok=True)
        lock = open(os.path.join(folder, LOCK), "w")
    except OSError as e:
        raise UserError(f"{folder} cannot be written: {e.strerror}; choose another --out") from e
    with lock:
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise UserError(f"another fineweb.py is writing to {folder}; wait for it") from e
        except (ImportError, OSError):  # Windows, some network file systems
            pass
        yield


def prepare(args, tokenizer=None):
    """Make the shards that --out does not have yet."""
    started = time.perf_counter()
    args.files = expand(args.files) if args.files else None
    with only_writer(args.out):
        manifest = open_manifest(args)
        gone = [i for i, s in enumerate(manifest["shards"]) if not is_whole(args.out, s)]
        if gone or not manifest["complete"]:
            tokenizer = tokenizer or get_tokenizer("gpt2", timeout=60)
            source = open_files(args) if args.files else open_hub(args, manifest["note"])
            args.writing = True
            save_manifest(args.out, manifest)
            pool = start_workers(args.num_proc, tokenizer.encode, source)
            try:
                make(source, pool, args, manifest, gone)
            finally:
                pool.shutdown(cancel_futures=True)
            with contextlib.suppress(OSError):
                os.remove(os.path.join(args.out, SHUFFLE_COPY))
    tokens, shards = manifest["tokens"], manifest["shards"]
    size, seconds = sum(map(file_size, shards)) / 1e9, time.perf_counter() - started
    print(f"{args.out}: {tokens:,} tokens of {manifest['documents']:,} documents in {len(shards)} "
          f"shards, {size:.2f} GB, {seconds:.0f} s")  # fmt: skip
    if len(shards) == 1:
        print(f"all of it is the val shard; for train shards, --shard_size well below {tokens:,}")


def make(source, pool, args, manifest, gone):
    """Write again the shards number `gone`, and then all that are not in the manifest yet."""
    from tqdm import tqdm

    shards = manifest["shards"]
    ahead = max(32, 3 * args.num_proc)  # enough to do while a shard is brought to disk

    def write(index, start, left, progress=lambda *_: None):
        batches = tokenized(source, pool, ahead, start["document"])
        return write_shards(batches, args.out, args.shard_size, index, start, left, progress)

    for i in gone:
        for entry, _ in write(i, shards[i]["start"], shards[i]["tokens"]):
            if entry != shards[i]:
                raise Fault(f"{entry['name']} came out different: the source is not what it was")
            print(f"{entry['name']} made again")
    start = shards[-1]["end"] if shards else {"document": 0, "token": 0}
    left = (args.max_tokens or math.inf) - manifest["tokens"]
    with tqdm(unit=" tokens", unit_scale=True, initial=manifest["tokens"], disable=None) as bar:

        def progress(tokens, document):
            bar.update(tokens)
            if source.total and document:  # tokens in all, guessed from the documents so far
                bar.total = int(min(bar.n * source.total / document, manifest["tokens"] + left))

        rest = () if manifest["complete"] else write(len(shards), start, left, progress)
        for entry, note in rest:
            shards.append(entry)
            left -= entry["tokens"]
            manifest["tokens"] += entry["tokens"]
            manifest["documents"] += entry["documents"]
            manifest["note"] = note or manifest["note"]
            save_manifest(args.out, manifest)
            bar.set_postfix_str(f"{len(shards)} shards done")
            if bar.disable:
                print(f"{entry['name']}: {entry['tokens']:,} tokens", flush=True)
    if not shards:
        raise UserError("there are no documents to read; check --files or --dataset")
    save_manifest(args.out, {**manifest, "complete": True, "note": None})


def file_size(entry):
    return len(npy_header(0)) + 2 * entry["tokens"]


def is_whole(folder, entry):
    """Whether the shard of a manifest entry is there with its size."""
    path = os.path.join(folder, entry["name"])
    return os.path.isfile(path) and os.path.getsize(path) == file_size(entry)


def verify(folder):
    """Compare sizes and hashes of all shards with the manifest, and name each bad one."""
    from tqdm import tqdm

    manifest = load_manifest(folder)
    if manifest is None:
        raise UserError(f"no {MANIFEST} in {folder}: nothing to compare with; was it made here?")
    shards = {s["name"]: s for s in manifest["shards"]}
    bad = {n: "not in the manifest" for n in os.listdir(folder) if split_of(n) and n not in shards}
    total = sum(map(file_size, shards.values()))
    with tqdm(total=total, unit="B", unit_scale=True, disable=None) as bar:
        for name, entry in shards.items():
            path = os.path.join(folder, name)
            if not is_whole(folder, entry):
                bad[name] = "of a wrong size" if os.path.isfile(path) else "missing"
                continue
            with open(path, "rb") as f:
                if hash_file(f, bar.update) != entry["sha256"]:
                    bad[name] = "of a wrong sha256"
    for name, fault in sorted(bad.items()):
        print(f"{os.path.join(folder, name)} is {fault}", file=sys.stderr)
    if bad:
        raise UserError(
            f"{len(bad)} bad shards in {folder}; delete them and give the command that made them "
            "again: it makes only what is missing"
        )
    state = "" if manifest["complete"] else "; not finished: the command that made them goes on"
    print(f"{folder}: {len(shards)} shards, {manifest['tokens']:,} tokens, all good{state}")


# -----------------------------------------------------------------------------
# The command

HUB_DEFAULTS = {  # what makes long downloads last; the environment goes before it
    "HF_HUB_ENABLE_HF_TRANSFER": "0",
    "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_DOWNLOAD_TIMEOUT": "300",
    "HF_HUB_ETAG_TIMEOUT": "60",
}
READ = {  # flag -> (its default, shown in the help; the help)
    "dataset": (None, f"data set on the Hugging Face hub, or a folder ({DATASET})"),
    "name": (None, f"its configuration ({CONFIG}: 10 billion tokens)"),
    "split": ("train", "its split (train)"),
    "revision": (None, "its branch, tag or commit (main, as it is when the first shard is made)"),
    "text_column": ("text", "the column that holds the text (text)"),
    "streaming": (
        False,
        "read over the network as it goes: no copy on disk, and the network must last. Without it "
        f"`datasets` downloads all first and keeps it, about 75 GB for {CONFIG}",
    ),
    "files": (
        None,
        "read these instead: local .parquet, .jsonl, .jsonl.gz (a row is a document) or .txt (a "
        "file is one); paths or globs, in this order",
    ),
}
WRITE = {
    "out": (OUT, "folder of the shards (edu_fineweb10B beside fineweb.py); takes 2 bytes a token"),
    "shard_size": (10**8, "tokens per shard (100000000, 200 MB each); the first shard is val"),
    "max_tokens": (
        0,
        "stop after N tokens (0 = all); 200000000 is a first try: 0.4 GB, a minute or two, and "
        "with --streaming a download of 0.6 GB",
    ),
    "shuffle": (
        None,
        "all documents in a random order, the same for a SEED (as they come). With --files takes "
        "disk for a copy of the texts meanwhile, else slow random reads on a hard disk; with "
        f"--streaming it is the files and a buffer of {STREAM_BUFFER:,} documents that is "
        "shuffled, and a rerun reads from the start again",
    ),
}
TYPES = {"shard_size": int, "max_tokens": int, "shuffle": int, "num_proc": int}
METAVARS = {"files": "PATH", "shuffle": "SEED", "out": "FOLDER", "dataset": "REPO"}


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def cores():
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parse_args(argv=None):
    """The flags of the command; --shard-size is --shard_size."""
    parser = Parser(
        prog="fineweb.py",
        description="FineWeb-Edu, another data set or your own files as token shards for "
        "train_gpt2.py. It can be killed at any moment: the same command goes on.",
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=22, width=98),
    )
    work = {
        "num_proc": (cores(), "worker processes (one per core: %(default)s), 100 to 200 MB each; a "
                     "core makes 2 to 4 million tokens/s, so 10 billion take about a core-hour"),
        "verify": (False, "only check the shards in --out: sizes and sha256, a minute for 20 GB"),
    }  # fmt: skip
    for title, flags in {"what to read": READ, "what to write": WRITE, "how": work}.items():
        group = parser.add_argument_group(title)
        for flag, (default, text) in flags.items():
            kind = {"action": "store_true"}
            if default is not False:
                kind = {"type": TYPES.get(flag, str), "nargs": "+" if flag == "files" else None}
                kind["metavar"] = METAVARS.get(flag, "N" if flag in TYPES else "NAME")
            group.add_argument(f"--{flag}", default=default, help=text, **kind)
    given = sys.argv[1:] if argv is None else argv
    given = [re.sub("(?<=^--)[^=]+", lambda m: m[0].replace("-", "_"), a) for a in given]
    args = parser.parse_args(given)
    for flag, least in {"shard_size": 1, "max_tokens": 0, "num_proc": 1, "shuffle": 0}.items():
        if getattr(args, flag) is not None and getattr(args, flag) < least:
            parser.error(f"--{flag} {getattr(args, flag)}: must be at least {least}")
    if args.files and (args.dataset or args.name or args.revision or args.streaming):
        parser.error("--files goes without --dataset, --name, --revision and --streaming")
    args.name = args.name or (None if args.dataset else CONFIG)
    args.dataset = args.dataset or DATASET
    args.writing = False  # no shard can have been finished yet
    return args


def main(argv=None, tokenizer=None):
    """The command; returns its exit status."""
    args = parse_args(argv)
    for name, value in HUB_DEFAULTS.items():
        os.environ.setdefault(name, value)
    try:
        verify(args.out) if args.verify else prepare(args, tokenizer)
        return 0
    except UserError as e:
        status, why = 2, str(e)
    except KeyboardInterrupt:
        status, why = 130, "stopped"
    except concurrent.futures.BrokenExecutor:
        status, why = 1, "a worker process died (killed, or out of memory?)"
    except (Fault, OSError) as e:
        status, why = 1, str(e)
    if args.writing:
        n = len((load_manifest(args.out) or {"shards": []})["shards"])
        why += f"; the {n} finished shards in {args.out} are safe, and the same command goes on"
    print(f"fineweb.py: error: {why}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
