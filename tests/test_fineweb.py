"""fineweb.py: its shards against plain tokenization, kills, faults, and shards that are fetched."""

import errno
import gzip
import io
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import Future
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, has_vocabulary
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from local_hub import Hub, finish, killed, shards_of, start, times_of

import fineweb
import plumbing.files
from plumbing.errors import UserError
from plumbing.manifest import sha256_of
from plumbing.tokens import EOT, Tokenizer, get_tokenizer, load_manifest, open_shards

BYTES = Tokenizer()
DATA = "HuggingFaceFW/fineweb-edu"
posix = pytest.mark.skipif(os.name == "nt", reason="needs process groups")


@pytest.fixture
def real():
    """Tests that need GPT-2's vocabulary run where it is at hand, and never download it."""
    if not has_vocabulary():
        pytest.skip("no vocabulary: set TIKTOKEN_CACHE_DIR")
    return get_tokenizer("gpt2")


class Here:
    """In the place of the pool of processes: does each job at once, in this process."""

    def __init__(self, num_proc, context, begin, arguments):
        fineweb.worker.update(zip(("encode", "dataset", "column"), arguments, strict=True))

    def submit(self, do, *job):
        future = Future()
        try:
            future.set_result(do(*job))
        except Exception as e:
            future.set_exception(e)
        return future

    def shutdown(self, **_):
        pass


@pytest.fixture
def main(monkeypatch, capsys):
    """The command in this process, and without others: (status, stdout, stderr)."""
    monkeypatch.setattr(fineweb, "ProcessPoolExecutor", Here)

    def run(*argv, tokenizer=BYTES):
        with pytest.raises(SystemExit) as e:
            fineweb.main([str(a) for a in argv], tokenizer)
        return e.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def refused(main):
    """The same for what ends in one line on stderr: (status, that line)."""

    def run(*argv, **how):
        status, _, err = main(*argv, **how)
        assert err.count("\n") == 1 and err.startswith("fineweb.py: error: "), err
        return status, err

    return run


def oracle(texts, encode=BYTES.encode):
    """The tokens of all documents, in the plainest way."""
    parts = [[[EOT], encode(text)] for text in texts]
    return np.concatenate([p for both in parts for p in both] or [[]]).astype(np.uint16)


def tokens_of(folder):
    paths = sorted(pathlib.Path(folder).glob("*.npy"), key=lambda p: p.name[-10:])
    return np.concatenate([np.load(p) for p in paths])


def texts_of(n, seed=0, size=400):
    rng = random.Random(seed)
    return ["".join(rng.choices("abc de\n\u00e9\u4e16", k=rng.randrange(size))) for _ in range(n)]


def write_jsonl(path, texts, opener=open):
    with opener(path, "wt", encoding="utf-8") as f:
        f.writelines(json.dumps({"text": t, "n": i}) + "\n" for i, t in enumerate(texts))
    return str(path)


def write_parquet(path, texts, rows=50):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"id": list(range(len(texts))), "text": pa.array(texts, pa.string())})
    pq.write_table(table, path, row_group_size=rows)
    return str(path)


# -----------------------------------------------------------------------------
# The shards are the tokenized documents, cut


# Documents longer than two shards, an exact fill, empty documents, none at all, the marker as text.
@given(st.lists(st.text("ab<|>\u00e9", max_size=30), max_size=12), st.integers(1, 40))
@example(["x" * 50], 16)
@example(["x" * 15, "y" * 7, "z" * 7], 16)
@example(["", "", "a", ""], 2)
@example(["ab<|endoftext|>cd", ""], 7)
@example([], 3)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_shards_are_the_tokenized_documents(main, texts, size):
    want = oracle(texts)
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(fineweb, "JOB_TOKENS", 5)  # so that even these texts make several jobs
        patch.setattr(plumbing.files.os, "fsync", lambda fd: None)
        path = write_jsonl(pathlib.Path(folder, "t.jsonl"), texts)
        status, _, err = main("--files", path, "--out", folder, "--shard_size", size)
        if not texts:
            assert status == 2 and "no documents" in err and not shards_of(folder)
            return
        assert status == 0, err
        entries, files = load_manifest(folder)["shards"], shards_of(folder)
    assert [e["name"] for e in entries] == [fineweb.shard_name(i) for i in range(len(entries))]
    assert sorted(files) == sorted(e["name"] for e in entries)
    place = {"document": 0, "token": 0}
    for i, e in enumerate(entries):
        cut = want[i * size : (i + 1) * size]
        plain = io.BytesIO()
        np.save(plain, cut)
        assert files[e["name"]] == plain.getvalue(), "not what np.save writes"
        assert (e["tokens"], e["documents"]) == (len(cut), (cut == EOT).sum())
        begins = [*np.flatnonzero(want == EOT), len(want)]  # of documents, and of what follows
        at = i * size + len(cut)
        document = int(np.searchsorted(begins, at, side="right")) - 1
        assert e["start"] == place
        place = e["end"]
        assert place == {"document": document, "token": at - begins[document]}
    assert sum(e["tokens"] for e in entries) == len(want)


