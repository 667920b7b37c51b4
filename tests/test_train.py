"""The command as a user meets it: parity with build-nanogpt, the smoke run, what it is used for."""

import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import processes
import pytest
import torch
from conftest import SHARED, TINY, has_vocabulary, read_log, train, weights, write_shards

import hellaswag
import train_gpt2
from plumbing import hardware, machine, tokens
from plumbing.flags import settle
from plumbing.tokens import get_tokenizer

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


# -----------------------------------------------------------------------------
# Parity


@pytest.fixture(scope="module")
def golden_run(forks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden")
    rng = np.random.default_rng(1234)
    for split in ("val_000000", "train_000001"):
        ids = (rng.random(20000) ** 6 * 50257).astype(np.uint16)
        np.save(folder / f"x_{split}.npy", ids)
    run = forks.run(
        f"--data={folder}", "--preset=gpt2", "--device=cpu", "--n_layer=2", "--n_head=2",
        "--n_embd=64", "--B=2", "--T=64", "--total_batch_size=512", "--max_steps=12",
        "--warmup_steps=4", "--max_lr=6e-4", "--dtype=float32", "--val_tokens=2560",
        "--num_samples=0", "--log_dir=log", cwd=folder).good()
    return folder, run.stdout


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
    model = train_gpt2.GPT.from_pretrained(str(golden_run[0] / "log" / "last.pt"))
    encode = get_tokenizer("gpt2").encode
    path = SHARED / "data" / "hellaswag_val_1000.jsonl"
    examples = hellaswag.load_examples(path, 8, 1024, encode)
    means = hellaswag.score_batch(model, examples, "cpu")[1]
    assert torch.allclose(means.float(), torch.tensor(golden["hellaswag_avg_loss"]), atol=1e-4)


# -----------------------------------------------------------------------------
# The first command


@pytest.mark.timeout(1800)
def test_smoke_run_tells_the_whole_story(tmp_path):
    """The README's first command with half its steps, and whichever vocabulary is to be had."""
    limit = 6.1 if has_vocabulary() else 3.15  # unigram frequencies alone: 5.7 and 3.2
    half = ["--max_steps=50"]
    result = train(*half, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    log = read_log(tmp_path / "log")
    val = [float(v) for (_, stream), v in log.items() if stream == "val"]
    assert val[-1] < limit and val[-1] < val[0] - 2
    assert "preset smoke" in result.stdout and "python fineweb.py" in result.stdout
    assert "rank 0 sample 3: Hello, I'm a language model," in result.stdout
    assert "try next: python train_gpt2.py" in result.stdout
    assert {"last.pt", "log.txt", "samples.txt", "config.json"} <= set(os.listdir(tmp_path / "log"))
    again = train(*half, "--resume", cwd=tmp_path)
    assert again.returncode == 0 and "is finished" in again.stdout


def test_without_a_vocabulary_text_is_read_as_bytes(forks, tmp_path):
    run = forks.run("--preset=smoke", "--max_steps=2", "--n_layer=1", "--val_tokens=256",
                    "--log_dir=log", cwd=tmp_path, **DEAD_NETWORK).good()
    assert "read as single bytes" in run.stdout
    saved = weights(tmp_path / "log")
    assert saved["tokenizer"] == "bytes" and saved["config"]["vocab_size"] == 50304


def test_help_is_grouped_narrow_and_complete(capsys):
    run_here("--help")
    out = capsys.readouterr().out
    assert max(len(line) for line in out.splitlines()) <= 100
    for title in train_gpt2.FLAG_GROUPS.values():
        assert f"\n{title}:\n" in out
    for name, field in train_gpt2.TrainConfig.__dataclass_fields__.items():
        assert f"--{name}" in out
        assert field.metadata["group"] in train_gpt2.FLAG_GROUPS


# -----------------------------------------------------------------------------
# Evaluation alone, export, weights from elsewhere


@pytest.fixture(scope="module")
def tiny_run(forks, tmp_path_factory):
    """A tiny model trained for four steps on a text: (folder, its checkpoint)."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text("the sea is green and the sky is grey. " * 100)
    forks.run(*TINY, "--vocab_size=50304", "--data=text.txt", "--max_steps=4", "--num_samples=2",
              "--sample_length=12", "--prompt=the sea", cwd=folder).good()
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


def test_eval_only_of_a_run(tiny_run, tmp_path, capsys):
    """--resume says which checkpoint; the run is left as it is."""
    before = {p.name: p.read_bytes() for p in (tiny_run[0] / "log").iterdir()}
    run_here("--eval_only", "--device=cpu", "--resume", f"--log_dir={tiny_run[0] / 'log'}",
             "--num_samples=1", "--prompt=sky", "--sample_length=8")
    out = capsys.readouterr().out
    assert f"validation loss: {read_log(tiny_run[0] / 'log')[4, 'val']}" in out
    assert "sample 0: sky" in out
    assert {p.name: p.read_bytes() for p in (tiny_run[0] / "log").iterdir()} == before


def test_eval_only_of_a_run_logs_nowhere(tiny_run, tmp_path, monkeypatch):
    """A run that logged to W&B is evaluated where there is none."""
    saved = torch.load(tiny_run[1], weights_only=True)
    torch.save(saved | {"flags": saved["flags"] | {"wandb": "sea"}}, tmp_path / "last.pt")
    monkeypatch.setitem(sys.modules, "wandb", None)
    run_here("--eval_only", "--device=cpu", "--resume", f"--log_dir={tmp_path}", "--num_samples=0")


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


def test_prompt_from_stdin(tiny_run, tmp_path):
    flags = ("--eval_only", "--device=cpu", f"--init={tiny_run[1]}", "--prompt=-",
             "--num_samples=1", "--temperature=0")
    result = subprocess.run([sys.executable, *processes.anew(*flags, cwd=tmp_path)],
                            input="grey sky", capture_output=True, text=True)
    assert "sample 0: grey sky" in result.stdout and result.returncode == 0, result.stderr


@pytest.mark.parametrize("config", ["{}", "[]", "{"])
def test_a_config_of_another_program_does_not_end_a_resume(forks, tiny_run, tmp_path, config):
    """--export_hf into the folder of a run puts one there."""
    shutil.copytree(tiny_run[0] / "log", tmp_path / "log")
    (tmp_path / "log" / "config.json").write_text(config)
    saved = weights(tmp_path / "log")
    torch.save(saved | {"step": 3, "finished": False}, tmp_path / "log" / "last.pt")
    os.remove(tmp_path / "log" / "model_00004.pt")
    forks.run("--resume", "--device=cpu", f"--data={tiny_run[0] / 'text.txt'}", cwd=tmp_path).good()
    assert json.loads((tmp_path / "log" / "config.json").read_text())["wandb_id"]


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
    model = train_gpt2.GPT.from_pretrained(tiny_run[1])
    idx = torch.arange(30)[None]
    with torch.no_grad():
        assert torch.allclose(model(idx)[0][..., :50257], hf(idx).logits, atol=1e-5)


@pytest.mark.parametrize("able, rate, dtype", [
    (True, 1.6, "bfloat16"), (True, 1.4, "float32"), (False, 9.0, "float32"),
])  # fmt: skip
def test_bfloat16_on_a_cpu_where_it_is_faster(monkeypatch, capsys, able, rate, dtype):
    rates = {torch.bfloat16: rate, torch.float32: 1.0}
    monkeypatch.setattr(hardware, "measure_matmul", lambda device, dtype, seconds: rates[dtype])
    monkeypatch.setattr(hardware, "has_bfloat16", lambda device: able)
    assert hardware.best_dtype(machine.Dist(0, 0, 1, torch.device("cpu"))) == dtype
    assert capsys.readouterr().out.startswith(f"dtype {dtype}: " if able else "")


@pytest.mark.parametrize("arch, able", [
    ("gfx90a:sramecc+:xnack-", True), ("gfx942", True), ("gfx908", True), ("gfx1100", True),
    ("gfx1032", False), ("gfx906:sramecc+", False), ("gfx90c", False), ("gfx803", False),
])  # fmt: skip
def test_bfloat16_on_amds_cards_that_have_it(monkeypatch, arch, able):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_properties",
                        lambda device: SimpleNamespace(gcnArchName=arch))
    assert hardware.has_bfloat16(torch.device("cuda")) == able


def test_a_smoke_run_downloads_nothing_on_a_gpu_either():
    """But weights that are evaluated there are scored as they are anywhere."""
    smoke = train_gpt2.TrainConfig(**train_gpt2.PRESETS["smoke"])
    assert train_gpt2.examples_wanted(smoke, torch.device("mps")) == 0
    cfg = settle(train_gpt2.TrainConfig, train_gpt2.PRESETS, "smoke", {"eval_only": True},
                 weights={"config": {}})
    assert train_gpt2.examples_wanted(SimpleNamespace(**cfg), torch.device("mps")) == 10042


@pytest.mark.parametrize("name, peak", [
    ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA A100-SXM4-80GB", 312),
    ("Tesla T4", 65), ("NVIDIA GeForce RTX 4090", 165),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA L4", 121),
    ("NVIDIA L40", None), ("NVIDIA A10G", None), ("NVIDIA GB200", None),
])  # fmt: skip
def test_a_card_is_known_by_its_whole_name(name, peak):
    words = f", 50% of the data sheet's {peak}" if peak else ""
    assert hardware.share_of_peak(name, "bfloat16", 0.5e12 * (peak or 1)) == words


FAULTS = """
import resource, torch
from plumbing.hardware import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):  # glibc finds a freed block again after eight of them at the latest
        torch.zeros(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

without = faults()
keep_freed_memory()
faults()
print(without, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_kept_for_the_next_step():
    result = subprocess.run([sys.executable, "-c", FAULTS], cwd=processes.ROOT, text=True,
                            capture_output=True, check=True)
    without, kept = map(int, result.stdout.split())
    assert kept < without / 10


def test_validation_shows_the_compiled_model_one_shape(tmp_path):
    """The mean over all tokens, and only whole batches go through the compiled model."""
    folder, shapes = write_shards(tmp_path / "s", val=16 * 23 + 1), []
    config = train_gpt2.GPTConfig(block_size=16, vocab_size=512, n_layer=1, n_head=2, n_embd=32)
    model, stream = train_gpt2.GPT(config), tokens.open_shards(folder, "val")
    cfg = train_gpt2.TrainConfig(dtype="float32", val_tokens=10**4)
    dist = machine.Dist(0, 0, 1, torch.device("cpu"))
    loader = train_gpt2.DataLoaderLite(4, 16, 0, 1, stream)
    evaluator = train_gpt2.Evaluator(cfg, dist, model, loader, [], [], None, machine.StopFlag(dist))

    def compiled(x, y):
        shapes.append(tuple(x.shape))
        return model(x, y)

    evaluator.whole_batch_model = compiled
    x, y = loader.read(np.arange(23))
    with torch.no_grad():
        expected = float(model(x, y)[1])
    assert math.isclose(evaluator.validate(), expected, rel_tol=1e-6)
    assert shapes == [(4, 16)] * 5  # 23 rows: the last three go another way


@pytest.mark.parametrize("device", ["mps", "cpu"])
def test_a_batch_that_is_not_pinned_is_waited_for(monkeypatch, device):
    """An Apple GPU reads it later otherwise, when its memory is another tensor's."""
    copies = []
    monkeypatch.setattr(torch.Tensor, "to", lambda t, *_, **how: copies.append(how) or t)
    run = SimpleNamespace(dist=machine.Dist(0, 0, 1, torch.device(device)),
                          loader=SimpleNamespace(next_batch=lambda: (torch.ones(1), torch.ones(1))))
    train_gpt2.Trainer.fetch_batch(run)
    assert len(run.batch) == 2
    assert copies and not any(how.get("non_blocking") for how in copies)


@pytest.mark.skipif(not has_vocabulary() or not (SHARED / "data").is_dir(), reason="no examples")
def test_compiled_training_is_not_touched_by_evaluation(tmp_path, monkeypatch, capsys):
    """The same train losses bit for bit, and no more graphs, with every kind of evaluation and with
    none."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HELLASWAG_FILE", str(SHARED / "data" / "hellaswag_val_head.jsonl"))
    shards, logs = write_shards("s", sizes=(4000,)), []
    for name, extra in (("on", ["--hellaswag=10", "--num_samples=2", "--prompt=a"]),
                        ("off", ["--hellaswag=0", "--val_tokens=0"])):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        run_here(*TINY, "--vocab_size=50304", "--block_size=256", f"--data={shards}", "--compile",
                 "--n_layer=1", "--max_steps=8", "--eval_every=3", f"--log_dir={name}", *extra)
        logs.append({k: v for k, v in read_log(name).items() if k[1] in ("train", "norm")})
        # of the model one graph to train and one to validate, and one of the compiler's trial
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert graphs == {"on": 3, "off": 2}[name]
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
