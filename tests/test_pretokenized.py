"""fineweb.py --ready: shards that are fetched from a hub, here one on 127.0.0.1."""

import hashlib
import json
import os
import pathlib

import numpy as np
import pytest
from local_hub import Hub, finish, killed, shards_of, start, times_of

import fineweb
from plumbing.errors import RunError, UserError
from plumbing.tokens import EOT, load_manifest, open_shards

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs process groups")
EDU, FINEWEB = "kjj0/finewebedu10B-gpt2", "kjj0/fineweb10B-gpt2"


def bin_file(tokens, magic=20240520, version=1, count=None):
    header = np.zeros(256, np.int32)
    header[:3] = magic, version, len(tokens) if count is None else count
    return header.tobytes() + tokens.tobytes()


def tokens_for(i):
    """Those of shard i: documents of some length, each behind its <|endoftext|>."""
    rng = np.random.default_rng(i)
    tokens = rng.integers(0, EOT, 3000 + i, dtype=np.uint16)
    tokens[rng.random(len(tokens)) < 0.01] = EOT
    return tokens


@pytest.fixture
def hub(tmp_path):
    """A hub that has a val and 12 train shards; hub.path(i) is the file of one of them."""
    folder = tmp_path / "repo"
    folder.mkdir()
    (folder / "README.md").write_text("tokens")
    with Hub(folder, EDU) as hub:
        hub.env["HF_HOME"] = str(tmp_path / "hf")
        hub.path = lambda i: folder / name_of(i)
        for i in range(13):
            hub.path(i).write_bytes(bin_file(tokens_for(i)))
        yield hub


def name_of(i, data="finewebedu"):
    return f"{data}_{'train' if i else 'val'}_{i:06d}.bin"


def names(*numbers):
    return [name_of(i) for i in numbers]


def ready(hub, out, *argv, status=0):
    """(stdout, stderr) of the command with --out; hub.requests then has what it asked for."""
    hub.requests.clear()
    return finish(start(hub.env, "real", "--out", out, *argv), status)


def downloads(hub):
    """The shards that have been asked for, in order."""
    asked = [r.split("/")[-1] for r in hub.requests if "/resolve/" in r]
    return list(dict.fromkeys(asked))


def test_fetched_shards_are_listed_verified_and_opened_by_the_trainer(hub, tmp_path):
    out = tmp_path / "out"
    said, err = ready(hub, out, "--ready", 3)
    assert err == "" and downloads(hub) == names(0, 1, 2, 3), "val, and the first three train"
    assert f"4 shards of {EDU} to fetch, 0.0 GB, to {out}" in said.splitlines()[0]
    assert shards_of(out, "bin") == {name_of(i): hub.path(i).read_bytes() for i in range(4)}
    manifest = load_manifest(out)
    assert manifest["complete"] and manifest["tokens"] == sum(3000 + i for i in range(4))
    for i, shard in enumerate(manifest["shards"]):
        sha256 = hashlib.sha256(hub.path(i).read_bytes()).hexdigest()
        assert (shard["name"], shard["tokens"], shard["sha256"]) == (name_of(i), 3000 + i, sha256)
        assert shard["documents"] == (tokens_for(i) == EOT).sum()
    train, val = open_shards(out, "train"), open_shards(out, "val")
    assert train.names == names(1, 2, 3) and val.names == names(0)
    want = np.concatenate([tokens_for(i) for i in (1, 2, 3)])
    assert (train.read(0, len(train)) == want).all() and (val.read(0, 3000) == tokens_for(0)).all()
    place = train.locate(5000)
    documents = (tokens_for(place[0] + 1)[: place[1] + 1] == EOT).sum()
    assert train.documents_before([place]) == {place: documents} and documents > 10
    said, _ = ready(hub, out, "--verify")
    assert "4 shards" in said and "all good" in said and not hub.requests


def test_a_rerun_fetches_what_is_missing_and_a_larger_number_the_others(hub, tmp_path):
    out = tmp_path / "out"
    ready(hub, out, "--ready", 2)
    before = times_of(out)
    ready(hub, out, "--ready", 2)
    assert downloads(hub) == []
    ready(hub, out, "--ready", 4)
    assert downloads(hub) == names(3, 4)
    (out / name_of(3)).unlink()
    (out / name_of(4)).write_bytes(hub.path(4).read_bytes()[:-100])
    ready(hub, out, "--ready", 1)
    assert downloads(hub) == names(3, 4), "they were asked for earlier"
    ready(hub, out, "--ready")
    assert downloads(hub) == names(*range(5, 13)), "all, without a number"
    assert before.items() <= times_of(out).items()
    assert shards_of(out, "bin") == {name_of(i): hub.path(i).read_bytes() for i in range(13)}
    assert [s["name"] for s in load_manifest(out)["shards"]] == names(*range(13))
    assert open_shards(out, "train").names == names(*range(1, 13))


