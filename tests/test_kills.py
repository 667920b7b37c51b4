"""A run that is killed or stopped by a signal anywhere resumes to the result of an uninterrupted run."""

import json
import os
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import TINY, assert_close, assert_same_end, read_log, weights
from processes import LINUX, assert_gone, at, raises

import train_gpt2

pytestmark = pytest.mark.skipif(not LINUX, reason="needs Linux")
STEP = "torch.nn.utils.clip_grad_norm_"  # called once per update
BATCH = "train_gpt2.GPT.forward"  # with when=evaluating: a validation batch, of which there are 16
SIGNUMS = signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGHUP", signal.SIGTERM)


def test_killed_at_the_worst_places(forks, uninterrupted, flags, tmp_path):
    log = tmp_path / "log"

    def killed(patch, step, log=log):
        """Resume a run that is killed by `patch`; last.pt must then be of that step."""
        forks.run(*flags, "--resume", f"--log_dir={log}", cwd=tmp_path, patch=patch).killed()
        assert (weights(log)["step"] if (log / "last.pt").exists() else 0) == step, patch

    killed('at("train_gpt2.open_log_dir", kill)', 0)
    killed('at("os.replace", kill, match="log.txt", before=False)', 0)  # no config.json yet
    killed(f'at("{STEP}", kill, nth=2)', 0)
    killed("torn_log(kill, when=lambda n: n == 4)", 0)  # half a line on the disk
    killed("torn_save(kill)", 0)  # half a checkpoint
    killed('at("os.replace", kill, match="last.pt")', 0)  # written, not renamed
    killed('at("os.replace", kill, match="last.pt", before=False)', 4)  # renamed, directory not synced
    killed('at("torch.load", kill)', 4)
    killed('at("os.replace", kill, match="log.txt")', 4)  # while the log is cut
    killed(f'at("{BATCH}", kill, nth=3, when=evaluating)', 4)  # in the evaluation at step 5
    killed('at("train_gpt2.Trainer.update", kill, nth=3)', 4)  # in the second epoch
    killed('at("os.link", kill)', 8)  # last.pt exists, model_00008.pt does not
    assert not (log / "model_00008.pt").exists()
    killed('at("os.link", kill, before=False)', 8)
    assert weights(log, "model_00008.pt")["step"] == 8
    killed('torn_save(kill, when=lambda n, state: state["step"] == 12)', 8)
    shutil.copytree(log, tmp_path / "other")
    killed('at("os.link", kill, match="model_00012")', 12)
    killed('at("train_gpt2.link_or_copy", kill)', 12)  # the finished run gets its second name
    killed('at("train_gpt2.RunLog.close", kill)', 12, log=tmp_path / "other")
    for folder in (log, tmp_path / "other"):
        run = forks.run(*flags, "--resume", f"--log_dir={folder}", cwd=tmp_path).good()
        assert ("is finished" in run.stdout) == (folder != log)
        assert_same_end(folder, uninterrupted)
    assert os.stat(log / "model_00012.pt").st_ino == os.stat(log / "last.pt").st_ino


def test_killed_at_any_line(forks, uninterrupted, flags, tmp_path, rng):
    """Random executed lines; a run that executes the line less often is killed at exit."""
    counts = json.loads((uninterrupted.parent / "lines.json").read_text())
    for _ in range(8):
        line = rng.choice(sorted(counts))
        patch = f"at_line({line!r}, {rng.randint(1, counts[line])}, kill)"
        print(patch)
        forks.run(*flags, "--resume", cwd=tmp_path, patch=patch).killed()
    forks.run(*flags, "--resume", cwd=tmp_path).good()
    assert_same_end(tmp_path / "log", uninterrupted)


@pytest.mark.parametrize("script, variant, kills", [
    ("train_gpt2", "--dtype=bfloat16", 2), ("modern", "--dtype=float32", 2), ("train_gpt2", "--compile", 1)])
def test_killed_variants(forks, data, tmp_path, rng, script, variant, kills):
    # without the C++ code generation, which takes a minute
    patch = "import functools, torch\ntorch.compile = functools.partial(torch.compile, backend='aot_eager')\n"
    flags = [*TINY, f"--data={data}", variant, "--shuffle=windows", "--n_layer=1", "--log_dir=log"]
    whole = forks.start(*flags, "--log_dir=whole", cwd=tmp_path, patch=patch, script=script)
    # the calls of an uninterrupted run: 12 updates, 8 renames, 97 training batches
    points = [(STEP, 12), ("os.replace", 8), ("train_gpt2.DataLoaderLite.next_batch", 97)]
    for _ in range(kills):
        name, calls = rng.choice(points)
        # at exit if a resumed run makes fewer calls
        where = f'at("{name}", kill, nth={rng.randint(1, calls)}); at("train_gpt2.exit_process", kill)'
        print(where)
        forks.run(*flags, "--resume", cwd=tmp_path, patch=patch + where, script=script).killed()
    forks.run(*flags, "--resume", cwd=tmp_path, patch=patch, script=script).good()
    whole.end().good()
    assert_same_end(tmp_path / "log", tmp_path / "whole")


