"""fineweb.py: its shards against plain tokenization, kills, faults, and reading."""

import contextlib
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
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from local_hub import Hub

import fineweb
import tokens as tokens_module
from fineweb import EOT, RunError, Tokenizer, UserError

ROOT = pathlib.Path(__file__).resolve().parents[1]
HELPER = str(ROOT / "tests" / "local_hub.py")
VOCABULARY = os.environ.get("TIKTOKEN_CACHE_DIR") or str(ROOT.parent / "shared" / "tiktoken")
BYTES = Tokenizer()
DATA = "HuggingFaceFW/fineweb-edu"
posix = pytest.mark.skipif(os.name == "nt", reason="needs process groups")


@pytest.fixture
def real(monkeypatch):
    """Tests that need GPT-2's vocabulary run where it is at hand, and never download it."""
    if not os.path.isdir(VOCABULARY) or not os.listdir(VOCABULARY):
        pytest.skip("no vocabulary: set TIKTOKEN_CACHE_DIR")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", VOCABULARY)
    return fineweb.get_tokenizer("gpt2")


@pytest.fixture
def one_line(capsys):
    """Runs the command in this process; its status and its single line on stderr."""

    def run(*argv, tokenizer=BYTES):
        try:
            status = fineweb.main([str(a) for a in argv], tokenizer)
        except SystemExit as e:  # argparse's way
            status = e.code
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and err.startswith("fineweb.py: error: "), err
        return status, err

    return run


def oracle(texts, encode=BYTES.encode):
    """The tokens of all documents, in the plainest way."""
    parts = [[[EOT], encode(text)] for text in texts]
    return np.concatenate([p for both in parts for p in both] or [[]]).astype(np.uint16)


def shards_of(folder):
    return {p.name: p.read_bytes() for p in sorted(pathlib.Path(folder).glob("*.npy"))}


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


@pytest.fixture(scope="module")
def pools():
    made = {n: fineweb.Workers(n, BYTES.encode, None) for n in (1, 2, 3)}
    yield made
    for pool in made.values():
        pool.close()


def write_all(texts, pool, folder, size, position=None, left=float("inf"), index=0):
    """Shards of in-memory texts from a position on; returns the entries of the manifest."""
    start = position or {"document": 0, "token": 0}
    source = fineweb.Texts(lambda first: iter(texts[first:]))
    batches = fineweb.tokenized(source, pool, 4, start["document"])
    made = fineweb.write_shards(batches, folder, size, index, start, left, lambda *_: None)
    return [entry for entry, _ in made]


# Documents longer than two shards, an exact fill, empty documents, none at all, the marker as text.
@given(st.lists(st.text("ab<|>\u00e9", max_size=30), max_size=12), st.integers(1, 40))
@example(["x" * 50], 16)
@example(["x" * 15, "y" * 7, "z" * 7], 16)
@example(["", "", "a", ""], 2)
@example(["ab<|endoftext|>cd", ""], 7)
@example([], 3)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_shards_are_the_tokenized_documents(pools, texts, size):
    want, results = oracle(texts), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fineweb, "JOB_TOKENS", 5)  # so that even these texts make several jobs
        patch.setattr(fineweb.os, "fsync", lambda fd: None)
        for pool in pools.values():
            with tempfile.TemporaryDirectory() as folder:
                entries = write_all(texts, pool, folder, size)
                results.append((entries, shards_of(folder)))
    entries, files = results[0]
    assert all(r == results[0] for r in results), "the number of workers changed the bytes"
    arrays = {name: np.load(io.BytesIO(data)) for name, data in files.items()}
    assert [e["name"] for e in entries] == [fineweb.shard_name(i) for i in range(len(entries))]
    for i, e in enumerate(entries):
        cut = want[i * size : (i + 1) * size]
        plain = io.BytesIO()
        np.save(plain, cut)
        assert files[e["name"]] == plain.getvalue(), "not what np.save writes"
        assert (arrays[e["name"]] == cut).all() and arrays[e["name"]].dtype == np.uint16
        assert (e["tokens"], e["documents"]) == (len(cut), (cut == EOT).sum())
        begins = [*np.flatnonzero(want == EOT), len(want)]  # of documents, and of what follows
        at = i * size + len(cut)
        document = int(np.searchsorted(begins, at, side="right")) - 1
        assert e["end"] == {"document": document, "token": at - begins[document]}
    assert sum(e["tokens"] for e in entries) == len(want) and sum(map(len, files.values())) == (
        2 * len(want) + 128 * len(entries)
    )


