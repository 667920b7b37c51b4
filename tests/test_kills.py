"""Killed anywhere, or stopped by a signal: with --resume the run ends as the one nobody disturbed.

Nothing here waits for a moment: a run is killed, signalled or held where its patch says so (see
processes.py).
"""

import json
import os
import shutil
import signal

import pytest
import torch
from conftest import TINY, assert_close, assert_same_end, read_log, weights
from processes import LINUX, assert_gone

from plumbing import hardware

pytestmark = pytest.mark.skipif(not LINUX, reason="needs Linux")

STEP = "torch.nn.utils.clip_grad_norm_"  # called once in every update
BATCH = "train_gpt2.GPT.forward"  # when=evaluating: a batch of a validation, of which there are 16


# -----------------------------------------------------------------------------
# SIGKILL


def test_killed_at_the_worst_places(forks, undisturbed, flags, tmp_path):
    log = tmp_path / "log"

    def killed(patch, step):
        """A run that goes on and is killed; then the newest checkpoint is of that step."""
        forks.run(*flags, "--resume", cwd=tmp_path, patch=patch).killed()
        assert (weights(log)["step"] if (log / "last.pt").exists() else 0) == step, patch

    killed('at("plumbing.reporter.open_log_dir", kill)', 0)
    killed('at("os.replace", kill, match="log.txt", before=False)', 0)  # no config.json yet
    killed(f'at("{STEP}", kill, nth=2)', 0)
    killed('torn_log(kill, when=lambda n: n == 4)', 0)  # half a line on the disk
    killed('torn_save(kill)', 0)  # half a checkpoint
    killed('at("os.replace", kill, match="last.pt")', 0)  # written, not renamed
    killed('at("os.replace", kill, match="last.pt", before=False)', 4)  # renamed, not synced
    killed('at("torch.load", kill)', 4)  # while it is read again
    killed('at("os.replace", kill, match="log.txt")', 4)  # while the log is cut
    killed('at("os.replace", kill, match="log.txt", before=False)', 4)
    killed(f'at("{BATCH}", kill, nth=3, when=evaluating)', 4)  # in the evaluation at step 5
    killed('at("train_gpt2.Trainer.update", kill, nth=3)', 4)  # in the second epoch
    killed('at("os.replace", kill, match="model_00008")', 4)  # one of two names is missing
    assert not (log / "model_00008.pt").exists()
    killed('at("os.link", kill, before=False)', 4)
    assert weights(log, "model_00008.pt")["step"] == 8
    killed('torn_save(kill, when=lambda n, state: state["step"] == 12)', 8)  # the last save
    killed('at("os.replace", kill, match="model_00012")', 8)
    shutil.copytree(log, tmp_path / "other")
    killed('at("plumbing.checkpoint.keep_copy", kill)', 8)  # all is there, but last.pt is old
    for name, patch in (("log", ""), ("other", 'at("plumbing.reporter.Reporter.close", kill)')):
        run = forks.run(*flags, "--resume", f"--log_dir={name}", cwd=tmp_path, patch=patch).end()
        assert run.status == (-signal.SIGKILL if patch else 0)
        run = forks.run(*flags, "--resume", f"--log_dir={name}", cwd=tmp_path).good()
        assert "is finished" in run.stdout
        assert_same_end(tmp_path / name, undisturbed)
    assert os.stat(log / "model_00012.pt").st_ino == os.stat(log / "last.pt").st_ino


def test_killed_at_any_line(forks, undisturbed, flags, tmp_path, rng):
    """Lines of the product's code by chance; where a resumed run does not come by so often, it is
    killed as it ends."""
    counts = json.loads((undisturbed.parent / "lines.json").read_text())
    assert len(counts) > 400 and any("checkpoint.py" in line for line in counts)
    for _ in range(8):
        place = rng.choice(sorted(counts))
        nth = rng.randint(1, counts[place])
        where = f"at_line({place!r}, {nth}, kill)"
        print(where)
        forks.run(*flags, "--resume", cwd=tmp_path, patch=where).killed()
    forks.run(*flags, "--resume", cwd=tmp_path).good()
    assert_same_end(tmp_path / "log", undisturbed)