def test_any_shard_can_be_made_again_from_its_position(main, tmp_path):
    argv = ["--files", write_jsonl(tmp_path / "t.jsonl", texts_of(30, size=90)), "--out", tmp_path]
    argv += ["--shard_size", "64"]
    assert main(*argv)[0] == 0
    before, manifest = shards_of(tmp_path), load_manifest(tmp_path)
    assert len(before) > 20
    for name in before:
        os.remove(tmp_path / name)
        status, out, _ = main(*argv)
        assert status == 0 and name in out and out.count(" tokens\n") == 1
        assert shards_of(tmp_path) == before and load_manifest(tmp_path) == manifest


def test_a_document_with_the_marker_in_its_text(real, main, tmp_path):
    path = write_jsonl(tmp_path / "t.jsonl", ["x <|endoftext|>", ""])
    assert main("--files", path, "--out", tmp_path, tokenizer=real)[0] == 0
    assert tokens_of(tmp_path).tolist() == [EOT, 87, 1279, 91, 437, 1659, 5239, 91, 29, EOT]


def test_half_a_surrogate_pair_is_the_same_token_with_and_without_shuffle(real, main, tmp_path):
    path = tmp_path / "half.jsonl"
    path.write_text('{"text": "a \\ud800 b"}\n')
    for out, extra in (("plain", []), ("mixed", ["--shuffle", "1"])):
        argv = ["--files", path, "--out", tmp_path / out, "--shard_size", "3"]
        assert main(*argv, *extra, tokenizer=real)[0] == 0
    want = [EOT, *real._bpe.encode_ordinary("a \ud800 b")]
    assert tokens_of(tmp_path / "plain").tolist() == want == tokens_of(tmp_path / "mixed").tolist()


def test_files_of_every_kind_and_shuffle(main, tmp_path):
    texts = texts_of(40, seed=1)
    (tmp_path / "b.txt").write_text("one document\n\nonly", encoding="utf-8")
    inputs = [
        write_parquet(tmp_path / "a.parquet", texts[:20], rows=7),
        write_jsonl(tmp_path / "c.jsonl", texts[20:30]),
        write_jsonl(tmp_path / "d.jsonl.gz", texts[30:], gzip.open),
        str(tmp_path / "b.t[x]t"),  # a glob
    ]
    texts.append("one document\n\nonly")

    def run(out, *extra):
        argv = ["--files", *inputs, "--out", tmp_path / out, "--shard-size=1000", *extra]
        status, said, _ = main(*argv)
        assert status == 0 and "documents in" in said
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
    assert manifest["complete"] and manifest["documents"] == 41


