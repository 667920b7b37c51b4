"""A mistake ends in one line that names the thing and the fix, and status 2, before time is spent.

So it is on any terminal, in any environment; a fault on the way says what is safe.
"""

import contextlib
import os
import signal
import stat
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
from plumbing.checks import check_apple, check_batch
from plumbing.errors import RunError, UserError
from plumbing.tokens import open_shards

needs_linux = pytest.mark.skipif(not LINUX, reason="needs Linux")


@pytest.fixture(autouse=True)
def restore():
    """main() in this process installs signal handlers."""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    yield
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


@pytest.fixture
def mistake(tmp_path, monkeypatch, capsys):
    """Call the command in this process, in tmp_path: cheap. Returns its one line."""
    monkeypatch.chdir(tmp_path)

    def call(*flags, **env):
        for name, value in env.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(SystemExit) as e:
            train_gpt2.main([str(f) for f in flags])
        out, err = capsys.readouterr()
        assert e.value.code == 2, (out, err)
        assert err.startswith("train_gpt2.py: error: ") and err.count("\n") == 1, err
        return err

    return call


# -----------------------------------------------------------------------------
# Flags

MISTAKES = [
    (["--batch_size=4"], "unrecognized arguments: --batch_size"),
    ([""], "unrecognized arguments: "),  # "$FLAGS" that was never set
    (["--max=3"], "unrecognized arguments"),  # no abbreviations
    (["--max_step=3"], "did you mean --max_steps"),
    (["--T=many"], "invalid int value"),
    (["--T=0"], "--T 0: must be a number of at least 1"),
    (["--T=64"], "--T 64 is beyond --block_size 32"),
    (["--n_embd=33"], "--n_embd 33 is not divisible by --n_head 2"),
    (["--pos=rope", "--n_embd=2"], "even n_embd / n_head"),
    (["--max_lr=nan"], "--max_lr nan"),
    (["--max_lr=inf"], "--max_lr inf"),
    (["--max_lr=-1"], "--max_lr -1.0: must be a number above 0"),
    (["--max_lr=0"], "--max_lr 0.0"),
    (["--min_lr=1"], "--min_lr 1 is above --max_lr"),
    (["--max_steps=0"], "--max_steps 0"),
    (["--eval_every=0"], "--eval_every 0"),
    (["--temperature=-1"], "--temperature -1.0"),
    (["--weight_decay=-0.1"], "--weight_decay -0.1"),
    (["--grad_clip=nan"], "--grad_clip nan"),
    (["--seed=-1"], "--seed -1"),
    (["--seed=18446744073709551616"], "--seed 18446744073709551616: must be at most"),
    (["--max_steps=" + "9" * 401], "must be at most"),
    (["--inspect=9223372036854775807"], "must be at most 1000000000"),
    (["--lr=3"], "unrecognized arguments: --lr=3 (--help"),  # and no far-fetched name
    (["--device=tpu"], "--device tpu: choose"),
    (["--device=cpu:1"], "--device cpu:1: choose"),
    (["--total_batch_size=250"], "use 224 or 256"),
    (["--total_batch_size=24"], "use 32"),
    (["--total_batch_size=10000000000000000000"], "must be at most 9223372036854775807"),  # > 2^63
    (["--total_batch_size=1099511627776"], "all 187 windows of the data over a thousand times"),
    (["--n_embd=100000000000"], "use a smaller model"),
    (["--n_embd=1000000", "--n_head=1"], "use a smaller model"),
    (["--vocab_size=1000000000000"], "use a smaller model"),
    (["--data=nowhere"], "nowhere, which does not exist"),
    (["--eval_only"], "--eval_only needs weights"),
    (["--export_hf=out"], "--export_hf needs weights"),
    (["--init=nowhere.pt"], "nowhere.pt: there is no such checkpoint"),
    (["--optimizer=sgd"], "choose from"),
]  # fmt: skip
if not torch.cuda.is_available():
    MISTAKES.append((["--device=cuda"], "no CUDA device"))


@pytest.mark.parametrize("flags, message", MISTAKES, ids=lambda v: " ".join(v)[:40])
def test_mistakes(mistake, flags, message, tmp_path):
    assert message in mistake(*TINY, f"--data={write_shards(tmp_path / 's')}", *flags)
    assert os.listdir(tmp_path) == ["s"]  # nothing was written


