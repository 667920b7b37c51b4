"""Several processes are one run: the same losses, the same weights, the same files, one message.

Most runs here share processes: each process of a fleet does a list of jobs, and a job is one call
of train_gpt2.main with a process group of its own, as torchrun's environment would ask for. Real
torchrun is used where it matters: agents as nodes, a rank that dies, messages under it.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, read_log, train, write_shards

import train_gpt2

WORKER = '''
"""Do the jobs of a JSON file, one after the other, as rank RANK of WORLD_SIZE processes.

A job: name, flags; optionally flags_of (more flags, by rank), cwd_of (a folder, by rank), copy
(from, to: before the run), raise_at (rank, number of a batch). Writes {name}.{rank}.json: exit
status, stdout, stderr, and what the hooks saw.
"""
import contextlib, hashlib, io, json, os, shutil, signal, sys, time, traceback

ROOT, JOBS, HELLASWAG = sys.argv[1:4]
sys.path.insert(0, ROOT)
sys.modules["matplotlib"] = None  # no curves: drawing takes a second a run
import torch
import torch.distributed
import torch.nn.parallel

import numpy as np
import tiktoken

import hellaswag
import train_gpt2

class Bytes:  # in the place of GPT-2's vocabulary, so that the model can be tiny
    def encode_to_numpy(self, text, **settings):
        return np.frombuffer(text.encode(), np.uint8)

tiktoken.get_encoding = lambda name: Bytes()
hellaswag.download = lambda *args, **kwargs: HELLASWAG  # the real file is 12 MB long

RANK = os.environ.get("RANK", "0")
DDP, sleep = torch.nn.parallel.DistributedDataParallel, time.sleep
wrapped, digests = [], []

def digest():
    h = hashlib.sha256()
    for p in wrapped[-1].parameters():
        h.update(p.detach().numpy().tobytes())
    digests.append(h.hexdigest()[:16])

def init(self, module, *args, **kwargs):
    wrapped.append(module)
    real_init(self, module, *args, **kwargs)

def forward(self, *args, **kwargs):
    if not torch.compiler.is_compiling():
        digest()
    return real_forward(self, *args, **kwargs)

real_init, real_forward = DDP.__init__, DDP.forward
DDP.__init__ = init

class Tee(io.StringIO):  # torchrun's terminal sees it too
    def write(self, text):
        sys.__stderr__.write(text)
        return super().write(text)

for job in json.load(open(JOBS)):
    wrapped.clear(), digests.clear()
    DDP.forward = real_forward if job.get("compile") else forward
    if "port" in job:
        os.environ["MASTER_PORT"] = str(job["port"])
    if job.get("copy") and RANK == "0":
        os.makedirs(os.path.dirname(job["copy"][1]), exist_ok=True)
        shutil.copy(*job["copy"])
    os.chdir(job.get("cwd_of", {}).get(RANK, os.path.dirname(JOBS)))
    time.sleep = lambda seconds: sleep(min(seconds, 0.2))  # waiting for the one that prints
    next_batch, calls = train_gpt2.DataLoaderLite.next_batch, []

    def broken(self):
        calls.append(0)
        if len(calls) == job["raise_at"][1]:
            raise RuntimeError("injected fault")
        return next_batch(self)

    if str(job.get("raise_at", [None])[0]) == RANK:
        train_gpt2.DataLoaderLite.next_batch = broken
    out, err, seen = io.StringIO(), Tee(), {}
    start = time.perf_counter()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            train_gpt2.main(job["flags"] + job.get("flags_of", {}).get(RANK, []))
        except SystemExit as e:
            seen["status"] = e.code
        except Exception:
            if "port" not in job:
                raise  # torchrun is to see it
            traceback.print_exc()
        if wrapped:
            digest()
    if job.get("compile"):
        metrics = torch._dynamo.utils.get_compilation_metrics()
        seen["compiled"] = [m.co_name for m in metrics if m.graph_op_count]
    seen |= dict(out=out.getvalue(), err=err.getvalue(), digests=digests,
                 group_left=torch.distributed.is_initialized(), seconds=time.perf_counter() - start)
    with open(os.path.join(os.path.dirname(JOBS), f"{job['name']}.{RANK}.json"), "w") as f:
        json.dump(seen, f)
    if seen["group_left"]:
        torch.distributed.destroy_process_group()
    signal.signal(signal.SIGINT, signal.SIG_DFL), signal.signal(signal.SIGTERM, signal.SIG_DFL)
'''
# Accumulation 4 on 1, 2 and 3 processes: B is 6, 3 and 2. 20 steps are more than two epochs.
BASE = [
    *TINY, "--data=shards", "--shuffle=windows", "--total_batch_size=384", "--max_steps=20",
    "--eval_every=5", "--val_tokens=500", "--save_every=0", "--checkpoint_every=8",
    "--block_size=64", "--hellaswag=30",
]  # fmt: skip
# Shorter and smaller: 12 steps, checkpoints at 8 and 12.
SHORT = [*TINY, "--data=shards", "--save_every=0", "--B=4", "--val_tokens=256", "--eval_every=12"]
MUON = [*SHORT, "--optimizer=muon"]
COMPILED = [*SHORT, "--n_layer=1", "--eval_every=4", "--max_steps=8", "--checkpoint_every=0"]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Fleet:
    """A folder with shards, and the processes that do jobs in it."""

    def __init__(self, folder):
        self.folder, self.said = Path(folder), ""
        write_shards(self.folder / "shards", sizes=(1111, 777, 1500))
        write_shards(self.folder / "elsewhere" / "shards", sizes=(1111, 777))
        self.script = self.folder / "worker.py"
        self.script.write_text(WORKER)
        self.hellaswag = self.folder / "hellaswag.jsonl"
        with open(self.hellaswag, "w") as f:
            for i in range(30):
                endings = [f"sits in a {word}." for word in ("tree", "boat", "train", "sack")]
                example = dict(ctx=f"The cat number {i * i}", label=i % 4,
                               endings=endings[i % 3 :] + endings[: i % 3])
                f.write(json.dumps(example) + "\n")

    def command(self, jobs, own_ports):
        path = self.folder / f"jobs_{jobs[0]['name']}.json"
        jobs = [job | {"port": free_port()} if own_ports else job for job in jobs]
        path.write_text(json.dumps(jobs))
        return [str(self.script), str(ROOT), str(path), str(self.hellaswag)]

    def wait(self, started, timeout):
        """Until all have ended; none is left behind. Returns their (status, output)."""
        end = time.monotonic() + timeout
        try:
            outputs = [p.communicate(timeout=max(1, end - time.monotonic()))[0] for p in started]
            return [(p.returncode, out) for p, out in zip(started, outputs, strict=True)]
        finally:
            for p in started:
                if p.poll() is None:
                    os.killpg(p.pid, 9)
                    p.communicate()

    def start(self, *command, **env):
        return subprocess.Popen(
            command, cwd=self.folder, env=os.environ | env, text=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)

    def work(self, world_size, *jobs, timeout=150):
        """Processes of their own, without torchrun."""
        command = self.command(jobs, own_ports=True)
        env = dict(WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size),
                   MASTER_ADDR="127.0.0.1")
        started = [self.start(sys.executable, *command, RANK=str(r), LOCAL_RANK=str(r), **env)
                   for r in range(world_size)]
        try:
            self.said += "".join(out for _, out in self.wait(started, timeout))
        except subprocess.TimeoutExpired:  # the tests of the jobs that did not end will tell
            self.said += f"{world_size} processes did not end within {timeout} s\n"

    def torchrun(self, nodes, per_node, job, timeout=120):
        """Agents of torchrun, each standing for a node."""
        flags = [f"--nnodes={nodes}", f"--nproc_per_node={per_node}", "--rdzv_backend=c10d",
                 f"--rdzv_endpoint=127.0.0.1:{free_port()}", "--rdzv_id=test",
                 "--local_addr=127.0.0.1"]
        command = self.command([job], own_ports=False)
        started = [self.start(sys.executable, "-m", "torch.distributed.run", *flags, *command)
                   for _ in range(nodes)]
        return self.wait(started, timeout)

    def result(self, name, rank=0):
        path = self.folder / f"{name}.{rank}.json"
        assert path.exists(), f"job {name} did not end on rank {rank}:\n{self.said}"
        return json.loads(path.read_text())

    def log(self, name):
        return {k: float(v) for k, v in read_log(self.folder / name).items()}

    def checkpoint(self, name, step):
        return torch.load(self.folder / name / f"model_{step:05d}.pt", weights_only=True)


def job(name, flags, *more, **settings):
    return dict(name=name, flags=[*flags, f"--log_dir={name}", *more]) | settings


def resume(name, flags, source, *more, **settings):
    """Go on from step 8 of another job."""
    copy = [f"{source}/model_00008.pt", f"{name}/last.pt"]
    return job(name, flags, "--resume", *more, copy=copy, **settings)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    return Fleet(tmp_path_factory.mktemp("fleet"))


@pytest.fixture(scope="module")
def two(fleet):
    """All that two processes do."""
    fleet.work(
        2,
        job("two", BASE, "--B=3"),
        job("two_b1", BASE, "--B=1", "--eval_every=20", "--hellaswag=0"),
        job("plain", SHORT),
        job("zero", SHORT, "--zero"),
        resume("zero_to_plain", SHORT, "zero"),
        resume("plain_to_zero", SHORT, "plain", "--zero"),
        job("muon", MUON),
        job("muon_zero", MUON, "--zero"),
        resume("muon_zero_to_zero", MUON, "muon_zero", "--zero"),
        job("flags", SHORT, flags_of={"1": ["--max_lr=1e-3"]}),
        job("absent", SHORT, flags_of={"1": ["--zero"]}),
        job("blind", SHORT, cwd_of={"1": str(fleet.folder / "shards")}),
        job("other", SHORT, cwd_of={"1": str(fleet.folder / "elsewhere")}),
        job("eager", COMPILED, "--no-compile"),
        job("compiled", COMPILED, "--compile", compile=True),
    )
    return fleet


@pytest.fixture(scope="module")
def one(two):
    """What one process does, two of them with checkpoints that two processes wrote."""
    two.work(
        1,
        job("one", BASE, "--B=6"),
        resume("zero_to_one", SHORT, "zero", "--B=2"),
        resume("muon_zero_to_one", MUON, "muon_zero", "--zero"),
    )
    return two


def ended_well(fleet, name, world_size):
    for rank in range(world_size):
        seen = fleet.result(name, rank)
        assert seen.get("status") == 0 and not seen["group_left"], (name, rank, seen["err"])
        assert rank == 0 or (seen["out"], seen["err"]) == ("", "")  # only the main process talks


def same(fleet, a, b, tolerance, streams=("train", "norm", "val", "hella"), from_step=0):
    """The logs of two jobs agree from a step on; returns the largest difference of a loss."""
    a, b = ({k: v for k, v in fleet.log(x).items() if k[0] >= from_step and k[1] in streams}
            for x in (a, b))
    assert a.keys() == b.keys() and len(a) > 3
    # log.txt has 6 digits of a training loss and 4 of the others
    rounding = dict(train=1.1e-6, val=1.1e-4, hella=1e-9, norm=1.1e-4)
    apart = {k: abs(a[k] - b[k]) for k in a}
    bad = {k: d for k, d in apart.items() if d > tolerance + rounding[k[1]]}
    assert not bad, bad
    return max(d for (_, stream), d in apart.items() if stream == "train")


def same_checkpoint(fleet, a, b, step, tolerance=0.0):
    """The same form and the same values, weights and optimizer state."""
    a, b = (fleet.checkpoint(x, step) for x in (a, b))
    may_differ = [f".flags.{x}" for x in ("zero", "log_dir", "resume", "B")] + [".val_loss"]

    def walk(x, y, path):
        assert type(x) is type(y), path
        if isinstance(x, dict):
            assert x.keys() == y.keys(), path
            for k in x:
                walk(x[k], y[k], f"{path}.{k}")
        elif isinstance(x, (list, tuple)):
            assert len(x) == len(y), path
            for i, (p, q) in enumerate(zip(x, y, strict=True)):
                walk(p, q, f"{path}[{i}]")
        elif isinstance(x, torch.Tensor):
            assert (x.shape, x.dtype, x.device) == (y.shape, y.dtype, y.device), path
            if not path.startswith(".rng"):
                worst = (x.double() - y.double()).abs().max()
                assert worst <= tolerance, (path, worst)
        elif path not in may_differ:
            assert x == y, path

    walk(a, b, "")


# -----------------------------------------------------------------------------
# Any number of processes


def test_one_two_and_three_processes_and_two_nodes_agree(one):
    """Losses to 1e-5 over 20 steps, with accumulation, evaluation and HellaSwag; weights equal to
    the bit on all ranks whenever a forward pass begins, and at the end."""
    one.work(3, job("three", BASE, "--B=2"))
    done = one.torchrun(2, 1, job("nodes", BASE, "--B=3"))
    assert [status for status, _ in done] == [0, 0], done
    found = {}
    for name, world_size in (("one", 1), ("two", 2), ("three", 3), ("nodes", 2)):
        ended_well(one, name, world_size)
        found[name] = same(one, "one", name, 1e-5)
        assert "accumulation steps: 4" in one.result(name)["out"]
        if world_size > 1:
            digests = [one.result(name, r)["digests"] for r in range(world_size)]
            assert len(digests[0]) == 20 * 4 + 1 and len(set(digests[0])) == 21
            assert all(d == digests[0] for d in digests), name
    print("largest difference of a loss:", found)
    steps = {s for s, stream in one.log("one") if stream == "val"}
    assert steps == {0, 5, 10, 15, 20}
    assert {s for s, stream in one.log("one") if stream == "hella"} == steps
    losses = one.log("one")
    assert losses[19, "train"] < losses[0, "train"] - 0.5  # it was training


def test_another_micro_batch_on_two_processes(two):
    """B=1, accumulation 12: the same step."""
    ended_well(two, "two_b1", 2)
    same(two, "two", "two_b1", 1e-5, streams=("train", "norm"))
    digests = [two.result("two_b1", r)["digests"] for r in (0, 1)]
    assert digests[0] == digests[1] and len(digests[0]) == 20 * 12 + 1


# -----------------------------------------------------------------------------
# The optimizer's state, sharded


@pytest.mark.parametrize("name", ["zero", "muon_zero"])
def test_zero_gives_the_same_losses_and_the_same_checkpoint(two, name):
    plain = dict(zero="plain", muon_zero="muon")[name]
    for x in (name, plain):
        ended_well(two, x, 2)
        digests = [two.result(x, r)["digests"] for r in (0, 1)]
        assert digests[0] == digests[1] and len(set(digests[0])) == 13
    same(two, plain, name, 1e-6)
    for step in (8, 12):
        same_checkpoint(two, plain, name, step, 1e-7)
    saved = two.checkpoint(name, 12)
    assert set(saved["optimizer"]) == ({"muon", "adamw"} if "muon" in name else {"adamw"})


@pytest.mark.parametrize(
    "name, source, world_size",
    [
        ("zero_to_plain", "plain", 2),
        ("plain_to_zero", "plain", 2),
        ("zero_to_one", "plain", 1),
        ("muon_zero_to_zero", "muon", 2),
        ("muon_zero_to_one", "muon", 1),
    ],
)
def test_resume_with_and_without_zero(one, name, source, world_size):
    """From step 8 on as if nothing had happened, also where one process goes on for two."""
    ended_well(one, name, world_size)
    assert "resuming from" in one.result(name)["out"]
    same(one, source, name, 1e-6 if world_size == 2 else 1e-5, from_step=8)
    # one process adds up in another order, and Muon orthogonalizes in bfloat16
    tolerance = 1e-7 if world_size == 2 else 1e-3 if source == "muon" else 1e-5
    same_checkpoint(one, source, name, 12, tolerance)


# -----------------------------------------------------------------------------
# Compiled


@pytest.mark.skipif(not (shutil.which("gcc") or shutil.which("cc") or shutil.which("g++")),
                    reason="torch.compile needs a C++ compiler")  # fmt: skip
def test_compiled_on_two_processes(two):
    """The losses of the eager run, and one compilation on each rank, evaluation in between."""
    ended_well(two, "compiled", 2)
    for rank in (0, 1):
        names = two.result("compiled", rank)["compiled"]
        assert [x for x in names if x != "<lambda>"] == ["forward"]  # and can_compile's trial
    assert "compile on" in two.result("compiled")["out"]
    print("largest difference of a loss:", same(two, "eager", "compiled", 1e-4))


# -----------------------------------------------------------------------------
# What goes wrong


def test_a_failing_rank_ends_the_job(two):
    """Rank 1 raises in its sixth batch; its error is shown once, and no process stays behind."""
    start = time.monotonic()
    [(status, out)] = two.torchrun(1, 2, job("fails", SHORT, raise_at=[1, 6]), timeout=60)
    assert status != 0 and time.monotonic() - start < 45
    assert out.count("RuntimeError: injected fault") == 1, out


@pytest.mark.parametrize(
    "name, words",
    [
        ("flags", ["--max_lr", "0.003", "0.001", "rank 0", "rank 1"]),
        ("absent", ["--zero", "not given", "True", "rank 1"]),
        ("blind", ["rank 1", "shards"]),
        ("other", ["rank 1", "shards"]),
    ],
)
def test_ranks_that_differ_are_named(two, name, words):
    """One line from the main process, status 2 on all, and nothing written."""
    first, second = (two.result(name, rank) for rank in (0, 1))
    assert first.get("status") == second.get("status") == 2, (first, second)
    assert not first["group_left"] and not second["group_left"]
    assert len(first["err"].splitlines()) == 1 and second["err"] == "", (first, second)
    assert all(word in first["err"] for word in words), first["err"]
    assert not (two.folder / name).exists()


def test_total_batch_that_three_processes_do_not_divide(two):
    """Said once, before torchrun's own report, with the nearest totals that work."""
    flags = [x for x in TINY if not x.startswith("--B=")]
    done = train(*flags, f"--data={two.folder / 'shards'}", "--total_batch_size=100", "--B=2",
                 cwd=two.folder, processes=3)
    assert done.returncode != 0
    lines = done.stderr.splitlines()
    mine = [i for i, line in enumerate(lines) if "train_gpt2.py: error:" in line]
    assert len(mine) == 1, done.stderr
    assert all(re.search(rf"\b{x}\b", lines[mine[0]]) for x in ("100", "96", "192", "3"))
    report = [i for i, line in enumerate(lines) if "ChildFailedError" in line]
    assert report and mine[0] < report[0]
    assert not any("train_gpt2.py\", line" in line for line in lines)  # no traceback of ours
    assert "exitcode  : 2" in done.stderr


def main_in_environment(monkeypatch, capsys, *flags, **env):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR",
                 "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises(SystemExit) as stop:
        train_gpt2.main([*TINY, *flags])
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and len(err.splitlines()) == 1, err
    return err


def test_world_size_without_an_address(monkeypatch, capsys):
    err = main_in_environment(monkeypatch, capsys, RANK=0, LOCAL_RANK=0, WORLD_SIZE=2,
                              LOCAL_WORLD_SIZE=2)
    assert "WORLD_SIZE" in err and "MASTER_ADDR" in err and "torchrun" in err


def test_more_processes_than_gpus(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    err = main_in_environment(monkeypatch, capsys, "--device=cuda", RANK=2, LOCAL_RANK=2,
                              WORLD_SIZE=3, LOCAL_WORLD_SIZE=3, MASTER_ADDR="127.0.0.1",
                              MASTER_PORT=1)
    assert re.search(r"\b3\b", err) and re.search(r"\b2\b", err) and "nproc_per_node" in err