@pytest.mark.parametrize("signum", SIGNUMS)
def test_signals(forks, uninterrupted, flags, tmp_path, signum):
    log = tmp_path / "log"

    def stopped(patch, step):
        run = forks.start(*flags, "--resume", cwd=tmp_path, patch=patch).arrived()
        assert run.kill(signum).release().end().status == 128 + signum
        assert weights(log)["step"] == step and run.stderr == ""
        assert f"at step {step}," in run.stdout and "--resume" in run.stdout

    stopped(f'at("{STEP}", wait, nth=2)', 2)  # the running update is completed and logged
    assert (1, "train") in read_log(log)
    stopped(f'at("{BATCH}", wait, nth=3, when=evaluating)', 5)  # this evaluation is repeated
    assert (5, "val") not in read_log(log) and (4, "train") in read_log(log)
    stopped('at("torch.save", wait)', 9)  # the save at step 8 is completed, then one more update
    assert weights(log, "model_00008.pt")["step"] == 8
    stopped(f'at("{BATCH}", wait, nth=19, when=evaluating)', 12)  # in the last one, after that at step 10
    assert (12, "val") not in read_log(log)
    forks.run(*flags, "--resume", cwd=tmp_path).good()
    assert_same_end(log, uninterrupted)


def test_second_signal_stops_at_once(forks, flags, tmp_path):
    """Slurm and torchrun may deliver one signal twice; within a second it counts once."""
    run = forks.run(*flags, cwd=tmp_path, patch=f"""
import train_gpt2, types
clock = [0.0]
train_gpt2.time = types.SimpleNamespace(monotonic=lambda: clock[0], perf_counter=time.perf_counter)
def signals():
    for clock[0], signum in (0.0, signal.SIGTERM), (0.9, signal.SIGTERM), (1.1, signal.SIGINT):
        signal.raise_signal(signum)
        print("alive at", clock[0], flush=True)
at("{STEP}", signals)""")
    assert run.status == 128 + signal.SIGINT and not (tmp_path / "log" / "last.pt").exists()
    assert "alive at 0.9" in run.stdout and "alive at 1.1" not in run.stdout


def test_signals_at_other_times(forks, uninterrupted, flags, tmp_path):
    """Before the first step, on a full disk, and SIGHUP where nohup has turned it off."""
    for name in ("train_gpt2.TokenStream", "train_gpt2.open_log_dir"):
        run = forks.run(*flags, cwd=tmp_path, patch=f'at("{name}", raises(signal.SIGINT))')
        assert run.status == 128 + signal.SIGINT and run.stderr == "" and os.listdir(tmp_path) == []
    patch = f'torn_save(no_space); at("{STEP}", raises(signal.SIGTERM), nth=2)'
    forks.run(*flags, cwd=tmp_path, patch=patch).refused("step 2", "No space left", "--resume", status=1)
    patch = f'signal.signal(signal.SIGHUP, signal.SIG_IGN); at("{STEP}", raises(signal.SIGHUP), nth=3)'
    forks.run(*flags, cwd=tmp_path, patch=patch).good()
    assert_same_end(tmp_path / "log", uninterrupted)


def test_main_called_from_python(flags, tmp_path, monkeypatch):
    """main() returns the status, restores the signal handlers, and works in a thread."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_gpt2.RunLog, "draw_curves", lambda self, timeout=0.0: None)
    monkeypatch.setattr(STEP, torch.nn.utils.clip_grad_norm_)  # undoes at()
    before = [signal.getsignal(s) for s in SIGNUMS]
    at(STEP, raises(signal.SIGTERM))
    assert train_gpt2.main(flags) == 128 + signal.SIGTERM
    assert [signal.getsignal(s) for s in SIGNUMS] == before
    with ThreadPoolExecutor() as pool:
        assert pool.submit(train_gpt2.main, [*flags, "--resume"]).result() == 0


def test_workers_end_with_torchrun(forks, flags, tmp_path):
    """When torchrun is killed, its workers save at their next step and exit."""
    log, hold = tmp_path / "log", f'if os.environ["RANK"] == "0": at("{STEP}", wait, nth=3)'
    job = forks.torchrun(2, *flags, f"--log_dir={log}", cwd=tmp_path, patch=hold).arrived()
    job.kill().end().release()
    assert_gone(str(log))
    assert weights(log)["step"] == 3, job.stdout


def test_torchrun_restarts_a_dead_worker(forks, flags, uninterrupted, tmp_path, rng):
    victim, log = (str(rng.randrange(2)), "0"), tmp_path / "log"
    patch = f'''if (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == {victim}:
    at("{STEP}", kill, nth={rng.randint(5, 11)})'''
    job = forks.torchrun(2, *flags, f"--log_dir={log}", "--resume", cwd=tmp_path, patch=patch,
                         options=["--standalone", "--max_restarts=3"],
                         TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1").end().good()
    assert_gone(str(log))
    assert job.stdout.count("resuming from") == 1, job.stdout
    assert_close(read_log(log), read_log(uninterrupted))


def test_ranks_agree_on_a_signal(forks, flags, uninterrupted, tmp_path):
    """A signal to one rank stops both at the same step."""
    flags = [*flags, "--resume"]
    stop = dict(patch=f'at("{STEP}", raises(signal.SIGTERM), nth=5)')
    ranks = forks.ranks(2, *flags, "--B=1", cwd=tmp_path, of={1: stop}).end()
    assert ranks.statuses == [143, 143] and weights(tmp_path / "log")["step"] == 5, ranks.errors
    assert "at step 5," in ranks[0].stdout and ranks[1].stdout == ""
    forks.run(*flags, "--B=4", cwd=tmp_path).good()  # one rank resumes a run of two
    assert_close(read_log(tmp_path / "log"), read_log(uninterrupted))