@pytest.mark.parametrize("env, words", [
    (dict(WORLD_SIZE="abc"), ["WORLD_SIZE=abc in the environment is not a number"]),
    (dict(WORLD_SIZE="2"), ["WORLD_SIZE is 2", "RANK", "MASTER_ADDR", "torchrun"]),
    (dict(WORLD_SIZE="2", RANK="0", LOCAL_RANK="0", LOCAL_WORLD_SIZE="2"),
     ["WORLD_SIZE", "MASTER_ADDR", "torchrun"]),
    (dict(WORLD_SIZE="-1"), ["WORLD_SIZE=-1"]),
    (dict(RANK="1"), ["RANK is 1 but WORLD_SIZE is 1"]),  # it would train and save nothing
])  # fmt: skip
def test_an_environment_that_is_not_torchruns(forks, tmp_path, env, words):
    forks.run(*TINY, cwd=tmp_path, **env).refused(*words)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("error, line", [
    ("UserError('the hub: Connection reset by peer')", "error: the hub: Connection reset by peer"),
    ("MemoryError()", "error: out of memory (MemoryError): use a smaller model"),
])
def test_an_error_of_our_own_is_said_under_torchrun(error, line):
    """torchrun reports who lost another process; nobody else reports these."""
    code = (f"from plumbing.errors import UserError, run_main\ndef command(): raise {error}\n"
            "run_main('train_gpt2.py', command)")
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                         env=os.environ | {"TORCHELASTIC_RUN_ID": "1"})
    assert line in run.stderr and run.stderr.count("\n") == 1 and run.returncode == 2


@pytest.mark.parametrize("B, T, dtype, version, message", [
    (31, 1024, "float32", "2.9.1", ""), (32, 1024, "float32", "2.13.0", "smaller --B or --T"),
    (4, 64, "bfloat16", "2.12.1", "use torch 2.13"), (4, 64, "bfloat16", "2.13.0", ""),
])  # fmt: skip
def test_what_an_apple_gpu_computes_wrongly_is_refused(monkeypatch, B, T, dtype, version, message):
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
    cfg = SimpleNamespace(T=T, dtype=dtype, eval_only=False)
    with pytest.raises(UserError, match=message) if message else contextlib.nullcontext():
        check_apple(cfg, B, torch.device("mps"))
    check_apple(cfg, B, torch.device("cuda"))


def test_three_processes_name_the_totals_that_work():
    cfg = train_gpt2.TrainConfig(B=0)
    with pytest.raises(UserError, match="use 491520 or 540672"):
        check_batch(cfg, 3)
    assert check_batch(train_gpt2.TrainConfig(B=0, total_batch_size=491520), 3) == 160


def test_missing_optional_packages_are_named(mistake, shards, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "transformers", None)
    err = mistake(*TINY, f"--data={shards}", "--wandb=test")
    assert "--wandb needs wandb: pip install wandb" in err
    assert not os.path.exists("log")
    err = mistake("--device=cpu", "--init=gpt2", "--eval_only")
    assert "gpt2 needs transformers: pip install transformers" in err


# -----------------------------------------------------------------------------
# Data


def save_npy(path, array, **kwargs):
    with open(path, "wb") as f:
        np.save(f, array, **kwargs)


def broken_shards(folder, kind):
    """Shards of which the first train shard is broken in one way."""
    write_shards(folder)
    path = Path(folder) / "edufineweb_train_000001.npy"
    ids = np.load(path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "pickle":
        save_npy(path, np.array([{}]), allow_pickle=True)
    else:
        save_npy(path, {"int32": ids.astype(np.int32), "2-D": ids.reshape(2, -1),
                        "beyond": np.full(3000, 600, np.uint16), "short": ids[:10],
                        "nothing": ids[:0]}[kind])
    return folder


@pytest.mark.parametrize("kind", ["truncated", "int32", "2-D", "empty", "nothing", "pickle",
                                  "beyond", "short"])
def test_broken_shards(mistake, kind, tmp_path):
    err = mistake(*TINY, f"--data={broken_shards(tmp_path / 's', kind)}")
    assert "edufineweb_train_000001.npy" in err
    if kind == "beyond":
        assert "token 600 at offset 0" in err and "--vocab_size 512" in err
    assert os.listdir(tmp_path) == ["s"]


def test_a_val_shard_is_looked_at_before_the_older_run_is_moved(mistake, tmp_path):
    folder = Path(write_shards("s"))
    np.save(folder / "edufineweb_val_000000.npy", np.array([1] * 5 + [600] * 995, np.uint16))
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "log.txt").write_text("0 train 1.0\n")
    err = mistake(*TINY, "--data=s")
    assert "edufineweb_val_000000.npy has token 600 at offset 5" in err
    assert os.listdir(tmp_path / "log") == ["log.txt"]


