"""
Check a machine before a long run: correctness, speed and memory of GPT-2 (124M) training.

    python tests/bench/gpu_check.py                  # all visible GPUs; 9 minutes on one H100
    python tests/bench/gpu_check.py --quick          # 3 minutes
    python tests/bench/gpu_check.py --only parity_float32,kv_cache

Each check runs in processes of its own with a time limit and prints one line when it finishes. A
failure or a timeout is a line as well, and the next check starts. At the end: a table to paste into
an issue, and gpu_check.json. Exit status 1 if a check failed. Without a GPU the shapes are tiny,
and checks that need CUDA are skipped. Linux and macOS; needs 10 GB in TMPDIR. Under torchrun rank 0
does all the work and starts torchrun jobs of its own.
"""

import functools
import json
import math
import os
import re
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from runs import (
    ROOT, last_line, make_parser, run_process, run_script, write_hellaswag, write_shards,
)

# build-nanogpt's own classes and loop in float32 on a CPU: loss and gradient norm of 12 steps,
# validation loss before the first and after the last update
GOLDEN = [
    (10.821478, 1.7642), (10.81287, 1.7279), (10.786215, 1.9423), (10.760171, 1.7546),
    (10.705337, 1.6983), (10.599888, 1.7219), (10.618573, 1.2322), (10.59326, 1.1843),
    (10.532262, 1.4392), (10.515318, 1.4029), (10.537377, 1.2932), (10.48124, 1.5306),
]  # fmt: skip
GOLDEN_VAL = (10.82239, 10.50796)
PROBES = str(Path(__file__).with_name("probes.py"))
NO_EVAL = ["--val_tokens=0", "--hellaswag=0", "--num_samples=0"]
# (name, function, time limit in seconds, part of --quick, needs CUDA), most useful first
CHECKS = []


class Failure(Exception):
    """A check that did not hold: a message, and figures measured so far."""


class Skipped(Exception):
    """A check that does not apply to this machine or to these flags."""


def check(limit, quick=False, cuda=False, name=None):
    """Register a check: a function of Context that returns {name of a figure: value}."""
    def register(function):
        CHECKS.append((name or function.__name__, function, limit, quick, cuda))
        return function
    return register


def require(condition, message, figures):
    """Return the figures if the condition holds, which is false if one of them is NaN."""
    if not condition:
        raise Failure(message, figures)
    return figures


class Context:
    """Settings and working directory of all checks, and the runs that several checks read."""

    def __init__(self, args, work_dir):
        self.args, self.work_dir, self.runs, self.deadline = args, Path(work_dir), {}, math.inf
        self.cuda = torch.cuda.is_available() and args.device != "cpu"
        self.gpus = torch.cuda.device_count() * self.cuda if args.gpus is None else args.gpus
        self.data = write_shards(self.work_dir / "data", 20_000_000 if self.cuda else 60_000)
        # 124M on a GPU; without one a model whose steps take milliseconds
        self.T, self.step_tokens = (1024, 524_288) if self.cuda else (64, 512)
        self.val_tokens, self.hellaswag = (2**20, 400) if self.cuda else (4096, 20)
        self.device = "cuda" if self.cuda else "cpu"
        self.size = [] if self.cuda else ["--n_layer=1", "--n_head=2", "--n_embd=64", "--T=64",
                                          "--total_batch_size=512", "--dtype=float32"]
        self.small = ["--no-compile", "--B=4", f"--total_batch_size={8 * self.T}"]

    def run(self, script, *flags, name, status=0, driver=False, keep=False, **how):
        """Run a script to its end, or to the check's deadline, with --log_dir `name`."""
        report = self.work_dir / f"{name}.json"
        target = [PROBES, "train", script, report] if driver else [ROOT / f"{script}.py"]
        run = run_script(target, "--preset=gpt2", f"--device={self.device}", *flags,
                         cwd=self.work_dir, log_dir=self.work_dir / name,
                         timeout=self.deadline - time.monotonic(), **how)
        if run.status != status:
            raise Failure(f"exit status {run.status}: {last_line(run.stderr)}")
        run.report = json.loads(report.read_text()) if driver else []
        for path in [] if keep else (self.work_dir / name).glob("*.pt"):
            path.unlink()  # 1.5 GB each
        return run

    def measure(self, *arguments, **env):
        """Run one function of probes.py; the JSON object that it prints."""
        run = run_process([sys.executable, PROBES, *arguments],
                          timeout=self.deadline - time.monotonic(), **env)
        if run.status:
            raise Failure(last_line(run.stderr))
        return json.loads(run.lines[-1][1])

    def kept(self, name):
        if name not in self.runs:
            raise Skipped(f"needs the run of step_{name}")
        return self.runs[name]


