"""
FineWeb-Edu, or any text, as token shards: this file makes and checks them, tokens.py reads them.

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
import queue
import signal
import sys
import time
import zlib
from dataclasses import dataclass

import numpy as np

from common import (
    Parser, RunError, UserError, add_flags, check_ranges, flag, one_line, put_in_place, try_lock,
)
from tokens import (  # noqa: F401  the readers too: trainer and command open shards alike
    EOT, MANIFEST, MANIFEST_FORMAT, Tokenizer, TokenStream, get_tokenizer, load_manifest,
    open_shards, open_text, split_of,
)

DATASET, CONFIG = "HuggingFaceFW/fineweb-edu", "sample-10BT"
OUT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "edu_fineweb10B")
LOCK, SHUFFLE_COPY = ".lock", ".documents.arrow"
TEMPORARY = ".tmp"  # ends the name of a file until it is whole


# -----------------------------------------------------------------------------
# Documents: texts in an order that never changes, given out as jobs for the workers

JOB_TOKENS = 1 << 18  # about what a worker is given at a time: 60 ms of work
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
            raise UserError(f"{path} cannot be read: {one_line(e)}") from e


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
            try:
                column = pa.array(some, pa.large_string())
            except UnicodeEncodeError:  # half a surrogate pair: take it for what tiktoken does
                some = [t and t.encode("utf-16", "surrogatepass") for t in some]
                some = [t and t.decode("utf-16", "replace") for t in some]
                column = pa.array(some, pa.large_string())
            copy.write_batch(pa.record_batch([column], schema=schema))
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
    """Iterates over the texts of a streamed data set from document `first` on. Raises RunError."""
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
        raise RunError(f"{args.dataset} cannot be read on: {one_line(e)}") from e


def hub_error(dataset, e):
    """The error to raise for one of the hub's: the user's, where a name is wrong, or a RunError."""
    kinds = {t.__name__ for t in type(e).__mro__}
    if kinds & {"DatasetNotFoundError", "RepositoryNotFoundError", "RevisionNotFoundError",
                "EmptyDatasetError", "DataFilesNotFoundError", "HFValidationError"}:
        hint = "check --dataset and --revision, or log in with `hf auth login`"
        return UserError(f"no dataset {dataset} that can be read ({one_line(e, 120)}); {hint}")
    if "ValueError" in kinds and "ArrowException" not in kinds:  # an unknown config or split
        return UserError(f"{dataset}: {one_line(e)}; check --name and --split")
    return RunError(f"{dataset} cannot be had from the hub: {one_line(e)}; check the network")


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


class Workers:
    """
    Processes that tokenize. A thread of this process waits for each: it sends a job, receives the
    result, and finds a broken pipe where the worker is dead. (concurrent.futures' own pool of
    processes can hang there before Python 3.11.6 and 3.12.1.) A worker in turn ends when its pipe
    breaks, that is with this process, however that ends.
    """

    def __init__(self, num_proc, encode, source):
        # Spawned everywhere: a fork would copy locks that threads of pyarrow or of the hub hold.
        context, self.pipes = multiprocessing.get_context("spawn"), queue.SimpleQueue()
        table = source if isinstance(source, Table) else None
        self.threads = concurrent.futures.ThreadPoolExecutor(num_proc)
        self.processes = []
        for _ in range(num_proc):
            mine, theirs = context.Pipe()
            process = context.Process(target=work, args=(theirs, encode, table), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.put(mine)

    def submit(self, job):
        """Future of tokenize's result for a list of texts, or for (first, end) of the Table."""
        return self.threads.submit(self._ask, job)

    def _ask(self, job):
        pipe = self.pipes.get()
        try:
            pipe.send(job)
            result = pipe.recv()
        except (EOFError, OSError) as e:
            raise RunError("a worker process died (killed, or out of memory?)") from e
        finally:
            self.pipes.put(pipe)
        if isinstance(result, Exception):
            raise result
        return result

    def close(self):
        self.threads.shutdown(cancel_futures=True)
        for _ in self.processes:
            self.pipes.get().close()
        for process in self.processes:
            process.join()


