"""The sequel: its recipe to the digit, and that it is a run like any other."""

import json
import os
import re
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from conftest import (
    ROOT, SHARED, TINY, assert_same_end, equal, has_vocabulary, read_log, weights,
)

import hellaswag
import modern
import train_gpt2

GOLDEN = SHARED / "golden" / "modern_A.json"
AS_MODERN = """
import train_gpt2, modern
real_main = train_gpt2.main
train_gpt2.main = lambda argv: real_main(argv, modern.ModernGPT)
"""
SMALL = [f for f in TINY if not f.startswith(("--max_lr", "--warmup"))]


def config(**changes):
    sizes = dict(block_size=32, vocab_size=64, n_layer=2, n_head=2, n_embd=32)
    return train_gpt2.GPTConfig(**sizes | changes)


def woken(**changes):
    """A ModernGPT whose zeros have been replaced, so that every weight tells."""
    torch.manual_seed(0)
    model = modern.ModernGPT(config(**changes))
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.2)
    return model


# -----------------------------------------------------------------------------
# The recipe

NAMES = [  # those of the recipe's own classes, and ours
    (r"^embed\.", "transformer.wte."), (r"^proj\.", "lm_head."), (r"^norm1\.", "transformer.ln_0."),
    (r"^norm2\.", "transformer.ln_f."), (r"^blocks\.", "transformer.h."),
    (r"attn\.(q|k|v|proj)\.", r"attn.c_\1."), (r"mlp\.(fc|proj)\.", r"mlp.c_\1."),
    (r"\.norm([12])\.", r".ln_\1."), (r"gains$", "weight"),
]  # fmt: skip


def golden_start(golden):
    """The weights that the golden run begins with, under our names."""
    state = {}
    for name, shape in golden["names"].items():
        drawn = re.search(r"embed|\.(q|k|v|fc)\.weight", name)
        ours = name
        for pattern, replacement in NAMES:
            ours = re.sub(pattern, replacement, ours)
        if drawn:
            std = 1.0 if name == "embed.weight" else (0.33 / shape[1]) ** 0.5
            numbers = np.random.RandomState(zlib.crc32(name.encode())).randn(*shape) * std
            state[ours] = torch.from_numpy(numbers.astype(np.float32))
        else:
            state[ours] = torch.full(shape, 1.0 if name.endswith("gains") else 0.0)
    return state


@pytest.mark.skipif(not GOLDEN.exists(), reason="the golden losses are not here")
def test_losses_and_norms_are_the_recipes(forks, tmp_path):
    golden = json.loads(GOLDEN.read_text())
    V, L, C, T, B, steps = (golden[k] for k in ("V", "L", "C", "T", "B", "steps"))
    shape = dict(block_size=T, vocab_size=V, n_layer=L, n_head=2, n_embd=C)
    torch.save(dict(arch="modern", config=shape, model=golden_start(golden)), tmp_path / "start.pt")
    rng = np.random.default_rng(golden["token_seed"])
    tokens = (rng.random(B * T * steps + 1) ** 6 * V).astype(np.uint16)
    for split, part in (("train_000001", tokens), ("val_000000", tokens[:300])):
        np.save(tmp_path / f"x_{split}.npy", part)
    flags = ["--init=start.pt", "--data=.", f"--max_steps={steps}", f"--B={B}", f"--T={T}",
             f"--total_batch_size={B * T}", "--dtype=float32", "--device=cpu"]
    forks.run(*flags, cwd=tmp_path, patch=AS_MODERN).good()
    log = read_log(tmp_path / "log")
    for step, (loss, norm) in enumerate(golden["losses"]):
        assert abs(float(log[step, "train"]) - loss) < (1e-4 if step < 7 else 3e-3), step
        assert abs(float(log[step, "norm"]) - norm) < 2e-2, step


def test_first_loss_is_that_of_knowing_nothing_and_every_block_begins_as_the_identity():
    model = modern.ModernGPT(config())
    idx = torch.randint(64, (3, 17))
    assert model(idx[:, :-1], idx[:, 1:])[1].item() == pytest.approx(np.log(64), abs=1e-6)
    first = model.embed(idx, None)
    assert torch.equal(model.hidden(idx), model.transformer.ln_f(first))


def test_parameter_count():
    model = modern.ModernGPT(config(block_size=1024, vocab_size=50304, n_layer=12, n_head=6,
                                    n_embd=768))
    assert sum(p.numel() for p in model.parameters()) // 10**6 == 162


