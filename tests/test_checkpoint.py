"""Checkpoints: plain data, proved whole when read, and readable whoever wrote them."""

import dataclasses
import json
import os
import pickle
import random
import re
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import assert_same_end, copy_until_8, equal, read_log, weights, write_shards
from processes import LINUX

import train_gpt2
from plumbing import checkpoint, machine
from plumbing.errors import UserError, one_line

RECORDED = Path(__file__).resolve().parent / "data"

# -----------------------------------------------------------------------------
# What a checkpoint is


def test_checkpoint_is_plain_data(undisturbed):
    """torch.load(weights_only=True) reads it, and JSON can hold all but the tensors."""
    saved = weights(undisturbed)
    assert all(type(v) is torch.Tensor for v in saved["model"].values())
    assert saved["optimizer"]["adamw"]["state"]
    keys, names = saved.keys(), saved["model"]
    config, flags, data, tokenizer, step, val_loss = json.loads(json.dumps(
        [saved[k] for k in ("config", "flags", "data", "tokenizer", "step", "val_loss")]))
    assert {"model", "optimizer", "step", "config", "flags", "tokenizer", "data", "val_loss",
            "rng"} <= keys
    assert "transformer.wte.weight" in names and "transformer.h.0.attn.c_attn.weight" in names
    assert not [n for n in names if n.startswith(("_orig_mod", "module"))]
    assert (config["n_layer"], config["vocab_size"], flags["max_lr"]) == (2, 512, 3e-3)
    assert (tokenizer, step, saved["arch"]) == ("gpt2", 12, "gpt2")
    assert f"{val_loss:.4f}" == read_log(undisturbed)[12, "val"]
    assert [n for _, n in data["shards"]] == [700, 500, 333] and data["tokens"] == 1533


def test_kept_checkpoints_share_bytes(undisturbed):
    last, kept, older = (os.stat(undisturbed / name) for name in
                         ("last.pt", "model_00012.pt", "model_00008.pt"))
    assert last.st_ino == kept.st_ino and last.st_nlink == 2
    assert older.st_ino != last.st_ino and older.st_nlink == 1
    assert weights(undisturbed, "model_00008.pt")["step"] == 8


def test_from_pretrained_takes_the_path_of_a_checkpoint(undisturbed, tmp_path):
    path = undisturbed / "last.pt"
    model = train_gpt2.GPT.from_pretrained(str(path))
    saved = weights(undisturbed)
    assert equal(dict(model.state_dict()), saved["model"])
    idx = torch.arange(6).view(2, 3)
    new = list(model.generate(idx, 5, n_vocab=512, generator=torch.Generator().manual_seed(1)))
    assert len(new) == 5 and all(column.shape == (2, 1) for column in new)
    torch.save(saved | {"arch": "modern"}, tmp_path / "modern.pt")
    with pytest.raises(UserError, match=r"modern\.pt holds a model of modern\.py: use that"):
        train_gpt2.GPT.from_pretrained(str(tmp_path / "modern.pt"))
    del saved["arch"]  # as the first checkpoints had it
    torch.save(saved, tmp_path / "old.pt")
    train_gpt2.GPT.from_pretrained(str(tmp_path / "old.pt"))


def test_resume_with_the_other_architecture(forks, undisturbed, flags, tmp_path):
    log = copy_until_8(undisturbed, tmp_path / "log")
    torch.save(weights(log) | {"arch": "modern"}, log / "other.pt")
    os.replace(log / "other.pt", log / "last.pt")
    (log / "model_00008.pt").unlink()
    before = {p.name: p.read_bytes() for p in log.iterdir()}
    forks.run(*flags, "--resume", cwd=tmp_path).refused("last.pt", "modern.py", "train_gpt2.py")
    assert {p.name: p.read_bytes() for p in log.iterdir()} == before


# -----------------------------------------------------------------------------
# Whoever wrote it


