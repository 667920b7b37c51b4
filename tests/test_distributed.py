"""Several processes are one run: the same losses, the same weights, the same files.

Most jobs are forks with an environment as torchrun gives it; the two nodes are torchrun itself.
"""

import json
import shutil

import pytest
import torch
from conftest import TINY, read_log, write_shards
from processes import free_port

# Accumulation 4 on 1, 2 and 3 processes: B is 6, 3 and 2. 20 steps are more than two epochs.
BASE = [
    *TINY, "--data=shards", "--shuffle=windows", "--total_batch_size=384", "--max_steps=20",
    "--eval_every=10", "--val_tokens=500", "--save_every=0", "--checkpoint_every=8",
    "--block_size=64", "--hellaswag=18",
]  # fmt: skip
# Shorter and smaller: 12 steps, checkpoints at 8 and 12.
SHORT = [*TINY, "--data=shards", "--save_every=0", "--B=4", "--val_tokens=256", "--eval_every=12"]
MUON = [*SHORT, "--optimizer=muon"]
COMPILED = [*SHORT, "--n_layer=1", "--eval_every=4", "--max_steps=8", "--checkpoint_every=0"]

# {name: (processes, flags, the job whose step 8 it goes on from)}
JOBS = {
    "one": (1, [*BASE, "--B=6"], None),
    "two": (2, [*BASE, "--B=3"], None),
    "three": (3, [*BASE, "--B=2"], None),
    "two_b1": (2, [*BASE, "--B=1", "--eval_every=20", "--hellaswag=0"], None),
    "plain": (2, SHORT, None),
    "zero": (2, [*SHORT, "--zero"], None),
    "zero_to_plain": (2, SHORT, "zero"),
    "plain_to_zero": (2, [*SHORT, "--zero"], "plain"),
    "zero_to_one": (1, [*SHORT, "--B=2"], "zero"),
    "muon": (2, MUON, None),
    "muon_zero": (2, [*MUON, "--zero"], None),
    "muon_zero_to_zero": (2, [*MUON, "--zero"], "muon_zero"),
    "muon_zero_to_one": (1, [*MUON, "--zero"], "muon_zero"),
    "eager": (2, [*COMPILED, "--no-compile"], None),
    "compiled": (2, [*COMPILED, "--compile"], None),
}

SEE = """
import hashlib, numpy as np, plumbing.tokens, torch, torch.nn.parallel

class Small(plumbing.tokens.Tokenizer):  # for GPT-2's, so that the model can be tiny
    def __init__(self, *_):
        super().__init__()
        self.name = "gpt2"

plumbing.tokens.Tokenizer = Small
plumbing.tokens.load_bpe = lambda timeout: (None, None)
plumbing.tokens.get_tokenizer = lambda *_: Small()

DDP, wrapped, digests = torch.nn.parallel.DistributedDataParallel, [], []
real_init, real_forward = DDP.__init__, DDP.forward

def init(self, module, *args, **kwargs):
    wrapped.append(module)
    real_init(self, module, *args, **kwargs)

def digest():
    h = hashlib.sha256()
    for p in wrapped[-1].parameters():
        h.update(p.detach().numpy().tobytes())
    digests.append(h.hexdigest()[:16])

def forward(self, *args, **kwargs):
    digest()
    return real_forward(self, *args, **kwargs)

DDP.__init__ = init
if "--compile" not in job["flags"]:
    DDP.forward = forward

def tell():
    if wrapped:
        digest()
    metrics = torch._dynamo.utils.get_compilation_metrics()
    return dict(digests=digests, group_left=torch.distributed.is_initialized(),
                compiled=[m.co_name for m in metrics if m.graph_op_count])

at_end(tell)
"""


class Jobs:
    """Jobs that several tests look at: each is done when it is first asked for."""

    def __init__(self, forks, folder):
        self.forks, self.folder, self.done = forks, folder, {}
        write_shards(folder / "shards", sizes=(1111, 777, 1500))
        with open(folder / "hellaswag.jsonl", "w") as f:
            for i in range(18):
                endings = [f"sits in a {word}." for word in ("tree", "boat", "train", "sack")]
                example = dict(ctx=f"The cat number {i * i}", label=i % 4,
                               endings=endings[i % 3 :] + endings[: i % 3])
                f.write(json.dumps(example) + "\n")
        self.env = dict(HELLASWAG_FILE=str(folder / "hellaswag.jsonl"),
                        TORCHINDUCTOR_COMPILE_THREADS="1")

    def __getitem__(self, name):
        """Its runs by rank, which have ended well."""
        if name not in self.done:
            n, flags, source = JOBS[name]
            if source:
                assert self[source]
                (self.folder / name).mkdir()
                shutil.copy(self.folder / source / "model_00008.pt", self.folder / name / "last.pt")
                flags = [*flags, "--resume"]
            self.done[name] = self.forks.ranks(n, *flags, f"--log_dir={name}", cwd=self.folder,
                                               patch=SEE, **self.env).end()
        runs = self.done[name].good()
        assert not any(run.told["group_left"] for run in runs)
        assert runs[0].stderr == "" or name == "compiled"  # the compiler has things to say
        return runs

    def log(self, name):
        return {k: float(v) for k, v in read_log(self.folder / name).items()}

    def checkpoint(self, name, step):
        return torch.load(self.folder / name / f"model_{step:05d}.pt", weights_only=True)


@pytest.fixture(scope="module")
def jobs(forks, tmp_path_factory):
    return Jobs(forks, tmp_path_factory.mktemp("jobs"))


