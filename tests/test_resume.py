"""--resume: model and data order are fixed, optimization may change, a finished run can be continued."""

import re
import shutil

import pytest
import torch
from conftest import TINY, assert_same_end, copy_until_8, equal, read_log, weights, write_shards

from train_gpt2 import get_lr, load_optimizer_state


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture
def log(uninterrupted, tmp_path):
    """The log_dir of a run that was killed after its save at step 8 of 12."""
    return copy_until_8(uninterrupted, tmp_path / "log")


CHANGED = dict(n_layer=1, n_head=4, n_embd=64, block_size=64, vocab_size=640, pos="rope", mlp="swiglu",
               norm="rmsnorm", T=8, total_batch_size=512, shuffle="windows", seed=1)


def test_other_model_or_data_order_is_refused(forks, flags, log, tmp_path):
    """The error has a table with exactly the flags that differ, and nothing is written."""
    before = contents(log)
    given = [f"--{name}={value}" for name, value in CHANGED.items()]
    run = forks.run(*flags, *given, "--max_lr=1e-3", "--B=4", "--resume", cwd=tmp_path).refused("checkpoint")
    saved = weights(log)["flags"]
    rows = [[x.strip() for x in line.split(" | ")] for line in run.stderr.splitlines() if " | " in line]
    assert sorted(rows[1:]) == sorted([f"--{k}", str(saved[k]), str(v)] for k, v in CHANGED.items())
    for name in ("seed", "total_batch_size"):
        run = forks.run(*flags, f"--{name}={CHANGED[name]}", "--resume", cwd=tmp_path)
        assert run.refused(f"--{name}", CHANGED[name]).stderr.count(" | ") == 4
    for preset, n_layer in (("gpt2-medium", 24), ("smoke", 4)):
        run = forks.run(f"--preset={preset}", flags[-1], "--resume", cwd=tmp_path)
        run.refused("--n_layer", n_layer)
        assert "--T" not in run.stderr  # a preset sets nothing else on resume
    other = write_shards(tmp_path / "other", sizes=(700, 500, 334), val=1001)
    forks.run(*flags, f"--data={other}", "--resume", cwd=tmp_path).refused("--data", "1,534")
    assert contents(log) == before


def test_machine_evaluation_and_files_may_change(forks, uninterrupted, flags, data, log, tmp_path):
    shutil.copytree(data, tmp_path / "moved")
    run = forks.run(*flags, f"--data={tmp_path / 'moved'}", "--B=4", "--save_every=3", "--eval_every=0",
                    "--resume", cwd=tmp_path).good()
    assert "changed on resume" not in run.stdout
    old, new = read_log(uninterrupted), read_log(log)
    assert float(new[11, "train"]) == pytest.approx(float(old[11, "train"]), abs=1e-5)
    assert (10, "val") in old and (10, "val") not in new and (12, "val") not in new


def test_a_muon_run_is_refused_but_its_weights_open(forks, flags, log, tmp_path):
    ckpt = weights(log)
    ckpt["flags"]["optimizer"] = "muon"
    (log / "model_00008.pt").unlink()
    torch.save(ckpt, log / "last.pt")
    forks.run(*flags, "--resume", cwd=tmp_path).refused("muon", "7f9751b", "--init")
    init = f"--init={log / 'last.pt'}"
    assert "validation loss: " in forks.run(*flags, init, "--eval_only", cwd=tmp_path).good().stdout
    forks.run(*flags, init, "--max_steps=1", "--warmup_steps=0", "--log_dir=new", cwd=tmp_path).good()
    first = float(read_log(tmp_path / "new")[0, "train"])
    assert first < float(read_log(log)[0, "train"]) - 0.1  # not from scratch


def test_constant_lr_in_two_parts(forks, data, tmp_path):
    """10 steps and then 10 more equal 20 steps to the bit."""
    flags = [*TINY, f"--data={data}", "--max_lr=1e-3", "--min_lr=1e-3", "--warmup_steps=0",
             "--checkpoint_every=10", "--resume"]
    run = forks.run(*flags, "--max_steps=10", cwd=tmp_path).good()
    assert "no checkpoint in log, starting at step 0" in run.stdout
    run = forks.run(*flags, "--max_steps=20", cwd=tmp_path).good()
    assert re.search(r"changed on resume: max_steps 10 -> 20; .*1\.0000e-03 -> 1\.0000e-03\n", run.stdout)
    forks.run(*flags, "--max_steps=20", "--log_dir=whole", cwd=tmp_path).good()
    assert_same_end(tmp_path / "log", tmp_path / "whole")


def test_changes_are_applied_and_printed(forks, flags, log, tmp_path):
    """A min_lr that was max_lr/10 follows the new max_lr."""
    forks.run(*flags, "--max_steps=7", "--resume", cwd=tmp_path).refused("--max_steps 7", "step 8")
    run = forks.run(*flags, "--max_steps=16", "--max_lr=6e-3", "--resume", cwd=tmp_path).good()
    line, = re.findall("changed on resume: (.*)", run.stdout)
    changes, lr = line.split("; ")
    old, new = get_lr(8, 3e-3, 3e-4, 3, 12), get_lr(8, 6e-3, 6e-4, 3, 16)
    assert re.fullmatch(r"max_steps 12 -> 16, max_lr 0.003 -> 0.006, min_lr 0.0003\d* -> 0.0006\d*", changes)
    assert lr == f"lr of step 8: {old:.4e} -> {new:.4e}" and f"| lr {new:.4e} |" in run.stdout
    assert weights(log)["step"] == 16 and weights(log)["flags"]["min_lr"] == 6e-3 / 10
    # the finished run continues once more, with a min_lr that is no longer max_lr/10
    flags = [*flags, "--resume"]
    forks.run(*flags, "--max_steps=17", "--max_lr=6e-3", "--min_lr=5e-4", cwd=tmp_path).good()
    run = forks.run(*flags, "--max_steps=18", "--max_lr=3e-3", cwd=tmp_path).good()
    assert "max_lr 0.006 -> 0.003; " in run.stdout and "min_lr" not in run.stdout