@pytest.mark.parametrize("kind", ["shards", "text"])
def test_a_run_of_an_earlier_version_goes_on(forks, tmp_path, kind):
    """tests/data: checkpoints of step 10 as commit 91c70fe wrote them, the shards with their
    manifest that its fineweb.py made, and the log and the weights of its own steps 10 to 20.

    Another CPU or another torch rounds otherwise, so the numbers are compared to 1e-6; that a
    resume is exact to the bit on one machine is what test_kills is about.
    """
    source = RECORDED / f"run_of_{kind}"
    log = tmp_path / "log"
    log.mkdir()
    for name in ("last.pt", "log.txt"):
        shutil.copy(source / name, log / name)
    data = RECORDED / ("shards" if kind == "shards" else "text.txt")
    run = forks.run("--resume", f"--data={data}", cwd=tmp_path, TIKTOKEN_CACHE_DIR="").good()
    assert "resuming from" in run.stdout and "step    10 |" in run.stdout
    assert "step     9 |" not in run.stdout
    was, now = read_log(source), read_log(log)
    assert list(now) == list(was)
    digits = dict(train=1.1e-6, val=1.01e-4, norm=1.01e-4)  # one in the last place
    for (step, stream), value in was.items():
        assert float(now[step, stream]) == pytest.approx(float(value), abs=digits[stream])
    saved = weights(log)
    recorded = json.loads((source / "weights.json").read_text())
    assert saved["step"] == 20 and saved["model"].keys() == recorded.keys()
    for name, (total, norm) in recorded.items():
        v = saved["model"][name].double()
        assert v.sum().item() == pytest.approx(total, abs=1e-4), name
        assert v.norm().item() == pytest.approx(norm, abs=1e-5), name
    again = forks.run("--resume", f"--data={data}", cwd=tmp_path, TIKTOKEN_CACHE_DIR="").good()
    assert "is finished" in again.stdout


@dataclasses.dataclass
class GPTConfig:
    """What build-nanogpt pickles."""

    block_size: int = 32
    vocab_size: int = 512
    n_layer: int = 2
    n_head: int = 2
    n_embd: int = 32


def test_build_nanogpt_checkpoint(forks, undisturbed, data, tmp_path, monkeypatch):
    """Its pickled config and the prefixes of its wrappers are read."""
    monkeypatch.setattr(sys.modules["__main__"], "GPTConfig", GPTConfig, raising=False)
    monkeypatch.setattr(GPTConfig, "__module__", "__main__")
    state = {f"_orig_mod.{k}": v for k, v in weights(undisturbed)["model"].items()}
    torch.save(dict(model=state, config=GPTConfig(), step=12, val_loss=6.0), tmp_path / "old.pt")
    values = []
    for path in (undisturbed / "last.pt", tmp_path / "old.pt"):
        run = forks.run("--device=cpu", f"--init={path}", f"--data={data}", "--eval_only", "--T=16",
                        "--val_tokens=512", "--num_samples=0", cwd=tmp_path).good()
        values += re.findall(r"validation loss: (\S+)", run.stdout)
    assert len(values) == 2 and values[0] == values[1]
    assert float(values[0]) == float(read_log(undisturbed)[12, "val"])


