"""
Tokens as a run reads them: the tokenizer, and the shards of a split as one long stream.
"""

import bisect
import codecs
import contextlib
import hashlib
import itertools
import json
import os
import re
import threading
from typing import NamedTuple

import numpy as np

from plumbing.errors import RunError, UserError, one_line, say, warn

EOT = 50256  # <|endoftext|>, the one special token of GPT-2; it stands before each document
MANIFEST, MANIFEST_FORMAT = "manifest.json", "fineweb.py 1"

# -----------------------------------------------------------------------------
# Tokenizer: tiktoken's gpt2, or GPT-2's own 256 single-byte tokens where there is no vocabulary

NO_TOKEN = "\ufffd".encode()  # for ids that the vocabulary does not have
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
        except ValueError as e:  # its regular expression gives up on a million blanks in a row
            raise UserError(f"the text that begins {text[:40]!r} cannot be cut into tokens "
                            f"({one_line(e, 100)}): shorten its longest run of blanks") from e

    def decode_bytes(self, ids):
        """The bytes of token ids; a token may be part of a character."""
        if self._bpe:
            one = self._bpe.decode_bytes
            return b"".join(one([int(i)]) if i < self.n_vocab else NO_TOKEN for i in ids)
        known = dict(enumerate(bytes([b]) for b in self._byte_of_id))
        known[EOT] = b"<|endoftext|>"
        return b"".join(known.get(int(i), NO_TOKEN) for i in ids)

    def stream(self):
        """A function from the next token ids to the text that they complete."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return lambda ids: decoder.decode(self.decode_bytes(ids))

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
            why.insert(0, one_line(e, 100))

    # tiktoken downloads without a time limit: behind a silent proxy it would hang for ever.
    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    thread.join(timeout)
    return (bpe[0], None) if bpe else (None, why[0])


# -----------------------------------------------------------------------------
# Reading: the shards of a split are one long stream of tokens

BIN_HEADER_BYTES = 256 * 4  # of llm.c's .bin: 256 int32, first magic, version and token count
BIN_MAGIC, BIN_VERSION = 20240520, 1
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
    The tokens of a split as one stream, read by position. Reading is open, seek and read, not a
    memory map: a map's pages count as resident memory, and a run would end up with all of the data.
    """

    def __init__(self, shards):
        self.names = [s.name for s in shards]
        self.counts = [s.count for s in shards]
        self._shards = shards
        self._starts = [0, *itertools.accumulate(self.counts)]

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
        parts = []
        while count:
            i, offset = self.locate(start)
            n = min(count, self.counts[i] - offset)
            parts.append(read_shard(self._shards[i], offset, n))
            start, count = start + n, count - n
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, np.uint16), *parts])

    def documents_before(self, places):
        """
        {(shard index, offset): number of EOT tokens in that shard at positions 0..offset}: which of
        the shard's documents that token is in, counted from 1; 0 for the rest of the last shard's.
        """
        found, shard, end, n = {}, None, 0, 0
        for i, offset in sorted(set(places)):
            if i != shard:
                shard, end, n = i, 0, 0
            while end <= offset:  # in pieces: a shard is 200 MB
                ids = self.read(self._starts[i] + end, min(PIECE, offset + 1 - end))
                n += int(np.count_nonzero(ids == EOT))
                end += len(ids)
            found[i, offset] = n
        return found


def read_shard(shard, offset, count):
    """Tokens [offset, offset + count) of a Shard. Raises RunError where the file has changed."""
    if shard.array is not None:
        return shard.array[offset : offset + count].copy()
    try:
        ids = np.fromfile(shard.path, "<u2", count, offset=shard.start + 2 * offset)
    except OSError as e:
        raise RunError(f"{shard.path} cannot be read any more: {e.strerror or e}") from e
    if len(ids) < count:
        raise RunError(f"{shard.path} is shorter than when it was opened ({shard.count:,} tokens "
                       "then); stop what is changing it, and start again")  # fmt: skip
    return ids


def split_of(name):
    """'train' or 'val' for the file name of a shard, None for any other file."""
    if name.startswith(".") or not name.endswith((".npy", ".bin")):
        return None
    return ([None] + re.findall(r"(?<![a-zA-Z])(train|val)(?![a-zA-Z])", name))[-1]


def shard_names(folder):
    """The files in a folder that are shards of a split, sorted; none where it cannot be read."""
    with contextlib.suppress(OSError):
        return sorted(name for name in os.listdir(folder) if split_of(name))
    return []