def test_any_shard_can_be_made_again_from_its_position(pools, tmp_path):
    texts = texts_of(30, size=90)
    whole = write_all(texts, pools[2], tmp_path, 64)
    before = shards_of(tmp_path)
    for i, entry in enumerate(whole):
        os.remove(tmp_path / entry["name"])
        again = write_all(texts, pools[2], tmp_path, 64, entry["start"], entry["tokens"], i)
        assert again == [entry]
    assert shards_of(tmp_path) == before and len(before) > 20


def test_a_document_with_the_marker_in_its_text(real):
    tokens, lengths = fineweb.tokenize(["x <|endoftext|>", ""], real.encode)
    assert tokens.tolist() == [EOT, 87, 1279, 91, 437, 1659, 5239, 91, 29, EOT]
    assert lengths.tolist() == [9, 1] and tokens.dtype == np.uint16


def test_encode_is_encode_ordinary(real):
    odd = ["", "a\ud800b", "<|endoftext|>" * 3, "\x00\r\n\u4e16", " " * 500, *texts_of(30)]
    for text in odd:
        assert real.encode(text).tolist() == real._bpe.encode_ordinary(text)


# -----------------------------------------------------------------------------
# The command: sources


def test_half_a_surrogate_pair_is_the_same_token_with_and_without_shuffle(real, tmp_path):
    path = tmp_path / "half.jsonl"
    path.write_text('{"text": "a \\ud800 b"}\n')
    for out, extra in (("plain", []), ("mixed", ["--shuffle", "1"])):
        argv = ["--files", str(path), "--out", str(tmp_path / out), "--num_proc", "1"]
        assert fineweb.main([*argv, "--shard_size", "3", *extra], real) == 0
    assert (tokens_of(tmp_path / "plain") == tokens_of(tmp_path / "mixed")).all()
    assert real.decode(tokens_of(tmp_path / "plain")[1:]) == "a \ufffd b"


def test_files_of_every_kind_and_shuffle(tmp_path, capsys):
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
        argv = ["--files", *inputs, "--out", str(tmp_path / out), "--shard-size=1000"]
        assert fineweb.main([*argv, "--num_proc", "1", *extra], BYTES) == 0
        return tokens_of(tmp_path / out)

    assert (run("plain") == oracle(texts)).all()
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "plain").glob("*.npy")}
    run("plain")
    assert before == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "plain").glob("*.npy")}
    assert (run("some", "--max_tokens", "2500") == oracle(texts)[:2500]).all()
    shuffled = run("mixed", "--shuffle", "7")
    order = np.random.RandomState(7).permutation(len(texts))
    assert (shuffled == oracle([texts[i] for i in order])).all()
    assert [p.name for p in (tmp_path / "mixed").iterdir() if "arrow" in p.name] == []
    manifest = fineweb.load_manifest(tmp_path / "plain")
    assert manifest["complete"] and manifest["documents"] == 41
    assert "documents in" in capsys.readouterr().out


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


def start(env, tokenizer, *argv):
    command = [sys.executable, HELPER, tokenizer, *map(str, argv)]
    if tokenizer == "real":
        command = [sys.executable, str(ROOT / "fineweb.py"), *map(str, argv)]
    return subprocess.Popen(
        command, env={**os.environ, **env}, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process, status=0):
    out, err = process.communicate(timeout=120)
    assert process.returncode == status, err
    return out, err


