"""modern.py: its recipe to the digit, and that it runs like train_gpt2.py."""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from conftest import ROOT, SHARED, TINY, assert_same_end, copy_until_8, has_vocabulary, read_log, weights

import modern
import train_gpt2

GOLDEN = SHARED / "golden" / "modern_A.json"
SMALL = [f for f in TINY if not f.startswith(("--max_lr", "--warmup"))]


def small_model():
    torch.manual_seed(0)
    return modern.ModernGPT(train_gpt2.GPTConfig(32, vocab_size=64, n_layer=2, n_head=2, n_embd=32))


def without_zeros():
    """A model whose zero-initialized weights are random, so that every weight matters."""
    model = small_model()
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.2)
    return model


NAMES = [  # in the recipe's own classes, and here
    (r"^embed\.", "transformer.wte."), (r"^proj\.", "lm_head."), (r"^norm1\.", "transformer.ln_0."),
    (r"^norm2\.", "transformer.ln_f."), (r"^blocks\.", "transformer.h."), (r"\.norm([12])\.", r".ln_\1."),
    (r"attn\.(q|k|v|proj)\.", r"attn.c_\1."), (r"mlp\.(fc|proj)\.", r"mlp.c_\1."), (r"gains$", "weight"),
]  # fmt: skip


def golden_start(golden):
    """The initial weights of the golden run under the names of modern.py."""
    state = {}
    for name, shape in golden["names"].items():
        value = np.full(shape, float(name.endswith("gains")))
        if re.search(r"embed|\.(q|k|v|fc)\.weight", name):
            std = 1.0 if name == "embed.weight" else (0.33 / shape[1]) ** 0.5
            value = np.random.RandomState(zlib.crc32(name.encode())).randn(*shape) * std
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        state[name] = torch.from_numpy(value.astype(np.float32))
    return state


@pytest.mark.skipif(not GOLDEN.exists(), reason="the golden losses are missing")
def test_losses_and_norms_are_the_recipes(forks, tmp_path):
    golden = json.loads(GOLDEN.read_text())
    V, L, C, T, B, steps = (golden[k] for k in ("V", "L", "C", "T", "B", "steps"))
    config = dict(block_size=T, vocab_size=V, n_layer=L, n_head=2, n_embd=C)
    torch.save(dict(arch="modern", config=config, model=golden_start(golden)), tmp_path / "start.pt")
    rng = np.random.default_rng(golden["token_seed"])
    tokens = (rng.random(B * T * steps + 1) ** 6 * V).astype(np.uint16)
    for split, part in (("train_000001", tokens), ("val_000000", tokens[:300])):
        np.save(tmp_path / f"x_{split}.npy", part)
    flags = ["--init=start.pt", "--data=.", f"--B={B}", f"--T={T}", f"--total_batch_size={B * T}"]
    forks.run(*flags, f"--max_steps={steps}", "--dtype=float32", "--device=cpu", cwd=tmp_path,
              script="modern").good()
    log = read_log(tmp_path / "log_modern")
    for step, (loss, norm) in enumerate(golden["losses"]):
        assert abs(float(log[step, "train"]) - loss) < (1e-4 if step < 7 else 3e-3), step
        assert abs(float(log[step, "norm"]) - norm) < 2e-2, step


def test_initial_loss_is_uniform_and_every_block_starts_as_the_identity():
    model, idx = small_model(), torch.randint(64, (3, 17))
    assert model(idx[:, :-1], idx[:, 1:])[1].item() == pytest.approx(np.log(64), abs=1e-6)
    assert torch.equal(model.hidden_states(idx), model.transformer.ln_f(model.embed(idx, None)))


@pytest.mark.parametrize("shape", [(24, 24), (48, 16), (16, 48)])
def test_muon_is_torchs_except_for_rounding(shape):
    torch.manual_seed(2)
    start = torch.randn(shape)
    a, b = (torch.nn.Parameter(start.clone()) for _ in range(2))
    settings = dict(lr=0.025, weight_decay=0.05, momentum=0.95)
    ours, torchs = modern.Muon([a], **settings), torch.optim.Muon(
        [b], **settings, nesterov=True, ns_coefficients=(2, -1.5, 0.5), ns_steps=12, adjust_lr_fn="original")
    for _ in range(5):
        a.grad = b.grad = torch.randn(shape)
        ours.step()
        torchs.step()
    assert torch.equal(ours.state[a]["momentum_buffer"], torchs.state[b]["momentum_buffer"])
    assert (a - b).norm() < 0.01 * (a - start).norm()


def test_schedule_is_constant_and_then_linear_to_zero():
    args = argparse.Namespace(max_lr=0.025, min_lr=0.0, warmup_steps=0, max_steps=1000)
    lr = [modern.ModernGPT.schedule(it, args) for it in range(1001)]
    assert set(lr[:301]) == {0.025} and lr[1000] == 0.0
    assert np.allclose(np.diff(lr[300:]), -0.025 / 700)


def test_no_token_sees_later_tokens_and_the_cache_changes_nothing():
    model, idx = without_zeros(), torch.randint(64, (2, 20))
    changed = idx.clone()
    changed[:, 12] = (idx[:, 12] + 1) % 64
    a, b = model(idx)[0], model(changed)[0]
    assert torch.equal(a[:, :12], b[:, :12]) and not torch.allclose(a[:, 12:], b[:, 12:])
    for n_new in (10, 40):  # within block_size, and beyond it
        new = [torch.cat([*model.generate(idx, n_new, 0.0, use_cache=c)], dim=1) for c in (True, False)]
        assert torch.equal(*new)


