"""Several ranks are one run: the same losses, the same weights, the same files.

Most jobs are forks with the environment that torchrun sets; the two nodes are torchrun itself.
"""

import json
import re
import shutil

import pytest
import torch
from conftest import TINY, read_log, write_shards
from processes import free_port
from torch.utils._pytree import keystr, tree_flatten_with_path

# Accumulation 4 on 1, 2 and 3 ranks: B is 6, 3 and 2. 20 steps are more than two epochs.
BASE = [*TINY, "--data=shards", "--shuffle=windows", "--total_batch_size=384", "--max_steps=20",
        "--eval_every=10", "--val_tokens=500", "--save_every=0", "--block_size=64", "--hellaswag=18"]
# Shorter and smaller: 12 steps, checkpoints at 8 and 12.
SHORT = [*TINY, "--data=shards", "--save_every=0", "--B=4", "--val_tokens=256", "--eval_every=12"]
MODERN = [*(f for f in SHORT if not re.match("--(max_lr|warmup)", f)), "--total_batch_size=192"]
COMPILED = [*SHORT, "--n_layer=1", "--eval_every=4", "--max_steps=8", "--checkpoint_every=0"]

# {name: (ranks, flags, the job whose step 8 it resumes)}; "modern..." runs modern.py
JOBS = {
    "one": (1, [*BASE, "--B=6"], None),
    "two": (2, [*BASE, "--B=3"], None),
    "three": (3, [*BASE, "--B=2"], None),
    "two_b1": (2, [*BASE, "--B=1"], None),
    "plain": (2, SHORT, None),
    "zero": (2, [*SHORT, "--zero"], None),
    "zero_to_plain": (2, SHORT, "zero"),
    "plain_to_zero": (2, [*SHORT, "--zero"], "plain"),
    "zero_to_one": (1, [*SHORT, "--B=2"], "zero"),
    "modern": (2, [*MODERN, "--B=2"], None),
    "modern_zero": (2, [*MODERN, "--B=2", "--zero"], None),
    "modern_zero_to_zero": (2, [*MODERN, "--B=2", "--zero"], "modern_zero"),
    "modern_zero_to_one": (1, [*MODERN, "--zero"], "modern_zero"),
    "eager": (2, [*COMPILED, "--no-compile"], None),
    "compiled": (2, [*COMPILED, "--compile"], None),
}

# GPT-2's tokenizer is replaced by bytes under its name, so that the model can be tiny. DDP records a
# digest of the weights before each forward pass of the training, and at the end.
RECORD = """
import hashlib, torch, torch.nn.parallel, train_gpt2

use_bytes(name="gpt2")

DDP, modules, digests = torch.nn.parallel.DistributedDataParallel, [], []
real_forward = DDP.forward

def digest():
    weights = b"".join(p.detach().numpy().tobytes() for p in modules[0].parameters())
    digests.append(hashlib.sha256(weights).hexdigest()[:16])

def forward(self, *args, **kwargs):
    modules[:] = [self.module]
    if torch.is_grad_enabled():
        digest()
    return real_forward(self, *args, **kwargs)

if "--compile" not in job["flags"]:
    DDP.forward = forward

def result():
    if modules:
        digest()
    metrics = torch._dynamo.utils.get_compilation_metrics()
    return dict(digests=digests, group_left=torch.distributed.is_initialized(),
                compiled=[m.co_name for m in metrics if m.graph_op_count])

at_exit(result)
"""


class Jobs:
    """Jobs that several tests use; each runs when it is first needed."""

    def __init__(self, forks, folder):
        self.forks, self.folder, self.done = forks, folder, {}
        write_shards(folder / "shards", sizes=(1111, 777, 1500))
        endings = [f"sits in a {word}." for word in ("tree", "boat", "train", "sack")]
        examples = [dict(ctx=f"Cat number {i * i}", endings=endings[i % 3:] + endings[:i % 3], label=i % 4)
                    for i in range(18)]
        file = folder / "hellaswag.jsonl"
        file.write_text("\n".join(map(json.dumps, examples)))
        self.env = dict(HELLASWAG_FILE=str(file), TORCHINDUCTOR_COMPILE_THREADS="1")

    def __getitem__(self, name):
        """The runs of a job by rank, after a successful end."""
        if name not in self.done:
            n, flags, source = JOBS[name]
            if source:
                assert self[source]
                (self.folder / name).mkdir()
                shutil.copy(self.folder / source / "model_00008.pt", self.folder / name / "last.pt")
                flags = [*flags, "--resume"]
            script = "modern" if "modern" in name else None
            self.done[name] = self.forks.ranks(n, *flags, f"--log_dir={name}", cwd=self.folder, patch=RECORD,
                                               script=script, **self.env).end()
        runs = self.done[name].good()
        assert not any(run.result["group_left"] for run in runs)
        assert runs[0].stderr == "" or name == "compiled"  # the compiler prints warnings
        return runs

    def log(self, name, streams=("train", "norm", "val", "hella")):
        return {k: float(v) for k, v in read_log(self.folder / name).items() if k[1] in streams}


