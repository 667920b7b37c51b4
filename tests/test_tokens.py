"""The tokenizer, and how shards, manifests and text files are read."""

import contextlib
import json
import os
import random
import socket
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, has_vocabulary, write_shards

import train_gpt2
from train_gpt2 import Dist, UserError, get_tokenizer, open_shard, open_shards

BYTES = get_tokenizer("bytes")
RANDOM = random.Random(0)
TEXTS = ["", "a\ud800b", "<|endoftext|>" * 3, "\x00\r\n\u4e16", " " * 500,
         *("".join(RANDOM.choices("abc de\n\u00e9\u4e16", k=RANDOM.randrange(400))) for _ in range(30))]


@pytest.fixture
def bpe():
    """GPT-2's tokenizer; skips the test where the vocabulary would have to be downloaded."""
    if not has_vocabulary():
        pytest.skip("no vocabulary: set TIKTOKEN_CACHE_DIR")
    return get_tokenizer("gpt2")


def test_encode_and_decode(bpe):
    """BPE tokens as tiktoken's, and byte tokens; ids without text become replacement characters."""
    for text in TEXTS:
        ids, byte_ids = bpe.encode_ordinary(text), BYTES.encode_ordinary(text)
        assert bpe.decode(ids) == BYTES.decode(byte_ids) == text.replace("\ud800", "\ufffd")
    assert [BYTES.name, BYTES.n_vocab, bpe.name, bpe.n_vocab] == ["bytes", 256, "gpt2", 50257]
    # byte tokens have the ids of GPT-2's single bytes
    assert all(BYTES.decode_single_token_bytes(i) == bpe.decode_single_token_bytes(i) for i in range(256))


def test_silent_network_falls_back_to_byte_tokens(tmp_path, monkeypatch, capsys):
    """After 10 s without an answer, with one warning."""
    requests, timeouts = pytest.importorskip("requests"), []
    real = requests.get

    def get(url, timeout):
        timeouts.append(timeout)
        return real(url, timeout=timeout / 100)

    monkeypatch.setattr(requests, "get", get)
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})  # as in a new process
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")  # no cache
    monkeypatch.setenv("NO_PROXY", "")
    (tmp_path / "t.txt").write_text("to be or not to be " * 20)
    flags = [*TINY, "--inspect=0", "--data"]
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts connections, never answers
        for name in ("HTTPS_PROXY", "https_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{server.getsockname()[1]}")
        assert train_gpt2.main([*flags, str(tmp_path / "t.txt")]) == 0
        out, text_warning = capsys.readouterr()
        assert train_gpt2.main([*flags, write_shards(tmp_path / "shards")]) == 0
        with pytest.raises(UserError, match="could not download.*[Tt]ime.*TIKTOKEN_CACHE_DIR"):
            get_tokenizer("gpt2")
    assert timeouts == [10, 10, 10]
    assert "offset 0\nto be or not to \n" in out  # 16 bytes per sequence
    for warning in text_warning, capsys.readouterr().err:
        assert warning.startswith("warning: could not download") and warning.count("\n") == 1
        assert "TIKTOKEN_CACHE_DIR" in warning and ("byte tokens" in warning) == (warning == text_warning)


def write_bin(path, tokens, magic=20240520, version=1, count=None):
    header = np.zeros(256, np.int32)
    header[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(tokens, np.uint16).tobytes())


@pytest.mark.parametrize("pattern", ["edufineweb_{}_{:06d}.npy", "finewebedu10T_{}_{:04d}.npy",
                                     "fineweb_{}_{:06d}.bin", "{}_{}.bin"])  # fmt: skip
def test_shards_of_all_makers_are_one_stream(tmp_path, pattern):
    rng, write = np.random.default_rng(0), np.save if pattern.endswith("npy") else write_bin
    parts = [rng.integers(0, 65536, n, dtype=np.uint16) for n in (50, 7, 1, 64, 30)]
    for i, part in enumerate(parts):
        write(tmp_path / pattern.format("train", i + 1), part)
    write(tmp_path / pattern.format("val", 0), parts[0])
    for ignored in ("x_train_000009.npy.tmp", ".x_train_000009.npy", "training.npy", "train.txt"):
        (tmp_path / ignored).write_bytes(b"ignored")
    (stream, val), tokens = open_shards(str(tmp_path)).values(), np.concatenate(parts)
    assert len(val) == 50 and len(stream) == len(tokens)
    assert stream.names == [pattern.format("train", i + 1) for i in range(5)]
    for start in range(len(tokens)):
        shard, offset = stream.locate(start)
        assert parts[shard][offset] == tokens[start]
        for count in (1, 9, 33, len(tokens) - start):
            ids = stream.read(start, min(count, len(tokens) - start))
            assert ids.dtype == np.uint16 and (ids == tokens[start:start + count]).all()


