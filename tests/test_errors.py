"""A user's mistake is one line with the value and the fix, exit status 2, before anything is written."""

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import processes
import pytest
import torch
from conftest import ROOT, TINY, assert_same_end, read_log, weights, write_shards
from processes import LINUX

import train_gpt2
from train_gpt2 import Dist, RunError, UserError, check_mps, choose_preset, open_shards, sequences_per_rank


@pytest.fixture
def mistake(tmp_path, monkeypatch, capsys):
    """mistake(*flags) runs the command in this process, in tmp_path, and returns its one error line."""
    monkeypatch.chdir(tmp_path)

    def run(*flags):
        with pytest.raises(SystemExit) as e:
            train_gpt2.run_script("train_gpt2.py", lambda: train_gpt2.main([str(f) for f in flags]))
        out, err = capsys.readouterr()
        assert e.value.code == 2, (out, err)
        assert err.startswith("train_gpt2.py: error: ") and err.count("\n") == 1, err
        return err

    return run


MISTAKES = [
    (["--batch_size=4"], "unrecognized arguments: --batch_size"), (["--eval-only"], "unrecognized"),
    (["--max=3"], "unrecognized"), ([""], "unrecognized"),  # an abbreviation, an unset "$FLAGS"
    (["--T=0"], "--T: must be at least 1"), (["--T=64"], "--T 64 is greater than --block_size 32"),
    (["--n_embd=33"], "33 is not divisible by --n_head 2"), (["--pos=rope", "--n_embd=2"], "by 2 * n_head"),
    (["--min_lr=1"], "--min_lr 1 is greater than --max_lr"), (["--device=cpu:1"], "--device cpu:1: choose"),
    (["--total_batch_size=24"], "use 32 or 64"), (["--init=s"], "Is a directory"),
    (["--total_batch_size=250"], "use 224 or 256"), (["--init=no.pt"], "No such file"),
    (["--inspect=1", "--total_batch_size=24"], "use 32 or 64"), (["--seed=1000000000001"], "at most 1e+12"),
    (["--eval_only"], "--eval_only and --export_hf need"), (["--export_hf=x"], "--export_hf need"),
    (["--n_embd=100000000000"], "smaller"), (["--shuffle=x"], "invalid choice"),
    *(([f"--{name}={value}"], f"--{name}: must be ") for name, value in [
        ("max_lr", "nan"), ("max_lr", "0"), ("grad_clip", "nan"), ("min_lr", "-inf"), ("temperature", "-1"),
        ("max_steps", "9" * 401), ("seed", "-1"), ("seed", 2**64), ("inspect", 2**63)]),
    *(([f"--{name}="], f"--{name}: must not be empty")  # an unset "$DIR"
      for name in ("data", "log_dir", "init", "export_hf")),
    *[(["--device=cuda"], "--device cuda: cuda:0 is not available")] * (not torch.cuda.is_available()),
]  # fmt: skip


@pytest.mark.parametrize("flags, message", MISTAKES, ids=lambda v: " ".join(v)[:40])
def test_mistakes(mistake, flags, message, tmp_path):
    write_shards("s")
    assert message in mistake(*TINY, "--data=s", *flags)
    assert os.listdir(tmp_path) == ["s"]  # nothing was written


