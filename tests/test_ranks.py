"""Several ranks and their failures: each error is reported once, by the right rank, and no rank hangs."""

import contextlib
import os
import re
import shutil
import signal

import numpy as np
import pytest
from conftest import TINY, assert_same_end, copy_until_8, read_log, weights, write_shards
from processes import KILL, LINUX, Forks, assert_gone

needs_linux = pytest.mark.skipif(not LINUX, reason="needs Linux")
STEP = "torch.nn.utils.clip_grad_norm_"  # called once per update
SHORT = [*TINY, "--B=4", "--data=shards", "--max_steps=2", "--warmup_steps=0", "--save_every=0"]


@pytest.fixture(scope="module")
def cwd(tmp_path_factory):
    """A directory with shards and a text, with a subdirectory that has other shards and one without."""
    folder = tmp_path_factory.mktemp("cwd")
    write_shards(folder / "shards", sizes=(1111, 777, 1500))
    write_shards(folder / "elsewhere" / "shards", sizes=(1111, 777))
    (folder / "empty").mkdir()
    (folder / "my.txt").write_text("the sea is green and the sky is grey. " * 50)
    return folder


def as_torchrun(forks, *flags, patch="", **options):
    """Fork two ranks with torchrun's environment, and end both once one has failed."""
    patch = "use_bytes()\n" + patch
    return forks.ranks(2, *flags, patch=patch, TORCHELASTIC_RUN_ID="test", **options).end(as_torchrun=True)


def test_error_of_all_ranks_is_reported_once(forks, cwd):
    """Without torchrun no rank ends the others: each reports it."""
    ranks = as_torchrun(forks, *SHORT, "--data=nowhere", cwd=cwd)
    ranks[0].refused("nowhere", "--data")
    assert ranks.statuses == [2, -signal.SIGTERM] and ranks.errors[1] == []
    for rank, run in enumerate(forks.ranks(2, *SHORT, "--data=nowhere", cwd=cwd).end()):
        run.refused("error: rank 1: " if rank else "error: ", "nowhere")


NO_SLEEP = "time.sleep = lambda seconds: sleep(0.1)\n"  # rank 1 waits for rank 0, which has no error
LAST_CHECK = """
import train_gpt2
def fault(): raise train_gpt2.UserError("fault")
at("train_gpt2.Trainer", fault)
"""


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("flags, cwd_of, patch, word", [
    (["--data=nowhere"], ".", "", "nowhere"),
    (["--data=my.txt", "--vocab_size=256"], "empty", "", "my.txt"),
    ([], ".", LAST_CHECK, "fault"),
], ids=["data", "text", "last check"])
def test_error_of_one_rank_is_reported_by_it(forks, cwd, rank, flags, cwd_of, patch, word):
    """Nothing is written before all ranks have passed all checks."""
    of = dict(cwd=cwd / cwd_of, patch=NO_SLEEP + patch)
    if word == "nowhere":
        flags, of["flags"] = [], flags
    ranks = as_torchrun(forks, *SHORT, *flags, "--log_dir=mine", cwd=cwd, of={rank: of})
    ranks[rank].refused("error: rank 1: " if rank else "error: ", word)
    assert ranks.errors[1 - rank] == [] and len(ranks.errors[rank]) == 1
    assert not (cwd / "mine").exists() and not list((cwd / "empty").iterdir())


@pytest.mark.parametrize("flags, cwd_of, words", [
    (["--max_lr=1e-3"], ".", ["--max_lr is 0.003 on rank 0 but 0.001 on rank 1"]),
    (["--zero"], ".", ["--zero", "not given", "True", "rank 1"]),
    ([], "elsewhere", ["data is 3 shards", "on rank 0 but 2 shards", "rank 1"]),
    (["--resume"], "elsewhere", ["log_dir", "12) on rank 0 but", "8) on rank 1"]),
], ids=["flags", "absent", "data", "checkpoint"])
def test_ranks_that_differ_are_named(forks, uninterrupted, cwd, flags, cwd_of, words):
    common = ["--log_dir=mine"]
    if flags == ["--resume"]:  # two nodes whose log_dir is not on shared storage
        shutil.copytree(uninterrupted, cwd / "local")
        copy_until_8(uninterrupted, cwd / "elsewhere" / "local")
        common = ["--log_dir=local", "--max_steps=14", "--resume"]
    ranks = as_torchrun(forks, *SHORT, *common, cwd=cwd, of={1: dict(flags=flags, cwd=cwd / cwd_of)})
    ranks[0].refused(*words)
    assert ranks.statuses[1] == -signal.SIGTERM and ranks.errors[1] == []
    assert not (cwd / "mine").exists()


def test_the_same_data_in_another_directory(forks, cwd, tmp_path):
    """Each node may have its own copy. No rank looks for log_dir before rank 0 has created it."""
    shutil.copytree(cwd / "shards", tmp_path / "shards")
    slow = dict(patch='at("train_gpt2.open_log_dir", lambda: sleep(0.3))')
    of = {0: slow, 1: dict(cwd=tmp_path)}
    as_torchrun(forks, *SHORT, f"--log_dir={tmp_path / 'mine'}", cwd=cwd, of=of).good()