def open_shards(folder, split):
    """
    The shards of a split ('train' or 'val') in a folder, sorted by name, as a TokenStream. Formats
    and sizes are checked, and compared with the manifest where there is one, without reading the
    tokens. Raises UserError.
    """
    found = shard_names(folder)
    mine = [n for n in found if split_of(n) == split]
    if not mine:
        gone = "" if os.path.exists(folder) else ", which does not exist"
        hint = "run `python fineweb.py`, or name the folder that holds them"
        raise UserError(f"no {split} shards in {folder}{gone}; {hint}")
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
        known = all({"name", "tokens", "sha256"} <= set(s) for s in manifest["shards"])
        if manifest["format"] != MANIFEST_FORMAT or not known:
            raise ValueError
        return manifest
    except FileNotFoundError:
        return None
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror or e}") from e
    except (ValueError, KeyError, TypeError) as e:
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


def read_text(path):
    """
    (text, sha256 hex) of a UTF-8 text file. Line ends are read as '\\n' on every system, and the
    hash is that of the text so read. Raises UserError.
    """
    try:
        with open(path, encoding="utf-8") as f:
            text = f.read()
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror or e}") from e
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text (byte {e.start:,}); convert it to UTF-8") from e
    return text, hashlib.sha256(text.encode("utf-8")).hexdigest()


# -----------------------------------------------------------------------------
# What a run opens


class Data:
    """
    What --data names: a folder of shards, or a text file that a tokenizer still has to cut into
    tokens. Raises UserError. `train` and `val` are its streams, `fingerprint` tells it from others.
    """

    def __init__(self, path):
        self.path, self.is_text = path, os.path.isfile(path)
        if self.is_text:
            self.text, digest = read_text(path)
            self.kind = self.fingerprint = f"text {digest}"
        else:
            self.train, self.val = open_shards(path, "train"), open_shards(path, "val")
            self.kind = f"{len(self.train.names)} shards"
            streams = [(x.names, x.counts) for x in (self.train, self.val)]
            digest = hashlib.sha256(json.dumps(streams).encode()).hexdigest()
            self.fingerprint = f"{self.kind}, {digest[:12]}"

    def tokenize(self, tokenizer):
        """Of a text: the first int(0.9 * tokens) tokens are train, the rest val; no EOT."""
        tokens, name = tokenizer.encode(self.text), os.path.basename(self.path)
        n = int(0.9 * len(tokens))
        if n == 0:
            raise UserError(f"{self.path} holds {len(tokens)} tokens, too few to train on; use "
                            "more text")  # fmt: skip
        parts = tokens[:n], tokens[n:]
        self.train, self.val = (TokenStream([Shard(name, len(t), array=t)]) for t in parts)

    @property
    def identity(self):
        """What a resume must find again, whatever the path: plain data."""
        named = () if self.is_text else zip(self.train.names, self.train.counts, strict=True)
        return {"kind": self.kind, "tokens": len(self.train), "shards": [list(s) for s in named]}


def sample_length(cfg, tokenizer):
    """Tokens per sample: --sample_length, or about as much text with either tokenizer."""
    return cfg.sample_length or (128 if tokenizer.name == "bytes" else 32)


def open_tokenizer(wanted, dist, required):
    """
    The tokenizer called `wanted` (None: what can be had); the main process decides and the others
    follow. Where it cannot be had: UserError if `required`, else a warning and None.
    """
    tokenizer = name = None
    if dist.master_process:
        try:
            tokenizer = get_tokenizer(wanted)
            name = tokenizer.name
        except UserError as e:
            if required:
                raise
            warn(f"no samples and no HellaSwag: {e}")
    name = dist.broadcast(name)
    if name == "bytes" and not wanted and dist.master_process:
        say("GPT-2's vocabulary cannot be had: the text is read as single bytes, GPT-2's tokens "
            f"0 to 255 ({tokenizer.why})")  # fmt: skip
    return tokenizer or (get_tokenizer(name) if name else None)


def inspect_step(loader, tokenizer, step):
    """Print which tokens a step reads, row by row, with their text."""
    names, rows = loader.tokens.names, list(loader.where(step))
    documents = loader.tokens.documents_before([row[3:] for row in rows])
    for row, epoch, window, shard, offset in rows:
        print(f"step {step} row {row % loader.rows_per_step}: epoch {epoch} window {window} "
              f"{names[shard]} offset {offset} document {documents[shard, offset]}")
        if tokenizer:
            print(tokenizer.decode(loader.tokens.read(window * loader.T, loader.T)))