def test_old_torch_and_missing_packages(mistake, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install wandb" in mistake(*TINY, f"--data={write_shards('s')}", "--wandb=test")
    assert "pip install transformers" in mistake("--device=cpu", "--init=gpt2", "--eval_only")
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.8.1"))
    assert "torch 2.8.1" in (err := mistake()) and "pip install 'torch>=2.9'" in err


@pytest.mark.parametrize("env, word", [({"WORLD_SIZE": "2"}, "SIZE is 2"), ({"RANK": "1"}, "RANK is 1")])
def test_incomplete_environment_of_torchrun(forks, tmp_path, env, word):
    """Otherwise rank 1 of 1 would train and save nothing."""
    no_wait = "time.sleep = lambda seconds: None"
    forks.run(*TINY, cwd=tmp_path, patch=no_wait, **env).refused(word, "start with torchrun")


def test_world_sizes_that_divide_the_batch():
    """A smoke run works on 1, 2 and 4 CPU ranks; the error for others names the nearest batch sizes."""
    smoke = SimpleNamespace(**train_gpt2.PRESETS["smoke"], B=0)
    for n in (1, 2, 4):
        assert choose_preset({}, Dist(0, 0, n, torch.device("cpu")))[0] == "smoke"
        assert sequences_per_rank(smoke, n) == 4 // n
    with pytest.raises(UserError, match="use 491520 or 540672"):
        sequences_per_rank(SimpleNamespace(T=1024, total_batch_size=524288, B=0), 3)


@pytest.mark.parametrize("B, T, dtype, version, message", [
    (31, 1024, "float32", "2.9.1", ""), (32, 1024, "float32", "2.13.0", "smaller --B or --T"),
    (4, 64, "bfloat16", "2.12.1", "--dtype float32"), (4, 64, "bfloat16", "2.13.0", ""),
])  # fmt: skip
def test_settings_that_apple_gpus_compute_incorrectly(monkeypatch, B, T, dtype, version, message):
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
    args = SimpleNamespace(T=T, dtype=dtype, eval_only=False)
    with pytest.raises(UserError, match=message) if message else contextlib.nullcontext():
        check_mps(args, B)


def test_under_torchrun_an_error_about_the_network_is_printed(monkeypatch, capsys):
    """Only a lost peer is silent there."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr("signal.signal", lambda *args: None)
    train_gpt2.report_error("train_gpt2.py", UserError("the hub: Connection reset by peer"))
    assert capsys.readouterr().err == "train_gpt2.py: error: the hub: Connection reset by peer\n"


def test_directories_without_shards(mistake, tmp_path):
    err = mistake(*TINY, "--data=nowhere")
    assert "nowhere" in err and "no such file or directory" in err
    os.makedirs("texts/a.txt")
    assert "python fineweb.py --files" in mistake(*TINY, "--data=texts")
    os.remove(Path(write_shards("s"), "edufineweb_val_000000.npy"))
    err = mistake(*TINY, "--data=s")
    assert "no val shards in" in err and "'val' in its name" in err


@pytest.mark.parametrize("name, content, words", [
    *((f"a.{ending}", content * 100, ["not UTF-8 text", "python fineweb.py --files"])
      for ending, content in (("jsonl", b"{}\n"), ("csv", b"{}\n"), ("JSON", b"{}\n"), ("npz", b"\x93"))),
    ("a.txt", b"\xff\xfe\xfa" * 50, ["not UTF-8", "byte 0"]), ("a.txt", b"", ["0 tokens"]),
    ("a.txt", b"x" * 100, ["10 tokens", "--T", "--val_tokens 0"]),  # the last tenth is for validation
])  # fmt: skip
def test_files_that_are_no_usable_text(mistake, name, content, words, tmp_path, monkeypatch):
    Path(name).write_bytes(content)
    tokenizer = train_gpt2.get_tokenizer("bytes")
    monkeypatch.setattr(train_gpt2, "get_tokenizer", lambda name: tokenizer)
    err = mistake(*TINY, "--vocab_size=256", f"--data={name}")
    assert name in err and all(word in err for word in words), err
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("split, number", [("train", 1), ("val", 0)])
def test_unusable_first_tokens_leave_the_older_run_in_place(mistake, tmp_path, split, number):
    """A token outside the vocabulary is found before anything is renamed or written."""
    path = Path(write_shards("s"), f"edufineweb_{split}_{number:06d}.npy")
    np.save(path, np.array([1] * 5 + [600] * 995, np.uint16))
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "log.txt").write_text("0 train 1.0\n")
    err = mistake(*TINY, "--data=s")
    assert f"{path.name} has token 600 at offset 5" in err and "--vocab_size 512" in err
    assert os.listdir(tmp_path / "log") == ["log.txt"] and sorted(os.listdir(tmp_path)) == ["log", "s"]


def test_warnings(forks, flags, tmp_path):
    """A prompt outside a tiny vocabulary turns samples off; a warm-up may be longer than the run."""
    patch = """
import numpy, train_gpt2
use_bytes()
import tiktoken
tiktoken.Encoding.encode_ordinary = lambda self, text: [5, 40000]"""
    more = ["--num_samples=2", "--max_steps=2", "--warmup_steps=100"]
    run = forks.run(*flags, *more, cwd=tmp_path, patch=patch).good()
    first, second = sorted(run.stderr.splitlines())
    assert "--warmup_steps 100 is greater than --max_steps 2" in second
    assert first == "warning: no samples: the prompt has token 40000, outside --vocab_size 512"
    assert "sample 0" not in run.stdout and (tmp_path / "log" / "samples.txt").read_bytes() == b""


def test_log_dir_that_cannot_be_written(forks, flags, tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in ("file", "file/log", *["/proc/log"] * LINUX):
        for more in ([], ["--resume"]):
            forks.run(*flags, f"--log_dir={path}", *more, cwd=tmp_path).refused(path)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(not LINUX, reason="needs Linux")
def test_one_live_run_per_log_dir(forks, flags, tmp_path):
    """A second run is refused. Older runs are renamed, the first to log.1, the next to log.2."""
    short = [*flags, "--max_steps=2", "--eval_every=0"]
    live = forks.start(*short, cwd=tmp_path, patch='at("train_gpt2.Trainer.update", wait)').arrived()
    for more in ([], ["--resume"]):
        forks.run(*short, *more, cwd=tmp_path).refused("another run is writing to", "--log_dir")
    live.release().end().good()
    logs = [(tmp_path / "log" / "log.txt").read_bytes()]
    for more in (["--seed=1"], ["--seed=2", "--log_dir=log/"], ["--init=log/last.pt"]):
        assert "renamed the older run" in forks.run(*short, *more, cwd=tmp_path).good().stdout
        logs.append((tmp_path / "log" / "log.txt").read_bytes())
    assert [(tmp_path / f"log.{n}" / "log.txt").read_bytes() for n in (1, 2, 3)] == logs[:3]
    assert len({*logs}) == 4


@pytest.mark.skipif(os.name != "posix", reason="pipes differ on other systems")
def test_closed_pipe_does_not_end_the_run(flags, tmp_path):
    """As with `| head -1`: the run completes with status 0 and without a traceback."""
    shutil.copy(ROOT / "train_gpt2.py", tmp_path)  # without plot.py: no curves
    process = subprocess.Popen([sys.executable, "train_gpt2.py", *flags], cwd=tmp_path, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 0
    process.stderr.close()
    assert weights(tmp_path / "log")["step"] == 12


def test_terminal_without_unicode(tmp_path):
    """No locale, no home, no vocabulary: samples are printed with escapes, and are UTF-8 in samples.txt."""
    (tmp_path / "text.txt").write_text("größer wird das Meer. " * 40, encoding="utf-8")
    env = os.environ | dict(PYTHONIOENCODING="ascii", LC_ALL="C", LANG="C", TIKTOKEN_CACHE_DIR="",
                            HTTPS_PROXY="http://127.0.0.1:9", NO_PROXY="")
    flags = [*TINY, "--data=text.txt", "--max_steps=4", "--num_samples=1", "--prompt=größer",
             "--sample_length=12", "--vocab_size=256"]
    done = subprocess.run([sys.executable, *processes.fresh_run(*flags, cwd=tmp_path)], capture_output=True,
                          text=True, env={name: value for name, value in env.items() if name != "HOME"})
    assert done.returncode == 0, done.stderr
    assert r"rank 0 sample 0: gr\xf6\xdfer" in done.stdout
    assert (tmp_path / "log" / "samples.txt").read_text(encoding="utf-8").startswith('4 sample 0: "größer')


POISON = """
import train_gpt2
def poisoned(self, loss, real=train_gpt2.Trainer.clip_and_all_reduce):
    if self.step == 5: {}
    return real(self, loss)
train_gpt2.Trainer.clip_and_all_reduce = poisoned
"""


@pytest.mark.parametrize("poison, word", [
    ("loss *= float('nan')", "loss (nan)"),
    ("self.raw_model.lm_head.weight.grad[0, 0] = float('inf')", "norm (inf)"),
], ids=["loss", "gradient"])  # fmt: skip
def test_non_finite_values_never_reach_the_weights(forks, uninterrupted, flags, tmp_path, poison, word):
    run, log = forks.run(*flags, cwd=tmp_path, patch=POISON.format(poison)), tmp_path / "log"
    run.refused("step 5", word, "edufineweb_train_000003.npy offset 80", "--inspect 5", status=1)
    assert (5, "train") not in read_log(log) and weights(log)["step"] == 4
    forks.run(*flags, "--resume", cwd=tmp_path).good()
    assert_same_end(log, uninterrupted)


def test_float16_overflow_lowers_the_scale_before_it_stops(shards):
    """At scale 1 it cannot be lowered; and a loss that is not finite is no overflow of the gradients."""
    trainer = SimpleNamespace(step=7, args=SimpleNamespace(log_dir="log", T=16),
                              loader=train_gpt2.DataLoaderLite(2, 16, 0, 1, open_shards(shards)["train"]))
    for scale, loss, stops in (2.0, 5.0, False), (1.0, 5.0, True), (2.0, float("nan"), True):
        trainer.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        with pytest.raises(RunError, match="step 7: non-finite") if stops else contextlib.nullcontext():
            train_gpt2.Trainer.check_finite(trainer, loss, float("inf"))