@pytest.mark.parametrize("variant", [
    ["--dtype=bfloat16", "--shuffle=windows", "--optimizer=muon"],
    ["--compile", "--n_layer=1"],
], ids=["bfloat16-windows-muon", "compile"])
def test_kill_variants(forks, data, tmp_path, rng, variant):
    # for --compile the compiler's front and autograd but not its C++: that takes a minute
    patch = """
import functools, torch
torch.compile = functools.partial(torch.compile, backend="aot_eager")
"""
    flags = [*TINY, f"--data={data}", *variant]
    whole = forks.start(*flags, "--log_dir=whole", cwd=tmp_path, patch=patch)
    # how often an undisturbed run comes by: of updates 12, of files 8, of batches to train on 97
    places = [(STEP, 12), ("os.replace", 8), ("train_gpt2.DataLoaderLite.next_batch", 97)]
    for _ in range(1 if "--compile" in variant else 3):
        name, often = rng.choice(places)
        where = f'at("{name}", kill, nth={rng.randint(1, often)})\n'
        print(where)
        end = 'at("plumbing.errors.leave", kill)'  # of a resumed run that does not come by so often
        forks.run(*flags, "--resume", cwd=tmp_path, patch=patch + where + end).killed()
    forks.run(*flags, "--resume", cwd=tmp_path, patch=patch).good()
    whole.end().good()
    assert_same_end(tmp_path / "log", tmp_path / "whole")


def test_measuring_the_machine_draws_nothing():
    """The runs here do without it, and a resume sets torch's random state before it."""
    before = torch.get_rng_state()
    hardware.measure_matmul(torch.device("cpu"), torch.float32)
    assert torch.equal(before, torch.get_rng_state())


# -----------------------------------------------------------------------------
# SIGTERM and Ctrl-C


SAVING = """
import threading
go = threading.Event()
at("torch.save", go.wait)
at("plumbing.checkpoint.Saver.wait", go.set, nth=2)  # the first save ends when the second waits
"""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT], ids=["TERM", "INT"])
def test_signals(forks, undisturbed, flags, tmp_path, signum):
    log = tmp_path / "log"

    def stopped(patch, step):
        run = forks.start(*flags, "--resume", cwd=tmp_path, patch=patch).arrived()
        assert run.kill(signum).go_on().end().status == 128 + signum
        assert weights(log)["step"] == step
        assert f"at step {step};" in run.stdout and "--resume" in run.stdout
        assert run.stderr == ""

    stopped(f'at("{STEP}", wait, nth=2)', 2)  # in a step, which is ended and logged
    assert (1, "train") in read_log(log)
    # in the evaluation at step 5, which is abandoned and redone
    stopped(f'at("{BATCH}", wait, nth=3, when=evaluating)', 5)
    assert (5, "val") not in read_log(log) and (4, "train") in read_log(log)
    # at step 10, while the checkpoint of step 8 is still being written
    patch = f'{SAVING}at("{STEP}", raises({int(signum)}), nth=5)'
    run = forks.run(*flags, "--resume", cwd=tmp_path, patch=patch)
    assert run.status == 128 + signum and weights(log)["step"] == 10
    assert weights(log, "model_00008.pt")["step"] == 8
    # in the last evaluation, behind that at 10: all steps are done, but the run is not
    stopped(f'at("{BATCH}", wait, nth=19, when=evaluating)', 12)
    assert (12, "val") not in read_log(log)
    forks.run(*flags, "--resume", cwd=tmp_path).good()
    assert_same_end(log, undisturbed)