def test_another_data_set(tmp_path):
    (tmp_path / "repo").mkdir()
    for i in range(3):
        (tmp_path / "repo" / name_of(i, "fineweb")).write_bytes(bin_file(tokens_for(i)))
    with Hub(tmp_path / "repo", FINEWEB) as hub:
        hub.env["HF_HOME"] = str(tmp_path / "hf")
        said, _ = ready(hub, tmp_path / "out", "--ready", "--dataset", FINEWEB)
        assert f"3 shards of {FINEWEB}" in said
        assert open_shards(tmp_path / "out", "val").names == [name_of(0, "fineweb")]
        # and the folder stays with it
        status = ready(hub, tmp_path / "out", "--ready", status=2)
        assert "no dataset kjj0/finewebedu10B-gpt2" in status[1]


def test_a_download_that_breaks_off_keeps_the_others_and_goes_on(hub, tmp_path):
    hub.broken = name_of(2)
    _, err = ready(hub, tmp_path / "out", "--ready", 3, status=1)
    last = err.splitlines()[-1]  # before it, those of huggingface_hub, which tries again
    assert "check the network" in last and "the 2 finished shards" in last and "goes on" in last
    assert [s["name"] for s in load_manifest(tmp_path / "out")["shards"]] == names(0, 1)
    assert sorted(shards_of(tmp_path / "out", "bin")) == sorted(names(0, 1))
    hub.broken = None
    ready(hub, tmp_path / "out", "--ready", 3)
    assert downloads(hub) == names(2, 3) and len(open_shards(tmp_path / "out", "train")) == 9006


@pytest.mark.parametrize("patch, listed", [
    ('at("huggingface_hub.hf_hub_download", kill, nth=1)', 0),
    ('at("huggingface_hub.hf_hub_download", kill, nth=3, before=False)', 2),  # there, not listed
    ('at("plumbing.manifest.save_manifest", kill, nth=4)', 2),
    ('at("os.replace", kill, match="manifest.json", nth=3)', 1),
])  # fmt: skip
def test_killed_and_rerun(hub, tmp_path, patch, listed):
    out = tmp_path / "out"
    killed(hub.env, "--ready", 3, "--out", out, patch=patch)
    manifest = load_manifest(out)
    assert len(manifest["shards"]) == listed and not manifest["complete"]
    hub.requests.clear()
    finish(start(hub.env, "real", "--ready", "3", "--out", out))
    assert downloads(hub) == names(*range(listed, 4))
    assert shards_of(out, "bin") == {name_of(i): hub.path(i).read_bytes() for i in range(4)}
    assert load_manifest(out)["complete"] and not list(out.glob("*.tmp"))
    ready(hub, out, "--verify")


@pytest.mark.parametrize("data, says", [
    (bin_file(tokens_for(2), magic=20240521), "not a .bin file of GPT-2 tokens"),
    (bin_file(tokens_for(2), version=2), "not a .bin file of GPT-2 tokens"),
    (bin_file(tokens_for(2), count=3003), "its header says"),
    (bin_file(tokens_for(2))[:-2], "its header says"),
    (bin_file(tokens_for(2)[:0]), "no tokens"),
    (b"<html>sign in</html>", "not a .bin file of GPT-2 tokens"),
])  # fmt: skip
def test_a_header_that_does_not_fit_is_refused_named_and_not_listed(hub, tmp_path, data, says):
    good, out = hub.path(2).read_bytes(), tmp_path / "out"
    hub.path(2).write_bytes(data)
    _, err = ready(hub, out, "--ready", 3, status=2)
    assert err.count("\n") == 1 and name_of(2) in err and says in err
    assert [s["name"] for s in load_manifest(out)["shards"]] == names(0, 1)
    with pytest.raises(UserError, match=name_of(2)):
        open_shards(out, "train")
    hub.path(2).write_bytes(good)  # what the hub has is good again
    ready(hub, out, "--ready", 3)
    assert (open_shards(out, "train").read(3001, 3002) == tokens_for(2)).all()


def test_what_came_damaged_is_known_by_the_sha256_that_the_hub_says(hub, tmp_path):
    damaged = bytearray(hub.path(1).read_bytes())
    damaged[4000] ^= 1
    (hub.replaced, out), good = ({name_of(1): bytes(damaged)}, tmp_path / "out"), hub.path(1)
    _, err = ready(hub, out, "--ready", 1, status=1)
    assert err.count("\n") == 1 and name_of(1) in err and "sha256" in err
    hub.replaced = {}
    ready(hub, out, "--ready", 1)
    assert (out / name_of(1)).read_bytes() == good.read_bytes()
    # fetched again, a listed one would be taken for good by its size the next time
    hub.replaced = {name_of(1): bytes(damaged)}
    os.remove(out / name_of(1))
    assert "sha256" in ready(hub, out, "--ready", 1, status=1)[1]
    assert not (out / name_of(1)).exists()
    hub.replaced = {}
    ready(hub, out, "--ready", 1)
    assert (out / name_of(1)).read_bytes() == good.read_bytes()