def same(jobs, a, b, tolerance, streams=("train", "norm", "val", "hella"), from_step=0):
    """The logs of two jobs agree from a step on; returns the largest difference of a loss."""
    a, b = ({k: v for k, v in jobs.log(x).items() if k[0] >= from_step and k[1] in streams}
            for x in (a, b))
    assert a.keys() == b.keys() and len(a) > 3
    # log.txt has 6 digits of a training loss and 4 of the others
    rounding = dict(train=1.1e-6, val=1.1e-4, hella=1e-9, norm=1.1e-4)
    apart = {k: abs(a[k] - b[k]) for k in a}
    bad = {k: d for k, d in apart.items() if d > tolerance + rounding[k[1]]}
    assert not bad, bad
    return max(d for (_, stream), d in apart.items() if stream == "train")


def same_checkpoint(jobs, a, b, step, tolerance=0.0):
    """The same form and the same values, weights and optimizer state."""
    a, b = (jobs.checkpoint(x, step) for x in (a, b))
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


@pytest.mark.parametrize("name, processes", [("one", 1), ("two", 2), ("three", 3)])
def test_one_two_and_three_processes_agree(jobs, name, processes):
    """Losses to 1e-5 over 20 steps, with accumulation, evaluation and HellaSwag; weights equal to
    the bit on all ranks whenever a forward pass begins, and at the end."""
    runs, losses = jobs[name], jobs.log("one") if jobs["one"] else {}
    assert "accumulation steps: 4" in runs[0].stdout
    print("largest difference of a loss:", same(jobs, "one", name, 1e-5))
    if processes > 1:
        digests = [run.told["digests"] for run in runs]
        assert len(digests[0]) == 20 * 4 + 1 and len(set(digests[0])) == 21
        assert all(d == digests[0] for d in digests)
    assert {s for s, stream in losses if stream == "val"} == {0, 10, 20}
    assert {s for s, stream in losses if stream == "hella"} == {0, 10, 20}
    assert losses[19, "train"] < losses[0, "train"] - 0.5  # it was training


def test_two_nodes_agree(jobs):
    """Two agents of torchrun, each with one process, as two machines have them."""
    assert jobs["one"]
    options = ["--nnodes=2", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{free_port()}",
               "--rdzv_id=test", "--local_addr=127.0.0.1"]
    nodes = [jobs.forks.torchrun(1, *BASE, "--B=3", "--log_dir=nodes", cwd=jobs.folder, patch=SEE,
                                 options=options, **jobs.env) for _ in range(2)]
    digests = [node.end().good().told["digests"] for node in nodes]
    assert digests[0] == digests[1] and len(set(digests[0])) == 21
    print("largest difference of a loss:", same(jobs, "one", "nodes", 1e-5))


def test_another_micro_batch_on_two_processes(jobs):
    """B=1, accumulation 12: the same step."""
    runs = jobs["two"] and jobs["two_b1"]
    same(jobs, "two", "two_b1", 1e-5, streams=("train", "norm"))
    digests = [run.told["digests"] for run in runs]
    assert digests[0] == digests[1] and len(digests[0]) == 20 * 12 + 1


# -----------------------------------------------------------------------------
# The optimizer's state, sharded


@pytest.mark.parametrize("name", ["zero", "muon_zero"])
def test_zero_gives_the_same_losses_and_the_same_checkpoint(jobs, name):
    plain = dict(zero="plain", muon_zero="muon")[name]
    for x in (name, plain):
        digests = [run.told["digests"] for run in jobs[x]]
        assert digests[0] == digests[1] and len(set(digests[0])) == 13
    same(jobs, plain, name, 1e-6)
    for step in (8, 12):
        same_checkpoint(jobs, plain, name, step, 1e-7)
    saved = jobs.checkpoint(name, 12)
    assert set(saved["optimizer"]) == ({"muon", "adamw"} if "muon" in name else {"adamw"})


@pytest.mark.parametrize("name, source, world_size", [
    ("zero_to_plain", "plain", 2),
    ("plain_to_zero", "plain", 2),
    ("zero_to_one", "plain", 1),
    ("muon_zero_to_zero", "muon", 2),
    ("muon_zero_to_one", "muon", 1),
])  # fmt: skip
def test_resume_with_and_without_zero(jobs, name, source, world_size):
    """From step 8 on as if nothing had happened, also where one process goes on for two."""
    assert "resuming from" in jobs[name][0].stdout and jobs[source]
    same(jobs, source, name, 1e-6 if world_size == 2 else 1e-5, from_step=8)
    # one process adds up in another order, and Muon orthogonalizes in bfloat16
    tolerance = 1e-7 if world_size == 2 else 1e-3 if source == "muon" else 1e-5
    same_checkpoint(jobs, source, name, 12, tolerance)


# -----------------------------------------------------------------------------
# Compiled


@pytest.mark.skipif(not (shutil.which("gcc") or shutil.which("cc") or shutil.which("g++")),
                    reason="torch.compile needs a C++ compiler")  # fmt: skip
@pytest.mark.timeout(1200)
def test_compiled_on_two_processes(jobs):
    """The losses of the eager run; on each rank one compilation to train and one to validate."""
    for run in jobs["compiled"]:
        names = run.told["compiled"]
        assert [x for x in names if x != "<lambda>"] == ["forward"] * 2  # and can_compile's trial
    assert "compile on" in jobs["compiled"][0].stdout and jobs["eager"]
    print("largest difference of a loss:", same(jobs, "eager", "compiled", 1e-4))