@pytest.mark.parametrize("rows, columns", [(24, 24), (96, 24), (24, 96)])
def test_orthogonalize_against_the_singular_value_decomposition(rows, columns):
    G = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
    U, S, V = torch.linalg.svd(G, full_matrices=False)
    far = (modern.orthogonalize(G).float() - U @ V).norm() / (U @ V).norm()
    assert far < 0.03  # bfloat16 has three digits


def test_muon_is_torchs_but_for_the_rounding():
    torch.manual_seed(2)
    a = torch.nn.Parameter(torch.randn(48, 16))
    b = torch.nn.Parameter(a.detach().clone())
    flags = dict(lr=0.025, weight_decay=0.05, momentum=0.95)
    ours = modern.Muon([a], **flags)
    torchs = torch.optim.Muon([b], **flags, nesterov=True, ns_coefficients=(2, -1.5, 0.5),
                              ns_steps=12, adjust_lr_fn="original")
    start = a.detach().clone()
    for _ in range(5):
        a.grad = torch.randn_like(a)
        b.grad = a.grad.clone()
        ours.step()
        torchs.step()
    assert torch.equal(*(list(o.state.values())[0]["momentum_buffer"] for o in (ours, torchs)))
    assert (a - b).norm() < 0.01 * (a - start).norm()


def test_schedule_is_flat_and_then_linear_to_zero():
    cfg = train_gpt2.TrainConfig(max_lr=0.025, min_lr=0.0, warmup_steps=0, max_steps=1000)
    lr = [modern.ModernGPT.schedule(None, it, cfg) for it in range(1001)]
    assert set(lr[:301]) == {0.025} and lr[1000] == 0.0
    assert lr[650] == pytest.approx(0.0125)
    assert np.allclose(np.diff(lr[300:]), -0.025 / 700)


# -----------------------------------------------------------------------------
# A run like any other


def test_greedy_text_is_the_same_with_and_without_the_cache():
    model, idx = woken(), torch.randint(64, (2, 5))
    for n_new in (20, 40):  # within block_size, and beyond it
        with_cache, without = (torch.cat(list(model.generate(idx, n_new, 0.0, use_cache=c)), dim=1)
                               for c in (True, False))
        assert torch.equal(with_cache, without)


def test_no_token_sees_the_future():
    model, idx = woken(), torch.randint(64, (1, 20))
    changed = idx.clone()
    changed[0, 12] = (idx[0, 12] + 1) % 64
    a, b = model(idx)[0], model(changed)[0]
    assert torch.equal(a[:, :12], b[:, :12]) and not torch.allclose(a[:, 12:], b[:, 12:])


def test_chunked_loss_equals_the_plain_one():
    model = woken(block_size=512)
    idx = torch.randint(64, (2, 401))
    x, y = idx[:, :-1], idx[:, 1:]
    logits = model(x)[0]
    assert logits.abs().max() < modern.CAP
    plain = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
    chunked = model(x, y)[1]
    assert "ChunkedCrossEntropy" in type(chunked.grad_fn).__name__
    assert chunked.item() == pytest.approx(plain.item(), abs=1e-5)
    a, b = (torch.autograd.grad(z, list(model.parameters()), retain_graph=True)
            for z in (plain, chunked))
    for name, p, q in zip(dict(model.named_parameters()), a, b, strict=True):
        assert torch.allclose(p, q, atol=1e-6, rtol=1e-4), name


