"""
The processes of a run and what they share, on torch.distributed under torchrun.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed

from plumbing.errors import UserError, say
from plumbing.hardware import can_compile, choose_device, keep_freed_memory

# -----------------------------------------------------------------------------
# Processes: one, or several under torchrun

GROUP_START_SECONDS = 300  # cold nodes take their time; a group that has not formed by then won't
COLLECTIVE_TIMEOUT = timedelta(minutes=30)  # one process may save this long while the others wait


@dataclass(frozen=True)
class Dist:
    """This process among all, and what they do together. One process is the plain case.

    No process that fails communicates any more (plumbing/errors.py), so these stand on the path
    of success only, in the same order on all processes.
    """

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def master_process(self):
        return self.rank == 0

    def sum(self, values):
        """Sum of a list of numbers over the processes, entry by entry."""
        if self.world_size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(total)
        return total.tolist()

    def broadcast(self, value):
        """The main process's value (anything that pickles)."""
        return self.gather(value if self.master_process else None)[0]

    def gather(self, value):
        """The values of all processes (anything that pickles), in the order of their ranks."""
        box = [value] * self.world_size
        if self.world_size > 1:
            torch.distributed.all_gather_object(box, value)
        return box

    def once_per_machine(self, fn):
        """fn() on one process of each machine while the others wait; the UserErrors it raised."""
        error = None
        if self.local_rank == 0:
            try:
                fn()
            except UserError as e:
                error = e
        return [e for e in self.gather(error) if e]

    def barrier(self):
        """Wait until every process is here: none of them has failed so far."""
        self.gather(None)

    def check_same(self, facts):
        """UserError on all processes where `facts`, {what: value}, are not the same on all."""
        everybody = self.gather(facts)
        for other_rank, other in enumerate(everybody):
            for name in sorted(everybody[0].keys() | other.keys()):
                first, here = (f.get(name, "not given") for f in (everybody[0], other))
                if repr(first) != repr(here):  # nan is not equal to itself
                    raise UserError(f"{name} is {first} on rank 0 but {here} on rank {other_rank}: "
                                    "start all processes alike")


@contextlib.contextmanager
def processes(device_name):
    """Yield this process's Dist, inside a process group where torchrun started several."""
    env = read_environment()
    device = choose_device(device_name, env["LOCAL_RANK"], env["LOCAL_WORLD_SIZE"])
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 where a product is float32
    else:
        keep_freed_memory()
    dist = Dist(env["RANK"], env["LOCAL_RANK"], env["WORLD_SIZE"], device)
    if dist.world_size == 1:
        yield dist
        return
    watchdog = threading.Timer(GROUP_START_SECONDS, give_up)
    watchdog.daemon = True
    watchdog.start()
    torch.distributed.init_process_group("nccl" if cuda else "gloo", timeout=COLLECTIVE_TIMEOUT,
                                         device_id=device if cuda else None)
    dist.barrier()
    watchdog.cancel()
    yield dist
    # Not after an error: a group that is taken down makes the others fail first, with a message
    # that hides the right one.
    torch.distributed.destroy_process_group()


def read_environment():
    """torchrun's numbers for this process, or those of one process alone."""
    defaults = dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1, LOCAL_WORLD_SIZE=1)
    env = {k: os.environ.get(k, str(v)) for k, v in defaults.items()}
    for name, value in env.items():
        if not value.isdigit():
            raise UserError(f"{name}={value} in the environment is not a number: start with "
                            "torchrun, or unset it")
    missing = {"RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} - os.environ.keys()
    if int(env["WORLD_SIZE"]) > 1 and missing:
        raise UserError(f"WORLD_SIZE is {env['WORLD_SIZE']} but {', '.join(sorted(missing))} is "
                        "not set: start with torchrun, or unset WORLD_SIZE")
    env = {k: int(v) for k, v in env.items()}
    if env["RANK"] >= env["WORLD_SIZE"]:
        raise UserError(f"RANK is {env['RANK']} but WORLD_SIZE is {env['WORLD_SIZE']}: start with "
                        "torchrun, or unset both")
    return env


def give_up():
    print(f"error: the processes did not find each other within {GROUP_START_SECONDS} s: check "
          "that all nodes run and reach the rendezvous endpoint; if NCCL hangs, try "
          "NCCL_P2P_DISABLE=1", file=sys.stderr, flush=True)
    os._exit(1)


# -----------------------------------------------------------------------------
# Signals

PARENT = os.getppid()  # torchrun, where it is alive


class Stopped(Exception):
    """A signal asked for the end. All processes raise it at the same place."""


class StopFlag:
    """Set by SIGTERM, Ctrl-C or the death of torchrun; a second signal stops at once."""

    def __init__(self, dist):
        self.dist = dist
        self.signum, self.since = 0, 0.0
        self.agreed = False  # all processes know

    def install(self):
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, self.catch)

    def catch(self, signum, frame):
        # Slurm signals both torchrun and its workers, and torchrun hands its own on: within a
        # second it is the same signal.
        if self.signum and time.monotonic() - self.since > 1:
            os._exit(128 + signum)
        if not self.signum:
            self.signum, self.since = signum, time.monotonic()

    def here(self):
        """Nonzero where this process wants to stop."""
        if "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != PARENT:
            self.signum = self.signum or signal.SIGTERM
        return self.signum

    def check(self):
        """Raise Stopped on all processes where any of them wants to stop; all must call it."""
        if sum(self.dist.sum([self.here()])):
            raise Stopped

    @property
    def status(self):
        return 128 + (self.signum or signal.SIGTERM)


