"""
Tokens as a run reads them: the tokenizer, the shards of a split as one long stream, and what a
training run opens of both.
"""

import bisect
import codecs
import collections
import contextlib
import hashlib
import itertools
import json
import os
import re
import sys
import threading
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from common import AgreedError, RunError, UserError, one_line, say, warn

EOT = 50256  # <|endoftext|>, the one special token of GPT-2; it stands before each document
MANIFEST, MANIFEST_FORMAT = "manifest.json", "fineweb.py 1"

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
            file = self._open(i)
            file.seek(shard.start + 2 * offset)
            while view.nbytes and (n := file.readinto(view)):
                view = view[n:]
        except OSError as e:
            raise RunError(f"{shard.path} cannot be read any more: {e.strerror or e}") from e
        if view.nbytes:
            raise RunError(
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
# What a run opens


@dataclass
class Data:
    """What a run reads: its two splits (None where there is no data) and its tokenizer."""

    train: TokenStream | None
    val: TokenStream | None
    identity: dict  # what a resume must find again, whatever the path
    tokenizer: Tokenizer | None  # None: its vocabulary cannot be had
    tokenizer_name: str


def open_tokenizer(is_text, wanted, dist):
    """(tokenizer or None, its name): what the checkpoint names, else what can be had.

    The main process decides and the others follow. Shards hold GPT-2's BPE tokens, so nothing
    else will do there; without the vocabulary such a run goes on, but shows no samples.
    """
    tokenizer = name = error = None
    if dist.master_process:
        try:
            tokenizer = get_tokenizer(wanted if is_text else "gpt2")
            name = tokenizer.name
        except UserError as e:
            error = str(e)
    name, error = dist.broadcast((name, error))
    if error and is_text:
        raise AgreedError(error)
    if error:
        warn(f"no samples and no HellaSwag: {error}")
        return None, "gpt2"
    if name == "bytes" and not wanted:
        say("GPT-2's vocabulary cannot be had: the text is read as single bytes, GPT-2's tokens "
            f"0 to 255 ({dist.master_process and tokenizer.why})")
    return dist.together(lambda: tokenizer or get_tokenizer(name)), name


def open_data(path, wanted, dist, needed=True, optional=False):
    """Open a folder of shards or a text file on every process: a Data.

    wanted: a tokenizer's name, or None. needed: whether shards are to be decoded at all. optional:
    go on without data where there is nothing at `path`.
    """
    is_text = os.path.isfile(path)
    if optional and not any(dist.gather(os.path.exists(path))):
        say(f"no data at {path}: no validation")
        return Data(None, None, {}, *open_tokenizer(True, wanted, dist))
    tokenizer, name = open_tokenizer(True, wanted, dist) if is_text else (None, "gpt2")
    if wanted and wanted != name:
        raise AgreedError(f"the checkpoint's tokens are the byte fallback's, those in {path} are "
                          "GPT-2's: give the text file that it was trained on with --data")

    def open_streams():
        if is_text:
            train, val, digest = open_text(path, tokenizer.encode)
            return train, val, {"kind": f"text {digest}", "tokens": len(train), "shards": []}
        train, val = open_shards(path, "train"), open_shards(path, "val")
        shards = [list(s) for s in zip(train.names, train.counts, strict=True)]
        kind = f"{len(shards)} shards"
        return train, val, {"kind": kind, "tokens": len(train), "shards": shards}

    train, val, identity = dist.together(open_streams)
    everybody = dist.gather([identity, val.names, val.counts])
    for rank, other in enumerate(everybody):
        if other != everybody[0]:
            raise AgreedError(f"on rank {rank}: other data in {path} than on rank 0 (shards or "
                              "their sizes)")
    if needed and not is_text:
        tokenizer, name = open_tokenizer(False, wanted, dist)
    return Data(train, val, identity, tokenizer, name)


def encode_prompt(cfg, tokenizer):
    """Token ids of cfg.prompt (- = stdin); empty where samples are off."""
    if not cfg.num_samples or tokenizer is None:
        return []
    prompt = cfg.prompt
    if prompt == "-":
        prompt = sys.stdin.read() if sys.stdin else ""
    ids = tokenizer.encode(prompt).tolist()
    if not ids:
        raise UserError("--prompt is empty: give it at least one character")
    for limit, name in ((cfg.block_size, "block_size"), (cfg.sample_length - 1, "sample_length")):
        if len(ids) > limit:
            raise UserError(f"--prompt has {len(ids)} tokens, too many for --{name} "
                            f"{getattr(cfg, name)}")
    return ids


def open_hellaswag(n, block_size, tokenizer, dist):
    """The first n prepared examples; where they cannot be had, one warning and none."""
    if not n or tokenizer is None:
        return []
    import hellaswag

    path = error = None
    try:  # on every process, as nodes may share no disk; where they do, one downloads
        path = hellaswag.download("val")
    except (UserError, OSError) as e:
        error = str(e)
    errors = [e for e in dist.gather(error) if e]
    if errors:
        warn(f"HellaSwag is off: {errors[0]}")
        return []
    return dist.together(hellaswag.load_examples, path, n, block_size, tokenizer.encode)


def scan_vocabulary(loader):
    """Look at up to 100M tokens of a split, the head of every shard, before training begins."""
    start, counts = 0, loader.tokens.counts
    for count in counts:
        for pos in range(start, start + min(count, 10**8 // len(counts)), 2**16):
            ids = loader.tokens.read(pos, min(2**16, start + count - pos))
            loader.check_vocabulary(ids, pos)
        start += count


def inspect_step(loader, tokenizer, step):
    """Print which tokens a step reads, row by row, with their text."""
    names, rows, documents = loader.tokens.names, list(loader.where(step)), {}
    for *_, shard, offset in sorted(rows, key=lambda row: row[3:]):  # one pass over each shard
        documents[shard, offset] = loader.tokens.documents_before(shard, offset)
    for row, epoch, window, shard, offset in rows:
        print(f"step {step} row {row % loader.rows_per_step}: epoch {epoch} window {window} "
              f"{names[shard]} offset {offset} document {documents[shard, offset]}")
        if tokenizer:
            print(tokenizer.decode(loader.tokens.read(window * loader.T, loader.T)))
