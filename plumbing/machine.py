"""
The processes of a run and the device each of them has, on torch.distributed under torchrun.
"""

import contextlib
import ctypes
import logging
import math
import os
import platform
import signal
import sys
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed

from plumbing.errors import UserError, is_out_of_memory, one_line, rank, say, warn

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
    return {k: int(v) for k, v in env.items()}


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

    def check(self):
        """Raise Stopped on all processes where any of them wants to stop; all must call it."""
        self.agreed = self.agreed or sum(self.dist.sum([self.here()])) > 0
        self.raise_agreed()

    def raise_agreed(self):
        """Raise Stopped where all processes have agreed to stop."""
        if self.agreed:
            raise Stopped

    @property
    def status(self):
        return 128 + (self.signum or signal.SIGTERM)


# -----------------------------------------------------------------------------
# Optimizers, plain or shared out over the processes


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
    optimizer.load_state_dict(state)
    if hasattr(optimizer, "optim"):
        # ZeRO leaves the step counters on the CPU, where fused AdamW cannot use them, and a second
        # copy of the share in its own state.
        for p, values in optimizer.optim.state.items():
            if "step" in values:
                values["step"] = values["step"].to(p.device)
        optimizer.state.clear()


# -----------------------------------------------------------------------------
# The device


def best_dtype(dist):
    """bfloat16 where all devices do it well, float16 on older CUDA cards, else float32."""
    able, kind = all(dist.gather(has_bfloat16(dist.device))), dist.device.type
    if kind == "cuda" or not able:
        return "bfloat16" if able else "float16" if kind == "cuda" else "float32"
    # some CPUs are slower with it; that is measured, so one process decides for all
    return dist.broadcast(faster_dtype(dist.device) if dist.master_process else None)


def has_bfloat16(device):
    """Whether the device has instructions for it; a CPU has AMX, or AVX-512 with bfloat16."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    known = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, name, bool)() for name in known)


def faster_dtype(device):
    """bfloat16 where its products are 1.5 times as fast: what surrounds them gets no faster."""
    low, full = (measure_matmul(device, dtype, seconds=0.25)
                 for dtype in (torch.bfloat16, torch.float32))
    dtype = "bfloat16" if low >= 1.5 * full else "float32"
    say(f"dtype {dtype}: a product in bfloat16 takes {full / low:.2f} of float32's time")
    return dtype


def keep_freed_memory():
    """Let glibc keep what torch frees for the next step: a page that goes back to the system and is
    asked for again costs a fault, and a step of 124M has 130,000 of them."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # other systems have other ways
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no mapping by itself for a large tensor
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: give nothing back


def synchronize(device):
    """Wait for what was started on the device."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def measure_matmul(device, dtype, seconds=0.5):
    """FLOP/s that a large matrix product reaches on this device."""
    n = 8192 if device.type == "cuda" else 2048
    own = torch.Generator(device)  # a resume has restored the other one
    a, b = (torch.randn(n, n, device=device, generator=own).to(dtype) for _ in range(2))
    a @ b  # the first product on a GPU also loads its kernels
    best, spent = math.inf, 0.0
    synchronize(device)
    while spent < seconds:
        start = time.perf_counter()
        a @ b
        synchronize(device)
        took = time.perf_counter() - start
        best, spent = min(best, took), spent + took
    return 2 * n**3 / best


def device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()


# Dense bfloat16 TFLOP/s by the makers' data sheets; float16 on the T4 and the V100, which have no
# bfloat16. The first name that is part of the card's own counts.
DATA_SHEETS = {"B200": 2250, "GH200": 989, "H200": 989, "H100 NVL": 835, "H100 PCIe": 756,
               "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "A10": 125, "4090": 165,
               "3090": 71, "V100": 125, "T4": 65}


def share_of_peak(name, dtype, flops):
    """In words: the share of a known card's peak that `flops` are. What papers call MFU is the
    console's mfu times this."""
    peak = next((peak for card, peak in DATA_SHEETS.items() if card in name), None)
    if dtype == "float32" or peak is None:
        return ""
    return f", {flops / 1e10 / peak:.0f}% of the data sheet's {peak}"


def memory_bytes(device):
    """All the memory that the device has; math.inf where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return math.inf


def free_memory():
    """Bytes of the host's memory that may still be taken; math.inf where it is not known."""
    free = math.inf
    with contextlib.suppress(OSError), open("/proc/meminfo") as f:
        free = next((1024 * int(x.split()[1]) for x in f if x.startswith("MemAvailable")), free)
    # a container may have less; what it keeps of files it can let go
    with contextlib.suppress(OSError, ValueError):
        limit, used, kinds = (Path("/sys/fs/cgroup", name).read_text()
                              for name in ("memory.max", "memory.current", "memory.stat"))
        kinds = dict(line.split() for line in kinds.splitlines())
        files = int(kinds["active_file"]) + int(kinds["inactive_file"])
        free = min(free, int(limit) - int(used) + files)
    return free


def fits_gpu(attempt, size, n_bytes, device):
    """Whether attempt(size) runs beside n_bytes and a twentieth of the GPU's memory."""
    n_bytes += memory_bytes(device) // 20
    if os.name == "nt":  # there memory spills to the host instead of failing
        torch.cuda.set_per_process_memory_fraction(0.95, device)
    try:
        reserve = torch.empty(n_bytes, dtype=torch.uint8, device=device)
        attempt(size)
        synchronize(device)
        del reserve
        return True
    except RuntimeError as e:
        if not is_out_of_memory(e):
            raise
        return False
    finally:
        torch.cuda.empty_cache()


def attention_of_any_shape():
    """A context in which scaled_dot_product_attention leaves cuDNN alone: on Hopper it would plan
    for seconds for every new shape, and an evaluation has dozens. On a CPU it changes nothing."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION,
                        SDPBackend.MATH])


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
    if not cuda:
        # the compiled embedding backward adds atomically: without this no two runs are equal
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    return torch.compile(model), True


def can_compile(device):
    """Whether torch.compile works here; where it does not, a warning says why."""
    if rank():  # what the compiler warns of is said once
        logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=device))
        return True
    except Exception as e:  # whatever a missing gcc or Triton or an old GPU comes up with
        warn(f"--compile is off, torch.compile does not work here ({one_line(e)})")
        return False