@check(60, quick=True)
def machine(c):
    return c.measure("card", c.device) | {"GPUs": c.gpus}


def parity(c, dtype, tolerance, **env):
    """Losses of golden A against build-nanogpt's own loop."""
    data = write_shards(c.work_dir / f"golden_{dtype}", 20_000)
    log = c.run("train_gpt2", f"--data={data}", "--n_layer=2", "--n_head=2", "--n_embd=64",
                "--B=2", "--T=64", "--total_batch_size=512", "--max_steps=12", "--warmup_steps=4",
                "--max_lr=6e-4", f"--dtype={dtype}", "--val_tokens=2560", "--num_samples=0",
                "--hellaswag=0", "--no-compile", name=f"log_{dtype}", **env).log
    losses = [abs(log[step, "train"] - loss) for step, (loss, _) in enumerate(GOLDEN)]
    losses += [abs(log[step, "val"] - loss) for step, loss in zip((0, 12), GOLDEN_VAL, strict=True)]
    norms = [abs(log[step, "norm"] - norm) for step, (_, norm) in enumerate(GOLDEN)]
    figures = {"max loss difference": max(losses), "max norm difference": max(norms)}
    return require(max(losses) <= tolerance,
                   f"losses differ from build-nanogpt's by more than {tolerance:g}", figures)


@check(60, quick=True)
def parity_float32(c):
    return parity(c, "float32", 1e-3, NVIDIA_TF32_OVERRIDE="0")


@check(60, quick=True)
def parity_bfloat16(c):
    return parity(c, "bfloat16", 2e-2)


def step(c, script, *flags, steps, name, ranks=0, **env):
    """Train for a few steps and return the figures of one step. The run is kept as `name`."""
    steps = steps if c.cuda else 6
    run = c.runs[name] = c.run(
        script, *c.size, f"--data={c.data}", "--B=0", f"--max_steps={steps}",
        f"--eval_every={steps}", "--warmup_steps=10", "--num_samples=0", "--save_every=0", *flags,
        name=name, ranks=ranks, driver=True, **env)
    seconds = statistics.median(dt for _, dt, _ in run.steps[3:])
    accum = int(re.search(r"gradient accumulation steps: (\d+)", run.text)[1])
    figures = {"B": c.step_tokens // (c.T * accum * max(1, ranks)), "ms per step": 1e3 * seconds,
               "tok/s": c.step_tokens / seconds, "first step s": run.steps[0][1]}
    if run.steps[-1][2]:
        figures["mfu %"] = statistics.median(mfu for *_, mfu in run.steps[3:])
    if c.cuda:
        peaks = [entry["peak"] for entry in run.report if entry["kind"] == "step"]
        figures["max_memory_allocated GB"] = max(peaks[1:]) / 1e9
    return figures


@check(240, quick=True)
def step_compiled(c):
    """The real step; also the evaluations that the check `evaluation` reads."""
    examples = write_hellaswag(c.work_dir / "hellaswag.jsonl", c.hellaswag)
    # HellaSwag needs GPT-2's vocabulary, which may not be available without a network
    load = [sys.executable, "-c", "import train_gpt2; train_gpt2.get_tokenizer()"]
    n = 0 if run_process(load, ROOT).status else c.hellaswag
    return step(c, "train_gpt2", "--compile", f"--val_tokens={c.val_tokens}", f"--hellaswag={n}",
                name="compiled", steps=12 if c.args.quick else 20, HELLASWAG_FILE=str(examples))


@check(90)
def step_eager(c):
    return step(c, "train_gpt2", "--no-compile", *NO_EVAL, name="eager", steps=8)


@check(180)
def step_modern(c):
    compiled = "--compile" if c.cuda else "--no-compile"
    return step(c, "modern", compiled, *NO_EVAL, name="modern", steps=12)


def step_all_gpus(c, script, flags):
    if c.gpus < 2:
        raise Skipped("needs several GPUs")
    return step(c, script, *NO_EVAL, *flags, name=f"{script}{len(flags)}", steps=10, ranks=c.gpus)


for script in ("train_gpt2", "modern"):
    for flags in ([], ["--zero"]):
        name = "_".join([script, "all_gpus", *(flag.strip("-") for flag in flags)])
        check(180, quick=name == "train_gpt2_all_gpus", name=name)(
            functools.partial(step_all_gpus, script=script, flags=flags))