def kill_group(process):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """(environment for a command, parquet files, their texts)"""
    pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("hub")
    texts = texts_of(600, seed=2)
    files = hub_folder(folder / "repo", texts)
    with Hub(folder / "repo", DATA) as server:
        env = {"HF_ENDPOINT": server.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(folder / "hf")}
        env = {**env, "HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
        yield env, files, texts


@posix
def test_the_hub_both_ways_killed_and_rerun_gives_what_files_give(hub, tmp_path):
    env, files, texts = hub
    have = os.path.isdir(VOCABULARY)
    env = {**env, "TIKTOKEN_CACHE_DIR": VOCABULARY}
    size = ["--shard_size", "1500" if have else "4000", "--num_proc", "1"]
    finish(start(env, "real" if have else "Bytes", *size, "--out", tmp_path / "f",
                 "--files", *files))  # fmt: skip
    want = shards_of(tmp_path / "f")
    assert len(want) > 10
    _, err = finish(start(env, "real" if have else "Bytes", *size, "--out", tmp_path / "m"))
    assert shards_of(tmp_path / "m") == want and err == ""
    assert fineweb.load_manifest(tmp_path / "m")["settings"]["revision"].startswith("c0ffee")
    _, err = finish(start(env, "real" if have else "Bytes", *size, "--out", tmp_path / "s",
                          "--streaming"))  # fmt: skip
    assert shards_of(tmp_path / "s") == want and err == ""


@posix
@pytest.mark.parametrize("how", [["--streaming"], []])
def test_the_hub_killed_and_rerun(hub, tmp_path, how):
    env, _, texts = hub
    argv = ["--shard_size", "4000", "--num_proc", "2", "--out", tmp_path, *how]
    process = start(env, "SlowBytes", *argv)
    wait_for_shards(tmp_path, 12)
    kill_group(process)
    listed = fineweb.load_manifest(tmp_path)
    assert 12 <= len(listed["shards"]) and not listed["complete"]
    assert bool(listed["note"]) == bool(how), "a stream is to be taken up where it was left"
    old = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("*.npy")}
    out, _ = finish(start(env, "SlowBytes", *argv))
    assert all(n not in out for n in (s["name"] for s in listed["shards"]))
    for s in listed["shards"]:
        assert (tmp_path / s["name"]).stat().st_mtime_ns == old[s["name"]]
    assert (tokens_of(tmp_path) == oracle(texts)).all()


