"""
Token shards for train_gpt2.py: fetched ready made, or made here from FineWeb-Edu or any text.

    python fineweb.py --ready 10                # the quickest: a billion tokens, 2 GB to download
    python fineweb.py --ready                   # all of the sample, ready made: 20 GB
    python fineweb.py                           # the same 10B tokens, made here from the texts
    python fineweb.py --streaming               # and with no copy of the data set on disk
    python fineweb.py --streaming --max_tokens 200000000    # two shards of them
    python fineweb.py --files 'texts/*.txt' --out mine --shard_size 1000000
    python fineweb.py --verify                  # sizes and sha256 of what is there

A shard is a plain 1-D uint16 .npy file of GPT-2 token ids. A document is <|endoftext|> and then its
ordinary tokens; documents follow each other and run on from one shard into the next. The first
shard is the validation split: edufineweb_val_000000.npy, edufineweb_train_000001.npy, ...
Ready made shards are llm.c's .bin files: such tokens behind another header.

manifest.json, beside the shards, says what was asked for and, for each shard, its tokens,
documents, sha256 and where in the source it begins and ends. Killed at any moment, a rerun goes on
behind the last shard listed there, and the result is the same bytes.
"""

import contextlib
import glob
import gzip
import itertools
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import zlib
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import dataclass, fields

import numpy as np

from plumbing.errors import RunError, UserError, one_line, run_main, warn
from plumbing.files import HERE, atomic_write
from plumbing.flags import Parser, add_flags, check_ranges, flag
from plumbing.manifest import (
    complete, entry_of, fault_of, only_writer, open_manifest, promise, verify,
)
from plumbing.tokens import EOT, TokenStream, get_tokenizer, load_manifest, open_shard, split_of

DATASET, CONFIG = "HuggingFaceFW/fineweb-edu", "sample-10BT"
READY = "kjj0/finewebedu10B-gpt2"  # that sample as tokens
ALL = sys.maxsize  # --ready without a number
STREAM_BUFFER = 10_000  # documents that --streaming --shuffle draws from

# -----------------------------------------------------------------------------
# Flags


def cores():
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass
class Flags:
    """What is read, what becomes of it, and how. --ready goes without those of the group "make"."""

    ready: int = flag(
        "ready", None, "fetch the val shard and the first N train shards, 200 MB each, of a data "
        "set of tokens; without N all. A larger N later fetches what is missing", ge=1)
    dataset: str = flag("both", None, "data set on the Hugging Face hub, or a folder",
                        shown=f"{DATASET}; with --ready {READY}")
    revision: str = flag("both", None, "its branch, tag or commit",
                         shown="main, as it is when the first shard is made")
    out: str = flag("both", os.path.join(HERE, "edu_fineweb10B"), "folder of the shards",
                    shown="edu_fineweb10B beside fineweb.py, where the trainer looks")
    verify: bool = flag("both", False, "only check the shards in --out: size, sha256", shown="")

    name: str = flag("make", None, "its configuration", shown=f"{CONFIG}, 10 billion tokens")
    split: str = flag("make", "train", "its split")
    text_column: str = flag("make", "text", "the column that holds the text")
    streaming: bool = flag(
        "make", False, "read over the network as it goes: no copy on disk, and the network must "
        f"last. Else all is downloaded first and kept, about 75 GB for {CONFIG}", shown="")
    files: list = flag(
        "make", None, "read these: .parquet, .jsonl, .jsonl.gz (a row is a document), .txt (a file "
        "is one); paths or globs, in this order. Takes disk for a copy meanwhile", shown="")
    shard_size: int = flag("make", 10**8, "tokens per shard; the first is val", ge=1, le=10**10)
    max_tokens: int = flag("make", 0, "stop after so many tokens, 0 = all; 200000000 are 0.4 GB, "
                           "and with --streaming a download of 0.6 GB", ge=0)
    shuffle: int = flag(
        "make", None, "seed of a random order of all documents; with --streaming of the files and "
        f"of a buffer of {STREAM_BUFFER:,} documents, and a rerun reads from the start again",
        ge=0, le=2**32 - 1, shown="as they come")
    num_proc: int = flag("make", cores(), "worker processes, 200 MB each; a core makes 2 to 4 "
                         "million tokens/s", ge=1, shown=f"one per core: {cores()}")

    def __post_init__(self):
        check_ranges(self)
        if self.files and (self.dataset or self.name or self.revision or self.streaming):
            raise UserError("--files goes without --dataset, --name, --revision and --streaming")
        for f in fields(self):
            if self.ready and f.metadata["group"] == "make" and getattr(self, f.name) != f.default:
                raise UserError(f"--ready goes without --{f.name}: its shards are made already")
        ours = self.dataset in (None, DATASET)  # typed or not; the hub's own default is all of it
        self.name = self.name or (CONFIG if ours else None)
        self.dataset = self.dataset or (READY if self.ready else DATASET)