SIGNALS = """
import plumbing.machine, types
clock = [0.0]
plumbing.machine.time = types.SimpleNamespace(monotonic=lambda: clock[0])

def signals():
    signal.raise_signal(signal.SIGTERM)
    clock[0] = 0.9  # torchrun hands on what the worker has already got: not a second one
    signal.raise_signal(signal.SIGTERM)
    print("still here", flush=True)
    clock[0] = 1.1
    signal.raise_signal(signal.SIGINT)
    print("still here after the second", flush=True)
"""


def test_second_signal_stops_at_once(forks, flags, tmp_path):
    run = forks.run(*flags, cwd=tmp_path, patch=SIGNALS + f'at("{STEP}", signals)')
    assert run.status == 128 + signal.SIGINT
    assert "still here" in run.stdout and "after the second" not in run.stdout
    assert not (tmp_path / "log" / "last.pt").exists()


def test_signal_and_a_full_disk(forks, flags, tmp_path):
    patch = f'torn_save(no_space); at("{STEP}", raises(signal.SIGTERM), nth=2)'
    run = forks.run(*flags, cwd=tmp_path, patch=patch)
    run.refused("step 2 could not be saved", "No space left", status=1)


def test_signal_before_the_first_step_is_no_traceback(forks, flags, tmp_path):
    for place in ("plumbing.tokens.Data", "plumbing.reporter.describe_run"):
        patch = f'at("{place}", raises(signal.SIGINT))'
        run = forks.run(*flags, cwd=tmp_path, patch=patch)
        assert run.status == 128 + signal.SIGINT and run.stderr == ""
        assert os.listdir(tmp_path) == []


# -----------------------------------------------------------------------------
# Several processes


def test_workers_end_with_torchrun(forks, flags, tmp_path):
    """Torchrun itself is killed: its workers notice at their next step, save and go."""
    log = tmp_path / "log"
    hold = f'if os.environ["RANK"] == "0": at("{STEP}", wait, nth=3)'
    job = forks.torchrun(2, *flags, f"--log_dir={log}", cwd=tmp_path, patch=hold).arrived()
    job.kill().end()
    job.go_on()
    assert_gone(str(log))
    assert weights(log)["step"] == 3, job.stdout


def test_torchrun_restarts_a_dead_worker(forks, flags, undisturbed, tmp_path, rng):
    """With --max_restarts it survives the death of any worker."""
    victim, step = rng.randrange(2), rng.randint(5, 11)
    patch = f"""
if os.environ["RANK"] == "{victim}" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    at("{STEP}", kill_saved, nth={step})
"""
    job = forks.torchrun(2, *flags, f"--log_dir={tmp_path / 'log'}", "--resume", cwd=tmp_path,
                         patch=patch, options=["--standalone", "--max_restarts=3"],
                         TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1").end().good()
    assert_gone(str(tmp_path / "log"))
    assert job.stdout.count("resuming from") == 1, job.stdout
    assert_close(read_log(tmp_path / "log"), read_log(undisturbed))


def test_two_processes_agree_on_a_signal(forks, flags, undisturbed, tmp_path, rng):
    """SIGTERM to one of two: both save at the same step and exit 143. Then one is killed: the
    other ends by itself, and one process with another B goes on."""
    flags = [*flags, "--resume"]
    stop = dict(patch=f'at("{STEP}", raises(signal.SIGTERM), nth=5)')
    ranks = forks.ranks(2, *flags, "--B=1", cwd=tmp_path, of={1: stop}).end()
    assert ranks.statuses == [143, 143], ranks.errors
    assert weights(tmp_path / "log")["step"] == 5
    assert "at step 5;" in ranks[0].stdout and ranks[1].stdout == ""
    victim = rng.randrange(2)
    dies = dict(patch=f'at("{STEP}", kill, nth=2)')
    ranks = forks.ranks(2, *flags, "--B=1", cwd=tmp_path, of={victim: dies}).end()
    assert all(ranks.statuses) and ranks.statuses[victim] == -signal.SIGKILL
    forks.run(*flags, "--B=4", cwd=tmp_path).good()
    assert_close(read_log(tmp_path / "log"), read_log(undisturbed))