def test_a_bad_token_deep_in_a_shard_never_reaches_the_weights(forks, data, tmp_path):
    """It shows when it is read: one line with the place, and the weights are as they were."""
    folder = Path(write_shards(tmp_path / "s", sizes=(700, 500, 333), val=1001))
    ids = np.load(folder / "edufineweb_train_000002.npy")
    ids[200] = 600  # token 900 of the stream, in step 3
    np.save(folder / "edufineweb_train_000002.npy", ids)
    run = forks.run(*TINY, f"--data={folder}", "--save_every=1", cwd=tmp_path)
    run.refused("edufineweb_train_000002.npy has token 600 at offset 200", "--vocab_size 512")
    assert weights(tmp_path / "log")["step"] in (2, 3)


@pytest.mark.parametrize("content, message", [(b"", "0 tokens"), (b"\xff\xfe\xfa" * 50, "UTF-8"),
                                              (b"too short", "less than one window")])
def test_broken_texts(mistake, content, message, tmp_path, monkeypatch):
    Path("text.txt").write_bytes(content)
    monkeypatch.setattr("plumbing.tokens.load_bpe", lambda timeout: (None, "no vocabulary"))
    err = mistake(*TINY, "--vocab_size=50304", "--data=text.txt")
    assert message in err and "text.txt" in err


def test_a_prompt_beyond_a_tiny_vocabulary_turns_samples_off(forks, flags, tmp_path):
    patch = """
import numpy as np
import plumbing.tokens
plumbing.tokens.load_bpe = lambda timeout: ("a vocabulary", None)
plumbing.tokens.Tokenizer.encode = lambda self, text: np.array([5, 40000], np.uint16)
"""
    run = forks.run(*flags, "--num_samples=2", "--prompt=the sea", "--max_steps=4", cwd=tmp_path,
                    patch=patch).good()
    assert run.stderr == ("warning: no samples: the prompt has token 40000, beyond --vocab_size "
                          "512\n")
    assert "sample 0" not in run.stdout and (tmp_path / "log" / "samples.txt").read_bytes() == b""


def test_warm_up_beyond_the_end_is_a_warning(forks, flags, tmp_path):
    run = forks.run(*flags, "--warmup_steps=100", "--max_steps=2", cwd=tmp_path).good()
    assert "warning: --warmup_steps 100 is beyond --max_steps 2" in run.stderr


# -----------------------------------------------------------------------------
# The folder of a run


