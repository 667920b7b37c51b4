"""
The processes of a run and the device each of them has, on torch.distributed under torchrun.
"""

import contextlib
import logging
import math
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed

from common import AgreedError, RunError, UserError, is_main_process, one_line, warn

# -----------------------------------------------------------------------------
# Processes: one, or several under torchrun

GROUP_START_SECONDS = 60  # a process group that has not formed by then never will
COLLECTIVE_TIMEOUT = timedelta(minutes=30)  # one process may save this long while the others wait


@dataclass(frozen=True)
class Dist:
    """This process among all, and what they do together. One process is the plain case."""

    rank: int
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

    def check_same(self, flags, fix="start all processes with the same flags"):
        """All processes must have the same flags, a dict."""
        everybody = self.gather(flags)
        for rank, other in enumerate(everybody):
            for name in sorted(everybody[0].keys() | other.keys()):
                first, here = (f.get(name, "not given") for f in (everybody[0], other))
                if repr(first) != repr(here):  # nan is not equal to itself
                    raise AgreedError(f"--{name} is {first} on rank 0 but {here} on rank {rank}: "
                                      + fix)

    def together(self, fn, *args):
        """fn(*args) on every process; a UserError or RunError of any of them is raised on all.

        fn must not communicate: a process that fails would leave the others waiting.
        """
        result = error = None
        try:
            result = fn(*args)
        except (UserError, RunError) as e:
            error = (AgreedError if isinstance(e, UserError) else RunError), str(e)
        errors = self.gather(error)
        for rank, failure in enumerate(errors):
            if failure:
                where = "" if rank == 0 or all(errors) else f"on rank {rank}: "
                raise failure[0](where + failure[1])
        return result


def choose_device(name, local_rank, local_world_size):
    """The device of this process: what was asked for, or the best there is."""
    has_mps = torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else (
            "mps" if has_mps and local_world_size == 1 else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cuda", "mps", "cpu") or (index and not (kind == "cuda" and index.isdigit())):
        raise UserError(f"--device {name}: choose cuda, cuda:0, cuda:1, ..., mps or cpu")
    if kind == "mps" and not has_mps:
        raise UserError("--device mps: this torch sees no Apple GPU; use --device cpu")
    if local_world_size > 1 and (index or kind == "mps"):
        raise UserError(f"--device {name}: several processes need --device cuda or --device cpu")
    if kind != "cuda":
        return torch.device(kind)
    count = torch.cuda.device_count()
    if count == 0:
        raise UserError(f"--device {name}: no CUDA device is there; use --device cpu")
    if local_world_size > count:
        raise UserError(f"{local_world_size} processes on this machine but {count} GPUs: start "
                        f"--nproc_per_node={count}")
    if int(index or local_rank) >= count:
        raise UserError(f"--device {name}: there are {count} CUDA devices, 0 to {count - 1}")
    return torch.device("cuda", int(index or local_rank))


@contextlib.contextmanager
def processes(device_name):
    """Yield this process's Dist, inside a process group where torchrun started several."""
    defaults = dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1, LOCAL_WORLD_SIZE=1)
    env = {k: os.environ.get(k, str(v)) for k, v in defaults.items()}
    for name, value in env.items():
        if not value.isdigit():
            raise UserError(f"{name}={value} in the environment is not a number: start with "
                            "torchrun, or unset it")
    env = {k: int(v) for k, v in env.items()}
    world_size = env["WORLD_SIZE"]
    missing = {"RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} - os.environ.keys()
    if world_size > 1 and missing:
        raise UserError(f"WORLD_SIZE is {world_size} but {', '.join(sorted(missing))} is not set: "
                        "start with torchrun")
    device = choose_device(device_name, env["LOCAL_RANK"], env["LOCAL_WORLD_SIZE"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 where a product is float32
    dist = Dist(env["RANK"], world_size, device)
    if world_size == 1:
        yield dist
        return
    watchdog = threading.Timer(GROUP_START_SECONDS, give_up)
    watchdog.daemon = True
    watchdog.start()
    done = False
    try:
        torch.distributed.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", timeout=COLLECTIVE_TIMEOUT,
            device_id=device if device.type == "cuda" else None)
        dist.gather(None)
        watchdog.cancel()
        yield dist
        done = True
    finally:
        watchdog.cancel()
        # After an error NCCL could wait here for processes that are gone: run_main ends it hard.
        if torch.distributed.is_initialized() and (done or device.type == "cpu"):
            torch.distributed.destroy_process_group()


def give_up():
    print(f"error: the processes did not find each other within {GROUP_START_SECONDS} s: check "
          "that all nodes run and reach the rendezvous endpoint; if NCCL hangs, try "
          "NCCL_P2P_DISABLE=1", file=sys.stderr, flush=True)
    os._exit(1)


PARENT = os.getppid()  # torchrun, where it is alive


class StopFlag:
    """Set by SIGTERM, Ctrl-C or the death of torchrun; a second signal stops at once."""

    def __init__(self):
        self.signum, self.since = 0, 0.0
        self.agreed = False  # all processes know
        self.elastic = "TORCHELASTIC_RUN_ID" in os.environ

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
        if self.elastic and os.getppid() != PARENT:
            self.signum = self.signum or signal.SIGTERM
        return self.signum

    def anywhere(self, dist):
        """Whether any process wants to stop; all must call it."""
        self.agreed = sum(dist.sum([self.here()])) > 0
        return self.agreed

    @property
    def status(self):
        return 128 + (self.signum or signal.SIGTERM)


# -----------------------------------------------------------------------------
# The device


def make_optimizer(kind, groups, zero, **settings):
    """One torch optimizer, or with its state sharded over the processes (ZeRO stage 1,
    Rajbhandari et al. 2020, arXiv 1910.02054)."""
    if not zero:
        return kind(groups, **settings)
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(groups, optimizer_class=kind, **settings)


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
    optimizer.load_state_dict(state)
    if hasattr(optimizer, "optim"):
        # ZeRO leaves the step counters on the CPU, where fused AdamW cannot use them, and a second
        # copy of the share in its own state.
        for p, values in optimizer.optim.state.items():
            if "step" in values:
                values["step"] = values["step"].to(p.device)
        optimizer.state.clear()


def best_dtype(device):
    """bfloat16 where the device does it well, float16 on older CUDA cards, else float32."""
    if device.type != "cuda":
        return "float32"
    return "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float16"


def synchronize(device):
    """Wait for what was started on the device."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def measure_matmul(device, dtype):
    """FLOP/s that a large matrix product reaches on this device; takes about half a second."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    best, spent = math.inf, 0.0
    synchronize(device)
    while spent < 0.5:
        start = time.perf_counter()
        a @ b
        synchronize(device)
        seconds = time.perf_counter() - start
        best, spent = min(best, seconds), spent + seconds
    return 2 * n**3 / best


def fits_gpu(attempt, n_bytes, device):
    """Whether attempt() runs beside n_bytes and a twentieth of the GPU's memory."""
    n_bytes += torch.cuda.get_device_properties(device).total_memory // 20
    try:
        reserve = torch.empty(n_bytes, dtype=torch.uint8, device=device)
        attempt()
        synchronize(device)
        del reserve
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        torch.cuda.empty_cache()


def can_compile(device):
    """Whether torch.compile works here; where it does not, a warning says why."""
    if not is_main_process():  # what the compiler warns of is said once
        logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=device))
        return True
    except Exception as e:  # whatever a missing gcc or Triton or an old GPU comes up with
        warn(f"--compile is off, torch.compile does not work here ({one_line(e)})")
        return False