@check(10)
def compiled_equals_eager(c):
    a, b = c.kept("compiled").log, c.kept("eager").log
    difference = max(abs(a[s, "train"] - b[s, "train"]) for s in range(5))
    return require(difference <= (2e-2 if c.cuda else 1e-4), "losses differ by more than rounding",
                   {"max difference of 5 losses": difference})


@check(10, quick=True)
def graphs(c):
    """One graph for evaluation, one for training, none after the first of each."""
    first_val, first_step, *_, last = (entry["graphs"] for entry in c.kept("compiled").report)
    figures = {"graphs of the training step": first_step - first_val,
               "graphs added later": last - first_step}
    return require(list(figures.values()) == [1, 0],
                   "expected one graph for the training step and none later", figures)


@check(10, quick=True)
def evaluation(c):
    """Seconds of an evaluation once compiled, and its share of a run at --eval_every 250."""
    run, (at, _, _) = c.kept("compiled"), c.kept("compiled").steps[-1]
    figures, start = {}, at
    for line, name in (("validation loss", f"validation of {c.val_tokens:,} tokens s"),
                       ("HellaSwag accuracy", f"HellaSwag of {c.hellaswag} examples s")):
        times = [t for t, text in run.lines if text.startswith(line)]
        figures[name] = times[-1] - at if times else "off"
        at = times[-1] if times else at
    train_s = 250 * statistics.median(dt for _, dt, _ in run.steps[3:])
    return figures | {"share at --eval_every 250 %": 100 * (at - start) / (at - start + train_s)}


@check(10, quick=True)
def data_loader(c):
    """Host time in next_batch(): an upper bound for the time that a step waits for data."""
    run = c.kept("compiled")
    loading = [entry["loading"] for entry in run.report if entry["kind"] == "step"]
    per_step = statistics.median(b - a for a, b in zip(loading[2:], loading[3:], strict=False))
    share = per_step / statistics.median(dt for _, dt, _ in run.steps[3:])
    figures = {"loader tok/s": c.step_tokens / per_step, "share of a step, at most %": 100 * share}
    return require(share < 0.01 or not c.cuda, "reading takes more than 1% of a step", figures)


@check(60, quick=True)
def sigterm(c):
    """SIGTERM during a step: a checkpoint of the last completed step, exit status 143."""
    sent = []

    def stop(line, process):
        if line.startswith("step     3"):
            sent.append(time.monotonic())
            process.send_signal(signal.SIGTERM)

    run = c.run("train_gpt2", *c.size, *c.small, *NO_EVAL, f"--data={c.data}", name="sigterm",
                on_line=stop, status=143, keep=True)
    figures = {"steps completed": len(run.steps), "seconds to exit": time.monotonic() - sent[0]}
    saved = torch.load(c.work_dir / "sigterm" / "last.pt", weights_only=True, mmap=True)["step"]
    return require(saved == len(run.steps), f"the checkpoint holds step {saved}", figures)


@check(90)
def save_and_resume(c):
    """Six steps with a save after the third, then the last three again from that checkpoint."""
    flags = [*c.size, *c.small, *NO_EVAL, f"--data={c.data}", "--max_steps=6", "--eval_every=99",
             "--checkpoint_every=3"]
    whole = c.run("train_gpt2", *flags, name="whole", keep=True)
    (c.work_dir / "resumed").mkdir()
    os.link(c.work_dir / "whole" / "model_00003.pt", c.work_dir / "resumed" / "model_00003.pt")
    resumed = c.run("train_gpt2", *flags, "--resume", name="resumed")
    difference = max(abs(whole.log[s, "train"] - resumed.log[s, "train"]) for s in (3, 4, 5))
    # between the third and the fourth step line: the save and the fourth step
    (before, _, _), (after, dt, _) = whole.steps[2:4]
    figures = {"save s": after - before - dt, "start to first step s": whole.steps[0][0],
               "the same resumed s": resumed.steps[0][0], "max loss difference": difference}
    return require(len(resumed.steps) == 3 and difference <= (2e-3 if c.cuda else 0.0),
                   "the resumed run differs", figures)


@check(60, cuda=True)
def float16(c):
    """20 steps with the gradient scaler."""
    log = c.run("train_gpt2", *c.small, *NO_EVAL, f"--data={c.data}", "--dtype=float16",
                "--max_steps=20", "--warmup_steps=5", name="float16").log
    losses, norms = ([log[s, kind] for s in range(20)] for kind in ("train", "norm"))
    figures = {"first loss": losses[0], "last loss": losses[-1],
               "skipped steps": sum(not math.isfinite(norm) for norm in norms)}
    return require(losses[-1] < losses[0], "the loss did not fall", figures)