# -----------------------------------------------------------------------------
# The model and its optimizers, plain or shared out over the processes


def wrap(model, dist, wants_compile):
    """(the model in DDP and then compiled, the order that torch wants; whether it is compiled).

    wants_compile: None = on CUDA.
    """
    cuda = dist.device.type == "cuda"
    if dist.world_size > 1:
        # 100 MB a message: fewer cuts through the compiled graph than with torch's 25
        model = torch.nn.parallel.DistributedDataParallel(
            model, device_ids=[dist.device.index] if cuda else None, gradient_as_bucket_view=True,
            bucket_cap_mb=100)
    wanted = cuda if wants_compile is None else wants_compile
    if not all(dist.gather(wanted and can_compile(dist.device))):
        return model, False
    if dist.device.type == "cpu":
        # the compiled embedding backward adds atomically: without this no two runs are equal
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    return torch.compile(model), True


def make_optimizer(kind, groups, zero, **settings):
    """One torch optimizer, or with its state sharded over the processes (ZeRO stage 1,
    Rajbhandari et al. 2020, arXiv 1910.02054)."""
    if not zero:
        return kind(groups, **settings)
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(groups, optimizer_class=kind, **settings)


def describe_muon(matrices, steps, zero):
    """Say what Muon's Newton-Schulz iteration costs: 4 m m n + 2 m m m per step of it and matrix
    (m rows, n columns, m <= n)."""
    sizes = [sorted(p.shape) for p in matrices]
    flops = steps * sum(4 * m * m * n + 2 * m**3 for m, n in sizes)
    share = "shared out over the processes" if zero else "done by each process; --zero shares it"
    say(f"using Muon for {len(matrices)} matrices: {flops / 1e12:.3g} TFLOP a step, {share}")


def optimizer_state(optimizer, dist):
    """The whole state_dict, on the main process, in the form it has when it is not sharded.

    Collected tensor by tensor: ZeroRedundancyOptimizer's own way pickles each process's share.
    """
    if not hasattr(optimizer, "optim"):
        return optimizer.state_dict()
    params = [p for group in optimizer.param_groups for p in group["params"]]
    mine = optimizer.optim.state
    owners = dist.sum([dist.rank if p in mine else 0 for p in params])
    # the main process holds at least the largest tensor: its state has the form of all the others
    template = next(iter(mine.values()), {})
    names = dist.broadcast([name for name, value in template.items() if value.dim()])
    states = {}
    for i, (p, owner) in enumerate(zip(params, owners, strict=True)):
        states[i] = {k: v.clone() for k, v in template.items() if not v.dim()}  # the step counter
        for name in names:
            tensor = mine[p][name] if owner == dist.rank else torch.empty_like(p)
            if owner and owner == dist.rank:
                torch.distributed.send(tensor, 0)
            elif owner and dist.master_process:
                torch.distributed.recv(tensor, int(owner))
            if dist.master_process:
                states[i][name] = tensor.detach().cpu()
    number = {id(p): i for i, p in enumerate(params)}
    groups = [group | {"params": [number[id(p)] for p in group["params"]]}
              for group in optimizer.param_groups]
    return {"state": states, "param_groups": groups}


def load_optimizer(optimizer, state):
    """Load a whole state_dict; with ZeRO each process keeps its share of it."""
    for here, group in zip(optimizer.param_groups, state["param_groups"], strict=True):
        if "fused" in here:  # as this device likes it, not the one that saved
            group["fused"] = here["fused"]
    optimizer.load_state_dict(state)
    if hasattr(optimizer, "optim"):
        # ZeRO leaves the step counters on the CPU, where fused AdamW cannot use them, and a second
        # copy of the share in its own state.
        for p, values in optimizer.optim.state.items():
            if "step" in values:
                values["step"] = values["step"].to(p.device)
        optimizer.state.clear()
