"""plumbing/tokens.py: the tokenizer, and shards and text files as they are read."""

import json
import os
import pathlib
import random
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, has_vocabulary, write_shards
from hypothesis import given, settings
from hypothesis import strategies as st

from plumbing import tokens as tokens_module
from plumbing.checks import choose_preset
from plumbing.errors import RunError, UserError
from plumbing.machine import Dist
from plumbing.tokens import (
    EOT, MANIFEST_FORMAT, Data, Tokenizer, get_tokenizer, open_shards, read_text,
)

BYTES = Tokenizer()


@pytest.fixture
def real():
    """Tests that need GPT-2's vocabulary run where it is at hand, and never download it."""
    if not has_vocabulary():
        pytest.skip("no vocabulary: set TIKTOKEN_CACHE_DIR")
    return get_tokenizer("gpt2")


# -----------------------------------------------------------------------------
# The tokenizer


def test_encode_is_encode_ordinary(real):
    rng = random.Random(0)
    some = ["".join(rng.choices("abc de\n\u00e9\u4e16", k=rng.randrange(400))) for _ in range(30)]
    odd = ["", "a\ud800b", "<|endoftext|>" * 3, "\x00\r\n\u4e16", " " * 500, *some]
    for text in odd:
        assert real.encode(text).tolist() == real._bpe.encode_ordinary(text)


def test_the_fallback_is_gpt2s_own_single_byte_tokens(real):
    fallback = get_tokenizer("bytes")
    assert (fallback.name, fallback.n_vocab) == ("bytes", 256)
    assert (real.name, real.n_vocab) == ("gpt2", 50257)
    for i in range(256):
        assert fallback.decode_bytes([i]) == real.decode_bytes([i])


@given(st.text())
@settings(max_examples=50, deadline=None)
def test_bytes_round_trip(text):
    text = text.encode("utf-8", "replace").decode()
    ids = BYTES.encode(text)
    assert ids.dtype == np.uint16 and BYTES.decode(ids) == text


def test_a_stream_of_tokens_gives_each_character_when_it_is_whole():
    decode, text = BYTES.stream(), "caf\u00e9 \u4e16!"
    parts = [decode([i]) for i in BYTES.encode(text)]
    assert "".join(parts) == text and parts.count("") == 3


@pytest.mark.skipif(not has_vocabulary(), reason="needs GPT-2's vocabulary")
def test_ids_of_padding_rows_are_no_text():
    """Shards of another vocabulary may hold them, and --inspect is there to look at such shards."""
    bpe = get_tokenizer("gpt2")
    assert bpe.decode([*bpe.encode("the sea"), 50257, 65535]) == "the sea\ufffd\ufffd"


def test_a_text_that_tiktoken_gives_up_on():
    def encode_to_numpy(text, disallowed_special):
        raise ValueError("Regex error: Max stack size exceeded")

    tokenizer = Tokenizer(SimpleNamespace(encode_to_numpy=encode_to_numpy))
    with pytest.raises(UserError, match="begins 'so far'.*blanks"):
        tokenizer.encode("so far")


def test_decode_of_what_is_no_text():
    assert BYTES.decode([EOT, *BYTES.encode("é")[:1], 30000]) == "<|endoftext|>\ufffd\ufffd"


def test_no_vocabulary_in_time(monkeypatch):
    tiktoken, silence = pytest.importorskip("tiktoken"), threading.Event()
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: silence.wait())  # a silent proxy
    fallback = get_tokenizer(timeout=0.2)  # and this comes back
    assert fallback.name == "bytes" and "0.2 s" in fallback.why
    silence.set()
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: {}[name])
    with pytest.raises(UserError, match="KeyError.*TIKTOKEN_CACHE_DIR"):
        get_tokenizer("gpt2")
    with pytest.raises(UserError, match="'gpt3' is not known"):
        get_tokenizer("gpt3")


# -----------------------------------------------------------------------------
# Shards


def write_bin(path, tokens, magic=20240520, version=1, count=None):
    header = np.zeros(256, np.int32)
    header[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(tokens, np.uint16).tobytes())


def save_any(path, tokens):
    np.save(path, tokens) if path.suffix == ".npy" else write_bin(path, tokens)


@pytest.mark.parametrize("pattern", ["edufineweb_{}_{:06d}.npy", "finewebedu10T_{}_{:04d}.npy",
                                     "fineweb_{}_{:06d}.bin", "{}_{}.bin"])  # fmt: skip
