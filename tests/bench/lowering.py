"""
Predicts, without a GPU, what the compiled step does on one, from the compiler's own output.

    python tests/bench/lowering.py                        # 124M, B=64, T=1024; a few minutes
    python tests/bench/lowering.py --against HEAD~1       # and the same of another commit
    python tests/bench/lowering.py --check 75 89 90       # with triton: build the kernels, too

The model of train_gpt2.py goes through torch.compile with tensors that only claim to be on a GPU,
as far as the code of the kernels. Printed for the forward and the backward pass, and for a forward
pass without gradients as a validation has it: kernels launched, bytes that they read and write, and
the most memory alive at once (weights not counted). Works with the CPU build of torch 2.13; it
needs g++, and leans on the compiler's inner parts, so another version may break it.
"""

import argparse
import contextlib
import ctypes
import importlib.util
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
CARD = dict(name="NVIDIA H100 80GB HBM3", type="cuda", multi_processor_count=132, warp_size=32,
            total_memory=80 * 10**9, max_threads_per_multi_processor=2048, gcnArchName="",
            regs_per_multiprocessor=65536, max_threads_per_block=1024, L2_cache_size=50 * 2**20,
            shared_memory_per_block=49152, shared_memory_per_block_optin=232448,
            shared_memory_per_multiprocessor=233472, clock_rate=1980000,
            memory_clock_rate=2619000, memory_bus_width=5120)  # fmt: skip

# What autograd, in C++, asks of CUDA: that there is one device and that nothing runs on it.
PRETENCE = """
#include <ATen/DeviceAccelerator.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/FakeGuardImpl.h>
using c10::DeviceType;
static c10::impl::FakeGuardImpl<DeviceType::CUDA> guard;
static bool known = [] {
  c10::impl::device_guard_impl_registry[(size_t)DeviceType::CUDA].store(&guard);
  return true;
}();
namespace at::accelerator {
std::optional<DeviceType> getAccelerator(bool) { return DeviceType::CUDA; }
}
namespace at {
struct CUDAHooks : CUDAHooksInterface {
  CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return false; }
  DeviceIndex deviceCount() const override { return 1; }
};
REGISTER_CUDA_HOOKS(CUDAHooks);
}
"""


def pretend():
    """Load PRETENCE; before torch, so that torch's own functions find these first."""
    torch = Path(importlib.util.find_spec("torch").origin).parent
    with tempfile.TemporaryDirectory() as tmp:
        source, library = Path(tmp, "cuda.cpp"), Path(tmp, "cuda.so")
        source.write_text(PRETENCE)
        subprocess.run(
            ["g++", "-std=c++20", "-shared", "-fPIC", source, "-o", library,
             "-I", torch / "include", "-I", torch / "include/torch/csrc/api/include",
             "-L", torch / "lib", f"-Wl,-rpath,{torch / 'lib'}", "-Wl,--no-as-needed",
             "-lc10", "-ltorch_cpu"], check=True)  # fmt: skip
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


class Lowered(Exception):
    """The graph has been lowered; nothing is there to run it on."""


@contextlib.contextmanager
def lowering(found):
    """A context in which torch.compile stops behind the code of its kernels; `found` gets a dict
    for each graph."""
    import torch
    from torch._functorch import config as autograd_config
    from torch._inductor import config

    def flash(q, k, v, attn_mask=None, is_causal=False, scale=None):
        return torch.ops.aten._scaled_dot_product_flash_attention(
            q, k, v, 0.0, is_causal, scale=scale)[0]

    def stop(graph):
        graph.codegen()
        found.append(describe(graph))

        def call(*args):
            raise Lowered

        return types.SimpleNamespace(call=call, key="", __file__="", runner=None)

    card = types.SimpleNamespace(major=9, minor=0, **CARD)
    patches = {
        "torch.cuda._lazy_init": lambda: None,
        "torch.cuda._get_device_properties": lambda *_: card,
        "torch.cuda.get_device_capability": lambda *_: (9, 0),
        "torch.cuda.current_device": lambda: 0,
        "torch.cuda.device_count": lambda: 1,
        "torch.cuda.is_bf16_supported": lambda *_: True,
        "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
        "torch.nn.functional.scaled_dot_product_attention": flash,  # the choice is made in C++
        "torch._inductor.scheduler.has_triton": lambda: True,
        "torch._inductor.compile_fx._check_triton_bf16_support": lambda graph: None,
        "torch.utils._triton.triton_hash_with_backend": lambda: "",
        "torch._inductor.graph.GraphLowering.compile_to_module": stop,
    }
    with contextlib.ExitStack() as stack:
        for name, value in patches.items():
            stack.enter_context(mock.patch(name, value, create=True))
        stack.enter_context(autograd_config.patch(force_non_lazy_backward_lowering=True))
        stack.enter_context(config.patch(fx_graph_cache=False, compile_threads=1,
                                         joint_graph_constant_folding=False))
        yield


