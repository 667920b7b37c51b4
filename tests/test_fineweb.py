"""fineweb.py: shards compared with plain tokenization, kills and reruns, errors."""

import errno
import gzip
import io
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
from unittest.mock import DEFAULT, Mock

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from local_hub import (
    ROOT, Hub, encode_bytes, finish, killed, oracle, shards_of, start, texts_of, times_of, tokens_of,
    write_jsonl, write_parquet,
)  # fmt: skip

import fineweb
from fineweb import EOT, load_manifest

DATA = "HuggingFaceFW/fineweb-edu"
posix = pytest.mark.skipif(os.name == "nt", reason="needs process groups")
vocabulary = pytest.mark.skipif(not os.path.isdir(os.environ.get("TIKTOKEN_CACHE_DIR", "")),
                                reason="set TIKTOKEN_CACHE_DIR")


@pytest.fixture
def main(monkeypatch, capsys):
    """Run the command in this process: (status, stdout, stderr)."""

    def run(*argv, encode=encode_bytes):
        if encode:
            monkeypatch.setattr(fineweb, "load_encode", lambda: encode)
        status = 0
        try:
            fineweb.main([str(a) for a in argv])
        except SystemExit as e:
            status = e.code
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def refused(main):
    """Run a command that must print one line on stderr, and return that line."""

    def run(*argv, status=2, **how):
        actual, _, err = main(*argv, **how)
        assert err.count("\n") == 1 and err.startswith("fineweb.py: error: ") and actual == status, err
        return err

    return run


def shard_name(index, prefix="tokens"):
    return f"{prefix}_{'train' if index else 'val'}_{index:06d}.npy"


# -----------------------------------------------------------------------------
# Shards are the tokenized documents, cut to size


# Covers documents longer than two shards, an exact fill, empty and null texts, no documents, and the literal
# <|endoftext|>.
@given(st.lists(st.text("ab<|>\u00e9", max_size=30) | st.none(), max_size=12), st.integers(1, 40))
@example(["x" * 50], 16)
@example(["x" * 15, "y" * 7, "z" * 7], 16)
@example(["", "", "a", ""], 2)
@example([None, "a", None, None, "bc", None], 2)
@example(["ab<|endoftext|>cd", ""], 7)
@example([], 3)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_shards_are_the_tokenized_documents(main, texts, size):
    want = oracle(texts)
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(fineweb, "JOB_DOCUMENTS", 2)
        patch.setattr(fineweb.os, "fsync", lambda fd: None)
        path = write_jsonl(pathlib.Path(folder, "t.jsonl"), texts)
        status, out, err = main("--files", path, "--out", folder, "--shard_size", size)
        if not len(want):
            assert status == 2 and not shards_of(folder)
            return
        assert status == 0, err
        entries, files = load_manifest(folder)["shards"], shards_of(folder)
    assert [e["name"] for e in entries] == [shard_name(i) for i in range(len(entries))]
    assert sorted(files) == sorted(e["name"] for e in entries)
    lengths = [0 if text is None else 1 + len(encode_bytes(text)) for text in texts]
    edges, position = np.concatenate([[0], np.cumsum(lengths)]), {"document": 0, "token": 0}
    for i, e in enumerate(entries):
        cut, plain = want[i * size : (i + 1) * size], io.BytesIO()
        np.save(plain, cut)
        assert files[e["name"]] == plain.getvalue(), "not what np.save writes"
        assert (e["tokens"], e["documents"]) == (len(cut), (cut == EOT).sum())
        assert e["start"] == position
        position = e["end"]
        assert edges[position["document"]] + position["token"] == i * size + len(cut)
        assert position["token"] in range(max([1, *lengths[position["document"] :][:1]]))
    assert sum(e["tokens"] for e in entries) == len(want)
    nulls = texts.count(None)
    assert (f"skipped {nulls} rows whose text is null" in out) == (nulls > 0)


