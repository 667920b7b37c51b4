"""
FineWeb-Edu, or any text, as token shards: this file makes them, checks them and reads them.

    python fineweb.py                              # 10B tokens -> edu_fineweb10B/ beside this file
    python fineweb.py --max_tokens 200000000       # a first try: two shards
    python fineweb.py --streaming                  # no copy of the data set on disk
    python fineweb.py --files 'texts/*.txt' --out mine   # .parquet, .jsonl, .jsonl.gz, .txt
    python fineweb.py --verify                     # sizes and sha256 of a finished set

A shard is a plain 1-D uint16 .npy file of GPT-2 token ids. A document is <|endoftext|> and then its
ordinary tokens; documents follow each other and run on from one shard into the next. The first
shard is the validation split: edufineweb_val_000000.npy, edufineweb_train_000001.npy, ...

manifest.json, beside the shards, says what was asked for and, for each shard, its tokens,
documents, sha256 and where in the source it ends. Killed at any moment, a rerun continues behind
the last shard listed there, and the result is the same bytes.
"""

import bisect
import collections
import hashlib
import json
import os
import re
import threading
from typing import NamedTuple

import numpy as np

EOT = 50256  # <|endoftext|>, the one special token of GPT-2; it stands before each document
MANIFEST = "manifest.json"
MANIFEST_FORMAT = "fineweb.py 1"
PIECE = 1 << 16  # tokens looked at together when a whole shard is read: 128 KB


class UserError(Exception):
    """A user's mistake: one line that names the thing and the fix; commands exit with status 2."""


# -----------------------------------------------------------------------------
# Tokenizer: tiktoken's gpt2, or GPT-2's own 256 single-byte tokens where there is no vocabulary

HOW_TO_GET_GPT2 = (
    "where there is a network, run `TIKTOKEN_CACHE_DIR=bpe python -c \"import tiktoken; "
    "tiktoken.get_encoding('gpt2')\"`, copy the folder bpe here and set TIKTOKEN_CACHE_DIR to it"
)