def describe(graph):
    """{launches, bytes, peak, kernels} of a lowered graph."""
    from torch._inductor.memory import estimate_peak_memory, get_freeable_input_buf
    from torch._inductor.scheduler import NopKernelSchedulerNode

    nodes = [n for n in graph.scheduler.nodes if not isinstance(n, NopKernelSchedulerNode)]
    # weights stay; what the forward pass has kept goes with its last use
    inputs = {x for x in graph.graph_inputs if not x.startswith(("primals", "arg"))}
    freeable = get_freeable_input_buf(graph.scheduler.nodes, inputs)
    peak, _ = estimate_peak_memory(graph.scheduler.nodes, freeable,
                                   set(graph.get_output_names()))
    return dict(launches=len(nodes), bytes=sum(n.get_read_write_buffers_sizes() for n in nodes),
                peak=peak, kernels=graph.wrapper_code.src_to_kernel)


def build(kernels, chip):
    """Compile the kernels' sources for a chip (90 = H100) with triton; the names of those that it
    refuses."""
    import triton
    from torch._inductor.codecache import PyCodeCache
    from torch._inductor.utils import Placeholder
    from triton.backends.compiler import GPUTarget

    refused = []
    for source, name in kernels.items():
        source = source.replace(str(Placeholder.DESCRIPTIVE_NAME), name)
        source = source.replace(str(Placeholder.KERNEL_NAME), "kernel")
        with mock.patch("torch._inductor.runtime.triton_helpers.set_driver_to_gpu"):
            tuner = PyCodeCache.load(source).kernel
        how = tuner.configs[0]
        meta = tuner._create_compile_meta(how)
        code = triton.compiler.ASTSource(tuner.fn, meta["signature"], meta["constants"],
                                         meta["configs"][0])
        options = dict(num_warps=how.num_warps, num_stages=how.num_stages)
        try:
            triton.compile(code, target=GPUTarget("cuda", chip, 32), options=options)
        except Exception as e:  # whatever ptxas or triton come up with
            refused.append(f"{name} ({type(e).__name__}: {str(e)[:200]})")
    return refused


def fake_model(shape, device):
    """A GPT without memory behind its weights."""
    import torch
    import train_gpt2

    with torch.device("meta"):
        model = train_gpt2.GPT(train_gpt2.GPTConfig(vocab_size=50304, **shape))
    there = {}  # the embedding and the head are one
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and p not in there:
                there[p] = torch.nn.Parameter(torch.empty(p.shape, device=device))
            module._parameters[name] = there.get(p)
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--B", type=int, default=64)
    parser.add_argument("--T", type=int, default=1024)
    parser.add_argument("--n_layer", type=int, default=12)
    parser.add_argument("--against", help="a commit to compare with")
    parser.add_argument("--check", type=int, nargs="*", default=[], help="chips, e.g. 75 89 90")
    parser.add_argument("--code", default=str(ROOT), help=argparse.SUPPRESS)
    args = parser.parse_args()
    print(f"This predicts and measures nothing: torch.compile's own count for an H100 at B={args.B}"
          f", T={args.T}, {args.n_layer} layers", flush=True)
    if args.against:
        with tempfile.TemporaryDirectory() as tmp:
            archive = subprocess.run(["git", "-C", ROOT, "archive", args.against], check=True,
                                     capture_output=True).stdout
            subprocess.run(["tar", "-x", "-C", tmp], input=archive, check=True)
            print(args.against, flush=True)
            subprocess.run([sys.executable, __file__, f"--B={args.B}", f"--T={args.T}",
                            f"--n_layer={args.n_layer}", f"--code={tmp}"], check=True)
    sys.path.insert(0, args.code)
    pretend()
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    found = []
    with lowering(found), FakeTensorMode(allow_non_fake_inputs=True):
        model = fake_model(dict(n_layer=args.n_layer), "cuda:0")
        x = torch.zeros(args.B, args.T, dtype=torch.long, device="cuda:0")
        for grad in (True, False):
            with (contextlib.suppress(Lowered), torch.set_grad_enabled(grad),
                  torch.autocast("cuda", torch.bfloat16)):
                torch.compile(model)(x, x)
    for name, graph in zip(("forward", "backward", "validation"), found, strict=True):
        print(f"{name:10} {graph['launches']:5} launches {graph['bytes'] / 1e9:8.1f} GB moved, "
              f"{graph['peak'] / 1e9:6.1f} GB alive")
    kernels = {source: name for graph in found for source, name in graph["kernels"].items()}
    for chip in args.check:
        refused = build(kernels, chip)
        print(f"sm_{chip}: {len(kernels) - len(refused)} of {len(kernels)} kernels compiled")
        print("\n".join(refused), end="\n" * bool(refused))


if __name__ == "__main__":
    main()