def test_weight_decay_is_changed(forks, uninterrupted, flags, log, tmp_path):
    """load_state_dict alone would restore the old one."""
    run = forks.run(*flags, "--weight_decay=0.5", "--grad_clip=0.5", "--resume", cwd=tmp_path).good()
    assert "changed on resume: weight_decay 0.1 -> 0.5, grad_clip 1 -> 0.5; " in run.stdout
    ckpt, new, old = weights(log), read_log(log), read_log(uninterrupted)
    assert [g["weight_decay"] for g in ckpt["optimizer"]["adamw"]["param_groups"]] == [0.5, 0.0]
    assert new[8, "train"] == old[8, "train"] and new[9, "train"] != old[9, "train"]


def test_dtype(forks, flags, tmp_path):
    """auto means the recorded one; a new float16 scaler starts fresh."""
    flags, recorded = [*flags, "--resume"], "bfloat16"
    forks.run(*flags, f"--dtype={recorded}", "--max_steps=3", cwd=tmp_path).good()
    for max_steps, given in ((4, "auto"), (5, "float16"), (6, "float32")):
        dtype = recorded if given == "auto" else given
        run = forks.run(*flags, f"--max_steps={max_steps}", f"--dtype={given}", cwd=tmp_path).good()
        assert (f"dtype {recorded} -> {dtype}" in run.stdout) == (dtype != recorded)
        ckpt, recorded = weights(tmp_path / "log"), dtype
        assert ckpt["flags"]["dtype"] == dtype and bool(ckpt["scaler"]) == (dtype == "float16")


@pytest.mark.parametrize("old_fused, new_fused", [(False, True), (True, False)])
def test_hyperparameters_are_those_of_the_new_optimizer(old_fused, new_fused):
    """Only the state and "ratio" come from the checkpoint; the kernel is that of the new device."""
    def adamw(weight_decay, fused, ratio):
        p = torch.ones(3, requires_grad=True)
        p.grad = torch.ones(3)
        optimizer = torch.optim.AdamW([dict(params=[p], ratio=ratio)], weight_decay=weight_decay, fused=fused)
        optimizer.step()
        return optimizer

    new, saved = adamw(0.2, new_fused, 1.0), adamw(0.1, old_fused, 28.0).state_dict()
    saved["state"][0]["exp_avg"] += 5
    load_optimizer_state(new, saved)
    (group,), (state,) = new.param_groups, new.state.values()
    assert (group["fused"], group["weight_decay"], group["ratio"]) == (new_fused, 0.2, 28.0)
    assert equal(state["exp_avg"], saved["state"][0]["exp_avg"])
    new.step()


def test_finished_run(forks, uninterrupted, flags, tmp_path):
    """One line and no change; with a larger --max_steps it continues."""
    log = tmp_path / "log"
    shutil.copytree(uninterrupted, log)
    before = contents(log)
    run = forks.run(*flags, "--resume", cwd=tmp_path).good()
    assert re.match("the run in log is finished: 12 steps; .* larger --max_steps\n", run.stdout)
    assert run.stderr == "" and contents(log) == before
    torch.save({k: v for k, v in weights(log).items() if k != "finished"}, log / "last.pt")  # as earlier ones
    assert "is finished" in forks.run(*flags, "--resume", cwd=tmp_path).good().stdout
    flags = [*flags, "--max_steps=14", "--resume"]
    run = forks.run(*flags, cwd=tmp_path).good()
    assert "max_steps 12 -> 14" in run.stdout and weights(log)["step"] == 14
    assert (log / "model_00012.pt").exists() and (log / "model_00014.pt").exists()
    assert "is finished: 14 steps" in forks.run(*flags, cwd=tmp_path).good().stdout


def test_final_evaluation_stays_in_the_log(forks, uninterrupted, flags, tmp_path):
    """Step 12 was evaluated as the last one, and a longer run does not evaluate it again."""
    log = tmp_path / "log"
    shutil.copytree(uninterrupted, log)
    forks.run(*flags, "--max_steps=14", "--resume", cwd=tmp_path).good()
    now, before = read_log(log), read_log(uninterrupted)
    assert {k: v for k, v in before.items() if k[0] <= 12}.items() <= now.items()
    assert (13, "train") in now and (14, "val") in now


def test_preset_of_the_run_itself_is_accepted(forks, uninterrupted, data, tmp_path):
    """Although explicit flags gave the run another size than its preset."""
    copy_until_8(uninterrupted, tmp_path / "log")
    forks.run("--preset=gpt2", f"--data={data}", "--resume", cwd=tmp_path).good()
    assert_same_end(tmp_path / "log", uninterrupted)