# -----------------------------------------------------------------------------
# Files that are no good


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def bad_files(folder, good):
    """{name: path} of files that are no checkpoints of this project."""
    state = torch.load(good, weights_only=True)
    contents = {
        "truncated": Path(good).read_bytes()[:-1000],
        "empty": b"",
        "random": random.Random(0).randbytes(5000),
        "text": b"hello\n" * 100,
        "tensor": torch.ones(3),
        "list": [1, 2, 3],
        "state": {"w": torch.ones(3)},
        # nanoGPT's: its config is that of the run, the shape is in model_args
        "nanogpt": dict(model=state["model"], optimizer={}, model_args=dict(n_layer=2), iter_num=5,
                        best_val_loss=torch.tensor(3.0), config=dict(out_dir="out", n_layer=2)),
        "no shape": dict(model=state["model"], config={}, step=1),
        "strange model": dict(state, model=[1, 2]),
        "strange config": dict(state, config=[1, 2]),
        "missing weight": dict(state, step=8, model={"w": torch.ones(3)}),
        "bomb": dict(state, val_loss=Bomb(str(folder / "bombed"))),
    }
    paths = {}
    for name, content in contents.items():
        paths[name] = folder / f"{name}.pt"
        if isinstance(content, bytes):
            paths[name].write_bytes(content)
        else:
            torch.save(content, paths[name])
    paths["plain bomb"] = folder / "plain bomb.pt"
    paths["plain bomb"].write_bytes(pickle.dumps(Bomb(str(folder / "bombed"))))
    paths["folder"] = folder
    paths["missing"] = folder / "nothing.pt"
    return paths


@pytest.mark.filterwarnings("error")
def test_bad_checkpoints(forks, undisturbed, flags, tmp_path):
    """One line that names the file, exit 2, for --init and for --resume; nothing runs."""
    paths, wrong = bad_files(tmp_path, undisturbed / "last.pt"), []
    for name in paths.keys() - {"nanogpt", "no shape", "missing weight"}:
        try:
            checkpoint.read_checkpoint(str(paths[name]))
            wrong.append(f"{name} was read")
        except UserError as e:
            assert str(paths[name]) in str(e) and "\n" not in str(e)
        except Exception as e:
            wrong.append(f"{name}: {one_line(e)}")
    runs = {}
    for name in ("nanogpt", "no shape", "missing weight", "bomb", "truncated"):
        run = forks.run(flags[-1], "--device=cpu", f"--init={paths[name]}", "--eval_only",
                        "--num_samples=0", cwd=tmp_path)
        runs["--init", name] = run, paths[name]
        if name == "missing weight":
            continue
        folder = tmp_path / f"log of {name}"
        folder.mkdir()
        shutil.copy(paths[name], folder / "last.pt")
        runs["--resume", name] = forks.run(*flags, "--resume", f"--log_dir={folder}",
                                           cwd=tmp_path), folder
        assert (folder / "last.pt").read_bytes() == paths[name].read_bytes()
        assert os.listdir(folder) == ["last.pt"]
    for what, (run, path) in runs.items():
        try:
            run.refused(path)
        except AssertionError as e:
            wrong.append(f"{what}: {str(e)[-300:]}")
    assert not (tmp_path / "bombed").exists(), "a pickle ran"
    assert not wrong, "\n".join(wrong)


def test_flipped_bits(tmp_path, rng):
    """A flipped bit anywhere is noticed, or is where it does no harm; never a traceback."""
    path = tmp_path / "small.pt"
    state = dict(model={"w": torch.arange(300.0)}, config=dict(n_layer=1), step=3, flags={},
                 optimizer={}, data={})
    torch.save(state, path)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        weight = next(i for i in archive.infolist() if i.filename.endswith("data/0"))
        directory = archive.start_dir
    first = whole.index(state["model"]["w"].numpy().tobytes())
    inside = range(first, first + weight.file_size)
    strange = []
    entry = whole.index(b"data/0", directory) - 52  # all of this entry in the directory, every bit
    for offset in {*range(entry, entry + 60), *rng.sample(range(len(whole)), 300)}:
        for bit in range(8) if entry <= offset < entry + 60 else [rng.randrange(8)]:
            path.write_bytes(whole[:offset] + bytes([whole[offset] ^ 1 << bit]) +
                             whole[offset + 1:])
            try:
                read = checkpoint.read_checkpoint(str(path))
                assert offset not in inside, f"offset {offset} bit {bit} was not noticed"
                assert equal(read, state), f"offset {offset} bit {bit} changed what was read"
            except UserError as e:
                assert str(path) in str(e) and "\n" not in str(e)
            except Exception as e:
                strange.append(f"offset {offset} of {len(whole)} bit {bit}: {one_line(e)}")
    assert not strange, f"{len(strange)}: " + "\n".join(strange[:5])


