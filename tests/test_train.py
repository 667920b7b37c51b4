"""train_gpt2.py as a user meets it: build-nanogpt's numbers, the smoke run, evaluate, sample, export."""

import io
import itertools
import json
import os
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SHARED, TINY, has_vocabulary, read_log, train, weights, write_shards

import hellaswag
import train_gpt2
from train_gpt2 import Dist, UserError

# build-nanogpt's own classes and loop in float32 on a CPU: loss and gradient norm of 12 steps.
GOLDEN = [
    (10.821478, 1.7642), (10.81287, 1.7279), (10.786215, 1.9423), (10.760171, 1.7546),
    (10.705337, 1.6983), (10.599888, 1.7219), (10.618573, 1.2322), (10.59326, 1.1843),
    (10.532262, 1.4392), (10.515318, 1.4029), (10.537377, 1.2932), (10.48124, 1.5306),
]  # fmt: skip
GOLDEN_VAL = (10.82239, 10.50796)  # before the first and after the last update


def run_here(*flags):
    """Run main() in this process."""
    assert train_gpt2.main([str(f) for f in flags]) == 0


@pytest.fixture(scope="module")
def golden_run(forks, tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("golden"), np.random.default_rng(1234)
    for split in ("val_000000", "train_000001"):
        np.save(folder / f"x_{split}.npy", (rng.random(20000) ** 6 * 50257).astype(np.uint16))
    run = forks.run(
        "--data=.", "--preset=gpt2", "--device=cpu", "--n_layer=2", "--n_head=2", "--n_embd=64", "--B=2",
        "--T=64", "--total_batch_size=512", "--max_steps=12", "--warmup_steps=4", "--max_lr=6e-4",
        "--dtype=float32", "--val_tokens=2560", "--num_samples=0", cwd=folder).good()
    return folder, run.stdout


def test_losses_and_norms_are_build_nanogpts(golden_run):
    folder, stdout = golden_run
    log = read_log(folder / "log")
    for step, (loss, norm) in enumerate(GOLDEN):
        assert float(log[step, "train"]) == pytest.approx(loss, abs=1e-4)
        assert float(log[step, "norm"]) == pytest.approx(norm, abs=1e-3)
    assert [float(log[step, "val"]) for step in (0, 12)] == pytest.approx(GOLDEN_VAL, abs=1e-4)
    line = "step     0 | loss: 10.8214.. | lr 1.5000e-04 | norm: 1.764. | dt: [0-9.]+ms | tok/sec: [0-9.]+"
    # to the end of the line: no mfu, because the peak of a CPU is unknown
    assert re.search(f"^{line.replace('|', '[|]')}$", stdout, flags=re.M)
    assert "=> calculated gradient accumulation steps: 4" in stdout
    assert "0.308 epochs of 312 windows" in stdout
    settings = json.loads((folder / "log" / "config.json").read_text())
    assert (settings["arch"], settings["tokenizer"]) == ("gpt2", "gpt2")
    assert settings["model"] == weights(folder / "log")["config"]
    assert settings["first_shard"] == "x_train_000001.npy"


@pytest.mark.skipif(not (SHARED / "golden").is_dir() or not has_vocabulary(), reason="no examples")
def test_hellaswag_losses_are_build_nanogpts(golden_run):
    golden = json.loads((SHARED / "golden" / "build_nanogpt_A.json").read_text())
    model = train_gpt2.GPT.from_pretrained(str(golden_run[0] / "log" / "last.pt"))
    path = SHARED / "data" / "hellaswag_val_1000.jsonl"
    examples = hellaswag.load_examples(path, 8, 1024, train_gpt2.get_tokenizer().encode)
    means = hellaswag.score_batch(model, examples, "cpu")[1]
    assert torch.allclose(means.float(), torch.tensor(golden["hellaswag_avg_loss"]), atol=1e-4)


@pytest.mark.timeout(1800)
def test_smoke_run_is_a_complete_run(tmp_path):
    """The README's first command with half its steps, with or without the GPT-2 vocabulary."""
    result = train("--max_steps=50", "--device=cpu", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    val = [float(v) for (_, stream), v in read_log(tmp_path / "log").items() if stream == "val"]
    limit = 6.1 if has_vocabulary() else 3.15  # unigram frequencies alone: 5.7 and 3.2
    assert val[-1] < limit and val[-1] < val[0] - 2
    assert "preset smoke" in result.stdout and "python fineweb.py" in result.stdout
    assert "rank 0 sample 3: Hello, I'm a language model," in result.stdout
    assert {"last.pt", "model_00050.pt", "config.json"} <= {*os.listdir(tmp_path / "log")}
    assert train_gpt2.PRESETS["smoke"]["hellaswag"] == 0  # no download on a GPU either


def test_without_a_vocabulary_the_smoke_run_learns_bytes_smoothly(forks, tmp_path):
    """A learning rate that is too high shows as a jump: with 3e-3 the loss rises by 1.1 at step 12."""
    stop = "at('train_gpt2.Trainer.update', raises(signal.SIGTERM), nth=30)"
    run = forks.run("--preset=smoke", "--device=cpu", "--val_tokens=256", "--num_samples=1",
                    "--sample_length=40", cwd=tmp_path, patch=stop, TIKTOKEN_CACHE_DIR="",
                    HTTPS_PROXY="http://127.0.0.1:9", NO_PROXY="")
    assert run.status == 128 + 15, run.stderr
    assert run.stderr.startswith("warning: could not download the GPT-2 vocabulary")
    assert "byte tokens" in run.stderr and "rank 0 sample 0: Hello, I'm a" in run.stdout
    losses = [float(v) for (_, stream), v in read_log(tmp_path / "log").items() if stream == "train"]
    assert len(losses) == 30 and losses[-1] < losses[0] - 5
    assert max(b - a for a, b in zip(losses, losses[1:], strict=False)) <= 0.8, losses
    assert weights(tmp_path / "log")["tokenizer"] == "bytes"


@pytest.fixture(scope="module")
def tiny_run(forks, tmp_path_factory):
    """A tiny model trained for four steps on a text: (directory, path of its checkpoint)."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text("the sea is green and the sky is grey. " * 100)
    forks.run(*TINY, "--vocab_size=50304", "--data=text.txt", "--max_steps=4", "--num_samples=2",
              "--sample_length=12", "--prompt=the sea", cwd=folder).good()
    return folder, str(folder / "log" / "last.pt")


def test_eval_only(tiny_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"grey \xff")))
    flags = ("--eval_only", "--device=cpu", f"--init={tiny_run[1]}", "--num_samples=2",
             "--sample_length=20", "--top_k=1000000")  # larger than the vocabulary: all tokens
    run_here(*flags, "--prompt=green")
    out = capsys.readouterr().out
    assert f"validation loss: {read_log(tiny_run[0] / 'log')[4, 'val']}" in out  # on the data of its training
    assert re.search(r"^rank 0 sample 0: green.*^rank 0 sample 1: green", out, flags=re.M | re.S)
    run_here(*flags, "--prompt=green")
    assert capsys.readouterr().out == out  # seeded
    run_here(*flags, "--prompt=-", "--temperature=0")
    assert "sample 0: grey \ufffd" in capsys.readouterr().out
    assert not os.listdir(tmp_path)


def test_eval_only_with_resume_leaves_the_run_unchanged(tiny_run, capsys):
    log_dir = tiny_run[0] / "log"
    before = {p.name: p.read_bytes() for p in log_dir.iterdir()}
    run_here("--eval_only", "--device=cpu", "--resume", f"--log_dir={log_dir}", "--num_samples=1",
             "--prompt=sky", "--sample_length=8")
    out = capsys.readouterr().out
    assert f"validation loss: {read_log(log_dir)[4, 'val']}" in out and "sample 0: sky" in out
    assert {p.name: p.read_bytes() for p in log_dir.iterdir()} == before
    lines = before["samples.txt"].decode().splitlines()
    assert len(lines) == 2 and lines[1].startswith('4 sample 1: "the sea')  # after the last update only


@pytest.mark.parametrize("flags, message", [
    (["--prompt", "sea " * 33], "tokens; --block_size 32 .* allow 1 to "),
    (["--n_layer=3", "--pos=rope"], "--n_layer +. 2 +. 3\n +--pos +. learned +. rope"),
    (["--prompt", "the sea is green", "--sample_length=2"], "--sample_length 2 allow 1 to 1")])
def test_eval_only_mistakes(tiny_run, flags, message):
    with pytest.raises(UserError, match=message):
        train_gpt2.main(["--eval_only", "--device=cpu", f"--init={tiny_run[1]}", *flags])


def test_init_takes_weights_and_shape_only(tiny_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    no_shape = [f for f in TINY if not re.match("--(preset|n_layer|n_head|n_embd|vocab|block)", f)]
    run_here(*no_shape, f"--data={tiny_run[0] / 'text.txt'}", f"--init={tiny_run[1]}", "--max_steps=1")
    assert weights("log")["config"] == torch.load(tiny_run[1], weights_only=True)["config"]
    assert weights("log")["step"] == 1 and (0, "train") in read_log("log")


def test_export_from_the_command(tiny_run, tmp_path):
    transformers = pytest.importorskip("transformers")
    run_here("--device=cpu", f"--init={tiny_run[1]}", f"--export_hf={tmp_path / 'hf'}")
    hf = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf").eval()
    model, idx = train_gpt2.GPT.from_pretrained(tiny_run[1]), torch.arange(30)[None]
    assert torch.allclose(model(idx)[0][..., :50257], hf(idx).logits, atol=1e-5)


@pytest.mark.parametrize("card, dtype", [((7, 5), "float16"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16")])
def test_dtype_auto_is_bfloat16_on_cards_that_have_it(monkeypatch, card, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: card)
    assert train_gpt2.resolve_dtype("auto", torch.device("cuda")) == dtype


@pytest.mark.parametrize("name, peak", [
    ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA A100-SXM4-80GB", 312),
    ("NVIDIA GeForce RTX 4090", 165), ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA L40S", 362),
    ("NVIDIA L40", None), ("NVIDIA A10G", None), ("NVIDIA GB200", None),
])  # fmt: skip
def test_peak_flops_by_the_whole_name_of_the_card(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    peaks = [train_gpt2.peak_flops(Dist(0, 0, 2, torch.device(device)), dtype) for device, dtype in
             (("cuda", "bfloat16"), ("cuda", "float32"), ("cpu", "bfloat16"))]
    assert peaks == [peak and pytest.approx(2 * peak * 1e12), None, None]


@pytest.mark.parametrize("device", ["mps", "cpu"])
def test_batches_that_are_not_pinned_are_copied_synchronously(monkeypatch, device):
    """An asynchronous copy to an Apple GPU may read memory that was reused meanwhile."""
    copies, loader = [], SimpleNamespace(next_batch=lambda: (torch.ones(1), torch.ones(1)))
    monkeypatch.setattr(torch.Tensor, "to", lambda t, *_, **how: copies.append(how) or t)
    trainer = SimpleNamespace(dist=Dist(0, 0, 1, torch.device(device)), loader=loader)
    train_gpt2.Trainer.fetch_batch(trainer)
    assert len(trainer.batch) == len(copies) == 2 and not any(how.get("non_blocking") for how in copies)


@pytest.mark.skipif(not has_vocabulary() or not (SHARED / "data").is_dir(), reason="no examples")
def test_compiled_training_is_unchanged_by_evaluation(tmp_path, monkeypatch, capsys):
    """The same training losses bit by bit, and no additional graphs, with all evaluations and with none."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HELLASWAG_FILE", str(SHARED / "data" / "hellaswag_val_head.jsonl"))
    shards, logs = write_shards("s", sizes=(4000,)), []
    for name, extra in (("on", ["--hellaswag=10", "--num_samples=2", "--prompt=a"]),
                        ("off", ["--hellaswag=0", "--val_tokens=0"])):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        run_here(*TINY, "--vocab_size=50304", "--block_size=256", f"--data={shards}", "--compile",
                 "--n_layer=1", "--max_steps=8", "--eval_every=3", f"--log_dir={name}", *extra)
        torch.use_deterministic_algorithms(False)  # --compile turns them on
        logs.append({k: v for k, v in read_log(name).items() if k[1] in ("train", "norm")})
        # the model's graphs for training and for validation, and that of can_compile()
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == {"on": 3, "off": 2}[name]
    assert logs[0] == logs[1] and len(logs[0]) == 16 and "nan" not in logs[0].values()
    assert "HellaSwag accuracy:" in capsys.readouterr().out


def test_wandb_keeps_its_run_on_resume(shards, tmp_path, monkeypatch):
    """Against a stand-in of the package that records its calls."""
    calls = []

    def init(**settings):
        calls.append((settings, logged := {}))
        return SimpleNamespace(log=lambda values, step: logged.setdefault(step, {}).update(values),
                               finish=lambda: logged.update(finished=True))

    monkeypatch.chdir(tmp_path)
    ids = itertools.count()  # a new one for each call
    util = SimpleNamespace(generate_id=lambda: str(next(ids)))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, util=util))
    for more in ([], ["--resume", "--max_steps=6"]):
        run_here(*TINY, f"--data={shards}", "--wandb=test", "--max_steps=4", *more)
    (first, logged), (second, logged_on_resume) = calls
    assert first["project"] == "test" and first["id"] == second["id"] and second["resume"] == "allow"
    assert list(logged) == [0, 1, 2, 3, 4, "finished"] and list(logged_on_resume) == [4, 5, 6, "finished"]
    assert f"{logged_on_resume[5]['train']:.6f}" == read_log("log")[5, "train"]
    assert f"{logged_on_resume[6]['val']:.4f}" == read_log("log")[6, "val"]