def test_a_folder_that_an_earlier_version_began_is_finished_to_the_same_bytes(main, tmp_path):
    """Its manifest, key by key; two of its shards are there."""
    texts = ["ab", "cdefgh", "", "ijklm", "nop"]
    path, want = write_jsonl(tmp_path / "t.jsonl", texts), oracle(texts)
    shards, places = [], [(0, 0), (1, 3), (3, 1), (4, 1)]  # of tokens 0, 6, 12 and 18
    for i in range(2):
        np.save(tmp_path / fineweb.shard_name(i), want[6 * i : 6 * i + 6])
        start, end = ({"document": d, "token": t} for d, t in places[i : i + 2])
        sha256 = sha256_of(tmp_path / fineweb.shard_name(i))
        shards.append({"name": fineweb.shard_name(i), "tokens": 6, "documents": 2,
                       "sha256": sha256, "start": start, "end": end})  # fmt: skip
    settings = {"files": [["t.jsonl", os.path.getsize(path)]], "text_column": "text",
                "shard_size": 6, "max_tokens": 0, "shuffle": None, "tokenizer": "gpt2"}
    manifest = {"format": "fineweb.py 1", "settings": settings, "complete": False, "tokens": 12,
                "documents": 4, "shards": shards, "note": None}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest, indent=1))
    before = times_of(tmp_path)
    assert main("--files", path, "--out", tmp_path, "--shard_size", "6")[0] == 0
    assert (tokens_of(tmp_path) == want).all() and len(shards_of(tmp_path)) == 4
    assert before.items() <= times_of(tmp_path).items()
    done = load_manifest(tmp_path)
    assert done["shards"][:2] == shards and done["complete"] and done["documents"] == 5
    assert done["shards"][1]["end"] == done["shards"][2]["start"] == {"document": 3, "token": 1}


# -----------------------------------------------------------------------------
# The hub, and kills


def hub_folder(folder, texts):
    """A data set laid out as FineWeb-Edu is, with a default configuration too."""
    half = len(texts) // 2
    write_parquet(folder / "sample" / "10BT" / "000_00000.parquet", texts[:half])
    write_parquet(folder / "sample" / "10BT" / "001_00000.parquet", texts[half:])
    write_parquet(folder / "data" / "CC" / "train.parquet", ["unused"])
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n"
        "    path: data/*/*\n- config_name: sample-10BT\n  data_files:\n  - split: train\n"
        "    path: sample/10BT/*\n---\n"
    )
    return sorted(str(p) for p in (folder / "sample" / "10BT").iterdir())


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """(the hub, environment for a command, parquet files, their texts)"""
    pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("hub")
    texts = texts_of(2000, seed=2)
    files = hub_folder(folder / "repo", texts)
    with Hub(folder / "repo", DATA) as server:
        yield server, {**server.env, "HF_HOME": str(folder / "hf")}, files, texts


@posix
def test_the_hub_both_ways_gives_what_files_give(hub, tmp_path):
    _, env, files, texts = hub
    kind, size = ("real", "10000") if has_vocabulary() else ("Bytes", "20000")
    size = ["--shard_size", size, "--num_proc", "1"]
    finish(start(env, kind, *size, "--out", tmp_path / "f", "--files", *files))
    want = shards_of(tmp_path / "f")
    assert len(want) > 10
    _, err = finish(start(env, kind, *size, "--out", tmp_path / "m"))
    assert shards_of(tmp_path / "m") == want and err == ""
    assert load_manifest(tmp_path / "m")["settings"]["revision"].startswith("c0ffee")
    _, err = finish(start(env, kind, *size, "--out", tmp_path / "s", "--streaming"))
    assert shards_of(tmp_path / "s") == want and err == ""


@pytest.mark.parametrize("version, known", [("5.0.0", False), ("5.0.1", True)])
def test_a_version_that_loses_its_place_is_not_asked_for_it(monkeypatch, version, known):
    import datasets

    monkeypatch.setattr(datasets, "__version__", version)
    data = datasets.Dataset.from_dict({"text": ["x"] * 2500}).to_iterable_dataset()
    args = SimpleNamespace(dataset="some", text_column="text", split="train", shuffle=None)
    notes = [note for _, _, note in fineweb.Stream(data, args, None).jobs(0)]
    assert [bool(note) for note in notes] == [False, known, known]  # where it is before each job


@posix
@pytest.mark.parametrize("how", [["--streaming"], []])
def test_the_hub_killed_and_rerun(hub, tmp_path, how):
    _, env, _, texts = hub
    argv = ["--shard_size", "20000", "--num_proc", "2", "--out", tmp_path, *how]
    killed(env, *argv, patch='at("numpy.save", kill, nth=14)')
    listed, old = load_manifest(tmp_path), times_of(tmp_path)
    assert len(listed["shards"]) == 13 and not listed["complete"]
    assert bool(listed["note"]) == bool(how), "a stream is to be taken up where it was left"
    out, _ = finish(start(env, "Bytes", *argv))
    assert not any(shard["name"] in out for shard in listed["shards"])
    assert old.items() <= times_of(tmp_path).items()
    assert (tokens_of(tmp_path) == oracle(texts)).all()