@posix
def test_a_stream_that_breaks_off_goes_on_when_the_hub_is_back(tmp_path):
    pytest.importorskip("datasets")
    texts = texts_of(200, seed=3)
    files = hub_folder(tmp_path / "repo", texts)
    with Hub(tmp_path / "repo", DATA) as server:
        env = {"HF_ENDPOINT": server.url, "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1",
               "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}  # fmt: skip
        out = tmp_path / "out"
        argv = ["--shard_size", "4000", "--num_proc", "1", "--out", out, "--streaming"]
        server.lost = os.path.basename(files[-1])
        _, err = finish(start(env, "Bytes", *argv), status=1)
        assert "cannot be read on" in err and "finished shards" in err and err.count("\n") == 1
        listed = fineweb.load_manifest(out)["shards"]
        assert listed and (tokens_of(out) == oracle(texts)[: 4000 * len(listed)]).all()
        server.lost = None
        finish(start(env, "Bytes", *argv))
        assert (tokens_of(out) == oracle(texts)).all()


def wait_for_shards(folder, n):
    end = time.monotonic() + 60
    while len(list(pathlib.Path(folder).glob("*.npy"))) <= n:  # the last may not be listed yet
        assert time.monotonic() < end
        time.sleep(0.01)


@posix
def test_killed_at_random_moments_and_rerun(tmp_path):
    texts = texts_of(1500, seed=3)
    argv = ["--files", write_jsonl(tmp_path / "t.jsonl", texts), "--shard_size", "3000"]
    argv += ["--num_proc", "2", "--out", tmp_path / "killed"]
    rng, reached = random.Random(int(time.time())), []
    finish(start({}, "Bytes", *argv[:-1], tmp_path / "whole"))
    whole = shards_of(tmp_path / "whole")
    for i in range(5):
        process = start({}, "SlowBytes", *argv)
        try:
            if i:  # while it works; a line says that this run has finished a shard
                assert process.stdout.readline()
            time.sleep(rng.uniform(0, 0.2 if i else 0.6))
            if i == 4:  # the parent alone: its workers must not outlive it
                process.kill()
                assert_group_ends(process)
        finally:
            kill_group(process)
        there = shards_of(tmp_path / "killed")
        assert all(data == whole[name] for name, data in there.items()), "half a shard"
        reached.append(len(there))
    assert 0 < reached[-1] < len(whole), f"kills at {reached} shards show nothing"
    finish(start({}, "SlowBytes", *argv))
    assert shards_of(tmp_path / "killed") == whole
    one, two = (fineweb.load_manifest(tmp_path / n) for n in ("killed", "whole"))
    assert one == two and (tokens_of(tmp_path / "whole") == oracle(texts)).all()
    assert not list((tmp_path / "killed").glob("*.tmp"))


def assert_group_ends(process):
    process.wait()
    end = time.monotonic() + 20
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < end:
            os.killpg(process.pid, 0)
            time.sleep(0.05)


# -----------------------------------------------------------------------------
# The command: mistakes and faults, one line each, nothing lost


def test_a_full_disk_keeps_what_is_finished(tmp_path, monkeypatch, one_line):
    texts = texts_of(200, seed=4)
    argv = ["--files", write_jsonl(tmp_path / "t.jsonl", texts), "--shard_size", "3000"]
    argv += ["--num_proc", "1", "--out", str(tmp_path / "out")]
    room = [20_000]

    class FullDisk(io.BufferedRandom):
        def write(self, data):
            room[0] -= memoryview(data).nbytes
            if room[0] < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    def small_disk(path, mode="r", **kw):
        return FullDisk(open_(path, "w+b", 0)) if mode == "w+b" else open_(path, mode, **kw)

    open_ = open
    with monkeypatch.context() as patch:
        patch.setattr(fineweb, "open", small_disk, raising=False)
        status, err = one_line(*argv)
    assert status == 1 and "No space left" in err and "3 finished shards" in err
    manifest = fineweb.load_manifest(tmp_path / "out")
    assert len(manifest["shards"]) == len(shards_of(tmp_path / "out")) == 3
    assert not list((tmp_path / "out").glob("*.npy.tmp")), "the half shard keeps the disk full"
    assert fineweb.main(argv, BYTES) == 0
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
])  # fmt: skip
def test_mistakes_with_files(tmp_path, one_line, monkeypatch, flags, says):
    monkeypatch.chdir(ROOT)
    path = write_jsonl(tmp_path / "t.jsonl", texts_of(3))
    status, err = one_line("--files", path, "--out", tmp_path / "out", *flags)
    assert status == 2 and says in err, err
    assert not shards_of(tmp_path / "out")


def bad_files(folder):
    good = pathlib.Path(write_parquet(folder / "good.parquet", texts_of(600, size=1500)))
    data = good.read_bytes()
    (folder / "cut.parquet").write_bytes(data[:-100])
    (folder / "no.parquet").write_bytes(b"no parquet at all")
    (folder / "line.jsonl").write_text('{"text": "good"}\n{"text": \n')
    (folder / "list.jsonl").write_text('[1, 2]\n')
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "good"}\n' * 99)[:-9])
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "number.jsonl").write_text('{"text": "good"}\n{"text": 5}\n')
    (folder / "folder.txt").mkdir()
    late = len(data) * 9 // 10  # a first look does not find it
    (folder / "flip.parquet").write_bytes(data[:late] + b"\xff" * 4000 + data[late + 4000 :])
    names = ["cut.parquet", "no.parquet", "line.jsonl", "list.jsonl", "cut.jsonl.gz", "latin.txt"]
    return [*names, "number.jsonl", "folder.txt", "flip.parquet"]


def test_damaged_files_are_named_and_finished_shards_kept(tmp_path, one_line, pools):
    names = bad_files(tmp_path)
    for name in names:
        with pytest.raises(UserError, match=name.replace(".", r"\.")):
            list(fineweb.read_files([str(tmp_path / "good.parquet"), str(tmp_path / name)], "text"))
    argv = ["--files", tmp_path / "good.parquet", tmp_path / "flip.parquet", "--out"]
    argv += [tmp_path / "out", "--shard_size", "30000", "--num_proc", "1"]
    status, err = one_line(*argv)
    kept = shards_of(tmp_path / "out")
    assert status == 2 and "flip.parquet" in err and f"{len(kept)} finished shards" in err
    want = oracle(texts_of(600, size=1500) * 2)
    assert len(kept) > 5 and (tokens_of(tmp_path / "out") == want[: 30000 * len(kept)]).all()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads all")
