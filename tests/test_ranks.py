"""Several processes and what goes wrong: each mistake is said once, by the right one; none hangs.

Where a job is said to be "as torchrun" it is forks with torchrun's environment, told to end as soon
as one of them has failed; the others are torchrun itself.
"""

import re
import shutil
import signal

import pytest
from conftest import TINY, read_log, train, weights, write_shards
from processes import LINUX, Forks, assert_gone

STEP = "torch.nn.utils.clip_grad_norm_"  # called once in every update
TEXT = [*(f for f in TINY if "vocab" not in f), "--vocab_size=256", "--data=my.txt",
        "--max_steps=2", "--save_every=0"]
SHORT = [*TINY, "--B=4", "--data=shards", "--max_steps=2", "--warmup_steps=0", "--save_every=0"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with shards and a text, one with other shards, and one with nothing."""
    folder = tmp_path_factory.mktemp("place")
    write_shards(folder / "shards", sizes=(1111, 777, 1500))
    write_shards(folder / "elsewhere" / "shards", sizes=(1111, 777))
    (folder / "empty").mkdir()
    (folder / "my.txt").write_text("the sea is green and the sky is grey. " * 50)
    return folder


def as_torchrun(forks, *flags, **how):
    patch = 'import plumbing.tokens\nplumbing.tokens.load_bpe = lambda _: (None, "by bytes")\n'
    return forks.ranks(2, *flags, patch=patch, TORCHELASTIC_RUN_ID="test",
                       **how).end(as_torchrun=True)


# -----------------------------------------------------------------------------
# A mistake


def test_a_mistake_of_all_is_said_once(forks, place):
    ranks = as_torchrun(forks, *SHORT, "--data=nowhere", cwd=place)
    ranks[0].refused("nowhere, which does not exist")
    assert ranks.statuses == [2, -signal.SIGTERM] and ranks.errors[1] == []


@pytest.mark.parametrize("rank", [0, 1])
def test_a_mistake_of_one_is_said_by_that_one(forks, place, rank):
    ranks = as_torchrun(forks, *SHORT, "--log_dir=mine", cwd=place,
                        of={rank: dict(flags=["--data=nowhere"])})
    ranks[rank].refused(f"on rank {rank}: no train shards" if rank else "error: no train shards")
    assert ranks.errors[1 - rank] == [] and len(ranks.errors[rank]) == 1
    assert not (place / "mine").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_text_that_only_one_process_has(forks, place, rank):
    """The other sees a folder that is not there: one line, whichever it is."""
    ranks = as_torchrun(forks, *TEXT, "--log_dir=mine", cwd=place,
                        of={rank: dict(cwd=place / "empty")})
    ranks[rank].refused("my.txt, which does not exist", *["on rank 1"] * rank)
    assert ranks.errors[1 - rank] == [] and len(ranks.errors[rank]) == 1
    assert not (place / "mine").exists() and not list((place / "empty").iterdir())


def test_nothing_is_written_before_all_have_passed_every_check(forks, place):
    """The last of them fails on rank 1 while the main process waits at the door."""
    patch = """
from plumbing.errors import UserError
def fail():
    raise UserError("this machine is too small")
at("plumbing.reporter.measure_matmul", fail)
"""
    ranks = as_torchrun(forks, *SHORT, "--log_dir=mine", cwd=place, of={1: dict(patch=patch)})
    ranks[1].refused("on rank 1: this machine is too small")
    assert ranks.errors[0] == [] and not (place / "mine").exists()


@pytest.mark.parametrize("of, words", [
    (dict(flags=["--max_lr=1e-3"]), ["--max_lr", "0.003", "0.001", "rank 0", "rank 1"]),
    (dict(flags=["--zero"]), ["--zero", "not given", "True", "rank 1"]),
    (dict(cwd="elsewhere"), ["the data is 3 shards", "on rank 0 but 2 shards", "rank 1"]),
], ids=["flags", "absent", "other data"])  # fmt: skip
def test_ranks_that_differ_are_named(forks, place, of, words):
    """One line from the main process, and nothing written."""
    if "cwd" in of:
        of = dict(cwd=place / of["cwd"])
    ranks = as_torchrun(forks, *SHORT, "--log_dir=mine", cwd=place, of={1: of})
    ranks[0].refused(*words)
    assert ranks.statuses[1] == -signal.SIGTERM and ranks.errors[1] == []
    assert len(ranks.errors[0]) == 1 and not (place / "mine").exists()


def test_the_same_data_in_another_place_is_the_same(forks, place, tmp_path):
    """Each node may have its own copy. And however long the main process takes to make its folder,
    nobody says that a node does not see it."""
    shutil.copytree(place / "shards", tmp_path / "shards")
    slow = dict(patch='at("plumbing.reporter.open_log_dir", lambda: PAUSE(0.3))')
    ranks = as_torchrun(forks, *SHORT, f"--log_dir={tmp_path / 'mine'}", cwd=place,
                        of={0: slow, 1: dict(cwd=tmp_path)}).good()
    assert ranks.errors == [[], []]


TIMED = """
import plumbing.hardware, torch
plumbing.hardware.has_bfloat16 = lambda device: True

def measure(device, dtype, seconds):
    return {torch.float32: 1, torch.bfloat16: 2 - int(os.environ["RANK"])}[dtype]

plumbing.hardware.measure_matmul = measure
"""


def test_one_process_measures_and_all_take_its_dtype(forks, place):
    ranks = forks.ranks(2, *SHORT, "--dtype=auto", "--log_dir=timed", cwd=place, patch=TIMED)
    ranks.end().good()
    assert "dtype bfloat16" in ranks[0].stdout
    assert weights(place / "timed")["flags"]["dtype"] == "bfloat16"


def test_without_torchrun_each_speaks_for_itself(forks, place):
    """Nobody ends the others, and they end all the same: each with its line and status 2."""
    ranks = forks.ranks(2, *SHORT, "--data=nowhere", cwd=place).end()
    assert ranks.statuses == [2, 2]
    ranks[0].refused("error: no train shards")
    ranks[1].refused("error: on rank 1: no train shards")


def test_total_batch_that_three_processes_do_not_divide(place):
    """Said once, before torchrun's own report, with the nearest totals that work."""
    flags = [x for x in TINY if not x.startswith("--B=")]
    done = train(*flags, "--data=shards", "--total_batch_size=100", "--B=2", cwd=place, processes=3)
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    mine = [i for i, line in enumerate(lines) if "train_gpt2.py: error:" in line]
    assert len(mine) == 1, done.stderr
    assert all(re.search(rf"\b{x}\b", lines[mine[0]]) for x in ("100", "96", "192", "3"))
    report = [i for i, line in enumerate(lines) if "ChildFailedError" in line]
    assert report and mine[0] < report[0]
    assert not any("train_gpt2.py\", line" in line for line in lines)  # no traceback of ours
    assert "exitcode  : 2" in done.stderr


def test_a_mistake_of_one_under_torchrun(forks, place):
    patch = 'if os.environ["RANK"] == "1": job["flags"].append("--data=nowhere")'
    job = forks.torchrun(2, *SHORT, "--log_dir=mine", cwd=place, patch=patch).end()
    assert job.status == 1 and len(job.errors()) == 1, job.stderr
    assert "error: on rank 1: no train shards" in job.errors()[0]
    assert "exitcode  : 2" in job.stderr and 'train_gpt2.py", line' not in job.stderr
    assert not (place / "mine").exists()


def test_more_processes_than_gpus(forks, place):
    patch = ("import torch\ntorch.cuda.is_available = lambda: True\n"
             "torch.cuda.device_count = lambda: 2\n")
    ranks = forks.ranks(3, *SHORT, "--device=cuda", cwd=place, patch=patch).end()
    assert ranks.statuses == [2, 2, 2]
    ranks[0].refused("3 processes on this machine but 2 GPUs", "--nproc_per_node=2")


# -----------------------------------------------------------------------------
# A process that fails on the way


def test_a_failing_rank_ends_the_job(forks, place):
    """Rank 1 raises in its fourth batch; its error is shown once, and no process stays behind."""
    patch = """
def fail():
    raise RuntimeError("injected fault")
if os.environ["RANK"] == "1":
    at("train_gpt2.DataLoaderLite.next_batch", fail, nth=4)
"""
    log = place / "fails"
    job = forks.torchrun(2, *SHORT, f"--log_dir={log}", cwd=place, patch=patch).end()
    assert job.status == 1
    assert job.stderr.count("RuntimeError: injected fault") == 1, job.stderr
    assert "on rank 1: Traceback" in job.stderr and not job.errors()
    assert_gone(str(log))


@pytest.mark.skipif(not LINUX, reason="needs Linux")
def test_a_rank_that_dies_ends_the_job(forks, place, rng):
    """Killed in its second update: torchrun reports it, and no other process blames anything."""
    victim, log = rng.randrange(2), place / "dies"
    patch = f'if os.environ["RANK"] == "{victim}": at("{STEP}", kill, nth=2)'
    job = forks.torchrun(2, *SHORT, f"--log_dir={log}", cwd=place, patch=patch).end()
    assert job.status == 1 and not job.errors(), job.stderr
    assert "Signal 9 (SIGKILL)" in job.stderr and "on rank" not in job.stderr
    assert 'train_gpt2.py", line' not in job.stderr
    assert_gone(str(log))
    assert (0, "train") in read_log(log)


@pytest.mark.skipif(not LINUX, reason="needs Linux")
def test_who_has_lost_its_peer_leaves_the_word_to_torchrun(forks, place):
    """Even where nobody ends it, it says nothing, and ends by itself."""
    dies = dict(patch=f'at("{STEP}", kill, nth=2)')
    ranks = forks.ranks(2, *SHORT, "--log_dir=lost", cwd=place, of={1: dies},
                        TORCHELASTIC_RUN_ID="test").end()
    assert ranks.statuses == [1, -signal.SIGKILL] and ranks.errors[0] == []


def test_a_full_disk_is_said_once(forks, place):
    """Only the main process saves; the other waits for it, and is ended."""
    ranks = forks.ranks(2, *SHORT, "--log_dir=full", cwd=place, patch="torn_save(no_space)",
                        TORCHELASTIC_RUN_ID="test").end(as_torchrun=True)
    ranks[0].refused("step 2 could not be saved", "No space left", status=1)
    assert ranks.errors[1] == []


# -----------------------------------------------------------------------------
# The end of a good run

STARVED = """
import threading, torch.distributed
job["whole_end"] = True
real_init = torch.distributed.init_process_group

def init(*args, **kwargs):
    real_init(*args, **kwargs)
    cores = sorted(os.sched_getaffinity(0))
    for thread in map(int, os.listdir("/proc/self/task")):
        os.sched_setaffinity(thread, {cores[int(os.environ["RANK"]) % len(cores)]})
        if thread != threading.get_native_id():
            os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))

torch.distributed.init_process_group = init
"""


@pytest.mark.skipif(not LINUX, reason="needs Linux")
def test_a_good_end_is_a_good_status(place, tmp_path):
    """gloo's threads outlive the process group. Starved (each process on one core, its threads run
    only where nothing else wants to) they used to let go of a tensor while Python was taken down,
    and about half of the jobs that had done their work ended by SIGABRT."""
    forks = Forks(tmp_path, warm=False)
    try:
        for four in range(3):
            jobs = [forks.ranks(2, *SHORT, "--max_steps=3", "--val_tokens=0",
                                f"--log_dir=end{four}{i}", cwd=place, patch=STARVED)
                    for i in range(4)]
            for job in jobs:
                job.end().good()
    finally:
        forks.close()


def test_a_good_end_under_torchrun(forks, place):
    """Status 0, and of ours nothing on stderr."""
    job = forks.torchrun(2, *SHORT, "--log_dir=good", cwd=place).end().good()
    assert "done: 2 steps" in job.stdout
    assert "train_gpt2" not in job.stderr and "terminate called" not in job.stderr