@posix
def test_killed_at_the_worst_places_and_rerun(tmp_path):
    """By one worker, where another run had three: neither is seen in the bytes."""
    texts = texts_of(600, seed=3)
    argv = ["--files", write_jsonl(tmp_path / "t.jsonl", texts), "--shard_size", "3000"]
    argv += ["--out"]
    finish(start({}, "Bytes", *argv, tmp_path / "whole", "--num_proc", "3"))
    whole, out = shards_of(tmp_path / "whole"), tmp_path / "killed"
    points = [
        ('at("pyarrow.record_batch", kill, nth=2)', 0),  # half of the texts copied
        ('at("os.replace", kill, nth=3, match=".npy")', 2),  # written, without its name
        ('torn_shard(3)', 4),  # half a shard
        ('at("plumbing.manifest.save_manifest", kill, nth=4)', 7),  # a shard that is not listed
        ('at("os.replace", kill, nth=3, match="manifest.json")', 8),  # nor is this one
        # and the last time, when all are there and only "complete" is missing
        (f'at("plumbing.manifest.save_manifest", kill, nth={len(whole) - 5})', len(whole)),
    ]
    for patch, there in points:
        killed({}, *argv, out, "--num_proc", "1", patch=patch)
        made = shards_of(out)
        assert len(made) == there, patch
        assert made.items() <= whole.items(), f"half a shard: {patch}"
    finish(start({}, "Bytes", *argv, out, "--num_proc", "1"))
    assert shards_of(out) == whole and not list(out.glob("*.tmp")) and not list(out.glob("*.arrow"))
    one, two = (load_manifest(tmp_path / name) for name in ("killed", "whole"))
    assert one == two and (tokens_of(tmp_path / "whole") == oracle(texts)).all()


@posix
@pytest.mark.parametrize("env, patch, safe", [
    ({"IN_WORKERS": 'print("here", flush=True); time.sleep(1)'}, "", "stopped; the same"),  # start
    ({}, 'at("numpy.save", stay, nth=4)', "stopped; the 3 finished shards in {} are safe, and "),
])  # fmt: skip
def test_ctrl_c_is_one_line_that_says_what_is_safe(tmp_path, env, patch, safe):
    argv = ["--files", write_jsonl(tmp_path / "t.jsonl", texts_of(200)), "--shard_size", "3000"]
    argv += ["--num_proc", "2", "--out", tmp_path / "out"]
    process = start(env, "Bytes", *argv, patch=patch)
    assert any("here" in line for line in process.stdout)  # two workers may share a line
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does it
    _, err = finish(process, status=130)
    assert safe.format(tmp_path / "out") in err and err.count("\n") == 1, err
    assert len(load_manifest(tmp_path / "out")["shards"]) == (3 if "3" in safe else 0)
    assert not list((tmp_path / "out").glob("*.arrow"))


@posix
def test_a_stream_that_breaks_off_goes_on_when_the_hub_is_back(hub, tmp_path):
    server, env, files, texts = hub
    argv = ["--shard_size", "20000", "--num_proc", "1", "--out", tmp_path, "--streaming"]
    server.lost = os.path.basename(files[-1])
    try:
        _, err = finish(start(env, "Bytes", *argv), status=1)
    finally:
        server.lost = None
    assert "cannot be read on" in err and "finished shards" in err and err.count("\n") == 1
    listed = load_manifest(tmp_path)["shards"]
    assert listed and (tokens_of(tmp_path) == oracle(texts)[: 20000 * len(listed)]).all()
    finish(start(env, "Bytes", *argv))
    assert (tokens_of(tmp_path) == oracle(texts)).all()