def test_folders_of_all_makers_are_one_stream(tmp_path, pattern):
    rng = np.random.default_rng(0)
    parts = [rng.integers(0, 65536, n, dtype=np.uint16) for n in (50, 7, 1, 64, 30)]
    for i, part in enumerate(parts):
        save_any(tmp_path / pattern.format("train", i + 1), part)
    save_any(tmp_path / pattern.format("val", 0), parts[0])
    for other in ("x_train_000009.npy.tmp", ".x_train_000009.npy", "training.npy", "train.txt"):
        (tmp_path / other).write_bytes(b"ignored")
    stream, want = open_shards(tmp_path, "train"), np.concatenate(parts)
    assert len(open_shards(tmp_path, "val")) == 50
    assert len(stream) == len(want) and stream.counts == [50, 7, 1, 64, 30]
    assert stream.names == [pattern.format("train", i + 1) for i in range(5)]
    for start in range(len(want) + 1):
        for count in (0, 1, 9, 33, len(want)):
            if start + count <= len(want):
                got = stream.read(start, count)
                assert got.dtype == np.uint16 and (got == want[start : start + count]).all()
    starts = np.cumsum([0, *stream.counts])
    for pos in range(len(want)):
        i, offset = stream.locate(pos)
        assert starts[i] + offset == pos and 0 <= offset < stream.counts[i]