def test_a_file_without_permission(tmp_path):
    path = tmp_path / "secret.txt"
    path.write_text("x")
    path.chmod(0)
    with pytest.raises(UserError, match="secret"):
        list(fineweb.read_files([str(path)], "text"))


@pytest.mark.parametrize("flags, status, says", [
    (["--dataset", "no/such"], 2, "no dataset no/such"),
    (["--revision", "nope"], 2, "--revision"),
    (["--name", "nope"], 2, "sample-10BT"),
    (["--text_column", "body", "--streaming"], 2, "it has id, text"),
    (["--text_column", "id", "--streaming"], 2, "int64"),
    ([], 1, "check the network"),
])  # fmt: skip
def test_mistakes_with_the_hub(hub, tmp_path, flags, status, says):
    env = hub[0] if flags else {**hub[0], "HF_ENDPOINT": "http://127.0.0.1:9"}
    _, err = finish(start(env, "Bytes", "--out", tmp_path, *flags), status)
    assert err.count("\n") == 1 and says in err, err


def test_a_worker_that_dies_ends_the_run(tmp_path):
    # Long documents behind it: what is on its way to a dead worker must not block the others.
    path = write_jsonl(tmp_path / "t.jsonl", ["fine", "deadly", *["x" * 300_000] * 40])
    argv = ["--files", path, "--out", tmp_path / "out", "--num_proc", "2"]
    _, err = finish(start({}, "DeadlyBytes", *argv), 1)
    assert "a worker process died" in err and err.count("\n") == 1


def test_other_settings_and_others_folders_are_refused(tmp_path, one_line):
    path = write_jsonl(tmp_path / "t.jsonl", texts_of(20))
    argv = ["--files", path, "--out", tmp_path / "out", "--num_proc", "1", "--shard_size", "500"]
    assert fineweb.main([str(a) for a in argv], BYTES) == 0
    before = shards_of(tmp_path / "out")
    assert "shard_size 500, not 600" in one_line(*argv, "--shard_size", "600")[1]
    assert "shuffle None, not 'seed 1'" in one_line(*argv, "--shuffle", "1")[1]
    write_jsonl(path, texts_of(21))
    assert "files" in one_line(*argv)[1]
    assert shards_of(tmp_path / "out") == before
    os.remove(tmp_path / "out" / "manifest.json")
    assert "made by something else" in one_line(*argv)[1]
    (tmp_path / "out" / "manifest.json").write_text('{"shards": 3}')
    assert "not a manifest" in one_line(*argv)[1]


@posix
def test_two_writers_in_a_folder(tmp_path, one_line):
    with fineweb.only_writer(tmp_path):
        path = write_jsonl(tmp_path / "t.jsonl", ["x"])
        assert "another fineweb.py" in one_line("--files", path, "--out", tmp_path)[1]


def test_verify_names_each_bad_shard_and_a_rerun_makes_only_these(tmp_path, capsys):
    path, out = write_jsonl(tmp_path / "t.jsonl", texts_of(40)), tmp_path / "out"
    argv = ["--files", path, "--out", str(out), "--num_proc", "1", "--shard_size", "900"]
    assert fineweb.main(argv, BYTES) == 0 == fineweb.main(["--verify", "--out", str(out)])
    assert "all good" in capsys.readouterr().out
    whole, train = shards_of(out), sorted(out.glob("*train*"))
    flipped, short, gone = train[1], train[2], train[-1]
    data = bytearray(flipped.read_bytes())
    data[700] ^= 1
    flipped.write_bytes(data)
    short.write_bytes(short.read_bytes()[:-2])
    gone.unlink()
    np.save(out / "edufineweb_train_000999.npy", np.ones(5, np.uint16))
    assert fineweb.main(["--verify", "--out", str(out)]) == 2
    err = capsys.readouterr().err
    faults = {flipped: "sha256", short: "size", gone: "missing", "000999": "not in the manifest"}
    for path, why in faults.items():
        assert any(str(path) in line and why in line for line in err.splitlines()), err
    with pytest.raises(UserError, match="damaged"):
        fineweb.open_shards(out, "train")
    short.unlink()
    with pytest.raises(UserError, match="is missing.*--verify"):
        fineweb.open_shards(out, "train")
    flipped.unlink()
    (out / "edufineweb_train_000999.npy").unlink()
    assert fineweb.main(argv, BYTES) == 0
    assert capsys.readouterr().out.count("made again") == 3 and shards_of(out) == whole