@posix
@pytest.mark.parametrize("patiently", [True, False])
def test_a_hub_that_stops_answering_is_said_and_waited_for(hub, tmp_path, patiently):
    server, env, files, texts = hub
    argv = ["--shard_size", "20000", "--num_proc", "1", "--out", tmp_path, "--streaming"]
    server.silent = os.path.basename(files[-1])
    try:
        process = start(env, "Bytes", *argv, patch="fineweb.PATIENCE = 1.5")
        line = process.stderr.readline()
        assert line.startswith("warning: no document for 1.5 s: the network does not answer"), line
        assert "is tried again" in line and "Ctrl-C stops" in line and "shards are safe" in line
        if not patiently:
            os.killpg(process.pid, signal.SIGINT)
            _, err = finish(process, status=130)
            assert "stopped; the " in err
            return
    finally:
        server.silent = None
    _, err = finish(process)
    assert all(line.startswith("warning: no document for") for line in err.splitlines()), err
    assert (tokens_of(tmp_path) == oracle(texts)).all()


# -----------------------------------------------------------------------------
# Mistakes and faults: one line each, nothing lost


def test_a_full_disk_keeps_what_is_finished(tmp_path, monkeypatch, main, refused):
    texts = texts_of(200, seed=4)
    argv = ["--files", write_jsonl(tmp_path / "t.jsonl", texts), "--shard_size", "3000"]
    argv += ["--out", tmp_path / "out"]
    room = [20_000]

    class FullDisk(io.BufferedRandom):
        def write(self, data):
            room[0] -= memoryview(data).nbytes
            if room[0] < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    def small_disk(path, mode="r", **kw):
        if ".npy" not in str(path):
            return open(path, mode, **kw)
        return FullDisk(open(path, mode, 0))

    with monkeypatch.context() as patch:
        patch.setattr(plumbing.files, "open", small_disk, raising=False)
        status, err = refused(*argv)
    assert status == 1 and "No space left" in err and "the 3 finished shards" in err
    manifest = load_manifest(tmp_path / "out")
    assert len(manifest["shards"]) == len(shards_of(tmp_path / "out")) == 3
    assert not list((tmp_path / "out").glob("*.tmp")), "the half shard keeps the disk full"
    assert not list((tmp_path / "out").glob("*.arrow")), "so does the copy"
    assert main(*argv)[0] == 0
    assert (tokens_of(tmp_path / "out") == oracle(texts)).all()


@pytest.mark.parametrize("flags, says", [
    (["--shard_size", "0"], "--shard_size 0"),
    (["--shard_size", "x"], "invalid int"),
    (["--num_proc", "0"], "--num_proc"),
    (["--max_tokens", "-1"], "--max_tokens"),
    (["--shard", "5"], "--shard"),  # an abbreviation
    (["--streaming"], "--streaming"),
    (["--text_column", "body"], "no column body, it has text, n"),
    (["--text_column", "n"], "column n of"),
    (["--files", "nowhere/*.txt"], "nowhere/*.txt"),
    (["--files", "fineweb.py"], "fineweb.py is not"),
    (["--ready", "3"], "--ready goes without --files"),
])  # fmt: skip
def test_mistakes_with_files(tmp_path, refused, monkeypatch, flags, says):
    monkeypatch.chdir(ROOT)
    path = write_jsonl(tmp_path / "t.jsonl", texts_of(3))
    status, err = refused("--files", path, "--out", tmp_path / "out", *flags)
    assert status == 2 and says in err, err
    assert not shards_of(tmp_path / "out")
    # and the command without the mistake is not held to it
    assert refused("--files", tmp_path / "none.txt", "--out", tmp_path / "out")[0] == 2


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory):
    """A folder of good.parquet and of files that are damaged, each in another way."""
    folder = tmp_path_factory.mktemp("bad")
    write_parquet(folder / "good.parquet", texts_of(90, size=1500))
    data = (folder / "good.parquet").read_bytes()
    (folder / "cut.parquet").write_bytes(data[:-100])
    (folder / "no.parquet").write_bytes(b"no parquet at all")
    (folder / "line.jsonl").write_text('{"text": "good"}\n{"text": \n')
    (folder / "list.jsonl").write_text('[1, 2]\n')
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "good"}\n' * 99)[:-9])
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "number.jsonl").write_text('{"text": "good"}\n{"text": 5}\n')
    (folder / "folder.txt").mkdir()
    late = len(data) * 9 // 10
    (folder / "flip.parquet").write_bytes(data[:late] + b"\xff" * 400 + data[late + 400 :])
    write_parquet(folder / "null.parquet", ["good", None])
    import pyarrow as pa
    import pyarrow.parquet as pq

    latin = pa.Array.from_buffers(pa.string(), 1, pa.array([b"caf\xe9"]).buffers())
    pq.write_table(pa.table({"text": latin}), folder / "latin.parquet")
    return folder