def test_any_shard_can_be_created_again_from_its_position(main, tmp_path):
    texts = [None if i % 7 == 0 else text for i, text in enumerate(texts_of(30, size=90))]
    argv = ["--files", write_jsonl(tmp_path / "t.jsonl", texts), "--out", tmp_path]
    assert main(*argv, "--shard_size", "64")[0] == 0
    before, manifest = shards_of(tmp_path), load_manifest(tmp_path)
    assert len(before) > 15
    for name in before:
        os.remove(tmp_path / name)
        status, out, _ = main(*argv)
        assert status == 0 and name in out and out.count(" tokens\n") == 1
        assert shards_of(tmp_path) == before and load_manifest(tmp_path) == manifest


@vocabulary
def test_literal_endoftext_and_unpaired_surrogates(main, tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "x <|endoftext|>"}\n{"text": "<|endoftext|>"}\n'
                    '{"text": ""}\n{"text": "a \\ud800 b"}\n')  # fmt: skip
    marker = [27, 91, 437, 1659, 5239, 91, 29]  # seven ordinary tokens
    real = fineweb.load_encode()
    texts = [[87, 1279, *marker[1:]], marker, [], real("a \ufffd b")]
    status, _, err = main("--files", path, "--out", tmp_path, encode=real)
    assert (status, err) == (0, "")
    assert tokens_of(tmp_path).tolist() == [token for text in texts for token in (EOT, *text)]


def test_all_file_types_and_shuffle(main, tmp_path):
    texts = texts_of(40, seed=1)
    texts[5] = texts[25] = None
    (tmp_path / "b.txt").write_text("one document\n\nonly", encoding="utf-8-sig")
    inputs = [
        write_parquet(tmp_path / "a.parquet", texts[:20], rows=7),
        write_jsonl(tmp_path / "c.jsonl", texts[20:30], encoding="utf-8-sig"),
        write_jsonl(tmp_path / "d.jsonl.gz", texts[30:], gzip.open),
        str(tmp_path / "b.t[x]t"),  # a glob pattern
    ]
    texts.append("one document\n\nonly")

    def run(out, *extra):
        assert main("--files", *inputs, "--out", tmp_path / out, "--shard_size=1000", *extra)[0] == 0
        return tokens_of(tmp_path / out)

    assert (run("plain") == oracle(texts)).all()
    before = times_of(tmp_path / "plain")
    run("plain")
    assert times_of(tmp_path / "plain") == before
    assert (run("some", "--max_tokens", "2500") == oracle(texts)[:2500]).all()
    order = np.random.RandomState(7).permutation(len(texts))
    assert (run("mixed", "--shuffle", "7") == oracle([texts[i] for i in order])).all()
    assert not [p.name for p in (tmp_path / "mixed").iterdir() if "arrow" in p.name]
    manifest = load_manifest(tmp_path / "plain")
    assert manifest["complete"] and manifest["documents"] == 39


def test_a_folder_that_an_earlier_version_began_is_finished_to_the_same_bytes(main, tmp_path):
    """The manifest is that of an earlier version, and two of its shards exist."""
    texts = ["ab", "cdefgh", "", "ijklm", "nop"]
    path, want = write_jsonl(tmp_path / "t.jsonl", texts), oracle(texts)
    shards, places = [], [(0, 0), (1, 3), (3, 1), (4, 1)]  # of tokens 0, 6, 12 and 18
    for i in range(2):
        name = shard_name(i, "edufineweb")  # the prefix of all sources in earlier versions
        np.save(tmp_path / name, want[6 * i : 6 * i + 6])
        begin, end = ({"document": d, "token": t} for d, t in places[i : i + 2])
        shards.append({"name": name, "tokens": 6, "documents": 2,
                       "sha256": fineweb.sha256_of(tmp_path / name), "start": begin, "end": end})  # fmt: skip
    recorded = {"files": [["t.jsonl", os.path.getsize(path)]], "text_column": "text",
                "shard_size": 6, "max_tokens": 20, "shuffle": None, "tokenizer": "gpt2"}
    note = {"datasets": "5.0.1", "document": 1000, "at": {}}  # of a stream, no longer used
    manifest = {"format": "fineweb.py 1", "settings": recorded, "complete": False, "tokens": 12,
                "documents": 4, "shards": shards, "note": note}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest, indent=1))
    before, argv = times_of(tmp_path), ["--files", path, "--out", tmp_path]
    assert main(*argv, "--max_tokens", "20")[0] == 0  # --shard_size as recorded
    assert (tokens_of(tmp_path) == want[:20]).all()
    assert sorted(shards_of(tmp_path)) == sorted(shard_name(i, "edufineweb") for i in range(4))
    assert before.items() <= times_of(tmp_path).items(), "a listed shard was written again"
    done = load_manifest(tmp_path)
    assert done["shards"][:2] == shards and done["complete"] and done["documents"] == 5
    assert done["shards"][1]["end"] == done["shards"][2]["start"] == {"document": 3, "token": 1}