# -----------------------------------------------------------------------------
# The command itself


def test_import_is_silent_and_light():
    code = "import sys, fineweb; print({m.split('.')[0] for m in sys.modules} & set(sys.argv[1:]))"
    heavy = ["torch", "datasets", "tiktoken", "pyarrow", "tqdm", "requests", "pandas"]
    command = [sys.executable, "-c", code, *heavy]
    assert subprocess.check_output(command, cwd=ROOT, text=True) == "set()\n"


def test_help_fits_and_explains_every_flag(capsys):
    with pytest.raises(SystemExit) as e:
        fineweb.main(["--help"])
    text = capsys.readouterr().out
    assert e.value.code == 0 and max(map(len, text.splitlines())) <= 100
    args = fineweb.parse_args([])
    assert all(f"\n  --{flag}" in text for flag in vars(args))
    assert args.shard_size == 10**8 and args.name == "sample-10BT"
    assert args.out == str(ROOT / "edu_fineweb10B")
    assert fineweb.parse_args(["--dataset", "a/b"]).name is None


def test_the_robust_download_settings_can_be_overridden(tmp_path, monkeypatch, one_line):
    for name in fineweb.HUB_DEFAULTS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "7")
    one_line("--verify", "--out", tmp_path)
    assert os.environ["HF_HUB_DISABLE_XET"] == "1"
    assert os.environ["HF_HUB_DOWNLOAD_TIMEOUT"] == "7"


# -----------------------------------------------------------------------------
# The tokenizer


def test_the_fallback_is_gpt2s_own_single_byte_tokens(real):
    fallback = fineweb.get_tokenizer("bytes")
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


def test_decode_of_what_is_no_text():
    assert BYTES.decode([EOT, *BYTES.encode("é")[:1], 30000]) == "<|endoftext|>\ufffd\ufffd"


def test_no_vocabulary_in_time(monkeypatch, one_line, tmp_path):
    tiktoken = pytest.importorskip("tiktoken")
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: time.sleep(5))  # a silent proxy
    began = time.monotonic()
    fallback = fineweb.get_tokenizer(timeout=0.2)
    assert fallback.name == "bytes" and "0.2 s" in fallback.why and time.monotonic() - began < 2
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: {}[name])
    with pytest.raises(UserError, match="KeyError.*TIKTOKEN_CACHE_DIR"):
        fineweb.get_tokenizer("gpt2")
    path = write_jsonl(tmp_path / "t.jsonl", ["x"])
    status, err = one_line("--files", path, "--out", tmp_path / "o", tokenizer=None)
    assert status == 2 and "TIKTOKEN_CACHE_DIR" in err


# -----------------------------------------------------------------------------
# Reading


def write_bin(path, tokens, magic=20240520, version=1, count=None):
    header = np.zeros(256, np.int32)
    header[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(tokens, np.uint16).tobytes())


def save_any(path, tokens):
    np.save(path, tokens) if path.suffix == ".npy" else write_bin(path, tokens)


@pytest.mark.parametrize("pattern", ["edufineweb_{}_{:06d}.npy", "finewebedu10T_{}_{:04d}.npy",
                                     "fineweb_{}_{:06d}.bin", "{}_{}.bin"])  # fmt: skip