@pytest.mark.parametrize("name", [
    "cut.parquet", "no.parquet", "line.jsonl", "list.jsonl", "cut.jsonl.gz", "latin.txt",
    "number.jsonl", "folder.txt", "flip.parquet", "null.parquet", "latin.parquet",
])  # fmt: skip
def test_a_damaged_file_is_named_before_the_first_shard_is_made(tmp_path, refused, bad_files, name):
    argv = ["--files", bad_files / "good.parquet", bad_files / name, "--out", tmp_path]
    status, err = refused(*argv, "--shard_size", "3000")
    assert status == 2 and name.removeprefix("folder") in err, err
    assert "line 2 is no JSON object" in err or name != "line.jsonl"
    assert not shards_of(tmp_path) and not list(tmp_path.glob("*.arrow"))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads all")
def test_a_file_without_permission(tmp_path, refused):
    path = tmp_path / "secret.txt"
    path.write_text("x")
    path.chmod(0)
    assert "secret" in refused("--files", path, "--out", tmp_path)[1]


@pytest.mark.parametrize("flags, status, says", [
    (["--dataset", "no/such"], 2, "no dataset no/such"),
    (["--revision", "nope"], 2, "--revision"),
    (["--name", "nope"], 2, "sample-10BT"),
    (["--text_column", "body", "--streaming"], 2, "it has id, text"),
    (["--text_column", "id", "--streaming"], 2, "int64"),
    ([], 1, "check the network"),
])  # fmt: skip
def test_mistakes_with_the_hub(hub, tmp_path, flags, status, says):
    env = hub[1] if flags else {**hub[1], "HF_ENDPOINT": "http://127.0.0.1:9"}
    _, err = finish(start(env, "Bytes", "--out", tmp_path, *flags), status)
    assert err.count("\n") == 1 and says in err, err


@posix
def test_a_worker_that_dies_ends_the_run(tmp_path):
    # Long documents behind it: what is on its way to a dead worker must not block the others.
    path = write_jsonl(tmp_path / "t.jsonl", ["fine", "deadly", *["x" * 300_000] * 40])
    argv = ["--files", path, "--out", tmp_path / "out", "--num_proc", "2"]
    _, err = finish(start({}, "DeadlyBytes", *argv), 1)
    assert "a worker process died" in err and err.count("\n") == 1


def test_other_settings_and_others_folders_are_refused(tmp_path, main, refused):
    path = write_jsonl(tmp_path / "t.jsonl", texts_of(20))
    argv = ["--files", path, "--out", tmp_path / "out", "--shard_size", "500"]
    assert main(*argv)[0] == 0
    before = shards_of(tmp_path / "out")
    assert "shard_size 500, not 600" in refused(*argv, "--shard_size", "600")[1]
    assert "shuffle None, not 'seed 1'" in refused(*argv, "--shuffle", "1")[1]
    write_jsonl(path, texts_of(21))
    assert "files" in refused(*argv)[1]
    assert shards_of(tmp_path / "out") == before
    os.remove(tmp_path / "out" / "manifest.json")
    assert "made by something else" in refused(*argv)[1]
    (tmp_path / "out" / "manifest.json").write_text('{"shards": 3}')
    assert "not a manifest" in refused(*argv)[1]


def test_two_writers_in_a_folder(tmp_path, refused):
    path = write_jsonl(tmp_path / "t.jsonl", ["x"])
    held = plumbing.files.lock(str(tmp_path / ".lock"), "")
    assert "another fineweb.py" in refused("--files", path, "--out", tmp_path)[1]
    held.release()