@pytest.mark.parametrize("kind", ["txt", "parquet", "jsonl.gz"])
def test_the_default_shard_size_leaves_about_a_tenth_for_validation(main, tmp_path, kind):
    words, path = (ROOT / "input.txt").read_text("utf-8"), tmp_path / f"t.{kind}"
    texts = [words] if kind == "txt" else [words[i : i + 500] for i in range(0, len(words), 500)]
    write = {"txt": lambda path, texts: path.write_text(*texts), "parquet": write_parquet,
             "jsonl.gz": lambda path, texts: write_jsonl(path, texts, gzip.open)}
    write[kind](path, texts)
    status, _, _ = main("--files", path, "--out", tmp_path / "out",
                        encode=lambda text: encode_bytes(text)[::4])  # about as many tokens as GPT-2's
    shards = load_manifest(tmp_path / "out")["shards"]
    assert status == 0 and 0.03 < shards[0]["tokens"] / sum(e["tokens"] for e in shards) < 0.2


def test_a_shard_size_that_leaves_nothing_to_train_on(main, tmp_path):
    path = write_jsonl(tmp_path / "t.jsonl", ["abcdef"] * 30)
    status, _, err = main("--files", path, "--out", tmp_path / "out", "--shard_size", "500")
    assert status == 0 and "all tokens are in the validation shard" in err
    assert "rerun with --shard_size 21 or less" in err