@check(60, quick=True)
def kv_cache(c):
    """Greedy sampling in float32 with the KV cache and without."""
    figures = c.measure("sampling", c.device, NVIDIA_TF32_OVERRIDE="0")
    return require(figures["equal"] == figures["tokens"], "greedy tokens differ", figures)


@check(150)
def learning(c):
    """100 steps of 8,192 tokens (CPU: 20 of 512) of a text; validation losses of both scripts."""
    if not (c.args.text or c.cuda):
        raise Skipped("needs --text on a CPU")
    text, steps = Path(c.args.text or ROOT / "input.txt").resolve(), 100 if c.cuda else 20
    figures = {}
    for script, own in (("train_gpt2", ["--warmup_steps=10"]), ("modern", [])):
        log = c.run(script, *c.size, *c.small, *own, f"--data={text}", f"--max_steps={steps}",
                    f"--eval_every={steps // 2}", "--val_tokens=65536", "--hellaswag=0",
                    "--num_samples=0", name=f"learning_{script}").log
        losses = [log[s, "val"] for s in (0, steps // 2, steps)]
        figures[f"{script}.py"] = " -> ".join(f"{loss:.4f}" for loss in losses)
        require(min(losses) < losses[0] - (2 if c.cuda else 0.1), "too little progress", figures)
    return figures


def run_check(c, function, limit):
    """(result, figures) of one check."""
    c.deadline = time.monotonic() + limit
    try:
        return "ok", function(c)
    except Skipped as e:
        return "skipped", {"reason": str(e)}
    except TimeoutError:
        return "TIMEOUT", {"reason": f"limit of {limit:.0f} s"}
    except Failure as e:
        message, *figures = e.args
        return "FAILED", {"reason": message} | dict(*figures)
    except Exception as e:  # the next check starts all the same
        return "FAILED", {"reason": f"{type(e).__name__}: {e}"[:200]}


def run_checks(c, names):
    """Run the checks and yield a row for each as it finishes."""
    budget = (180 if c.args.quick else 540) * (2 if c.gpus > 1 else 1)
    end = time.monotonic() + budget
    for name, function, limit, quick, cuda in CHECKS:
        start = time.monotonic()
        limit = min(limit, end - start)
        if names and name not in names:
            continue
        obstacle = ("not part of --quick" if c.args.quick and not quick and not names else
                    "needs CUDA" if cuda and not c.cuda else
                    f"the limit of {budget} s is reached" if limit < 5 else "")
        result, figures = ("skipped", {"reason": obstacle}) if obstacle else run_check(
            c, function, limit)
        yield dict(check=name, result=result, seconds=time.monotonic() - start, figures=figures)


def describe(figures):
    """The figures of a check on one line."""
    def show(value):
        if not isinstance(value, float):
            return str(value)
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"

    return ", ".join(show(value) if name == "reason" else f"{name} {show(value)}"
                     for name, value in figures.items())


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="the most useful checks, 3 minutes")
    parser.add_argument("--gpus", type=int, help="number of GPUs (default: all visible)")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    parser.add_argument("--text", help="text of the learning check (default on a GPU: input.txt)")
    parser.add_argument("--only", default="", help="names of checks, separated by commas")
    parser.add_argument("--json", default="gpu_check.json", help="path of the JSON report")
    args = parser.parse_args()
    names, known = set(filter(None, args.only.split(","))), [name for name, *_ in CHECKS]
    if names - set(known):
        parser.error(f"--only {args.only}: choose from {', '.join(known)}")
    rows, date = [], time.strftime("%Y-%m-%d")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the running check as well
    with tempfile.TemporaryDirectory() as work_dir:
        for row in run_checks(Context(args, work_dir), names):
            rows.append(row)
            print(f"{row['check']}: {row['result']} ({row['seconds']:.0f} s) "
                  f"{describe(row['figures'])}", flush=True)
    report = dict(date=date, flags=sys.argv[1:], checks=rows)
    Path(args.json).write_text(json.dumps(report, indent=1))
    print(f"\n{date}, {sum(row['seconds'] for row in rows):.0f} s\n")
    print("| check | result | s | figures |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row['check']} | {row['result']} | {row['seconds']:.0f} | "
              f"{describe(row['figures'])} |")
    return int(any(row["result"] in ("FAILED", "TIMEOUT") for row in rows))


if __name__ == "__main__":
    sys.exit(main() if os.environ.get("RANK", "0") == "0" else 0)