@pytest.mark.parametrize("flags, says", [
    (["--ready", "0"], "--ready 0: must be a number of at least 1"),
    (["--ready", "-3"], "--ready -3: must be a number of at least 1"),
    (["--ready", "x"], "--ready: invalid int"),
    (["--ready", "13"], "has 1 val and 12 train shards"),
    (["--ready", "2", "--shuffle", "1"], "--ready goes without --shuffle"),
    (["--ready", "--max_tokens", "9"], "--ready goes without --max_tokens"),
    (["--ready", "2", "--dataset", "no/such"], "no dataset no/such"),
    (["--ready", "2", "--revision", "nope"], "--revision"),
])  # fmt: skip
def test_mistakes_are_one_line(hub, tmp_path, flags, says):
    _, err = ready(hub, tmp_path / "out", *flags, status=2)
    assert err.count("\n") == 1 and says in err, err
    assert downloads(hub) == []


@pytest.mark.parametrize("name, error, words", [
    ("RuntimeError", "Dataset scripts are no longer supported, but found x.py", "refs/convert"),
    ("LocalEntryNotFoundError", "no connection", "check the network"),  # a ValueError of old hubs
    ("ValueError", "BuilderConfig 'x' not found", "check --dataset"),
])
def test_what_the_hub_has_against_a_data_set(name, error, words):
    kind = RuntimeError if name == "RuntimeError" else type(name, (ValueError,), {})
    with pytest.raises((UserError, RunError), match=words), fineweb.asking_the_hub("some/data"):
        raise kind(error)


def test_our_data_set_has_our_configuration_also_where_it_is_typed():
    """The hub's own default is all of FineWeb-Edu: a trillion tokens."""
    name = {d: fineweb.parse_args(["--dataset", d]).name for d in (fineweb.DATASET, "another/one")}
    assert name == {fineweb.DATASET: fineweb.CONFIG, "another/one": None}
    assert fineweb.parse_args([]).name == fineweb.CONFIG


def test_a_data_set_without_shards_is_refused(hub, tmp_path):
    for i in range(1, 13):
        hub.path(i).unlink()
    _, err = ready(hub, tmp_path / "out", "--ready", status=2)
    assert "has 1 val and 0 train shards" in err and err.count("\n") == 1


def test_the_two_kinds_of_shards_are_not_mixed(hub, tmp_path):
    """Neither way, and before anything is asked of the hub."""
    out = tmp_path / "out"
    out.mkdir()
    np.save(out / fineweb.shard_name(0), tokens_for(0))
    _, err = ready(hub, out, "--ready", 2, status=2)
    assert ".npy" in err and "--out" in err and err.count("\n") == 1 and not hub.requests
    (out / fineweb.shard_name(0)).unlink()
    ready(hub, out, "--ready", 2)
    (tmp_path / "t.txt").write_text("text")
    _, err = ready(hub, out, "--files", tmp_path / "t.txt", status=2)
    assert ".bin" in err and "--out" in err and err.count("\n") == 1
    assert sorted(shards_of(out, "bin")) == sorted(names(0, 1, 2)) and not shards_of(out)


def test_shards_that_somebody_else_brought_are_left_alone(hub, tmp_path):
    pathlib.Path(tmp_path / "out").mkdir()
    (tmp_path / "out" / name_of(1)).write_bytes(b"mine")
    _, err = ready(hub, tmp_path / "out", "--ready", 2, status=2)
    assert "made by something else" in err and downloads(hub) == []
    assert (tmp_path / "out" / name_of(1)).read_bytes() == b"mine"


def test_a_rerun_keeps_to_the_commit_of_the_first_run(hub, tmp_path):
    out = tmp_path / "out"
    ready(hub, out, "--ready", 1)
    assert load_manifest(out)["settings"] == {"ready": EDU, "revision": hub.commit}
    first, hub.commit = hub.commit, "f00d" * 10
    hub.commits = (first, hub.commit)
    ready(hub, out, "--ready", 2)
    asked = [r for r in hub.requests if "/resolve/" in r]
    assert asked and all(first in r for r in asked)
    _, err = ready(hub, out, "--ready", 2, "--revision", "main", status=2)
    assert json.dumps(first)[1:-1] in err and "choose another --out" in err