def work(pipe, encode, table):
    """What a worker does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    with contextlib.suppress(EOFError, OSError):  # the parent has ended
        while True:
            job = pipe.recv()
            try:
                result = tokenize(job if isinstance(job, list) else table.texts(*job), encode)
            except Exception as e:
                result = e
            pipe.send(result)


def tokenize(texts, encode):
    """Documents as (tokens uint16 (n,), lengths (documents,)); each is EOT and its own tokens."""
    eot, parts = np.array([EOT], dtype=np.uint16), []
    for text in texts:
        if not isinstance(text, str):
            raise UserError(f"a document is {type(text).__name__}, not text; see --text_column")
        parts += [eot, encode(text)]
    return np.concatenate(parts), np.array([1 + len(p) for p in parts[1::2]])


def tokenized(source, workers, ahead, first):
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
                    pending.append((job[0], workers.submit(job[1]), job[2]))
            except (UserError, RunError) as e:
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
    """Says in a RunError what could not be written, and why."""
    try:
        yield
    except OSError as e:
        raise RunError(f"{path} cannot be written: {e.strerror or e}") from e


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
        if not try_lock(lock):
            raise UserError(f"another fineweb.py is writing to {folder}; wait for it")
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
            workers = Workers(args.num_proc, tokenizer.encode, source)
            try:
                make(source, workers, args, manifest, gone)
            finally:
                workers.close()
            with contextlib.suppress(OSError):
                os.remove(os.path.join(args.out, SHUFFLE_COPY))
    tokens, shards = manifest["tokens"], manifest["shards"]
    size, seconds = sum(map(file_size, shards)) / 1e9, time.perf_counter() - started
    print(f"{args.out}: {tokens:,} tokens of {manifest['documents']:,} documents in {len(shards)} "
          f"shards, {size:.2f} GB, {seconds:.0f} s")  # fmt: skip
    if len(shards) == 1:
        print(f"all of it is the val shard; for train shards, --shard_size well below {tokens:,}")


def make(source, workers, args, manifest, gone):
    """Write again the shards number `gone`, and then all that are not in the manifest yet."""
    from tqdm import tqdm

    shards = manifest["shards"]
    ahead = max(32, 3 * args.num_proc)  # enough to do while a shard is brought to disk

    def write(index, start, left, progress=lambda *_: None):
        batches = tokenized(source, workers, ahead, start["document"])
        return write_shards(batches, args.out, args.shard_size, index, start, left, progress)

    for i in gone:
        for entry, _ in write(i, shards[i]["start"], shards[i]["tokens"]):
            if entry != shards[i]:
                raise RunError(f"{entry['name']} came out different: the source is not what it was")
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
FLAG_GROUPS = {"dataset": "what to read", "out": "what to write", "num_proc": "how"}


def cores():
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass
class Flags:
    """What is read, what becomes of it, and how."""

    dataset: str = flag(None, "data set on the Hugging Face hub, or a folder", str, shown=DATASET)
    name: str = flag(None, "its configuration", str, shown=f"{CONFIG}, 10 billion tokens")
    split: str = flag("train", "its split")
    revision: str = flag(None, "its branch, tag or commit", str,
                         shown="main, as it is when the first shard is made")
    text_column: str = flag("text", "the column that holds the text")
    streaming: bool = flag(
        False, "read over the network as it goes: no copy on disk, and the network must last. "
        f"Without it `datasets` downloads all first and keeps it, about 75 GB for {CONFIG}",
        shown="")
    files: list = flag(
        None, "read these instead: local .parquet, .jsonl, .jsonl.gz (a row is a document) or .txt "
        "(a file is one); paths or globs, in this order", list, shown="")

    out: str = flag(OUT, "folder of the shards; takes 2 bytes a token",
                    shown="edu_fineweb10B beside fineweb.py")
    shard_size: int = flag(10**8, "tokens per shard; the first shard is val", ge=1,
                           shown="100000000, 200 MB each")
    max_tokens: int = flag(
        0, "stop after so many tokens, 0 = all; 200000000 is a first try: 0.4 GB, a minute or two, "
        "and with --streaming a download of 0.6 GB", ge=0)
    shuffle: int = flag(
        None, "seed of a random order of all documents. With --files takes disk for a copy of the "
        "texts meanwhile, else slow random reads on a hard disk; with --streaming it is the files "
        f"and a buffer of {STREAM_BUFFER:,} documents that is shuffled, and a rerun reads from the "
        "start again", int, ge=0, le=2**32 - 1, shown="as they come")

    num_proc: int = flag(
        cores(), "worker processes, 100 to 200 MB each; a core makes 2 to 4 million tokens/s, so "
        "10 billion take about a core-hour", ge=1, shown=f"one per core: {cores()}")
    verify: bool = flag(False, "only check the shards in --out: sizes and sha256, a minute for 20 "
                        "GB", shown="")

    def __post_init__(self):
        check_ranges(self)
        if self.files and (self.dataset or self.name or self.revision or self.streaming):
            raise UserError("--files goes without --dataset, --name, --revision and --streaming")
        self.name = self.name or (None if self.dataset else CONFIG)
        self.dataset = self.dataset or DATASET


def parse_args(argv=None):
    """The flags of the command. Raises UserError."""
    parser = Parser("FineWeb-Edu, another data set or your own files as token shards for "
                    "train_gpt2.py.\nIt can be killed at any moment: the same command goes on.")
    add_flags(parser, Flags, FLAG_GROUPS)
    return Flags(**vars(parser.parse_args(argv)))


def main(argv=None, tokenizer=None):
    """The command; returns its exit status."""
    args = None
    for name, value in HUB_DEFAULTS.items():
        os.environ.setdefault(name, value)
    try:
        args = parse_args(argv)
        verify(args.out) if args.verify else prepare(args, tokenizer)
        return 0
    except UserError as e:
        status, why = 2, str(e)
    except KeyboardInterrupt:
        status, why = 130, "stopped"
    except (RunError, OSError) as e:
        status, why = 1, str(e)
    if getattr(args, "writing", False):  # not before a shard can have been finished
        n = len((load_manifest(args.out) or {"shards": []})["shards"])
        why += f"; the {n} finished shards in {args.out} are safe, and the same command goes on"
    print(f"fineweb.py: error: {why}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