NPY = b"\x93NUMPY\x01\x00\x46\x00{'descr': oops" + b" " * 60


@pytest.mark.parametrize("name, content, message", [
    ("1.npy", np.zeros(5, np.int64), "int64"), ("1.npy", np.zeros((5, 2), np.uint16), r"\(5, 2\)"),
    ("1.npy", np.zeros(5, ">u2"), "not uint16"), ("1.npy", np.array(5, np.uint16), "not uint16"),
    ("1.npy", np.zeros(0, np.uint16), "0 tokens"), ("1.npy", np.array([{}], object), None),
    ("1.npy", b"", None), ("1.npy", NPY, None), ("1.bin", b"", None), ("1.bin", b"\0" * 2000, None),
    ("1.bin", dict(count=4), "1,030 bytes.* 4 "), ("1.bin", dict(count=2), "1,030 bytes.* 2 "),
    ("1.bin", dict(magic=20240521), None), ("1.bin", dict(version=2), None), ("1.bin", dict(count=-3), None),
])  # fmt: skip
def test_bad_shard_is_one_line(tmp_path, name, content, message):
    path = tmp_path / f"a_train_{name}"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content) if name == "1.npy" else write_bin(path, [1, 2, 3], **content)
    with pytest.raises(UserError, match=message) as e:
        open_shard(str(path))
    assert path.name in str(e.value) and "\n" not in str(e.value)


def test_truncated_shard_and_two_data_sets(shards):
    os.truncate(Path(shards, "edufineweb_train_000002.npy"), 150)
    with pytest.raises(UserError, match="edufineweb_train_000002.npy is .*damaged"):
        open_shards(shards)
    write_bin(Path(shards, "a_train_1.bin"), [1, 2, 3])
    with pytest.raises(UserError, match="two data sets"):
        open_shards(shards)


COMPLETE = {"a_train_1.bin": 5, "a_val_0.bin": 7}


def manifest(listed, **more):
    return json.dumps({"shards": [dict(name=k, tokens=n, sha256="0") for k, n in listed.items()]} | more)


@pytest.mark.parametrize("text, problem", [
    (manifest(COMPLETE), None), (manifest(COMPLETE, complete=True), None),
    (manifest(COMPLETE, complete=False), "incomplete"), (manifest({}), "a_train_1.*a_val_0.*--verify"),
    (manifest(COMPLETE | {"a_val_0.bin": 8}), "a_val_0.bin.*--verify"),
    (manifest({"a_val_0.bin": 7}), "a_train_1"), (manifest(COMPLETE | {"a_train_2.bin": 7}), "train_2"),
    *((text, "manifest.json.*fineweb.py") for text in ("", "{", "[]", '{"shards": 3}', '{"x": 1}', "\xff")),
])  # fmt: skip
def test_shards_must_equal_their_manifest(tmp_path, text, problem):
    for name, n in COMPLETE.items():
        write_bin(tmp_path / name, range(n))
    (tmp_path / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=problem) if problem else contextlib.nullcontext():
        assert len(open_shards(str(tmp_path))["train"]) == 5


def open_data(path):
    args = SimpleNamespace(data=str(path), eval_only=False, num_samples=0, hellaswag=0, inspect=None,
                           sample_length=None)
    ckpt = dict(tokenizer="bytes") if os.path.isfile(path) else None
    return train_gpt2.load_data(args, True, ckpt, Dist(0, 0, 1, torch.device("cpu")))[0]


def test_text_file_is_split_into_train_and_val(tmp_path):
    """The first 90% of the tokens are train. Windows line ends and a byte order mark are removed."""
    path, text = tmp_path / "t.txt", "é one\ntwo\n" * 10
    path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    data, tokens = open_data(path), BYTES.encode_ordinary(text)
    assert len(data['train']) == int(0.9 * len(tokens)) and data['train'].names == ["t.txt"]
    assert (np.concatenate([s.read(0, len(s)) for s in data.values()]) == tokens).all()
    (tmp_path / "same.txt").write_bytes(text.encode())
    assert open_data(tmp_path / "same.txt")['train'].identity == data['train'].identity


def test_preset_on_a_gpu(tmp_path, monkeypatch):
    """The smoke run without data; the real run with data, --resume or several ranks."""
    monkeypatch.setattr(train_gpt2, "SHARDS_DIR", str(tmp_path / "shards"))
    one, eight = (Dist(0, 0, n, torch.device("cuda")) for n in (1, 8))
    runs = [({}, one), ({"data": "x.txt"}, one), ({"resume": True}, one), ({}, eight)]
    assert [train_gpt2.choose_preset(*run)[0] for run in runs] == ["smoke", "gpt2", "gpt2", "gpt2"]
    write_shards(tmp_path / "shards")
    assert train_gpt2.choose_preset({}, one)[0] == "gpt2"