# -----------------------------------------------------------------------------
# The hub, and kills


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """(hub with the layout of FineWeb-Edu, environment for a command, parquet files, texts)"""
    folder = tmp_path_factory.mktemp("hub")
    texts, repo = texts_of(2000, seed=2), folder / "repo"
    texts[300] = texts[1500] = None
    files = [write_parquet(repo / "sample" / "10BT" / f"00{i}_00000.parquet", half)
             for i, half in enumerate((texts[:1000], texts[1000:]))]  # fmt: skip
    write_parquet(repo / "data" / "CC" / "train.parquet", ["unused"])
    (repo / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/*/*\n"
        "- config_name: sample-10BT\n  data_files:\n  - split: train\n    path: sample/10BT/*\n---\n"
    )
    with Hub(repo, DATA) as server:
        yield server, {**server.env, "HF_HOME": str(folder / "hf")}, files, texts


@posix
def test_the_hub_with_and_without_streaming_gives_the_documents_in_order(hub, tmp_path):
    """Shards are named after FineWeb-Edu only if they come from it."""
    _, env, files, texts = hub
    argv, want = ["--shard_size", "20000", "--out"], oracle(texts)
    for name, extra in ("files", ["--files", *files]), ("downloaded", []), ("streamed", ["--streaming"]):
        out, err = finish(start(env, *argv, tmp_path / name, *extra))
        assert (tokens_of(tmp_path / name) == want).all() and err == ""
        prefix = "tokens" if name == "files" else "edufineweb"
        assert len(shards_of(tmp_path / name)) > 10
        assert all(shard.startswith(f"{prefix}_") for shard in shards_of(tmp_path / name))
        assert "skipped 2 rows whose text is null" in out
    assert load_manifest(tmp_path / "downloaded")["settings"]["revision"].startswith("c0ffee")


@posix
def test_killed_at_the_worst_places_and_rerun(tmp_path):
    """The number of threads differs between the runs and does not change the bytes."""
    texts = texts_of(600, seed=3)
    argv = ["--files", write_jsonl(tmp_path / "t.jsonl", texts), "--shard_size", "3000", "--out"]
    finish(start({}, *argv, tmp_path / "whole", "--num_proc", "3"))
    whole, out = shards_of(tmp_path / "whole"), tmp_path / "killed"
    points = [
        ('at("pyarrow.record_batch", kill, nth=2)', 0),  # some of the texts copied
        ('at("fineweb.sha256_of", kill)', 1),  # the first shard is not listed
        ('at("os.replace", kill, nth=3, match=".npy")', 2),  # written, not renamed
        ('torn_shard(3)', 4),
        ('at("fineweb.save_manifest", kill, nth=3)', 7),  # a shard that is not listed
        ('at("os.replace", kill, nth=3, match="manifest.json")', 9),  # nor is this one
        # all shards are listed, only "complete" is missing
        (f'at("fineweb.save_manifest", kill, nth={len(whole) - 7})', len(whole)),
    ]
    for patch, there in points:
        killed({}, *argv, out, "--num_proc", "1", patch=patch)
        made = shards_of(out)
        assert len(made) == there and made.items() <= whole.items(), patch
    finish(start({}, *argv, out, "--num_proc", "1"))
    assert shards_of(out) == whole and not list(out.glob("*.tmp")) and not list(out.glob(".documents*"))
    one, two = (load_manifest(tmp_path / name) for name in ("killed", "whole"))
    assert one == two and (tokens_of(tmp_path / "whole") == oracle(texts)).all()


@posix
@pytest.mark.parametrize("patch, shards", [
    ('at("pyarrow.record_batch", stay)', 0),
    ('at("numpy.save", stay, nth=4)', 3),
    ('at("concurrent.futures.Future.result", stay)', 0),
])  # fmt: skip
def test_ctrl_c_is_one_line_and_keeps_the_completed_shards(tmp_path, patch, shards):
    path = write_jsonl(tmp_path / "t.jsonl", texts_of(200))
    process = start({}, "--files", path, "--shard_size", "3000", "--out", tmp_path / "out", patch=patch)
    assert any("here" in line for line in process.stdout)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, err = finish(process, status=130)
    assert err == "fineweb.py: interrupted; completed shards are safe, rerun to continue\n"
    assert (tmp_path / "out").exists() == (shards > 0) and len(shards_of(tmp_path / "out")) == shards
    assert not list((tmp_path / "out").glob(".documents*"))


@posix
def test_an_interrupted_stream_continues(hub, tmp_path):
    server, env, files, texts = hub
    argv = ["--shard_size", "20000", "--streaming", "--out"]
    server.replaced = {"sample/10BT/001_00000.parquet": None}
    _, err = finish(start(env, *argv, tmp_path), status=1)
    server.replaced = {}
    assert f"could not load {DATA}" in err and "rerun to continue" in err and err.count("\n") == 1
    listed = load_manifest(tmp_path)["shards"]
    assert listed and (tokens_of(tmp_path) == oracle(texts)[: 20000 * len(listed)]).all()
    finish(start(env, *argv, tmp_path))
    assert (tokens_of(tmp_path) == oracle(texts)).all()
    argv = ["--shuffle", "5", *argv]
    finish(start(env, *argv, tmp_path / "whole"))
    killed(env, *argv, tmp_path / "killed", patch='at("fineweb.record_shard", kill, nth=4)')
    finish(start(env, *argv, tmp_path / "killed"))
    assert shards_of(tmp_path / "killed") == shards_of(tmp_path / "whole")


# -----------------------------------------------------------------------------
# Mistakes and faults: one line each, no loss of completed shards


def test_a_full_disk_keeps_the_completed_shards(tmp_path, monkeypatch, main, refused):
    texts = texts_of(200, seed=4)
    argv = ["--files", write_jsonl(tmp_path / "t.jsonl", texts), "--shard_size", "3000", "--out", tmp_path]
    full = OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(fineweb.np, "save", Mock(wraps=np.save, side_effect=[DEFAULT] * 3 + [full]))
        assert "No space left" in refused(*argv, status=1)
    assert len(load_manifest(tmp_path)["shards"]) == len(shards_of(tmp_path)) == 3
    assert not list(tmp_path.glob(".documents*")), "the copy still fills the disk"
    assert main(*argv)[0] == 0 and not list(tmp_path.glob("*.tmp"))
    assert (tokens_of(tmp_path) == oracle(texts)).all()


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, ""), NotImplementedError()])
def test_locks(tmp_path, monkeypatch, main, refused, error):
    """Two writers are refused. Storage without locks is a warning."""
    argv = ["--files", write_jsonl(tmp_path / "t.jsonl", texts_of(20)), "--out", tmp_path]
    with fineweb.locked_dir(str(tmp_path)):
        assert "another fineweb.py is writing" in refused(*argv)
    monkeypatch.setattr("filelock.FileLock.acquire", Mock(side_effect=error))
    status, _, err = main(*argv)
    assert status == 0 and err.count("\n") == 1 and "warning: could not lock" in err


@pytest.mark.parametrize("flags, message", [
    (["--shard_size", "0"], "argument --shard_size: 0 is less than 1"),
    (["--shard", "5"], "unrecognized arguments: --shard 5"),  # an abbreviation
    (["--text_column", ""], "--text_column must not be empty"),
    (["--streaming"], "--files excludes"),
    (["--text_column", "body"], "t.jsonl line 1 has no text in column body, only text (str), n (int)"),
    (["--text_column", "n"], "no text in column n,"),
    (["--files", "nowhere/*.txt"], "nowhere/*.txt: no such"),
    (["--files", "fineweb.py"], "fineweb.py: no such"),
    (["--out", "LICENSE"], "File exists: 'LICENSE'; check --out"),
])  # fmt: skip
def test_mistakes_with_files(tmp_path, refused, monkeypatch, flags, message):
    monkeypatch.chdir(ROOT)
    path = write_jsonl(tmp_path / "t.jsonl", texts_of(3))
    assert message in refused("--files", path, "--out", tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name, content, message", [
    ("line.jsonl", b'{"text": "good"}\n\n{"text": \n', " line 3 (JSONDecodeError"),
    ("byte.jsonl", b'{"text": "good"}\n' * 999 + b'{"text": "caf\xe9"}\n', " line 1000 (UnicodeDecodeError"),
    ("late.jsonl", b'{"text": "good"}\n{"body": ""}\n', " line 2 has no text in column text, only body"),
    ("list.jsonl", b"[]", " line 1 is not a JSON object"),
    ("number.jsonl", b'{"text": 5}\n', " line 1 has no text in column text, only text (int)"),
    ("cut.jsonl.gz", gzip.compress(b'{"text": "good"}\n' * 99, mtime=0)[:-9], ""),
    ("latin.txt", b"caf\xe9", "utf-8"),
    ("flip.parquet", None, ""),
])  # fmt: skip
def test_a_damaged_file_is_named_first(tmp_path, refused, name, content, message):
    good, bad = write_parquet(tmp_path / "good.parquet", texts_of(90, size=1500)), tmp_path / name
    data = bytearray(pathlib.Path(good).read_bytes())
    late = len(data) * 9 // 10
    data[late : late + 400] = b"\xff" * 400
    bad.write_bytes(content or data)
    err = refused("--files", good, bad, "--out", tmp_path / "out", "--shard_size", "3000")
    assert f"{bad}" in err and message in err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags, status, message", [
    (["--dataset", "no/such"], 2, "could not load no/such"),
    (["--revision", "nope"], 2, "Revision Not Found"),
    (["--name", "nope"], 2, "sample-10BT"),
    (["--text_column", "body", "--streaming"], 2, "no text in column body, only id (int), text (str)"),
    ([], 1, "the network"),
])  # fmt: skip
def test_mistakes_with_the_hub(hub, tmp_path, flags, status, message):
    env = hub[1] if flags else {**hub[1], "HF_ENDPOINT": "http://127.0.0.1:9"}
    _, err = finish(start(env, "--out", tmp_path / "out", *flags), status)
    assert err.count("\n") == 1 and message in err, err
    assert not (tmp_path / "out").exists()


def test_other_settings_and_foreign_shards_are_refused(tmp_path, main, refused):
    path, out = write_jsonl(tmp_path / "t.jsonl", texts_of(20)), tmp_path / "out"
    argv = ["--files", path, "--out", out, "--shard_size", "500"]
    assert main(*argv)[0] == 0
    before = shards_of(out)
    assert "shard_size 500, not 600" in refused(*argv, "--shard_size", "600")
    assert "shuffle None, not 'seed 1'" in refused(*argv, "--shuffle", "1")
    write_jsonl(path, texts_of(21))
    assert "files" in refused(*argv) and shards_of(out) == before
    os.remove(out / "manifest.json")
    assert "shards from another source" in refused(*argv)
    for text in '{"shards": 3}', "[]", "{":
        (out / "manifest.json").write_text(text)
        assert "was not written by this version" in refused(*argv)


def test_verify_names_each_bad_shard_and_a_rerun_creates_only_these(tmp_path, main, refused):
    texts, out = texts_of(40), tmp_path / "out"
    argv = ["--files", write_jsonl(tmp_path / "t.jsonl", texts), "--out", out, "--shard_size", "900"]
    assert "no shards in" in refused("--verify", "--out", out) and main(*argv)[0] == 0
    status, printed, _ = main("--verify", "--out", out)
    assert status == 0 and ", valid\n" in printed
    whole, train = shards_of(out), sorted(out.glob("*train*"))
    flipped, short, gone, extra = train[1], train[2], train[-1], out / "tokens_train_000999.npy"
    data = bytearray(flipped.read_bytes())
    data[700] ^= 1
    flipped.write_bytes(data)
    short.write_bytes(short.read_bytes()[:-2])
    gone.unlink()
    np.save(extra, np.ones(5, np.uint16))
    err = refused("--verify", "--out", out)
    faults = {flipped: "wrong sha256", short: "wrong size", gone: "missing", extra: "not in the manifest"}
    assert all(f"{path.name} ({fault})" in err for path, fault in faults.items())
    flipped.unlink()
    extra.unlink()
    status, printed, _ = main(*argv)
    assert status == 0 and printed.count(" tokens\n") == 3 and shards_of(out) == whole
    flipped.unlink()
    write_jsonl(tmp_path / "t.jsonl", [text.replace("a", "b") for text in texts])  # as many bytes
    for _ in range(2):  # a rerun compares sizes, so that a shard with other tokens must not stay
        assert f"{flipped.name} has another sha256" in refused(*argv) and not flipped.exists()


def test_a_missing_vocabulary_is_one_line_with_the_fix(monkeypatch, refused, tmp_path):
    monkeypatch.setattr("tiktoken.get_encoding", Mock(side_effect=ConnectionError("no network")))
    path = write_jsonl(tmp_path / "t.jsonl", ["x"] * 20)
    err = refused("--files", path, "--out", tmp_path / "out", encode=None)
    assert "GPT-2 vocabulary (ConnectionError: no network); set TIKTOKEN_CACHE_DIR" in err
    assert not (tmp_path / "out").exists()


# -----------------------------------------------------------------------------
# The command


@vocabulary
def test_the_script_alone_in_an_empty_directory(tmp_path):
    shutil.copy(ROOT / "fineweb.py", tmp_path)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONIOENCODING": "ascii"}

    def run(*argv):
        command = [sys.executable, "fineweb.py", "--files", "t.txt", "--num_proc", "1", *argv]
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True)

    (tmp_path / "t.txt").write_text("Hello world. " * 20 + "\u4e16", encoding="utf-8")
    done = run()
    assert done.returncode == 0 and done.stderr == b"", done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["edu_fineweb10B", "fineweb.py", "t.txt"]
    assert tokens_of(tmp_path / "edu_fineweb10B")[:4].tolist() == [EOT, 15496, 995, 13]
    done = run("--out", "\u4e16")
    assert done.returncode == 0 and rb"\u4e16: " in done.stdout
    (tmp_path / "t.txt").write_text(" " * 2_000_000 + "x")
    done = run("--out", "o")
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1
    assert b"Regex error while tokenizing" in done.stderr


def test_help_names_every_flag_and_the_default_is_the_sample(main):
    status, text, _ = main("--help")
    args = fineweb.parse_args([])
    assert status == 0 and all(f"\n  --{flag}" in text for flag in vars(args)) and "--ready" not in text
    assert args.name == fineweb.parse_args(["--dataset", DATA]).name == "sample-10BT"
    assert fineweb.parse_args(["--dataset", "another/one"]).name is None