def test_logits_are_bounded_and_the_loss_is_their_cross_entropy():
    model, (x, y) = without_zeros(), torch.randint(64, (2, 2, 16))
    model.lm_head.weight.data *= 100
    logits, z = model(x)[0], model.lm_head(model.hidden_states(x))
    assert z.abs().max() > 100 and 14 < logits.abs().max() < modern.SOFT_CAP == 15
    assert torch.allclose(logits, 15 * z / (z**2 + 15**2).sqrt(), atol=1e-5)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
    assert torch.allclose(model(x, y)[1], loss, atol=1e-5)


@pytest.fixture(scope="module")
def whole(forks, data, tmp_path_factory):
    """The log_dir of an uninterrupted run: the default one."""
    folder = tmp_path_factory.mktemp("modern")
    forks.run(*SMALL, f"--data={data}", cwd=folder, script="modern").good()
    return folder / "log_modern"


def test_resume_is_exact(forks, data, whole, tmp_path):
    flags, stop = [*SMALL, f"--data={data}", "--resume"], "at('torch.nn.utils.clip_grad_norm_', kill, nth=7)"
    forks.run(*flags, cwd=tmp_path, script="modern", patch=stop).killed()
    forks.run(*flags, cwd=tmp_path, script="modern").good()
    assert_same_end(tmp_path / "log_modern", whole)


def test_resume_takes_ratio_from_the_checkpoint_and_weight_decay_from_the_flags(forks, whole, tmp_path):
    log_dir = copy_until_8(whole, tmp_path / "log_modern")
    saved = weights(log_dir)
    assert [g["ratio"] for g in saved["optimizer"]["adamw"]["param_groups"]] == [28.0, 0.16, 0.6]
    saved["optimizer"]["adamw"]["param_groups"][0]["ratio"] = 7.0
    os.remove(log_dir / "last.pt")  # another name of model_00008.pt
    for name in ("last.pt", "model_00008.pt"):
        torch.save(saved, log_dir / name)
    run = forks.run("--resume", "--weight_decay=0.1", cwd=tmp_path, script="modern").good()
    assert "weight_decay 0.05 -> 0.1" in run.stdout
    end = weights(log_dir)
    lr = modern.ModernGPT.schedule(11, argparse.Namespace(**end["flags"]))
    groups = end["optimizer"]["muon"]["param_groups"] + end["optimizer"]["adamw"]["param_groups"]
    assert [g.get("ratio", 1.0) for g in groups] == [1.0, 7.0, 0.16, 0.6]
    assert [g["lr"] for g in groups] == pytest.approx([lr, 7.0 * lr, 0.16 * lr, 0.6 * lr])
    assert [g["weight_decay"] for g in groups] == pytest.approx([0.1, 0.002, 0.002, 0.002])


def test_a_run_in_log_as_earlier_versions_wrote_it_is_named(forks, data, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "log")
    flags = [*SMALL, f"--data={data}", "--resume"]
    forks.run(*flags, cwd=tmp_path, script="modern").refused("log_modern", "--log_dir log")
    assert os.listdir(tmp_path) == ["log"]
    assert "finished" in forks.run(*flags, "--log_dir=log", cwd=tmp_path, script="modern").good().stdout


def test_each_script_refuses_the_others_checkpoints_by_name(forks, whole, tmp_path):
    path = whole / "last.pt"
    forks.run(f"--init={path}", "--eval_only", cwd=tmp_path).refused(path, "modern.py")
    forks.run("--resume", f"--log_dir={whole}", cwd=tmp_path).refused(path, "modern.py")  # it is finished
    for words, *flags in (("--export_hf needs the GPT-2 architecture", f"--init={path}", "--export_hf=out"),
                          ("32 / 16 is not a multiple of 4", "--n_embd=32", "--n_head=16"),
                          ("unrecognized arguments: --pos", "--pos=rope")):
        forks.run(*flags, cwd=tmp_path, script="modern").refused(words)
    assert not os.listdir(tmp_path)


def test_a_copy_with_another_arch_trains_resumes_and_is_refused_by_the_others(forks, data, tmp_path):
    source = (ROOT / "modern.py").read_text()
    assert source.count('arch = "modern"') == 1
    (tmp_path / "mine.py").write_text(source.replace('arch = "modern"', 'arch = "mine"'))
    patch = f"""
import sys; sys.path.insert(0, {str(tmp_path)!r})
import train_gpt2, mine
real_main = train_gpt2.main
train_gpt2.main = lambda argv: real_main(argv, mine.ModernGPT)
"""
    flags, stop = [*SMALL, f"--data={data}", "--resume"], "at('torch.nn.utils.clip_grad_norm_', kill, nth=6)"
    forks.run(*flags, cwd=tmp_path, patch=patch + stop).killed()
    run = forks.run(*flags, cwd=tmp_path, patch=patch).good()
    assert "resuming from" in run.stdout and weights(tmp_path / "log_mine")["arch"] == "mine"
    forks.run("--init=log_mine/last.pt", "--eval_only", cwd=tmp_path, script="modern").refused("mine.py")


@pytest.mark.skipif(not has_vocabulary(), reason="the GPT-2 vocabulary is missing")
def test_the_script_itself_and_its_smoke_preset(tmp_path):
    line = [sys.executable, ROOT / "modern.py", "--max_steps=2", "--val_tokens=256", "--sample_length=12"]
    done = subprocess.run([*line, "--device=cpu"], cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert "preset smoke" in done.stdout and "using Muon for 18 matrices" in done.stdout
    assert "sample 3: Hello, I'm a language model," in done.stdout
    assert (tmp_path / "log_modern" / "last.pt").exists()