def byte_of_id():
    """(256,) uint8: the byte that GPT-2's token ids 0..255 stand for, printable bytes first."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in set(printable)]
    return np.array(printable + rest, dtype=np.uint8)


class Tokenizer:
    """
    Text to GPT-2 token ids and back. `name` is 'gpt2' (BPE) or 'bytes' (ids 0..255 only: valid
    GPT-2 ids, about four times as many of them). `n_vocab` counts the ids that may be sampled;
    `why` says why the bytes are used where nobody asked for them.
    """

    def __init__(self, bpe=None, why=None):
        self.name = "gpt2" if bpe else "bytes"
        self.n_vocab = 50257 if bpe else 256
        self.why = why
        self._bpe = bpe
        self._byte_of_id = byte_of_id()
        self._id_of_byte = np.argsort(self._byte_of_id).astype(np.uint16)

    def encode(self, text):
        """The tokens of a text as uint16 (n,); '<|endoftext|>' in it is text like any other."""
        if self._bpe:
            return np.array(self._bpe.encode_ordinary(text), dtype=np.uint16)
        return self._id_of_byte[np.frombuffer(text.encode("utf-8", "replace"), dtype=np.uint8)]

    def decode_bytes(self, ids):
        """The bytes of token ids; a token may be part of a character."""
        if self._bpe:
            return self._bpe.decode_bytes([int(i) for i in ids])
        table = self._byte_of_id
        return b"".join(
            bytes([table[i]]) if i < 256 else b"<|endoftext|>" if i == EOT else "\ufffd".encode()
            for i in ids
        )

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
    if name == "bytes":
        return Tokenizer()
    bpe, why = load_bpe(timeout)
    if bpe is None and name == "gpt2":
        raise UserError(f"GPT-2's vocabulary cannot be had ({why}); {HOW_TO_GET_GPT2}")
    return Tokenizer(bpe, why)


def load_bpe(timeout):
    """(tiktoken's gpt2 encoding, None), or (None, the reason) when it is not there in time."""
    try:
        import tiktoken
    except ImportError:
        return None, "tiktoken is not installed: pip install tiktoken"
    result = {}

    def load():
        try:
            result["bpe"] = tiktoken.get_encoding("gpt2")
        except Exception as e:  # whatever the network, a proxy or a cache folder comes up with
            result["why"] = f"{type(e).__name__}: {e}".splitlines()[0][:200]

    # tiktoken downloads without a time limit: behind a silent proxy it would hang for ever.
    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    thread.join(timeout)
    return result.get("bpe"), None if "bpe" in result else result.get(
        "why", f"no answer from the network within {timeout:g} s"
    )


# -----------------------------------------------------------------------------
# Reading: the shards of a split are one long stream of tokens

BIN_HEADER_BYTES = 256 * 4  # of llm.c's .bin: 256 int32, first magic, version and token count
BIN_MAGIC, BIN_VERSION = 20240520, 1
MAX_OPEN_FILES = 64


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
    map: pages of a map count as resident memory and a run would end up with all of the data in it.
    """

    def __init__(self, shards):
        self.names = [s.name for s in shards]
        self.counts = [s.count for s in shards]
        self._shards = shards
        self._starts = [0, *np.cumsum(self.counts, dtype=np.int64).tolist()]
        self._files = collections.OrderedDict()  # shard index -> open file, least recent first
        self._lock = threading.Lock()  # a file has one position, and a loader may prefetch
        self._counted = (0, 0, 0)  # shard, positions looked at, EOTs in them

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
    words = re.findall(r"(?<![a-zA-Z])(train|val)(?![a-zA-Z])", name)
    return words[-1] if words else None


def open_shards(folder, split):
    """
    The shards of a split ('train' or 'val') in a folder, sorted by name, as a TokenStream. Formats
    and sizes are checked, and compared with the manifest where there is one, without reading the
    tokens. Raises UserError.
    """
    folder = os.fspath(folder)
    hint = "run `python fineweb.py`, or name the folder that holds them"
    try:
        names = sorted(n for n in os.listdir(folder) if split_of(n))
    except OSError as e:
        raise UserError(f"no {split} shards in {folder} ({e.strerror}); {hint}") from e
    mine = [n for n in names if split_of(n) == split]
    if not mine:
        raise UserError(f"no {split} shards in {folder}; {hint}")
    kinds = {n[-4:]: n for n in names}
    if len(kinds) > 1:
        raise UserError(
            f"{folder} holds two data sets, {kinds['.npy']} and {kinds['.bin']}; keep the .npy or "
            "the .bin files"
        )
    shards = [open_shard(os.path.join(folder, n)) for n in mine]
    compare_with_manifest(folder, split, {s.name: s.count for s in shards})
    return TokenStream(shards)


def open_shard(path):
    """The Shard in a .npy or .bin file, from its header and its size. Raises UserError."""
    name = os.path.basename(path)
    try:
        with open(path, "rb") as f:
            read_header = read_npy_header if path.endswith(".npy") else read_bin_header
            count = read_header(f, path)
            start = f.tell()
            size = os.fstat(f.fileno()).st_size
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror or e}") from e
    if count == 0:
        raise UserError(f"{path} holds no tokens; delete it")
    if size != start + 2 * count:
        raise UserError(
            f"{path} has {size:,} bytes and its header says {start + 2 * count:,}; it is damaged: "
            "delete it and make or copy it again"
        )
    return Shard(name, count, path, start)


def read_npy_header(f, path):
    """Number of tokens in a .npy file open at its start; leaves it open at the first token."""
    form = np.lib.format
    try:
        version = form.read_magic(f)
        read = form.read_array_header_1_0 if version == (1, 0) else form.read_array_header_2_0
        shape, _, dtype = read(f)
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
    raw = f.read(BIN_HEADER_BYTES)
    header = np.frombuffer(raw.ljust(BIN_HEADER_BYTES, b"\0"), dtype="<i4")
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
        if manifest["format"] != MANIFEST_FORMAT:
            raise ValueError(f"format {manifest['format']!r}")
        for shard in manifest["shards"]:
            shard["name"], int(shard["tokens"]), shard["sha256"]
    except FileNotFoundError:
        return None
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror or e}") from e
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path} is not a manifest of fineweb.py; move it away") from e
    return manifest


def compare_with_manifest(folder, split, counts):
    """Refuse shards ({name: tokens}) that differ from the manifest, where there is one."""
    manifest = load_manifest(folder)
    if manifest is None:
        return
    listed = {s["name"]: s["tokens"] for s in manifest["shards"] if split_of(s["name"]) == split}
    faults = [f"{n} is missing" for n in listed if n not in counts]
    faults += [f"{n} is not listed" for n in counts if n not in listed]
    faults += [
        f"{n} has {counts[n]:,} tokens, not {listed[n]:,}"
        for n in counts
        if n in listed and counts[n] != listed[n]
    ]
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
    parts = [TokenStream([Shard(name, len(t), array=t)]) for t in (tokens[:n], tokens[n:])]
    return *parts, hashlib.sha256(text.encode("utf-8")).hexdigest()