def test_damaged_newest_checkpoint(forks, undisturbed, flags, tmp_path):
    """The next older good one is used, the bad one named."""
    log = tmp_path / "log"
    shutil.copytree(undisturbed, log)  # not linked: each file has its own bytes
    for name in ("last.pt", "model_00012.pt"):
        with open(log / name, "r+b") as f:
            size = f.seek(0, os.SEEK_END)
            if name == "last.pt":
                f.truncate(size - 100)
            else:
                f.seek(size // 2)
                byte = f.read(1)[0]
                f.seek(size // 2)
                f.write(bytes([byte ^ 4]))
    run = forks.run(*flags, "--resume", cwd=tmp_path).good()
    assert "last.pt" in run.stderr and "model_00012.pt" in run.stderr
    assert run.stderr.count("is not a good checkpoint") == 2
    assert re.search(r"resuming from .*model_00008.pt, step 8", run.stdout)
    assert_same_end(log, undisturbed)


# -----------------------------------------------------------------------------
# Which one a resume takes, and with which settings it goes on


def test_newest_is_the_largest_step(tmp_path):
    state = dict(model={}, config={}, optimizer={}, flags={}, data={}, tokenizer="gpt2", scaler={},
                 rng=0)
    for step in (95000, 100000):
        torch.save(state | {"step": step}, tmp_path / f"model_{step:05d}.pt")
    found = checkpoint.find_checkpoint(str(tmp_path))
    assert found["step"] == 100000 and found["path"].endswith("model_100000.pt")
    for step, newest in ((99000, "model_100000.pt"), (100000, "last.pt"), (100001, "last.pt")):
        torch.save(state | {"step": step}, tmp_path / "last.pt")  # a kill between the two writes
        assert checkpoint.find_checkpoint(str(tmp_path))["path"] == str(tmp_path / newest)


CHANGED = dict(n_layer=1, n_head=4, n_embd=64, block_size=64, vocab_size=640, pos="rope",
               mlp="swiglu", norm="rmsnorm", T=8, total_batch_size=512, max_lr=1e-3, min_lr=1e-5,
               warmup_steps=4, max_steps=24, weight_decay=0.2, grad_clip=0.5, optimizer="muon",
               seed=1, dtype="bfloat16", shuffle="windows")


def test_resume_with_other_mathematics(forks, undisturbed, flags, data, tmp_path):
    """Refused with a table of flag, checkpoint, now."""
    log = copy_until_8(undisturbed, tmp_path / "log")
    before = {p.name: p.read_bytes() for p in log.iterdir()}
    everything = [f"--{k}={v}" for k, v in CHANGED.items()]
    run = forks.run(*flags, *everything, "--resume", cwd=tmp_path).refused("checkpoint", "now")
    saved = weights(log)["flags"]
    rows = {r[0].strip(): r[1:] for r in (x.split(" | ") for x in run.stderr.splitlines()) if r[1:]}
    for name, value in CHANGED.items():
        old, new = rows[f"--{name}"]
        assert (old.strip(), new.strip()) == (str(saved[name]), str(value))
    assert len(rows) == len(CHANGED) + 1
    for name in ("seed", "total_batch_size", "max_lr", "dtype"):
        run = forks.run(*flags, f"--{name}={CHANGED[name]}", "--resume", cwd=tmp_path)
        run.refused(f"--{name}", CHANGED[name])
        assert run.stderr.count(" | ") == 4
    other = write_shards(tmp_path / "other", sizes=(700, 500, 334), val=1001)
    forks.run(*flags, f"--data={other}", "--resume", cwd=tmp_path).refused("--data", "1,534")
    moved = tmp_path / "moved"
    shutil.copytree(data, moved)
    # what may differ; the same data elsewhere
    assert before == {p.name: p.read_bytes() for p in log.iterdir()}
    forks.run(*flags, f"--data={moved}", "--B=4", "--save_every=3", "--resume", cwd=tmp_path).good()
    assert float(read_log(log)[11, "train"]) == pytest.approx(
        float(read_log(undisturbed)[11, "train"]), abs=1e-5)


@pytest.mark.parametrize("there, here", [(False, True), (True, False)])
def test_the_kernel_of_the_optimizer_is_that_of_the_device_that_goes_on(there, here):
    """modern.py takes the fused one on CUDA alone, and a run may go on elsewhere."""

    def adamw(fused):
        p = torch.ones(3, requires_grad=True)
        p.grad = torch.ones(3)
        optimizer = torch.optim.AdamW([p], fused=fused)
        optimizer.step()
        return optimizer

    goes_on = adamw(here)
    machine.load_optimizer(goes_on, adamw(there).state_dict())
    assert goes_on.param_groups[0]["fused"] is here
    goes_on.step()


def test_finished_run(forks, undisturbed, flags, tmp_path):
    log = tmp_path / "log"
    shutil.copytree(undisturbed, log)
    before = {p.name: p.read_bytes() for p in log.iterdir()}
    run = forks.run(*flags, "--resume", cwd=tmp_path).good()
    assert "is finished" in run.stdout and run.stderr == ""
    assert len(run.stdout.splitlines()) == 1
    run = forks.run(*flags, "--max_steps=24", "--resume", cwd=tmp_path).refused("--max_steps", 24)
    assert "schedule" in run.stderr
    assert {p.name: p.read_bytes() for p in log.iterdir()} == before
    saved = weights(log)
    del saved["finished"]  # as the first checkpoints had it
    torch.save(saved, log / "last.pt")
    assert "is finished" in forks.run(*flags, "--resume", cwd=tmp_path).good().stdout


def test_finished_without_a_validation(forks, flags, tmp_path):
    """--val_tokens 0: no validation, a proper end all the same, and a resume knows it."""
    short = [*flags, "--max_steps=3", "--val_tokens=0"]
    run = forks.run(*short, cwd=tmp_path).good()
    assert "validation" not in run.stdout and "done: 3 steps, 768 tokens" in run.stdout
    assert {stream for _, stream in read_log(tmp_path / "log")} == {"train", "norm"}
    saved = weights(tmp_path / "log")
    assert saved["step"] == 3 and saved["val_loss"] is None and saved["finished"]
    before = {p.name: p.read_bytes() for p in (tmp_path / "log").iterdir()}
    for more in ([], ["--val_tokens=0"]):
        run = forks.run(*flags, "--max_steps=3", *more, "--resume", cwd=tmp_path).good()
        assert run.stdout == "the run in log is finished: 3 steps\n"
    assert {p.name: p.read_bytes() for p in (tmp_path / "log").iterdir()} == before


@pytest.mark.skipif(not LINUX, reason="other systems forbid such names")
@pytest.mark.parametrize("name", ["a b", "new\nline", "größer", "st*r [a-z]?", "'\" ~100%"])
def test_a_log_dir_of_any_name_is_written_and_resumed(forks, flags, undisturbed, tmp_path, name):
    log = tmp_path / name
    forks.run(*flags, f"--log_dir={name}", cwd=tmp_path,
              patch='at("os.replace", kill, match="model_00008", before=False)').killed()
    assert os.listdir(tmp_path) == [name] and not (log / "last.pt.tmp").exists()
    run = forks.run(*flags, "--resume", f"--log_dir={name}", cwd=tmp_path).good()
    assert "step 8\n" in run.stdout and run.stderr == ""
    assert_same_end(log, undisturbed)
    forks.run(*flags, "--max_steps=1", f"--log_dir={name}", cwd=tmp_path).good()
    assert sorted(os.listdir(tmp_path)) == [name, f"{name}.1"]
    assert_same_end(tmp_path / f"{name}.1", undisturbed)