def test_indivisible_batch_under_torchrun(forks, cwd):
    """One line before torchrun's report, with the nearest sizes that work."""
    job = forks.torchrun(2, *SHORT, "--total_batch_size=96", "--B=2", cwd=cwd, patch="none").end()
    line, = job.errors()
    assert all(re.search(rf"\b{n}\b", line) for n in (96, 64, 128))
    assert job.stderr.index(line) < job.stderr.index("ChildFailedError") < job.stderr.index("exitcode  : 2")
    assert job.status == 1 and 'train_gpt2.py", line' not in job.stderr  # no traceback of ours


def new_token(path):
    tokens = np.load(path)
    tokens[200] = 600  # outside --vocab_size 512
    np.save(path, tokens)


@pytest.fixture(scope="module")
def two_ranks(forks, data, tmp_path_factory):
    """The log_dir of an uninterrupted run of two ranks."""
    folder = tmp_path_factory.mktemp("two")
    forks.ranks(2, *TINY, f"--data={data}", cwd=folder).end().good()
    return folder / "log"


@needs_linux
@pytest.mark.parametrize("damage", [lambda path: os.truncate(path, 200), os.remove, new_token],
                         ids=["truncated", "removed", "token"])
def test_shard_damaged_in_mid_run(forks, uninterrupted, flags, data, tmp_path, damage):
    """All ranks save at the same step; after a repair the run resumes to the same result."""
    shutil.copytree(data, tmp_path / "data")
    flags = [*flags, f"--data={tmp_path / 'data'}"]
    shard = tmp_path / "data" / "edufineweb_train_000001.npy"
    run = forks.start(*flags, cwd=tmp_path, patch=f'at("{STEP}", wait, nth=6)').arrived()
    damage(shard)  # steps 0 to 5 and the first batch of step 6 have been read
    run.release().end().refused(shard.name, "step 6", "--resume", status=1)
    log = read_log(tmp_path / "log")
    assert weights(tmp_path / "log")["step"] == 6 and (5, "train") in log and (6, "train") not in log
    shutil.copy(f"{data}/{shard.name}", shard)
    forks.run(*flags, "--resume", cwd=tmp_path).good()
    assert_same_end(tmp_path / "log", uninterrupted)


@pytest.mark.parametrize("zero", [[], ["--zero"]], ids=["", "zero"])
@pytest.mark.parametrize("where, nth, step", [("train", 30, 6), ("val", 11, 5)])
def test_one_rank_cannot_read(forks, two_ranks, flags, tmp_path, zero, where, nth, step):
    """An I/O error on rank 1 while training, or in the validation at step 5."""
    flags = [*flags, *zero]
    fault = f"def fault(): raise OSError(errno.EIO, 'broken disk', 'shard_{where}_1.npy')\n"
    fault += f'at("numpy.fromfile", fault, nth={nth}, match="_{where}_")'
    ranks = as_torchrun(forks, *flags, cwd=tmp_path, of={1: dict(patch=fault)})
    ranks[0].refused("rank 1", f"_{where}_", "broken disk", f"step {step}", "--resume", status=1)
    assert len(ranks.errors[0]) == 1 and ranks.errors[1] == []
    assert weights(tmp_path / "log")["step"] == step
    forks.ranks(2, *flags, "--resume", cwd=tmp_path).end().good()
    assert_same_end(tmp_path / "log", two_ranks)


def test_a_failing_rank_ends_the_job(forks, cwd):
    """An unexpected error on rank 1 is shown once, and no process is left."""
    patch = """
def fail(): raise RuntimeError("injected fault")
if os.environ["RANK"] == "1": at("train_gpt2.DataLoaderLite.next_batch", fail, nth=4)
"""
    job = forks.torchrun(2, *SHORT, f"--log_dir={cwd / 'fails'}", cwd=cwd, patch=patch).end()
    assert job.status == 1 and job.stderr.count("RuntimeError: injected fault") == 1, job.stderr
    assert "rank 1: Traceback" in job.stderr and not job.errors()
    assert_gone(str(cwd / "fails"))


@needs_linux
def test_a_rank_that_lost_its_peer_prints_nothing(forks, cwd):
    dies = dict(patch=f'at("{STEP}", kill, nth=2)')
    ranks = forks.ranks(2, *SHORT, "--log_dir=lost", cwd=cwd, of={1: dies}, TORCHELASTIC_RUN_ID="test").end()
    assert ranks.statuses == [1, -KILL] and ranks.errors[0] == []


STARVED = """
import threading, torch.distributed
job["full_teardown"] = True
def init(*args, real=torch.distributed.init_process_group, **kwargs):
    real(*args, **kwargs)
    cores = sorted(os.sched_getaffinity(0))
    for thread in map(int, os.listdir("/proc/self/task")):
        os.sched_setaffinity(thread, {cores[int(os.environ["RANK"]) % len(cores)]})
        if thread != threading.get_native_id():
            os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))
torch.distributed.init_process_group = init
"""


@needs_linux
def test_a_good_end_is_a_good_status(cwd, tmp_path):
    """gloo's threads outlive the process group. Starved of CPU time, they used to abort finished runs."""
    with contextlib.closing(Forks(tmp_path, warm=False)) as forks:
        for i in range(2):
            jobs = [forks.ranks(2, *SHORT, "--val_tokens=0", f"--log_dir=end{i}{j}", cwd=cwd, patch=STARVED)
                    for j in range(4)]
            for job in jobs:
                job.end().good()