def test_folders_of_all_makers_are_one_stream(tmp_path, pattern, monkeypatch):
    monkeypatch.setattr(tokens_module, "MAX_OPEN_FILES", 2)
    rng = np.random.default_rng(0)
    parts = [rng.integers(0, 65536, n, dtype=np.uint16) for n in (50, 7, 1, 64, 30)]
    for i, part in enumerate(parts):
        save_any(tmp_path / pattern.format("train", i + 1), part)
    save_any(tmp_path / pattern.format("val", 0), parts[0])
    for other in ("x_train_000009.npy.tmp", ".x_train_000009.npy", "training.npy", "train.txt"):
        (tmp_path / other).write_bytes(b"ignored")
    stream, want = fineweb.open_shards(tmp_path, "train"), np.concatenate(parts)
    assert len(fineweb.open_shards(tmp_path, "val")) == 50
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
    assert len(stream._files) <= 2


def test_documents_before(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens_module, "PIECE", 5)
    rng = np.random.default_rng(1)
    parts = [np.where(rng.random(n) < 0.3, EOT, 7).astype(np.uint16) for n in (40, 23)]
    for i, part in enumerate(parts):
        np.save(tmp_path / f"a_train_{i}.npy", part)
    stream = fineweb.open_shards(tmp_path, "train")
    asked = [(i, j) for i in (0, 1, 0) for j in range(len(parts[i]))]
    for i, j in asked + random.Random(0).sample(asked, 60):
        assert stream.documents_before(i, j) == (parts[i][: j + 1] == EOT).sum()


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
        fineweb.open_shards(tmp_path, "train")
    assert name in str(e.value) and "\n" not in str(e.value)


def test_cut_and_mixed_and_missing_shards(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=r"no train shards in .*python fineweb\.py"):
            fineweb.open_shards(folder, "train")
    path = tmp_path / "a_train_1.npy"
    np.save(path, np.arange(100, dtype=np.uint16))
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(UserError, match=r"a_train_1\.npy has 278 bytes.* 328"):
        fineweb.open_shards(tmp_path, "train")
    path.unlink()
    write_bin(tmp_path / "a_train_1.bin", [1, 2, 3], count=4)
    with pytest.raises(UserError, match=r"1,030 bytes.* 1,032"):
        fineweb.open_shards(tmp_path, "train")
    np.save(tmp_path / "a_val_0.npy", np.arange(3, dtype=np.uint16))
    with pytest.raises(UserError, match="two data sets"):
        fineweb.open_shards(tmp_path, "val")


def test_a_shard_cut_while_it_is_read(tmp_path):
    path = tmp_path / "a_train_1.npy"
    np.save(path, np.arange(100, dtype=np.uint16))
    stream = fineweb.open_shards(tmp_path, "train")
    os.truncate(path, 150)
    assert stream.read(0, 5).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(RunError, match="a_train_1.npy is shorter"):
        stream.read(50, 10)


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
def test_reading_100m_tokens_costs_no_memory(tmp_path):
    path = tmp_path / "a_train_1.npy"
    path.write_bytes(fineweb.npy_header(10**8))
    os.truncate(path, 128 + 2 * 10**8)  # no blocks on disk, the same reads
    code = """if 1:
        import sys, fineweb
        def resident():
            return int(open("/proc/self/statm").read().split()[1]) * 4096
        before = resident()
        stream = fineweb.open_shards(sys.argv[1], "train")
        for i in range(0, 10**8 - 65537, 65536):
            stream.read(i, 65537)
        assert stream.documents_before(0, 10**8 - 1) == 0
        print(resident() - before)"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    assert int(subprocess.check_output(command, cwd=ROOT)) < 2e6


def test_open_text(tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes("é one\r\ntwo\n".encode() * 10)
    train, val, sha256 = fineweb.open_text(path, BYTES.encode)
    tokens = BYTES.encode("é one\ntwo\n" * 10)
    assert len(train) == int(0.9 * len(tokens)) and train.names == ["t.txt"]
    both = np.concatenate([s.read(0, len(s)) for s in (train, val)])
    assert (both == tokens).all() and train.locate(5) == (0, 5) and len(sha256) == 64
    path.write_bytes(b"caf\xe9")
    for bad in (path, tmp_path / "none.txt", tmp_path):
        with pytest.raises(UserError, match=str(bad)):
            fineweb.open_text(bad, BYTES.encode)
    path.write_bytes(b"")
    with pytest.raises(UserError, match="too few"):
        fineweb.open_text(path, BYTES.encode)