def test_log_dir_that_cannot_be_written(forks, flags, tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder in ("file", "file/log"):
        for more in ([], ["--resume"]):
            forks.run(*flags, f"--log_dir={folder}", *more, cwd=tmp_path).refused(folder)
    if LINUX:
        forks.run(*flags, "--log_dir=/proc/log", cwd=tmp_path).refused("/proc/log")
    assert (tmp_path / "file").read_text() == "mine"
    if os.name == "posix" and os.geteuid():  # root may write anywhere
        (tmp_path / "shut").mkdir()
        os.chmod(tmp_path / "shut", stat.S_IRUSR | stat.S_IXUSR)
        forks.run(*flags, "--log_dir=shut", cwd=tmp_path).refused("shut")


@needs_linux
def test_one_log_dir_one_live_run(forks, flags, tmp_path):
    """A second run is refused; an older one is moved, the first to log.1, the next to log.2."""
    short = [*flags, "--max_steps=2"]
    hold = 'at("train_gpt2.Trainer.update", wait)'
    live = forks.start(*short, cwd=tmp_path, patch=hold).arrived()
    others = [forks.start(*short, *more, cwd=tmp_path) for more in ([], ["--resume"])]
    for run in others:
        run.end().refused("another run is writing to log", "--log_dir")
    assert live.poll() is None
    live.kill().end().killed()
    first = (tmp_path / "log" / "log.txt").read_bytes()
    assert first.startswith(b"0 val ")
    # a start that is refused moves nothing
    forks.run(*short, f"--init={tmp_path}/nothing.pt", cwd=tmp_path).refused("nothing.pt")
    assert not (tmp_path / "log.1").exists()
    run = forks.run(*short, "--seed=1", cwd=tmp_path).good()
    assert "log.1" in run.stdout
    second = (tmp_path / "log" / "log.txt").read_bytes()
    forks.run(*short, "--seed=2", "--log_dir=log/", cwd=tmp_path).good()
    third = (tmp_path / "log" / "log.txt").read_bytes()
    assert (tmp_path / "log.1" / "log.txt").read_bytes() == first
    assert (tmp_path / "log.2" / "log.txt").read_bytes() == second
    assert len({first, second, third}) == 3
    # --init from the folder that moves: opened before
    forks.run(*short, "--init=log/last.pt", cwd=tmp_path).good()
    assert (tmp_path / "log.3" / "log.txt").read_bytes() == third


# -----------------------------------------------------------------------------
# Any terminal, any environment


@pytest.mark.skipif(os.name != "posix", reason="another system breaks pipes in another way")
def test_a_reader_that_goes_away_is_no_traceback(flags, tmp_path):
    command = [sys.executable, ROOT / "train_gpt2.py", *flags]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.stdout.close()  # as `| head -1` does
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 1 and "Traceback" not in err, err


@pytest.mark.skipif(os.name != "posix", reason="needs a shell")
def test_closed_streams(flags, tmp_path):
    """What would be printed is lost, the run is not, and no file gets what was meant for them."""

    def start(*more):
        line = [sys.executable, *processes.anew(*flags, *more, cwd=tmp_path)]
        shell = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"]
        return subprocess.run([*shell, *line]).returncode

    assert start("--max_steps=4") == 0
    assert len(read_log(tmp_path / "log")) == 2 + 2 * 4
    assert weights(tmp_path / "log")["step"] == 4
    assert (tmp_path / "log" / "samples.txt").read_bytes() == b""
    assert start("--T=0") == 2


def test_a_terminal_that_knows_no_unicode(tmp_path):
    """Samples beyond ASCII, no home, no locale: printed as escapes, and in samples.txt as is."""
    (tmp_path / "text.txt").write_text("größer wird das Meer. " * 40, encoding="utf-8")
    env = os.environ | dict(PYTHONIOENCODING="ascii", LC_ALL="C", LANG="C",
                            TIKTOKEN_CACHE_DIR="", HTTPS_PROXY="http://127.0.0.1:9", NO_PROXY="")
    env.pop("HOME", None)
    flags = [*TINY, "--data=text.txt", "--max_steps=4", "--num_samples=1", "--prompt=größer",
             "--sample_length=12", "--vocab_size=256"]
    done = subprocess.run([sys.executable, *processes.anew(*flags, cwd=tmp_path)], env=env,
                          capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    assert r"rank 0 sample 0: gr\xf6\xdfer" in done.stdout
    lines = (tmp_path / "log" / "samples.txt").read_text(encoding="utf-8")
    assert lines.startswith('4 sample 0: "größer')


# -----------------------------------------------------------------------------
# A loss or a gradient that is not finite

NAN_LOSS = """
import torch
real, n = torch.nn.functional.cross_entropy, 0
def cross_entropy(*args, **kwargs):
    global n
    n += torch.is_grad_enabled()
    return real(*args, **kwargs) * (float("nan") if n == 8 * 5 + 3 else 1)
torch.nn.functional.cross_entropy = cross_entropy
"""
INF_GRADIENT = """
import torch
clip, n = torch.nn.utils.clip_grad_norm_, 0
def clip_grad_norm_(parameters, *args, **kwargs):
    global n
    n, parameters = n + 1, list(parameters)
    if n == 6:
        parameters[3].grad.view(-1)[0] = float("inf")
    return clip(parameters, *args, **kwargs)
torch.nn.utils.clip_grad_norm_ = clip_grad_norm_
"""


@pytest.mark.parametrize("patch", [NAN_LOSS, INF_GRADIENT], ids=["loss", "gradient"])
def test_not_finite(forks, undisturbed, flags, tmp_path, patch):
    log = tmp_path / "log"
    run = forks.run(*flags, "--save_every=5", cwd=tmp_path, patch=patch)
    run.refused("step 5", "nan" if patch is NAN_LOSS else "inf", "edufineweb_train_000001",
                "offset", status=1)
    assert (5, "train") not in read_log(log)
    assert weights(log)["step"] == 5
    forks.run(*flags, "--resume", cwd=tmp_path).good()
    assert_same_end(log, undisturbed)


def test_far_too_large_lr(forks, flags, tmp_path):
    run = forks.run(*flags, "--max_lr=1e30", "--save_every=1", cwd=tmp_path)
    run.refused("weights were not updated", "offset", status=1)
    saved = weights(tmp_path / "log")
    assert f"step {saved['step']}:" in run.stderr
    assert all(v.isfinite().all() for v in saved["model"].values())
    run = forks.run(*flags, "--max_lr=1e30", "--save_every=1", "--resume", cwd=tmp_path)
    run.refused("step", "offset", status=1)


def test_float16_goes_lower_before_it_gives_up(shards):
    loader = train_gpt2.DataLoaderLite(2, 16, 0, 1, open_shards(shards, "train"))
    trainer = SimpleNamespace(step=7, loader=loader, cfg=SimpleNamespace(log_dir="log", T=16),
                              scaler=torch.amp.GradScaler("cpu", init_scale=2.0))
    check = train_gpt2.Trainer.check_finite
    check(trainer, 5.0, float("inf"))  # the scaler skips this update
    for scale, loss in ((1.0, 5.0), (2.0, float("nan"))):
        trainer.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        with pytest.raises(RunError, match="step 7: loss"):
            check(trainer, loss, float("inf"))