def parse_args(argv=None):
    """The flags of the command. Raises UserError."""
    parser = Parser("Token shards for train_gpt2.py, fetched ready made or made here.\n"
                    "It can be killed at any moment: the same command goes on.")
    first, text = parser.add_argument_group("the quickest way"), fields(Flags)[0].metadata["text"]
    first.add_argument("--ready", nargs="?", type=int, const=ALL, metavar="N", help=text)
    titles = {"both": "what, and where to", "make": "making shards here, that is without --ready"}
    add_flags(parser, Flags, titles, leave_out=("ready",))
    return Flags(**vars(parser.parse_args(argv)))


# -----------------------------------------------------------------------------
# Documents: texts in an order that never changes, given out as jobs for the workers

JOB_TOKENS = 1 << 18  # about what a worker is given at a time: 60 ms of work
JOB_DOCUMENTS = 1000  # at most, however short they are
PATIENCE = 30  # seconds without documents before --streaming says that the network is silent


class Table:
    """Documents of a memory-mapped datasets.Dataset, in its order or in that of `seed`. The workers
    read them: pages of a map count as resident memory, and this process would end up with all."""

    def __init__(self, dataset, column, seed=None):
        self.dataset, self.column, self.total = dataset, column, len(dataset)
        fitting = 4 * JOB_TOKENS * self.total // (dataset.data.nbytes or 1)
        self.per_job = max(1, min(JOB_DOCUMENTS, fitting))
        # RandomState, unlike default_rng, promises the same permutation in every version.
        self.order = None if seed is None else np.random.RandomState(seed).permutation(self.total)

    def jobs(self, first):
        """Yields (first document, its row and those behind it, None)."""
        for i in range(first, self.total, self.per_job):
            rows = slice(i, i + self.per_job)
            yield i, rows if self.order is None else self.order[rows], None


class Stream:
    """Documents that this process reads over the network as it goes. `note` is what the manifest
    says about how far an earlier run had read: this one need not begin at the beginning."""

    dataset = None  # that a worker could read

    def __init__(self, data, args, note):
        self.data, self.name, self.column, self.note = data, args.dataset, args.text_column, note
        self.total = getattr((data.info.splits or {}).get(args.split), "num_examples", None)
        self.shuffled = args.shuffle is not None
        if self.shuffled:
            self.data = data.shuffle(args.shuffle, buffer_size=STREAM_BUFFER)

    def jobs(self, first):
        """Yields (first document, list of texts, note of where the source was before them)."""
        from datasets import __version__ as version

        # The state of a shuffled stream lacks its buffer. In one version the state stands still
        # once it was set (datasets issue 8308).
        known = not self.shuffled and version != "5.0.0"
        start = self.note or {"datasets": None}
        if not known or start["datasets"] != version or start["document"] > first:
            start = {"document": 0, "at": None}
        self.data.load_state_dict(start["at"])
        rows = itertools.islice(self.data, first - start["document"], None)  # those are written
        texts, note = (row.get(self.column) for row in rows), None
        while some := self.next_texts(texts):
            yield first, some, note
            first += len(some)
            if known:
                note = {"datasets": version, "document": first, "at": self.data.state_dict()}

    def next_texts(self, texts):
        # `datasets` goes on trying for more than ten minutes, and says nothing meanwhile.
        silence = (f"no document for {PATIENCE:g} s: the network does not answer, and is tried "
                   "again and again; Ctrl-C stops, and the finished shards are safe")
        alarm = threading.Timer(PATIENCE, warn, [silence])
        alarm.start()
        try:
            return take(texts)
        except Exception as e:
            raise RunError(f"{self.name} cannot be read on: {one_line(e)}") from e
        finally:
            alarm.cancel()


