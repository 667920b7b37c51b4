"""
The device of a process: which one, and what it is able to do.
"""

import contextlib
import ctypes
import logging
import math
import os
import platform
import re
import time
from pathlib import Path

import torch

from plumbing.errors import UserError, is_out_of_memory, one_line, rank, say, warn


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


def attention_of_any_shape():
    """A context in which scaled_dot_product_attention leaves cuDNN alone: on Hopper it would plan
    for seconds for every new shape, and an evaluation has dozens. On a CPU it changes nothing."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION,
                        SDPBackend.MATH])


def product(a, b, kind):
    """a @ b, in parts on an Apple GPU: an M1's or M2's adds to sums of 32,767 terms and more what
    lies in memory behind a and b (github.com/pytorch/pytorch/issues/195163)."""
    if kind != "mps":
        return a @ b
    return sum(x @ y for x, y in zip(a.split(16384, dim=1), b.split(16384), strict=True))


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


# -----------------------------------------------------------------------------
# What it does well, and how fast


def best_dtype(dist):
    """bfloat16 where all devices do it well, float16 on older CUDA cards, else float32."""
    able, kind = all(dist.gather(has_bfloat16(dist.device))), dist.device.type
    if kind == "cuda" or not able:
        return "bfloat16" if able else "float16" if kind == "cuda" else "float32"
    # some CPUs are slower with it; that is measured, so one process decides for all
    return dist.broadcast(faster_dtype(dist.device) if dist.master_process else None)


def has_bfloat16(device):
    """Whether the device has instructions for it; a CPU has AMX, or AVX-512 with bfloat16."""
    if device.type == "cuda" and torch.version.hip:  # AMD's have names in place of a capability
        arch = torch.cuda.get_device_properties(device).gcnArchName
        return not re.match("gfx(8|90[02469c]|10)", arch)
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


def synchronize(device):
    """Wait for what was started on the device."""
    getattr(torch, device.type).synchronize()  # on a CPU there is nothing to wait for


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
# bfloat16. The first that is a word of the card's name counts.
DATA_SHEETS = {"B200": 2250, "GH200": 989, "H200 NVL": 835, "H200": 989, "H100 NVL": 835,
               "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "A10": 125,
               "RTX 4090(?! Laptop| D)": 165, "RTX 3090(?! Ti)": 71, "V100": 125, "T4": 65}


def share_of_peak(name, dtype, flops):
    """In words: the share of a known card's peak that `flops` are. What papers call MFU is the
    console's mfu times this."""
    peaks = (peak for card, peak in DATA_SHEETS.items() if re.search(rf"\b{card}\b", name))
    peak = next(peaks, None)
    if dtype == "float32" or peak is None:
        return ""
    return f", {flops / 1e10 / peak:.0f}% of the data sheet's {peak}"


# -----------------------------------------------------------------------------
# Memory


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


def keep_freed_memory():
    """Let glibc keep what torch frees for the next step: a page that goes back to the system and is
    asked for again costs a fault, and a step of 124M has 130,000 of them."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # other systems have other ways
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no mapping by itself for a large tensor
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: give nothing back
