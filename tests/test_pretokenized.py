"""fineweb.py --pretokenized: shards downloaded from a hub on 127.0.0.1."""

import hashlib
import os

import numpy as np
import pytest
from local_hub import Hub, finish, killed, shards_of, start, times_of

from fineweb import EOT, load_manifest

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs process groups")
EDU = "kjj0/finewebedu10B-gpt2"


def tokens_for(i):
    """The tokens of shard i: documents that start with <|endoftext|>."""
    rng = np.random.default_rng(i)
    tokens = rng.integers(0, EOT, 3000 + i, dtype=np.uint16)
    tokens[rng.random(len(tokens)) < 0.01] = EOT
    return tokens


@pytest.fixture
def hub(tmp_path):
    """A hub with one val and 12 train shards; hub.path(i) is the file of shard i."""
    folder = tmp_path / "repo"
    folder.mkdir()
    (folder / "README.md").write_text("tokens")
    with Hub(folder, EDU) as hub:
        hub.env["HF_HOME"] = str(tmp_path / "hf")
        hub.path = lambda i: folder / name_of(i)
        for i in range(13):
            header = np.zeros(256, np.int32)
            header[:3] = 20240520, 1, 3000 + i
            hub.path(i).write_bytes(header.tobytes() + tokens_for(i).tobytes())
        yield hub


def name_of(i):
    return f"finewebedu_{'train' if i else 'val'}_{i:06d}.bin"


def names(*numbers):
    return [name_of(i) for i in numbers]


def download(hub, out, *argv, status=0):
    """Run the command: (stdout, stderr). Afterwards hub.requests holds only its requests."""
    hub.requests.clear()
    return finish(start(hub.env, "--out", out, *argv), status)


def refused(hub, out, *argv, status=2):
    """Run a command that must print one line on stderr, and return that line."""
    _, err = download(hub, out, *argv, status=status)
    assert err.count("\n") == 1 and err.startswith("fineweb.py: error: "), err
    return err


def downloads(hub):
    """The shards that were requested, in order."""
    return list(dict.fromkeys(r.split("/")[-1] for r in hub.requests if "/resolve/" in r))


def bytes_of(hub, *numbers):
    return {name_of(i): hub.path(i).read_bytes() for i in numbers}


def test_downloaded_shards_are_listed_and_verified(hub, tmp_path):
    out = tmp_path / "out"
    printed, err = download(hub, out, "--pretokenized", 3)
    assert err == "" and downloads(hub) == names(0, 1, 2, 3), "val and the first three train shards"
    assert f"downloading 4 shards of {EDU}, 0.0 GB, to {out}" in printed.splitlines()[0]
    assert shards_of(out, "bin") == bytes_of(hub, *range(4))
    manifest = load_manifest(out)
    assert manifest["complete"] and manifest["tokens"] == sum(3000 + i for i in range(4))
    for i, shard in enumerate(manifest["shards"]):
        sha256 = hashlib.sha256(hub.path(i).read_bytes()).hexdigest()
        documents = (tokens_for(i) == EOT).sum()
        assert shard == {"name": name_of(i), "tokens": 3000 + i, "documents": documents, "sha256": sha256}
    printed, _ = download(hub, out, "--verify")
    assert "4 shards" in printed and ", valid\n" in printed and not hub.requests


def test_a_rerun_downloads_only_what_is_missing(hub, tmp_path):
    out = tmp_path / "out"
    download(hub, out, "--pretokenized", 2)
    before = times_of(out)
    download(hub, out, "--ready", 2)  # the flag's former name
    assert downloads(hub) == []
    download(hub, out, "--pretokenized", 4)
    assert downloads(hub) == names(3, 4)
    (out / name_of(3)).unlink()
    (out / name_of(4)).write_bytes(hub.path(4).read_bytes()[:-100])
    download(hub, out, "--pretokenized", 1)
    assert downloads(hub) == names(3, 4), "listed by an earlier run"
    download(hub, out, "--pretokenized")
    assert downloads(hub) == names(*range(5, 13)), "all, without a number"
    assert before.items() <= times_of(out).items()
    assert shards_of(out, "bin") == bytes_of(hub, *range(13))
    assert [s["name"] for s in load_manifest(out)["shards"]] == names(*range(13))