def take(texts):
    """The next texts of an iterator, enough for a job; none at its end."""
    some, chars = [], 0
    for text in texts:
        some.append(text)
        chars += len(text or "")
        if chars >= 4 * JOB_TOKENS or len(some) >= JOB_DOCUMENTS:  # a token is about 4 characters
            break
    return some


# -----------------------------------------------------------------------------
# Where documents come from: the hub, or --files


@contextlib.contextmanager
def asking_the_hub(dataset):
    """Says in one line what the hub has against a data set, or what is wrong on the way there."""
    try:
        yield
    except Exception as e:
        kinds, said = {t.__name__ for t in type(e).__mro__}, one_line(e)
        absent = kinds & {"DatasetNotFoundError", "RepositoryNotFoundError", "EmptyDatasetError",
                          "RevisionNotFoundError", "DataFilesNotFoundError"}
        if "scripts are no longer supported" in said:
            raise UserError(f"{dataset} is a script, which `datasets` does not run; try the hub's "
                            "own copy with --revision refs/convert/parquet") from e
        # A ValueError is an unknown configuration or split; in old versions a lost network too.
        lost = kinds & {"ArrowException", "LocalEntryNotFoundError"}
        if absent or ("ValueError" in kinds and not lost):
            raise UserError(f"no dataset {dataset} that can be read ({said}); check --dataset, "
                            "--name, --split and --revision, or log in: hf auth login") from e
        raise RunError(f"{dataset} cannot be had from the hub: {said}; check the network, and the "
                       "room on the disk") from e


def open_hub(args, note):
    """--dataset as a source: a Table of the downloaded set, or with --streaming a Stream."""
    import datasets

    where = {"split": args.split, "revision": args.revision, "streaming": args.streaming}
    with asking_the_hub(args.dataset):
        data = datasets.load_dataset(args.dataset, args.name, **where)
    if data.features:
        types = {k: getattr(v, "dtype", type(v).__name__) for k, v in data.features.items()}
        check_column(args.dataset, args.text_column, types)
        data = data.select_columns([args.text_column])
    if args.streaming:
        return Stream(data, args, note)
    return Table(data, args.text_column, args.shuffle)


def open_files(args, path):
    """--files as a source: a Table of a copy at `path` that can be read at any place. The copy is
    whole before the first shard is begun, so a damaged file is found before time is spent."""
    import datasets
    import pyarrow as pa

    schema = pa.schema([("text", pa.large_string())])
    with pa.OSFile(path, "wb") as sink, pa.ipc.new_stream(sink, schema) as copy:
        for name in args.files:
            for texts in read_file(name, args.text_column):
                copy.write_batch(pa.record_batch([texts], schema=schema))
    return Table(datasets.Dataset.from_file(path), "text", args.shuffle)


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