@pytest.fixture(scope="module")
def whole(forks, data, tmp_path_factory):
    """The log_dir of a run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("modern")
    forks.run(*SMALL, f"--data={data}", cwd=folder, patch=AS_MODERN).good()
    return folder / "log"


def test_resume_is_exact(forks, data, whole, tmp_path):
    flags = [*SMALL, f"--data={data}", "--resume"]
    stop = AS_MODERN + "at('torch.nn.utils.clip_grad_norm_', kill, nth=7)"
    forks.run(*flags, cwd=tmp_path, patch=stop).killed()
    forks.run(*flags, cwd=tmp_path, patch=AS_MODERN).good()
    assert_same_end(tmp_path / "log", whole)


def close(log, reference, tolerance=1.1e-4):
    assert log.keys() == reference.keys()
    for key, value in reference.items():
        wide = 20 if key[1] == "norm" else 1
        assert abs(float(log[key]) - float(value)) <= wide * tolerance, key


def test_two_and_three_processes_are_the_same_run_and_zero_is_as_plain(forks, data, tmp_path):
    flags = [*SMALL, f"--data={data}", "--total_batch_size=192", "--n_layer=1", "--save_every=0"]
    jobs = {name: forks.ranks(n, *flags, *more, f"--log_dir={name}", cwd=tmp_path, patch=AS_MODERN)
            for name, n, *more in (("one", 1), ("two", 2), ("three", 3, "--B=4"),
                                   ("zero", 2, "--zero"))}
    for job in jobs.values():
        assert [run.status for run in job.end()] == [0] * len(job), job[0].stderr
    one = read_log(tmp_path / "one")
    for name in ("two", "three"):
        close(read_log(tmp_path / name), one)
    assert (tmp_path / "zero" / "log.txt").read_bytes() == (
        tmp_path / "two" / "log.txt").read_bytes()
    plain, zero = weights(tmp_path / "two"), weights(tmp_path / "zero")
    assert equal(plain["model"], zero["model"])
    assert equal(plain["optimizer"]["muon"]["state"], zero["optimizer"]["muon"]["state"])


def test_each_command_refuses_the_others_checkpoints_by_name(forks, whole, tmp_path):
    path = whole / "last.pt"
    assert weights(whole)["arch"] == "modern"
    run = forks.run(f"--init={path}", "--eval_only", cwd=tmp_path)
    run.refused("modern.py", str(path))
    run = forks.run(f"--init={path}", "--export_hf=out", cwd=tmp_path, patch=AS_MODERN)
    assert run.status == 2 and not (tmp_path / "out").exists()
    assert run.stderr.startswith("modern.py: error: Hugging Face's GPT-2 knows no modern")
    run = forks.run("--n_embd=32", "--n_head=16", cwd=tmp_path, patch=AS_MODERN)
    assert run.status == 2 and "is no multiple of 4" in run.stderr
    run = forks.run("--pos=rope", cwd=tmp_path, patch=AS_MODERN)
    assert run.status == 2 and "unrecognized arguments: --pos" in run.stderr


def test_a_copy_with_one_changed_line_trains_resumes_and_is_refused_by_the_others(
        forks, data, tmp_path, monkeypatch):
    source = (ROOT / "modern.py").read_text()
    assert source.count('arch = "modern"') == 1
    (tmp_path / "mine.py").write_text(source.replace('arch = "modern"', 'arch = "mine"'))
    mine = AS_MODERN.replace("modern", "mine")
    flags = [*SMALL, f"--data={data}", "--resume", "--n_layer=1"]
    path = f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\n"
    stop = "at('torch.nn.utils.clip_grad_norm_', kill, nth=6)"
    forks.run(*flags, cwd=tmp_path, patch=path + mine + stop).killed()
    forks.run(*flags, cwd=tmp_path, patch=path + mine).good()
    assert weights(tmp_path / "log")["arch"] == "mine"
    run = forks.run(f"--init={tmp_path}/log/last.pt", "--eval_only", cwd=tmp_path, patch=AS_MODERN)
    assert run.status == 2 and "mine.py" in run.stderr
    # hellaswag.py hands it to the one that it belongs to
    started = []
    for name, stand_in in (("HERE", str(tmp_path)), ("get_tokenizer", lambda name: None),
                           ("download", lambda split: os.devnull)):
        monkeypatch.setattr(hellaswag, name, stand_in)
    monkeypatch.setattr(os, "execv", lambda program, argv: started.append(argv[1]) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        hellaswag.score(["-m", f"{tmp_path}/log/last.pt"])
    assert started == [str(tmp_path / "mine.py")]


@pytest.mark.skipif(not has_vocabulary(), reason="GPT-2's vocabulary is not here")
def test_the_command_itself_and_its_smoke_preset(tmp_path):
    flags = ["--max_steps=3", "--val_tokens=256", "--sample_length=12"]
    done = subprocess.run([sys.executable, str(ROOT / "modern.py"), *flags], cwd=tmp_path,
                          capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert "preset smoke" in done.stdout and "using Muon for 18 matrices" in done.stdout
    assert "sample 3: Hello, I'm a language model," in done.stdout
    assert os.path.exists(tmp_path / "log" / "last.pt")