@pytest.mark.parametrize("suffix", [".npy", ".bin"])
def test_documents_before(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(tokens_module, "PIECE", 5)
    rng = np.random.default_rng(1)
    parts = [np.where(rng.random(n) < 0.3, EOT, 7).astype(np.uint16) for n in (40, 23)]
    for i, part in enumerate(parts):
        save_any(tmp_path / f"a_train_{i}{suffix}", part)
    stream = open_shards(tmp_path, "train")
    places = [(i, j) for i in (0, 1) for j in range(len(parts[i]))]
    some = random.Random(0).sample(places, 9)
    for asked in (places, some, [places[30]], some + some):
        want = {(i, j): (parts[i][: j + 1] == EOT).sum() for i, j in asked}
        assert stream.documents_before(asked) == want


@pytest.mark.parametrize("name, data, says", [
    ("a_train_1.npy", np.zeros(5, np.int64), "int64"),
    ("a_train_1.npy", np.zeros((5, 2), np.uint16), r"\(5, 2\)"),
    ("a_train_1.npy", np.zeros(5, ">u2"), "not uint16"),
    ("a_train_1.npy", np.array(5, np.uint16), "not uint16"),
    ("a_train_1.npy", np.zeros(0, np.uint16), "no tokens"),
    ("a_train_1.npy", np.array([{}], object), "object"),
    ("a_train_1.npy", b"\x80\x04pickle", "not a .npy"),
    ("a_train_1.npy", b"", "not a .npy"),
    ("a_train_1.npy", b"\x93NUMPY\x01\x00\x46\x00{'descr': oops" + b" " * 60, "not a .npy"),
    ("a_train_1.bin", b"", "not a .bin"),
    ("a_train_1.bin", b"\0" * 2000, "not a .bin"),
])  # fmt: skip
def test_what_is_no_shard_is_refused_in_one_line(tmp_path, name, data, says):
    if isinstance(data, bytes):
        (tmp_path / name).write_bytes(data)
    else:
        np.save(tmp_path / name, data)
    with pytest.raises(UserError, match=says) as e:
        open_shards(tmp_path, "train")
    assert name in str(e.value) and "\n" not in str(e.value)


def test_cut_and_mixed_and_missing_shards(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=r"no train shards in .*python fineweb\.py"):
            open_shards(folder, "train")
    path = tmp_path / "a_train_1.npy"
    np.save(path, np.arange(100, dtype=np.uint16))
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(UserError, match=r"a_train_1\.npy has 278 bytes.* 328"):
        open_shards(tmp_path, "train")
    path.unlink()
    write_bin(tmp_path / "a_train_1.bin", [1, 2, 3], count=4)
    with pytest.raises(UserError, match=r"1,030 bytes.* 1,032"):
        open_shards(tmp_path, "train")
    np.save(tmp_path / "a_val_0.npy", np.arange(3, dtype=np.uint16))
    with pytest.raises(UserError, match="two data sets"):
        open_shards(tmp_path, "val")


@pytest.mark.parametrize("how", [dict(magic=20240521), dict(version=2), dict(count=-3)])
def test_a_bin_of_another_kind_is_refused(tmp_path, how):
    write_bin(tmp_path / "a_train_1.bin", [1, 2, 3], **how)
    with pytest.raises(UserError, match=r"a_train_1\.bin is not a \.bin file of GPT-2 tokens"):
        open_shards(tmp_path, "train")


def test_a_shard_cut_while_it_is_read(tmp_path):
    path = tmp_path / "a_train_1.npy"
    np.save(path, np.arange(100, dtype=np.uint16))
    stream = open_shards(tmp_path, "train")
    os.truncate(path, 150)
    assert stream.read(0, 5).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(RunError, match="a_train_1.npy is shorter"):
        stream.read(50, 10)
    path.unlink()
    with pytest.raises(RunError, match="a_train_1.npy cannot be read any more"):
        stream.read(0, 5)


def write_manifest(folder, shards):
    entries = [{"name": name, "tokens": n, "sha256": "0"} for name, n in shards.items()]
    manifest = {"format": MANIFEST_FORMAT, "shards": entries}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("listed, says", [
    ({"a_train_1.bin": 5, "a_train_2.bin": 7}, None),
    ({"a_train_1.bin": 5, "a_train_2.bin": 7, "a_val_0.bin": 1}, None),  # another split's
    ({"a_train_1.bin": 5, "a_train_2.bin": 8}, "a_train_2.bin has 7 tokens, not 8"),
    ({"a_train_1.bin": 5}, "a_train_2.bin is not listed"),
    ({"a_train_1.bin": 5, "a_train_2.bin": 7, "a_train_3.bin": 7}, "a_train_3.bin is missing"),
    ({}, "a_train_1.bin is not listed, a_train_2.bin is not listed"),
])  # fmt: skip
def test_a_folder_is_what_its_manifest_lists(tmp_path, listed, says):
    for i, n in ((1, 5), (2, 7)):
        write_bin(tmp_path / f"a_train_{i}.bin", range(n))
    write_manifest(tmp_path, listed)
    if says:
        with pytest.raises(UserError, match=says + ".*--verify"):
            open_shards(tmp_path, "train")
    else:
        assert len(open_shards(tmp_path, "train")) == 12


@pytest.mark.parametrize("text", ["", "{", "[]", '{"shards": 3}', '{"format": "other"}'])
def test_what_is_no_manifest_is_refused(tmp_path, text):
    write_bin(tmp_path / "a_train_1.bin", range(5))
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match="manifest.json is not a manifest"):
        open_shards(tmp_path, "train")


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
def test_reading_100m_tokens_costs_no_memory(tmp_path):
    with open(tmp_path / "a_train_1.npy", "wb") as f:  # no blocks on disk, the same reads
        form = {"descr": "<u2", "fortran_order": False, "shape": (10**8,)}
        np.lib.format.write_array_header_1_0(f, form)
        f.truncate(f.tell() + 2 * 10**8)
    code = """if 1:
        import sys
        from plumbing.tokens import open_shards
        def resident():
            return int(open("/proc/self/statm").read().split()[1]) * 4096
        before = resident()
        stream = open_shards(sys.argv[1], "train")
        for i in range(0, 10**8 - 65537, 65536):
            stream.read(i, 65537)
        assert stream.documents_before([(0, 10**8 - 1)]) == {(0, 10**8 - 1): 0}
        print(resident() - before)"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    assert int(subprocess.check_output(command, cwd=ROOT)) < 2e6


# -----------------------------------------------------------------------------
# What --data names


def test_a_text_file_is_nine_tenths_train(tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes("é one\r\ntwo\n".encode() * 10)
    data = Data(path)
    data.tokenize(BYTES)
    tokens = BYTES.encode("é one\ntwo\n" * 10)
    assert len(data.train) == int(0.9 * len(tokens)) and data.train.names == ["t.txt"]
    both = np.concatenate([s.read(0, len(s)) for s in (data.train, data.val)])
    assert (both == tokens).all() and data.train.locate(5) == (0, 5)
    text, sha256 = read_text(path)
    assert text == "é one\ntwo\n" * 10 and len(sha256) == 64
    assert data.identity == {"kind": f"text {sha256}", "tokens": len(data.train), "shards": []}
    path.write_bytes(b"caf\xe9")
    for bad in (path, tmp_path / "none.txt", tmp_path):
        with pytest.raises(UserError, match=str(bad)):
            read_text(bad)
    path.write_bytes(b"")
    empty = Data(path)
    with pytest.raises(UserError, match="too few"):
        empty.tokenize(BYTES)


def test_a_folder_of_shards_is_known_by_names_and_counts_wherever_it_lies(tmp_path):
    def make(name, sizes):
        folder = pathlib.Path(tmp_path, name)
        folder.mkdir()
        for i, n in enumerate(sizes):
            write_bin(folder / f"a_{'train' if i else 'val'}_{i}.bin", range(n))
        return Data(folder)

    one, same, other = make("one", (9, 5, 7)), make("two", (9, 5, 7)), make("three", (9, 5, 8))
    shards = [["a_train_1.bin", 5], ["a_train_2.bin", 7]]
    assert one.identity == {"kind": "2 shards", "tokens": 12, "shards": shards}
    assert len(one.val) == 9 and one.identity == same.identity != other.identity
    assert one.fingerprint == same.fingerprint != other.fingerprint


@pytest.mark.parametrize("typed, made, preset", [
    ({}, False, "smoke"), ({}, True, "gpt2"), ({"data": "x.txt"}, False, "gpt2"),
    ({"resume": True}, False, "gpt2"),
])  # fmt: skip
def test_the_real_run_needs_a_gpu_and_shards(tmp_path, typed, made, preset):
    """By itself; there is no GPU here, so the device only says that it is one."""
    if made:
        write_shards(tmp_path / "shards")
    dist = Dist(0, 0, 1, torch.device("cuda"))
    assert choose_preset(typed, dist, tmp_path / "shards")[0] == preset
