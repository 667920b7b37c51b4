"""Checkpoints are plain data, verified on load, and readable whichever version wrote them."""

import json
import os
import pickle
import random
import re
import shutil
import sys
import zipfile
from dataclasses import make_dataclass
from pathlib import Path

import pytest
import torch
from conftest import assert_same_end, copy_until_8, equal, read_log, weights

from train_gpt2 import UserError, find_latest_checkpoint, load_checkpoint

RECORDED = Path(__file__).resolve().parent / "data"


def test_checkpoint_is_plain_data(uninterrupted):
    """torch.load(weights_only=True) reads it, and everything but the tensors fits into JSON."""
    ckpt = weights(uninterrupted)
    assert all(type(v) is torch.Tensor for v in ckpt["model"].values())
    assert ckpt["optimizer"]["adamw"]["state"] and ckpt["scaler"] == {} and ckpt["rng"].dtype == torch.uint8
    tensors = {"model", "optimizer", "rng"}
    plain = json.loads(json.dumps({k: v for k, v in ckpt.items() if k not in tensors}))
    assert (plain["config"]["n_layer"], plain["flags"]["max_lr"]) == (2, 3e-3)
    assert [plain[k] for k in ("tokenizer", "arch", "step", "finished")] == ["gpt2", "gpt2", 12, True]
    assert f"{plain['val_loss']:.4f}" == read_log(uninterrupted)[12, "val"]
    assert plain["data"].startswith("3 shards, 1,533 tokens, ")


@pytest.mark.parametrize("run_of, data", [("shards", "shards"), ("text", "text.txt"), ("7f9751b", "shards")])
def test_a_run_of_an_earlier_version_goes_on(forks, tmp_path, run_of, data):
    """tests/data has checkpoints of step 10 with the log and the weights of the same runs at step 20.

    Commits 91c70fe (shards, text) and 7f9751b wrote them. Another CPU or torch version rounds differently.
    """
    source, log = RECORDED / f"run_of_{run_of}", tmp_path / "log"
    args = ["--resume", f"--data={RECORDED / data}"]
    log.mkdir()
    for name in ("last.pt", "log.txt"):
        shutil.copy(source / name, log / name)
    run = forks.run(*args, cwd=tmp_path, TIKTOKEN_CACHE_DIR="").good()
    assert "resuming from" in run.stdout and "changed on resume" not in run.stdout
    assert "step    10 |" in run.stdout and "step     9 |" not in run.stdout
    expected, actual = read_log(source), read_log(log)
    assert list(actual) == list(expected)
    digits = dict(train=1.1e-6, val=1.01e-4, norm=1.01e-4)  # one in the last digit
    for key, value in expected.items():
        assert float(actual[key]) == pytest.approx(float(value), abs=digits[key[1]]), key
    ckpt, recorded = weights(log), json.loads((source / "weights.json").read_text())
    assert ckpt["step"] == 20 and ckpt["model"].keys() == recorded.keys()
    for name, (total, norm) in recorded.items():
        v = ckpt["model"][name].double()
        assert abs(v.sum().item() - total) < 1e-4 and abs(v.norm().item() - norm) < 1e-5, name
    assert "is finished" in forks.run(*args, cwd=tmp_path, TIKTOKEN_CACHE_DIR="").good().stdout


def test_build_nanogpt_checkpoint(forks, uninterrupted, data, tmp_path, monkeypatch):
    """Its pickled config and the prefixes of compiled and DDP modules are read."""
    config_class = make_dataclass("GPTConfig", ["block_size", "vocab_size", "n_layer", "n_head", "n_embd"])
    config_class.__module__ = "__main__"  # torch.save pickles the name of the class
    monkeypatch.setattr(sys.modules["__main__"], "GPTConfig", config_class, raising=False)
    state = {f"module._orig_mod.{k}": v for k, v in weights(uninterrupted)["model"].items()}
    torch.save(dict(model=state, config=config_class(32, 512, 2, 2, 32), step=12), tmp_path / "old.pt")
    run = forks.run("--device=cpu", "--init=old.pt", f"--data={data}", "--eval_only", "--T=16",
                    "--val_tokens=512", "--num_samples=0", cwd=tmp_path).good()
    assert f"validation loss: {read_log(uninterrupted)[12, 'val']}" in run.stdout


class Bomb(str):
    def __reduce__(self):
        return os.mkdir, (str(self),)


@pytest.mark.filterwarnings("error")
def test_invalid_checkpoints(forks, uninterrupted, flags, tmp_path):
    """One line that names the file and status 2, for --init and --resume; no pickle is executed."""
    ckpt, bomb = weights(uninterrupted), Bomb(str(tmp_path / "bombed"))
    contents = {
        "truncated": (uninterrupted / "last.pt").read_bytes()[:-1000], "empty": b"",
        "random": random.Random(0).randbytes(5000), "pickle": pickle.dumps(bomb),
        "tensor": torch.ones(3), "list": [1, 2, 3], "state": {"w": torch.ones(3)},
        # nanoGPT: its config is that of the run, the model's is in model_args
        "nanogpt": dict(model=ckpt["model"], optimizer={}, model_args=dict(n_layer=2), iter_num=5,
                        config=dict(out_dir="out", n_layer=2)),
        "no config": dict(model=ckpt["model"], config={}, step=1),
        "bad model": dict(ckpt, model=[1, 2]), "bad config": dict(ckpt, config=[1, 2]),
        "missing weight": dict(ckpt, step=8, model={"w": torch.ones(3)}), "bomb": dict(ckpt, val_loss=bomb),
    }
    for name, content in contents.items():
        path, log = tmp_path / f"{name}.pt", tmp_path / f"log of {name}"
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        if name not in ("nanogpt", "no config", "missing weight"):
            with pytest.raises(UserError) as error:
                load_checkpoint(str(path))
            assert str(path) in str(error.value) and "\n" not in str(error.value)
        if name in ("nanogpt", "no config", "missing weight", "bomb", "truncated"):
            forks.run(flags[-1], "--device=cpu", f"--init={path}", "--eval_only", "--num_samples=0",
                      cwd=tmp_path).refused(path)
            log.mkdir()
            shutil.copy(path, log / "last.pt")
            forks.run(*flags, "--resume", f"--log_dir={log}", cwd=tmp_path).refused(log)
            assert (log / "last.pt").read_bytes() == path.read_bytes()
            assert {*os.listdir(log)} <= {"last.pt", ".lock"}
    assert not (tmp_path / "bombed").exists(), "a pickle was executed"


