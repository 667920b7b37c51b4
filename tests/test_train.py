"""The command as a user meets it: parity with build-nanogpt, the smoke run, mistakes, uses."""

import ast
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, SHARED, TINY, command, has_vocabulary, read_log, train, write_shards

import hellaswag
import train_gpt2
from common import RunError
from tokens import get_tokenizer, open_shards

# build-nanogpt's own classes and loop in float32 on a CPU: loss and gradient norm of 12 steps.
GOLDEN = [
    (10.821478, 1.7642), (10.81287, 1.7279), (10.786215, 1.9423), (10.760171, 1.7546),
    (10.705337, 1.6983), (10.599888, 1.7219), (10.618573, 1.2322), (10.59326, 1.1843),
    (10.532262, 1.4392), (10.515318, 1.4029), (10.537377, 1.2932), (10.48124, 1.5306),
]  # fmt: skip
GOLDEN_VAL = (10.82239, 10.50796)  # before the first and after the last update
DEAD_NETWORK = dict(TIKTOKEN_CACHE_DIR="", HTTPS_PROXY="http://127.0.0.1:9", NO_PROXY="")


@pytest.fixture(autouse=True)
def restore():
    """main() in this process installs signal handlers, and --compile deterministic algorithms."""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    yield
    for signum, handler in handlers.items():
        signal.signal(signum, handler)
    torch.use_deterministic_algorithms(False)


def run_here(*flags, status=0):
    """The command in this process: cheap, for everything that needs no process of its own."""
    with pytest.raises(SystemExit) as e:
        train_gpt2.main([str(f) for f in flags])
    assert e.value.code == status


# --- parity ---