def test_verify_names_each_bad_shard_and_a_rerun_makes_only_these(tmp_path, main):
    path, out = write_jsonl(tmp_path / "t.jsonl", texts_of(40)), tmp_path / "out"
    argv = ["--files", path, "--out", out, "--shard_size", "900"]
    assert main(*argv)[0] == 0
    status, said, _ = main("--verify", "--out", out)
    assert status == 0 and "all good" in said
    whole, train = shards_of(out), sorted(out.glob("*train*"))
    flipped, short, gone = train[1], train[2], train[-1]
    data = bytearray(flipped.read_bytes())
    data[700] ^= 1
    flipped.write_bytes(data)
    short.write_bytes(short.read_bytes()[:-2])
    gone.unlink()
    np.save(out / "edufineweb_train_000999.npy", np.ones(5, np.uint16))
    status, _, err = main("--verify", "--out", out)
    assert status == 2
    faults = {flipped: "sha256", short: "size", gone: "missing", "000999": "not in the manifest"}
    for path, why in faults.items():
        assert any(str(path) in line and why in line for line in err.splitlines()), err
    with pytest.raises(UserError, match="damaged"):
        open_shards(out, "train")
    short.unlink()
    with pytest.raises(UserError, match="is missing.*--verify"):
        open_shards(out, "train")
    flipped.unlink()
    (out / "edufineweb_train_000999.npy").unlink()
    status, said, _ = main(*argv)
    assert status == 0 and said.count(" tokens\n") == 3 and shards_of(out) == whole


def test_a_shard_that_comes_out_different_is_not_left_under_its_name(tmp_path, main, refused):
    """Of the right size, the next run would take it for the one that was listed."""
    texts = ["some words"] * 40
    path, out = write_jsonl(tmp_path / "t.jsonl", texts), tmp_path / "out"
    argv = ["--files", path, "--out", out, "--shard_size", "100"]
    assert main(*argv)[0] == 0
    write_jsonl(path, ["other word"] * 40)  # as many bytes, and as many tokens
    first = min(out.glob("*train*"))
    first.unlink()
    for _ in range(2):
        assert "came out different" in refused(*argv)[1] and not first.exists()
    write_jsonl(path, texts)
    assert main(*argv)[0] == 0 and main("--verify", "--out", out)[0] == 0


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path, main):
    plain, marked = write_jsonl(tmp_path / "t.jsonl", texts_of(3)), tmp_path / "marked.jsonl"
    marked.write_text(pathlib.Path(plain).read_text(), encoding="utf-8-sig")
    for path in (plain, marked):
        assert main("--files", path, "--out", tmp_path / pathlib.Path(path).stem)[0] == 0
    assert shards_of(tmp_path / "t") == shards_of(tmp_path / "marked")


def test_no_vocabulary_is_said_with_the_way_to_it(monkeypatch, refused, tmp_path):
    monkeypatch.setattr(pytest.importorskip("tiktoken"), "get_encoding", lambda name: {}[name])
    path = write_jsonl(tmp_path / "t.jsonl", ["x"])
    status, err = refused("--files", path, "--out", tmp_path / "o", tokenizer=None)
    assert status == 2 and "TIKTOKEN_CACHE_DIR" in err


# -----------------------------------------------------------------------------
# The command itself


def test_import_is_silent_and_light():
    code = "import sys, fineweb; print({m.split('.')[0] for m in sys.modules} & set(sys.argv[1:]))"
    heavy = ["torch", "datasets", "tiktoken", "pyarrow", "tqdm", "requests", "pandas"]
    command = [sys.executable, "-c", code, *heavy, "huggingface_hub"]
    assert subprocess.check_output(command, cwd=ROOT, text=True) == "set()\n"


def test_help_fits_and_explains_every_flag(main):
    status, text, _ = main("--help")
    assert status == 0 and max(map(len, text.splitlines())) <= 100
    args = fineweb.parse_args([])
    assert all(f"\n  --{flag}" in text for flag in vars(args))
    assert args.shard_size == 10**8 and args.name == "sample-10BT" and args.ready is None
    assert args.out == str(ROOT / "edu_fineweb10B")
    assert fineweb.parse_args(["--dataset", "a/b"]).name is None
    assert text.index("--ready") < text.index("--dataset"), "the quickest way comes first"


def test_the_robust_download_settings_can_be_overridden(tmp_path, monkeypatch, refused):
    for name in fineweb.HUB_DEFAULTS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "7")
    refused("--verify", "--out", tmp_path)
    assert os.environ["HF_HUB_DISABLE_XET"] == "1"
    assert os.environ["HF_HUB_DOWNLOAD_TIMEOUT"] == "7"