@pytest.fixture(scope="module")
def jobs(forks, tmp_path_factory):
    return Jobs(forks, tmp_path_factory.mktemp("jobs"))


def same_log(a, b, tolerance):
    assert a.keys() == b.keys() and len(a) > 3
    # log.txt has 6 digits of a training loss and 4 of the others
    rounding = dict(train=1.1e-6, val=1.1e-4, hella=1e-9, norm=1.1e-4)
    assert not {k: (a[k], b[k]) for k in a if abs(a[k] - b[k]) > tolerance + rounding[k[1]]}


def same_checkpoint(jobs, a, b, step, tolerance):
    """Assert the same structure and the same values of two checkpoints, optimizer state included."""
    a, b = (torch.load(jobs.folder / x / f"model_{step:05d}.pt", weights_only=True) for x in (a, b))
    a, b = ({keystr(path): leaf for path, leaf in tree_flatten_with_path(x)[0]} for x in (a, b))
    assert a.keys() == b.keys()
    flags = {f"['flags']['{name}']" for name in ("zero", "log_dir", "resume", "B")}
    for path in a.keys() - flags - {"['rng']", "['val_loss']"}:
        if isinstance(a[path], torch.Tensor):
            torch.testing.assert_close(a[path], b[path], rtol=0, atol=tolerance)
        else:
            assert (type(a[path]), a[path]) == (type(b[path]), b[path]), path


@pytest.mark.parametrize("name, accumulation", [("one", 4), ("two", 4), ("three", 4), ("two_b1", 12)])
def test_one_two_and_three_processes_agree(jobs, name, accumulation):
    """Losses to 1e-5 over 20 steps, with evaluation and HellaSwag; weights bit-equal on all ranks before each
    forward pass and at the end."""
    runs, losses = jobs[name], jobs.log("one") if jobs["one"] else {}
    assert f"accumulation steps: {accumulation}" in runs[0].stdout
    same_log(losses, jobs.log(name), 1e-5)
    digests = [run.result["digests"] for run in runs]
    assert all(d == digests[0] for d in digests)
    if name != "one":
        assert len(digests[0]) == 20 * accumulation + 1 and len(set(digests[0])) == 21
    for evaluation in ("val", "hella"):
        assert {step for step, stream in losses if stream == evaluation} == {0, 10, 20}
    assert losses[19, "train"] < losses[0, "train"] - 0.5  # it learned


def test_two_nodes_agree(jobs):
    """Two agents of torchrun with one rank each, as on two machines."""
    assert jobs["one"]
    options = ["--nnodes=2", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{free_port()}",
               "--rdzv_id=test", "--local_addr=127.0.0.1"]
    nodes = [jobs.forks.torchrun(1, *BASE, "--B=3", "--log_dir=nodes", cwd=jobs.folder, patch=RECORD,
                                 options=options, **jobs.env) for _ in range(2)]
    digests = [node.end().good().result["digests"] for node in nodes]
    assert digests[0] == digests[1] and len(set(digests[0])) == 21
    same_log(jobs.log("one"), jobs.log("nodes"), 1e-5)


@pytest.mark.parametrize("name, plain", [("zero", "plain"), ("modern_zero", "modern")])
def test_zero_gives_the_same_losses_and_the_same_checkpoint(jobs, name, plain):
    for x in (name, plain):
        digests = [run.result["digests"] for run in jobs[x]]
        assert digests[0] == digests[1] and len(set(digests[0])) == 13
    same_log(jobs.log(plain), jobs.log(name), 1e-6)
    for step in (8, 12):
        same_checkpoint(jobs, plain, name, step, 1e-7)


@pytest.mark.parametrize("name, source, ranks", [
    ("zero_to_plain", "plain", 2), ("plain_to_zero", "plain", 2), ("zero_to_one", "plain", 1),
    ("modern_zero_to_zero", "modern", 2), ("modern_zero_to_one", "modern", 1),
])  # fmt: skip
def test_resume_with_and_without_zero(jobs, name, source, ranks):
    """From step 8 on the same as without an interruption, also if one rank resumes a run of two."""
    assert "resuming from" in jobs[name][0].stdout and jobs[source]
    # the log of a resumed run starts at step 8
    before = {k: v for k, v in jobs.log(source).items() if k[0] >= 8}
    same_log(before, jobs.log(name), 1e-6 if ranks == 2 else 1e-5)
    # one rank adds in another order, and Muon orthogonalizes in bfloat16
    same_checkpoint(jobs, source, name, 12, 1e-7 if ranks == 2 else 1e-3 if source == "modern" else 1e-5)


@pytest.mark.skipif(not any(map(shutil.which, ("gcc", "cc", "g++"))), reason="torch.compile needs a compiler")
@pytest.mark.timeout(1200)
def test_compiled_on_two_ranks(jobs):
    """The losses of the eager run; each rank compiles once to train and once to validate."""
    for run in jobs["compiled"]:
        names = run.result["compiled"]
        assert [x for x in names if x != "<lambda>"] == ["forward"] * 2  # and that of can_compile()
    assert "compile on" in jobs["compiled"][0].stdout and jobs["eager"]
    same_log(jobs.log("eager"), jobs.log("compiled"), 1e-4)