def read_file(path, column):
    """Iterates over the texts of a file, as pyarrow arrays. Raises UserError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if not path.endswith(".parquet"):
            texts = read_lines(path, column)
            while some := take(texts):
                yield pa.array(some, pa.large_string())
            return
        with pq.ParquetFile(path) as f:
            check_column(path, column, {field.name: str(field.type) for field in f.schema_arrow})
            for batch in f.iter_batches(batch_size=JOB_DOCUMENTS, columns=[column]):
                texts = batch.column(0).cast(pa.large_string())
                texts.validate(full=True)  # is it UTF-8? nobody has looked yet
                if texts.null_count:
                    raise UserError(f"column {column} of {path} has rows without a text")
                yield texts
    except (OSError, EOFError, ValueError, zlib.error) as e:  # pyarrow's errors are among them
        raise UserError(f"{path} cannot be read: {one_line(e)}; mend it, or leave it out") from e


def read_lines(path, column):
    """Iterates over the texts of a .txt, which is one, or of a .jsonl or .jsonl.gz."""
    with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8-sig") as f:
        if path.endswith(".txt"):
            yield f.read()
            return
        for number, line in enumerate(f, 1):
            if not line.isspace():
                try:
                    row = json.loads(line)
                    types = {k: type(v).__name__ for k, v in row.items()}
                except (ValueError, RecursionError, AttributeError) as e:  # a list has no items()
                    raise UserError(f"{path} line {number} is no JSON object {{...}}; mend it, or "
                                    "take it out") from e
                check_column(f"{path} line {number}", column, types)
                # Half a surrogate pair, which JSON can hold, is U+FFFD here as it is for tiktoken.
                yield row[column].encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def check_column(where, column, types):
    """Refuse a column that is not among {name: name of its type}, or holds no text."""
    if column not in types:
        names = ", ".join(types) or "nothing"
        raise UserError(f"{where} has no column {column}, it has {names}; set --text_column")
    if types[column] not in ("string", "large_string", "string_view", "str"):
        raise UserError(f"column {column} of {where} holds {types[column]}, not text")


# -----------------------------------------------------------------------------
# Workers: texts in, tokens out, in order

worker = {}  # in a worker process: how it encodes, and the documents that it reads


def start_worker(encode, dataset, column):
    """What a worker does first."""

    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    # A pool tells its workers to go. A parent that is killed cannot: they would wait for ever.
    threading.Thread(target=end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    worker.update(encode=encode, dataset=dataset, column=column)


@contextlib.contextmanager
def workers(num_proc, encode, source):
    """A pool of processes that tokenize documents of the source."""
    # Spawned everywhere: a fork would copy locks that threads of pyarrow or of the hub hold.
    spawn = multiprocessing.get_context("spawn")
    begin = encode, source.dataset, source.column
    num_proc = min(num_proc, 61) if os.name == "nt" else num_proc  # Windows waits for no more
    pool = ProcessPoolExecutor(num_proc, spawn, start_worker, begin)
    # Ctrl-C is this process's business. That the others ignore it they inherit: it must hold while
    # they still import what they need.
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for _ in range(num_proc):
            pool.submit(int)  # starts one more
        signal.signal(signal.SIGINT, interrupt)
        yield pool
    except BrokenExecutor as e:
        raise RunError("a worker process died (killed, or out of memory?)") from e
    finally:
        signal.signal(signal.SIGINT, interrupt)  # also where a worker could not be started
        pool.shutdown(cancel_futures=True)


def tokenize(job):
    """Documents as (tokens uint16 (n,), lengths (documents,)); each is EOT and its own tokens."""
    texts = worker["dataset"][job][worker["column"]] if worker["dataset"] else job
    eot, parts = np.array([EOT], dtype=np.uint16), []
    for text in texts:
        if not isinstance(text, str):
            raise UserError(f"a document is {type(text).__name__}, not text; see --text_column")
        parts += [eot, worker["encode"](text)]
    return np.concatenate(parts), np.array([1 + len(p) for p in parts[1::2]])


def tokenized(source, pool, ahead, first, bar):
    """Yields (first document, tokens, lengths, note) for all documents from `first` on, in order,
    with up to `ahead` jobs given out beyond the one that is waited for."""
    jobs, pending = source.jobs(first), []
    while True:
        for document, job, note in itertools.islice(jobs, ahead + 1 - len(pending)):
            pending.append((document, pool.submit(tokenize, job), note))
        if not pending:
            return
        document, result, note = pending.pop(0)
        tokens, lengths = result.result()
        bar.update(len(lengths))
        yield document, tokens, lengths, note


# -----------------------------------------------------------------------------
# Shards


def cut(batches, size, start, left):
    """Cut tokenized documents, from the position `start` in them on, into shards of `size` tokens
    and `left` tokens in all. Yields (tokens, what the manifest says about their place, note); the
    tokens of the next shard will take the place of these.

    A position {"document": d, "token": t} says that token t of document d comes next."""
    shard = np.empty(min(size, left), dtype=np.uint16)
    filled = documents = 0
    skip, end = start["token"], start
    for first, tokens, lengths, note in batches:
        edges = np.concatenate([[0], np.cumsum(lengths)])  # where its documents begin and end
        a, skip = skip, 0
        while a < len(tokens) and left:
            b = min(len(tokens), a + len(shard) - filled, a + left)
            shard[filled : filled + b - a] = tokens[a:b]
            filled, left = filled + b - a, left - (b - a)
            documents += int(np.searchsorted(edges, b) - np.searchsorted(edges, a))
            d = int(np.searchsorted(edges, b, side="right")) - 1  # the document of token b
            end = {"document": first + d, "token": b - int(edges[d])}
            a = b
            if filled == len(shard):
                yield shard, {"documents": documents, "start": start, "end": end}, note
                filled, documents, start = 0, 0, end
        if not left:  # and not when the next documents have come
            break
    if filled:  # the last shard of all is a short one
        yield shard[:filled], {"documents": documents, "start": start, "end": end}, None


def shard_name(index):
    return f"edufineweb_{'train' if index else 'val'}_{index:06d}.npy"


# -----------------------------------------------------------------------------
# Making shards, and fetching them


def settings_of(args):
    """What decides the bytes of the shards."""
    if args.ready:
        return {"ready": args.dataset, "revision": commit_of(args, "ready")}
    shuffle = None if args.shuffle is None else f"seed {args.shuffle}"
    if shuffle and args.streaming:
        import datasets

        shuffle += f", buffer of {STREAM_BUFFER:,}, datasets {datasets.__version__}"
    if args.files:
        args.files = expand(args.files)
        source = {"files": [[os.path.basename(p), os.path.getsize(p)] for p in args.files]}
    else:
        args.revision = commit_of(args, "dataset")
        source = {k: getattr(args, k) for k in ("dataset", "name", "split", "revision")}
    rest = {k: getattr(args, k) for k in ("text_column", "shard_size", "max_tokens")}
    return {**source, **rest, "shuffle": shuffle, "tokenizer": "gpt2"}


def commit_of(args, key):
    """The commit of --dataset: what --revision stands for now, or without it what the first run
    into this folder read. `key` is what the settings call the data set."""
    from huggingface_hub import HfApi, constants

    manifest = load_manifest(args.out)
    old = manifest["settings"] if manifest else {}  # what the shards in there were made with
    if args.revision is None and old.get(key) == args.dataset:
        return old["revision"]
    if os.path.isdir(args.dataset) or constants.HF_HUB_OFFLINE:
        return args.revision
    with asking_the_hub(args.dataset):  # main moves, and a rerun is to read what this run reads
        return HfApi().dataset_info(args.dataset, revision=args.revision, timeout=60).sha


def make(args, manifest, tokenizer):
    """Make the listed shards that are not whole, and then all that are not listed. Yields (manifest
    entry, note) when a shard is on disk."""
    from tqdm import tqdm

    shards, most = manifest["shards"], args.max_tokens or sys.maxsize
    todo = [(i, s["start"], s["tokens"]) for i, s in enumerate(shards) if fault_of(args.out, s)]
    start = shards[-1]["end"] if shards else {"document": 0, "token": 0}
    if not manifest["complete"]:
        todo.append((len(shards), start, most - manifest["tokens"]))
    if not todo:  # then neither the network nor a vocabulary is needed
        return
    tokenizer = tokenizer or get_tokenizer("gpt2", timeout=60)
    copy = os.path.join(args.out, ".documents.arrow")
    ahead = max(32, 3 * args.num_proc)  # enough to do while a shard is brought to disk
    try:
        source = open_files(args, copy) if args.files else open_hub(args, manifest["note"])
        total = None if args.max_tokens else source.total  # how many fill them is not known
        bar = tqdm(total=total, initial=start["document"], unit=" documents", disable=None)
        with workers(args.num_proc, tokenizer.encode, source) as pool, bar:
            for index, start, left in todo:
                batches = tokenized(source, pool, ahead, start["document"], bar)
                for tokens, place, note in cut(batches, args.shard_size, start, left):
                    path = os.path.join(args.out, shard_name(index))
                    with atomic_write(path) as f:
                        np.save(f, tokens)
                    yield {**entry_of(path), **place}, note
                    index += 1
    finally:
        with contextlib.suppress(OSError):
            os.remove(copy)


def fetch(args, manifest):
    """Download what --ready asks for and is not there; yields (manifest entry, None)."""
    from huggingface_hub import HfApi

    commit = manifest["settings"]["revision"]
    with asking_the_hub(args.dataset):
        info = HfApi().dataset_info(args.dataset, revision=commit, files_metadata=True, timeout=60)
    files = {file.rfilename: file for file in info.siblings}
    bins = sorted(name for name in files if name.endswith(".bin") and "/" not in name)
    val, train = ([name for name in bins if split_of(name) == s] for s in ("val", "train"))
    number = len(train) if args.ready == ALL else args.ready
    if number > len(train) or not val or not train:
        raise UserError(f"{args.dataset} has {len(val)} val and {len(train)} train shards (.bin), "
                        "too few; check --ready and --dataset")
    faults = {entry["name"]: fault_of(args.out, entry) for entry in manifest["shards"]}
    wanted = dict.fromkeys([*val, *train[:number], *faults])  # and what was wanted earlier
    missing = [files[name] for name in wanted if faults.get(name, "not listed")]
    if missing:
        size = sum(file.size for file in missing) / 1e9
        print(f"{len(missing)} shards of {args.dataset} to fetch, {size:.1f} GB, to {args.out}")
    manifest["complete"] = False
    for file in missing:
        yield fetch_shard(args, file, commit), None


def fetch_shard(args, file, commit):
    """The shard is on disk under its name, and good; returns its manifest entry."""
    from huggingface_hub import hf_hub_download

    name, path = file.rfilename, os.path.join(args.out, file.rfilename)
    with contextlib.suppress(FileNotFoundError):
        os.remove(path)  # not in the manifest it may be anything, else its size is wrong
    with asking_the_hub(args.dataset):
        hf_hub_download(args.dataset, name, repo_type="dataset", revision=commit,
                        local_dir=args.out)
    entry = entry_of(path)
    if file.lfs and file.lfs.sha256 != entry["sha256"]:
        os.remove(path)  # of the right size, a listed one would be taken for good the next time
        raise RunError(f"{path} was damaged on its way (its sha256 is not the hub's)")
    last = (0, entry["tokens"] - 1)  # up to there, all that begin in the shard
    documents = TokenStream([open_shard(path)]).documents_before([last])[last]
    return {**entry, "documents": documents}


# -----------------------------------------------------------------------------
# The command


def run(args, tokenizer=None):
    """Make, fetch or verify shards."""
    if args.verify:
        return verify(args.out)
    started = time.perf_counter()
    with only_writer(args.out, ".bin" if args.ready else ".npy"):
        manifest = open_manifest(args.out, settings_of(args))
        made = fetch(args, manifest) if args.ready else make(args, manifest, tokenizer)
        with promise(args.out), contextlib.closing(made):
            complete(args.out, manifest, made)
    tokens, shards = manifest["tokens"], manifest["shards"]
    print(f"{args.out}: {tokens:,} tokens of {manifest['documents']:,} documents in {len(shards)} "
          f"shards, {2 * tokens / 1e9:.2f} GB, {time.perf_counter() - started:.0f} s")
    if len(shards) == 1:
        print("all of it is the val shard, nothing is left to train on: delete that folder and give"
              f" the command again with --shard_size well below {tokens:,}")


HUB_DEFAULTS = {  # what makes long downloads last; the environment goes before it
    "HF_HUB_ENABLE_HF_TRANSFER": "0", "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_DOWNLOAD_TIMEOUT": "300", "HF_HUB_ETAG_TIMEOUT": "60",
}
NO_BARS = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}


def main(argv=None, tokenizer=None):
    """The command; ends the process with its status."""
    on_a_terminal = sys.stderr is not None and sys.stderr.isatty()
    for name, value in (HUB_DEFAULTS if on_a_terminal else HUB_DEFAULTS | NO_BARS).items():
        os.environ.setdefault(name, value)
    run_main("fineweb.py", lambda: run(parse_args(argv), tokenizer),
             smaller="fewer processes (--num_proc) or a smaller --shard_size")


if __name__ == "__main__":
    main()