def test_an_interrupted_download_keeps_the_completed_shards(hub, tmp_path):
    hub.replaced = {name_of(2): None}
    err = refused(hub, tmp_path, "--pretokenized", 3, status=1)
    assert "the network" in err and "completed shards are safe, rerun to continue" in err
    assert [s["name"] for s in load_manifest(tmp_path)["shards"]] == names(0, 1)
    assert sorted(shards_of(tmp_path, "bin")) == names(1, 0)
    hub.replaced = {}
    download(hub, tmp_path, "--pretokenized", 3)
    assert downloads(hub) == names(2, 3)


@pytest.mark.parametrize("patch, listed", [
    ('at("huggingface_hub.hf_hub_download", kill, nth=1)', 0),
    ('at("huggingface_hub.hf_hub_download", kill, nth=3, before=False)', 2),  # there, not listed
    ('at("fineweb.save_manifest", kill, nth=4)', 2),
    ('at("os.replace", kill, match="manifest.json", nth=3)', 1),
])  # fmt: skip
def test_killed_and_rerun(hub, tmp_path, patch, listed):
    out = tmp_path / "out"
    killed(hub.env, "--pretokenized", 3, "--out", out, patch=patch)
    manifest = load_manifest(out)
    assert len(manifest["shards"]) == listed and not manifest["complete"]
    download(hub, out, "--pretokenized", 3)
    assert downloads(hub) == names(*range(listed, 4))
    assert shards_of(out, "bin") == bytes_of(hub, *range(4))
    assert load_manifest(out)["complete"] and not list(out.glob("*.tmp"))
    download(hub, out, "--verify")


@pytest.mark.parametrize("position", [4000, 20])
def test_a_shard_whose_sha256_is_not_the_hubs_is_removed(hub, tmp_path, position):
    damaged, out = bytearray(hub.path(1).read_bytes()), tmp_path / "out"
    damaged[position] ^= 1
    for _ in range(2):  # a new shard, then one that is listed in the manifest
        hub.replaced = {name_of(1): bytes(damaged)}
        err = refused(hub, out, "--pretokenized", 1, status=2)
        assert f"{name_of(1)} has another sha256" in err and not (out / name_of(1)).exists()
        hub.replaced = {}
        download(hub, out, "--pretokenized", 1)
        assert (out / name_of(1)).read_bytes() == hub.path(1).read_bytes()
        os.remove(out / name_of(1))


@pytest.mark.parametrize("flags, message", [
    (["--pretokenized", "0"], "argument --pretokenized: 0 is less than 1"),
    (["--pretokenized", "13"], "has 1 val and 12 train shards"),
    (["--pretokenized", "2", "--shuffle", "0"], "--pretokenized excludes --shuffle"),
    (["--pretokenized", "--max_tokens", "9"], "--pretokenized excludes --max_tokens"),
    (["--pretokenized", "2", "--dataset", "no/such"], "could not load no/such"),
    (["--pretokenized", "2", "--revision", "nope"], f"could not load {EDU} (RevisionNotFoundError"),
])  # fmt: skip
def test_mistakes_are_one_line(hub, tmp_path, flags, message):
    assert message in refused(hub, tmp_path / "out", *flags, status=2)
    assert downloads(hub) == [] and not (tmp_path / "out").exists()


@pytest.mark.parametrize("env", [{"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}])
def test_without_a_network_no_directory_is_left(hub, tmp_path, env):
    hub.env |= env
    err = refused(hub, tmp_path / "out", "--pretokenized", 2, status=1)
    assert f"could not load {EDU}" in err and "the network" in err
    assert not (tmp_path / "out").exists()


def test_a_rerun_uses_the_commit_of_the_first_run(hub, tmp_path):
    out = tmp_path / "out"
    download(hub, out, "--pretokenized", 1)
    assert load_manifest(out)["settings"] == {"ready": EDU, "revision": hub.commit}
    first, hub.commit = hub.commit, "f00d" * 10
    hub.commits = (first, hub.commit)
    download(hub, out, "--pretokenized", 2)
    requests = [r for r in hub.requests if "/resolve/" in r]
    assert requests and all(first in r for r in requests)
    err = refused(hub, out, "--pretokenized", 2, "--revision", "main")
    assert first in err and "use another --out" in err
    (tmp_path / "t.txt").write_text("text" * 9)
    assert "use another --out" in refused(hub, out, "--files", tmp_path / "t.txt")