@pytest.fixture(scope="module")
def golden_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden")
    rng = np.random.default_rng(1234)
    for split in ("val_000000", "train_000001"):
        ids = (rng.random(20000) ** 6 * 50257).astype(np.uint16)
        np.save(folder / f"x_{split}.npy", ids)
    result = train(
        f"--data={folder}", "--preset=gpt2", "--device=cpu", "--n_layer=2", "--n_head=2",
        "--n_embd=64", "--B=2", "--T=64", "--total_batch_size=512", "--max_steps=12",
        "--warmup_steps=4", "--max_lr=6e-4", "--dtype=float32", "--val_tokens=2560",
        "--num_samples=0", "--log_dir=log", cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


def test_losses_and_norms_are_build_nanogpts(golden_run):
    folder, stdout = golden_run
    log = read_log(folder / "log")
    for step, (loss, norm) in enumerate(GOLDEN):
        assert float(log[step, "train"]) == pytest.approx(loss, abs=1e-4)
        assert float(log[step, "norm"]) == pytest.approx(norm, abs=1e-3)
    assert float(log[0, "val"]) == pytest.approx(GOLDEN_VAL[0], abs=1e-4)
    assert float(log[12, "val"]) == pytest.approx(GOLDEN_VAL[1], abs=1e-4)
    line = r"step     0 \| loss: 10.821478 \| lr 1.5000e-04 \| norm: 1.7642 \| dt: [\d.]+ms \| " \
           r"tok/sec: [\d.]+ \| mfu: [\d.]+%"
    assert re.search(line, stdout)
    assert "=> calculated gradient accumulation steps: 4" in stdout
    assert "0.308 epochs of 312 windows" in stdout


@pytest.mark.skipif(not (SHARED / "golden").is_dir() or not has_vocabulary(), reason="no examples")
def test_hellaswag_losses_are_build_nanogpts(golden_run):
    golden = json.loads((SHARED / "golden" / "build_nanogpt_A.json").read_text())
    model, *_ = train_gpt2.load_weights(str(golden_run[0] / "log" / "last.pt"))
    encode = get_tokenizer("gpt2").encode
    path = SHARED / "data" / "hellaswag_val_1000.jsonl"
    examples = hellaswag.load_examples(path, 8, 1024, encode)
    means = hellaswag.score_batch(model, hellaswag.collate(examples, "cpu"))[1]
    assert torch.allclose(means.float(), torch.tensor(golden["hellaswag_avg_loss"]), atol=1e-4)


# --- what the commands promise ---


def test_import_is_silent_and_light(tmp_path):
    code = ("import sys; sys.path.insert(0, sys.argv[1]); import train_gpt2, fineweb, hellaswag, "
            "plot; print([m for m in ('transformers', 'datasets', 'tiktoken', 'requests', "
            "'matplotlib', 'wandb', 'torch._dynamo') if m in sys.modules])")
    result = subprocess.run([sys.executable, "-B", "-c", code, str(ROOT)], capture_output=True,
                            text=True, cwd=tmp_path)
    assert (result.stdout, result.stderr) == ("[]\n", "")
    assert not list(tmp_path.iterdir())


def test_smoke_run_tells_the_whole_story(tmp_path):
    """The README's first command, with whichever vocabulary is to be had."""
    limit = 5.6 if has_vocabulary() else 2.7  # unigram frequencies alone: 5.7 and 3.2
    result = train(cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    log = read_log(tmp_path / "log")
    val = [float(v) for (_, stream), v in log.items() if stream == "val"]
    assert val[-1] < limit and val[-1] < val[0] - 2
    assert "preset smoke" in result.stdout and "python fineweb.py" in result.stdout
    assert "rank 0 sample 3: Hello, I'm a language model," in result.stdout
    assert "try next: python train_gpt2.py --init" in result.stdout
    assert {"last.pt", "log.txt", "samples.txt", "config.json"} <= set(os.listdir(tmp_path / "log"))
    again = train("--resume", cwd=tmp_path)
    assert again.returncode == 0 and "is finished" in again.stdout


def test_without_a_vocabulary_text_is_read_as_bytes(tmp_path):
    result = train("--preset=smoke", "--max_steps=2", "--n_layer=1", "--val_tokens=256",
                   "--log_dir=log", cwd=tmp_path, **DEAD_NETWORK)
    assert result.returncode == 0, result.stderr
    assert "read as single bytes" in result.stdout
    saved = torch.load(tmp_path / "log" / "last.pt", weights_only=True)
    assert saved["tokenizer"] == "bytes" and saved["config"]["vocab_size"] == 50304


def test_help_is_grouped_narrow_and_complete(capsys):
    run_here("--help")
    out = capsys.readouterr().out
    assert max(len(line) for line in out.splitlines()) <= 100
    for name in ("model", "data", "optimization", "machine", "evaluation", "run"):
        assert f"\n{name}:\n" in out
    for name in train_gpt2.TrainConfig.__dataclass_fields__:
        assert f"--{name}" in out


def test_readme_flag_table_is_the_help(capsys):
    text = (ROOT / "README.md").read_text()
    rows = dict(re.findall(r"^\| `--(\w+)` \| (.*?) \|", text, flags=re.M))
    fields = train_gpt2.TrainConfig.__dataclass_fields__
    assert list(rows) == list(fields)
    for name, f in fields.items():
        assert rows[name].strip("` ") == f.metadata["shown"].replace("|", "\\|"), name


def test_no_function_is_long_and_the_trainer_stays_short():
    source = (ROOT / "train_gpt2.py").read_text()
    assert source.count("\n") < 1000
    for path in ROOT.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 50, (path.name, node.name)


# --- mistakes: one line, status 2 ---

MISTAKES = [
    (["--batch_size=4"], "unrecognized arguments: --batch_size"),
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
    (["--n_embd=100000000000"], "out of memory"),
    (["--lr=3"], "unrecognized arguments: --lr=3 (--help"),  # and no far-fetched name
    (["--device=tpu"], "--device tpu: choose"),
    (["--device=cpu:1"], "--device cpu:1: choose"),
    (["--total_batch_size=250"], "use 224 or 256"),
    (["--total_batch_size=24"], "use 32"),
    (["--data=nowhere"], "nowhere, which does not exist"),
    (["--eval_only"], "--eval_only needs weights"),
    (["--export_hf=out"], "--export_hf needs weights"),
    (["--init=nowhere.pt"], "nowhere.pt: there is no such checkpoint"),
    (["--optimizer=sgd"], "choose from"),
]  # fmt: skip
if not torch.cuda.is_available():
    MISTAKES.append((["--device=cuda"], "no CUDA device"))


@pytest.mark.parametrize("flags, message", MISTAKES, ids=lambda v: " ".join(v)[:40])
def test_mistakes(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_here(*TINY, f"--data={write_shards(tmp_path / 's')}", *flags, status=2)
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert err.startswith("train_gpt2.py: error: ") and "Traceback" not in err
    assert os.listdir(tmp_path) == ["s"]  # nothing was written


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
def test_broken_shards(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_here(*TINY, f"--data={broken_shards(tmp_path / 's', kind)}", status=2)
    err = capsys.readouterr().err
    assert "edufineweb_train_000001.npy" in err and err.count("\n") == 1
    if kind == "beyond":
        assert "token 600 at offset 0" in err and "--vocab_size 512" in err


def test_a_val_shard_is_looked_at_before_the_older_run_is_moved(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = Path(write_shards("s"))
    np.save(folder / "edufineweb_val_000000.npy", np.array([1] * 900 + [600] * 100, np.uint16))
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "log.txt").write_text("0 train 1.0\n")
    run_here(*TINY, "--data=s", status=2)
    err = capsys.readouterr().err
    assert "edufineweb_val_000000.npy has token 600 at offset 900" in err and err.count("\n") == 1
    assert os.listdir(tmp_path / "log") == ["log.txt"]


def test_world_size_that_is_no_number(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "abc")
    run_here(*TINY, status=2)
    assert "WORLD_SIZE=abc in the environment is not a number" in capsys.readouterr().err


@pytest.mark.skipif(os.name != "posix", reason="another system breaks pipes in another way")
def test_a_reader_that_goes_away_is_no_traceback(tmp_path):
    data = write_shards(tmp_path / "s")
    command = [sys.executable, ROOT / "train_gpt2.py", *TINY, f"--data={data}"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.stdout.close()  # as `| head -1` does
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) == 1 and "Traceback" not in err, err


@pytest.mark.parametrize("content, message", [(b"", "empty"), (b"\xff\xfe\xfa" * 50, "UTF-8"),
                                              (b"too short", "less than one window")])
def test_broken_texts(content, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_bytes(content)
    run_here(*TINY, "--vocab_size=50304", "--data=text.txt", status=2)
    err = capsys.readouterr().err.splitlines()
    assert message in err[-1] and "text.txt" in err[-1]


def test_three_processes_name_the_totals_that_work():
    cfg = train_gpt2.TrainConfig(B=0)
    with pytest.raises(train_gpt2.UserError, match="use 491520 or 540672"):
        train_gpt2.check_batch(cfg, 3)
    assert train_gpt2.check_batch(train_gpt2.replace(cfg, total_batch_size=491520), 3) == 160


def test_warm_up_beyond_the_end_is_a_warning(shards, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_here(*TINY, f"--data={shards}", "--warmup_steps=100", "--max_steps=2")
    assert "--warmup_steps 100 is beyond --max_steps 2" in capsys.readouterr().err


# --- evaluation alone, export, inspection ---


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """A tiny model trained for four steps on a text: (folder, its checkpoint)."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text("the sea is green and the sky is grey. " * 100)
    result = train(*TINY, "--vocab_size=50304", "--data=text.txt", "--max_steps=4",
                   "--num_samples=2", "--sample_length=12", "--prompt=the sea", cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder, str(folder / "log" / "last.pt")


def test_samples_are_logged(tiny_run):
    lines = (tiny_run[0] / "log" / "samples.txt").read_text().splitlines()
    assert len(lines) == 2  # after the last update; none at step 0
    assert json.loads(lines[1].removeprefix("4 sample 1: ")).startswith("the sea")


def test_eval_only(tiny_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ("--eval_only", "--device=cpu", f"--init={tiny_run[1]}")
    run_here(*flags, "--prompt=green", "--num_samples=2", "--sample_length=60")
    out = capsys.readouterr().out
    log = read_log(tiny_run[0] / "log")
    assert f"validation loss: {log[4, 'val']}" in out  # on the data of its own training
    assert re.search(r"^sample 0: green.*^sample 1: green", out, flags=re.M | re.S)
    run_here(*flags, "--prompt=green", "--num_samples=2", "--sample_length=60")
    assert capsys.readouterr().out == out  # seeded
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("flags, message", [
    (["--prompt="], "--prompt: must not be empty"),
    (["--export_hf="], "--export_hf: must not be empty"),  # "$DIR" that was never set
    (["--prompt", "the sea " * 30], "too many for --block_size 32"),
    (["--prompt", "the sea is green", "--sample_length=2"], "too many for --sample_length 2"),
    (["--n_layer=3"], "--n_layer 3 contradicts --init"),
])  # fmt: skip
def test_eval_only_mistakes(tiny_run, flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_here("--eval_only", "--device=cpu", f"--init={tiny_run[1]}", *flags, status=2)
    assert message in capsys.readouterr().err


def test_a_top_k_beyond_the_vocabulary_means_all(tiny_run, capsys):
    run_here("--eval_only", "--device=cpu", f"--init={tiny_run[1]}", "--prompt=the",
             "--sample_length=5", "--top_k=1000000", "--num_samples=1")
    assert "sample 0: the" in capsys.readouterr().out


def test_prompt_from_stdin(tiny_run):
    result = subprocess.run(
        command("--eval_only", "--device=cpu", f"--init={tiny_run[1]}", "--prompt=-",
                "--num_samples=1", "--temperature=0"),
        input="grey sky", capture_output=True, text=True)
    assert "sample 0: grey sky" in result.stdout and result.returncode == 0, result.stderr


def test_init_takes_weights_and_shape_only(tiny_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = [f for f in TINY if not re.match(r"--(n_layer|n_head|n_embd|vocab|block)", f)]
    data = tiny_run[0] / "text.txt"
    run_here(*small, f"--data={data}", f"--init={tiny_run[1]}", "--max_steps=1")
    saved = torch.load("log/last.pt", weights_only=True)
    assert saved["config"] == torch.load(tiny_run[1], weights_only=True)["config"]
    assert saved["step"] == 1


def test_export_from_the_command(tiny_run, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    run_here("--device=cpu", f"--init={tiny_run[1]}", f"--export_hf={tmp_path / 'hf'}")
    hf = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf").eval()
    capsys.readouterr()
    (tmp_path / "file").write_text("")
    run_here("--device=cpu", f"--init={tiny_run[1]}", f"--export_hf={tmp_path / 'file'}", status=2)
    assert "file cannot be written" in capsys.readouterr().err
    model, *_ = train_gpt2.load_weights(tiny_run[1])
    idx = torch.arange(30)[None]
    with torch.no_grad():
        assert torch.allclose(model(idx)[0][..., :50257], hf(idx).logits, atol=1e-5)


@pytest.mark.skipif(not has_vocabulary() or not (SHARED / "data").is_dir(), reason="no examples")
def test_compiled_training_is_not_touched_by_evaluation(tmp_path, monkeypatch, capsys):
    """The same train losses bit for bit, and one graph, with HellaSwag and samples on and off."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hellaswag, "download",
                        lambda split: str(SHARED / "data" / "hellaswag_val_head.jsonl"))
    shards, logs = write_shards("s", sizes=(4000,)), []
    for name, extra in (("on", ["--hellaswag=10", "--num_samples=2", "--prompt=a"]),
                        ("off", ["--hellaswag=0"])):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        run_here(*TINY, "--vocab_size=50304", "--block_size=256", f"--data={shards}", "--compile",
                 "--max_steps=8", "--eval_every=3", f"--log_dir={name}", *extra)
        logs.append({k: v for k, v in read_log(name).items() if k[1] in ("train", "norm")})
        # one graph of the model and one of the two lines that try the compiler
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert logs[0] == logs[1] and len(logs[0]) == 16
    assert all(math.isfinite(float(v)) for v in logs[0].values())
    assert "HellaSwag accuracy:" in capsys.readouterr().out


def test_wandb_offline(shards, tmp_path, monkeypatch, capsys):
    """Against the real package where it is installed; resuming keeps the run's id."""
    pytest.importorskip("wandb")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    flags = (*TINY, f"--data={shards}", "--wandb=test", "--max_steps=4", "--save_every=2")
    run_here(*flags)
    first = json.loads(Path("log/config.json").read_text())["wandb_id"]
    (runs := list(Path("log/wandb").glob("offline-run-*"))) and os.remove("log/last.pt")
    assert len(runs) == 1 and runs[0].name.endswith(first)
    os.rename("log/model_00004.pt", "log/gone")
    run_here(*flags, "--resume")
    assert json.loads(Path("log/config.json").read_text())["wandb_id"] == first


def test_float16_goes_lower_before_it_gives_up(shards):
    loader = train_gpt2.DataLoaderLite(2, 16, 0, 1, open_shards(shards, "train"))
    run = SimpleNamespace(step=7, loader=loader, cfg=SimpleNamespace(log_dir="log", T=16),
                          scaler=torch.amp.GradScaler("cpu", init_scale=2.0))
    train_gpt2.check_finite(run, 5.0, math.inf)  # the scaler skips this update
    for scale, loss in ((1.0, 5.0), (2.0, math.nan)):
        run.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        with pytest.raises(RunError, match="step 7: loss"):
            train_gpt2.check_finite(run, loss, math.inf)


def test_missing_optional_packages_are_named(shards, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "transformers", None)
    run_here(*TINY, f"--data={shards}", "--wandb=test", status=2)
    assert "--wandb needs wandb: pip install wandb" in capsys.readouterr().err
    assert not os.path.exists("log")
    run_here("--device=cpu", "--init=gpt2", "--eval_only", status=2)
    assert "gpt2 needs transformers: pip install transformers" in capsys.readouterr().err