def test_flipped_bits(tmp_path, rng):
    """A flipped bit is detected, or changes nothing of what is loaded; never a traceback."""
    path = tmp_path / "small.pt"
    ckpt = dict(model={"w": torch.arange(300.0)}, config=dict(n_layer=1), step=3, flags={}, optimizer={})
    torch.save(ckpt, path)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        entry = whole.index(b"data/0", archive.start_dir) - 52  # of the weight, in the zip directory
    first = whole.index(ckpt["model"]["w"].numpy().tobytes())
    for offset in {*range(entry, entry + 60), *rng.sample(range(len(whole)), 300)}:
        for bit in range(8) if entry <= offset < entry + 60 else [rng.randrange(8)]:
            print(f"TEST_OFFSET={offset} TEST_BIT={bit}")
            path.write_bytes(whole[:offset] + bytes([whole[offset] ^ 1 << bit]) + whole[offset + 1:])
            try:
                loaded = load_checkpoint(str(path))
            except UserError as e:
                assert str(path) in str(e) and "\n" not in str(e)
            else:
                assert not first <= offset < first + 1200 and equal(loaded, ckpt | {"path": str(path)})


def test_damaged_newest_checkpoint(forks, uninterrupted, flags, tmp_path):
    """The newest valid checkpoint is used, and the damaged ones are named."""
    log = tmp_path / "log"
    shutil.copytree(uninterrupted, log)  # each file gets its own bytes
    content = (log / "last.pt").read_bytes()
    (log / "last.pt").write_bytes(content[:-100])
    half = len(content) // 2
    (log / "model_00012.pt").write_bytes(content[:half] + bytes([content[half] ^ 4]) + content[half + 1:])
    run = forks.run(*flags, "--resume", cwd=tmp_path).good()
    assert re.fullmatch(r".*last\.pt.*\n.*model_00012\.pt.*\n", run.stderr)
    assert re.search(r"resuming from .*model_00008.pt, step 8", run.stdout)
    assert_same_end(log, uninterrupted)


def test_newest_is_the_largest_step(tmp_path):
    ckpt = dict(model={}, config={}, optimizer={}, flags={}, data="", tokenizer="gpt2", scaler={}, rng=0)
    for step in (95000, 100000):
        torch.save(ckpt | {"step": step}, tmp_path / f"model_{step:05d}.pt")
    assert find_latest_checkpoint(str(tmp_path))["path"] == str(tmp_path / "model_100000.pt")
    # earlier versions wrote model_N.pt first, and a kill left an older last.pt
    for step, newest in ((99000, "model_100000.pt"), (100000, "last.pt"), (100001, "last.pt")):
        torch.save(ckpt | {"step": step}, tmp_path / "last.pt")
        assert find_latest_checkpoint(str(tmp_path))["path"] == str(tmp_path / newest)


def test_resumed_state_does_not_alias_the_file(forks, uninterrupted, flags, tmp_path):
    """A truncated checkpoint does not crash the run that resumed from it. Without mmap it is read plainly."""
    truncate = 'at("train_gpt2.train", lambda: open("{}/last.pt", "wb").close())'
    no_mmap = """
import torch
def load(*args, real=torch.load, **kwargs):
    if kwargs.get("mmap"): raise RuntimeError("unable to mmap: No such device")
    return real(*args, **kwargs)
torch.load = load
"""
    for name, patch in (("truncate", truncate), ("no_mmap", no_mmap)):
        log = copy_until_8(uninterrupted, tmp_path / name)
        forks.run(*flags, "--resume", f"--log_dir={log}", cwd=tmp_path, patch=patch.format(log)).good()
        assert_same_end(log, uninterrupted)


def test_log_dir_that_cannot_be_renamed(forks, flags, uninterrupted, tmp_path):
    """The current directory or a mount point is refused with a fix, and nothing changes."""
    log = copy_until_8(uninterrupted, tmp_path / "log")
    mount = 'at("os.rename", lambda: exec("raise OSError(errno.EBUSY, \'busy\')"))'
    for cwd, name, patch in ((log, ".", ""), (tmp_path, "log", mount)):
        forks.run(*flags, f"--log_dir={name}", cwd=cwd, patch=patch).refused("--resume", "--log_dir")
    assert weights(log)["step"] == 8 and os.listdir(tmp_path) == ["log"]
    forks.run(*flags, "--resume", "--log_dir=.", cwd=log).good()
    assert_same_end(log, uninterrupted)
