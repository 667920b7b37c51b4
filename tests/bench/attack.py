"""
Attack the project and count what breaks. Run by hand, on Linux; half an hour on two cores:

    python tests/bench/attack.py                           # everything
    python tests/bench/attack.py kills bits --n 1000       # these kinds, so many of each
    python tests/bench/attack.py flags --seed 417 --n 1    # that trial once more

    kills   SIGKILL at a line or a call by chance, again and again; the end is bit-equal
    zero    the same under --zero while the number of processes changes; the end agrees to 1e-5
    bits    a flipped bit or a cut end of a checkpoint is refused or harmless, the next older serves
    flags   flags by chance, good and bad: status 0, or one line, status 2 and nothing written
    disk    a disk that fills at some moment takes nothing that was good; with room it goes on
    world   odd environments, streams, rights and names, for all the commands

Each trial has a seed of its own, one more than the last. Exits with 1 where anything failed.
"""

import argparse
import contextlib
import functools
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import fields
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
import conftest  # noqa: E402
import fineweb  # noqa: E402
import train_gpt2  # noqa: E402
from conftest import TINY, copy_until_8, differing_lines, equal, weights  # noqa: E402
from plumbing.checkpoint import read_checkpoint  # noqa: E402
from processes import Forks  # noqa: E402

TEXT = "The sea – said Élise – is never the same sea twice; naïve ☃ or not, it goes on. "
SAMPLES = ["--data={text}", "--num_samples=2", "--prompt=The sea –", "--sample_length=16"]
BYTES = 'import plumbing.tokens; plumbing.tokens.load_bpe = lambda timeout: (None, "no network")\n'
COMPILE = "import functools, torch\ntorch.compile = functools.partial(torch.compile, backend={})\n"
VARIANTS = {  # name: flags, patch
    "plain": ([], ""),
    "later": (["--dtype=bfloat16", "--shuffle=windows", "--optimizer=muon", "--pos=rope"], ""),
    "compiled": (["--compile", "--n_layer=1"], COMPILE.format('"aot_eager"')),
    "letters": (SAMPLES, BYTES),
    "words": ([*SAMPLES, "--vocab_size=50304", "--n_embd=8", "--hellaswag=6"], ""),
    "zero": (["--zero", "--total_batch_size=192", "--max_steps=20", "--shuffle=windows"], ""),
}


class Stage:
    """What the trials of a call share: data, the process that forks, runs that nobody disturbs."""

    def __init__(self, folder):
        self.folder, self.text, self.hella = folder, folder / "text.txt", folder / "rows.jsonl"
        self.text.write_text("".join(f"{i}. {TEXT}" for i in range(60)), encoding="utf-8")
        example = dict(ctx="The sea", text=TEXT, endings=["is wide.", "is a sea", "dry", "runs"])
        self.hella.write_text("\n".join(json.dumps(example | dict(label=i % 4)) for i in range(8)))
        os.environ |= dict(HELLASWAG_FILE=str(self.hella), HF_HUB_OFFLINE="1")
        self.shards = conftest.write_shards(folder / "data", sizes=(700, 500, 333), val=1001)
        (folder / "console").mkdir()
        self.forks = Forks(folder / "console")

    def flags(self, variant):
        flags = [*TINY, f"--data={self.shards}", *VARIANTS[variant][0]]
        return [flag.format(text=self.text) for flag in flags]

    @functools.cache  # noqa: B019
    def whole(self, variant):
        """(log_dir of an undisturbed run, how often it and a resumed one come by each line)"""
        here, lines = self.folder / f"whole-{variant}", Counter()
        here.mkdir()
        for name, n in (("log", 1), ("two", 2) if variant == "zero" else ("again", 1)):
            if name == "again":
                copy_until_8(here / "log", here / "again")
            file = here / f"{name}.json"
            self.forks.ranks(n, *self.flags(variant), f"--log_dir={name}", "--resume", cwd=here,
                             patch=VARIANTS[variant][1],
                             of={n - 1: dict(patch=f"count_lines({str(file)!r})")}).end().good()
            lines |= Counter(json.loads(file.read_text()))  # of two counts the larger
        return here / "log", lines | (self.whole("plain")[1] if variant == "zero" else lines)


def newest(log):
    """The newest step in a log_dir; every checkpoint there must be whole."""
    return max((weights(log, path.name)["step"] for path in log.glob("*.pt")), default=0)


def assert_manners(program, status, stderr, statuses=(0, 2)):
    """A run that ended well has at most warned; another has said one line, or a table."""
    told = f"status {status}: {stderr[-900:]}"
    error = [x for x in stderr.splitlines() if not x.startswith("warning: ")]
    assert status in statuses and "Traceback" not in stderr and bool(error) == bool(status), told
    assert not error or error[0].startswith(f"{program}: error: "), told
    assert all(" | " in line for line in error[1:]), told


# ---------- kills, zero
CALLS = """os.replace os.fsync os.link os.remove os.makedirs os.open torch.load numpy.fromfile
    torch.set_rng_state zipfile.ZipFile.testzip json.dumps torch.nn.utils.clip_grad_norm_
    torch.Tensor.backward torch.distributed.send torch.distributed.recv torch.distributed.all_reduce
    torch.distributed.all_gather_object torch.distributed.init_process_group""".split()
FILES = ("checkpoint.py", "files.py", "reporter.py", "machine.py", "hardware.py")
END = 'at("plumbing.errors.leave", kill)'


def draw_point(rng, lines):
    """A patch that kills somewhere, or as the run ends where it does not come by so often."""
    nth, kind = 1 + int(rng.expovariate(0.2)), rng.random()
    if kind < 0.6:
        place = rng.choice(sorted(x for x in lines if kind < 0.3 or x.startswith(FILES)))
        return f"at_line({place!r}, {rng.randint(1, lines[place])}, kill)"
    if kind < 0.75:
        torn = rng.choice(["torn_save(kill, when=lambda n, _:", "torn_log(kill, when=lambda n:"])
        return f"{torn} n == {nth}); {END}"
    return f"at({rng.choice(CALLS)!r}, kill, nth={nth}, before={rng.random() < 0.5}); {END}"


def kills(stage, rng, here, variant=None):
    """Start runs, kill each, with several processes one of them; at last one goes to its end."""
    variant = variant or rng.choice([v for v in VARIANTS if v != "zero"])
    processes = (2, 3, 1, 2) if variant == "zero" else (1,) * 5
    (whole, lines), log, count, step = stage.whole(variant), here / "log", 0, 0
    start = functools.partial(stage.forks.ranks, cwd=here, patch=VARIANTS[variant][1])
    flags = [*stage.flags(variant), "--resume"]
    for n in processes[:rng.randint(1, len(processes))]:
        point, victim = draw_point(rng, lines), rng.randrange(n)
        print(f"  {variant}, rank {victim} of {n}: {point}")
        ranks = start(n, *flags, of={victim: dict(patch=point)}).end(as_torchrun=True)
        ranks[victim].killed()
        for run in ranks:
            assert "Traceback" not in run.stderr or "by peer" in run.stderr, run.stderr
        assert newest(log) >= step, f"step {step} was there, and now {newest(log)}"
        step, said = newest(log), ranks[0].stdout
        if "try next" in said or "is finished" in said:  # as it ended; there is no more to kill
            break
        count += 1
    start(processes[-1], *flags).end().good()
    if variant == "zero":
        conftest.assert_close(conftest.read_log(log), conftest.read_log(whole))
    else:
        conftest.assert_same_end(log, whole)
        assert not differing_lines(log, whole, "samples.txt")
    return count


# ---------- bits


def bits(stage, rng, here):
    """One wrong bit in last.pt, mostly where no CRC is over it, or no end; older is model_00008."""
    (whole, _), log, last = stage.whole("plain"), here / "log", here / "log" / "last.pt"
    copy_until_8(whole, log)
    blob = bytearray((whole / "last.pt").read_bytes())
    heads = [head.start() for head in re.finditer(rb"PK[\1-\7]", blob)]
    place = rng.choice([rng.choice(heads) + rng.randrange(100), rng.randrange(len(blob))])
    bit, cut = rng.randrange(8), rng.random() < 0.2
    print(f"  {'cut at' if cut else f'bit {bit} of'} byte {place} of {len(blob)}")
    blob[place % len(blob)] ^= 1 << bit
    last.unlink()
    last.write_bytes(blob[:place] if cut else blob)
    run = stage.forks.run(*stage.flags("plain"), "--resume", cwd=here).good()
    assert_manners("train_gpt2.py", 0, run.stderr)
    if "is finished" in run.stdout:  # it was taken for good
        assert equal(read_checkpoint(str(last)), weights(whole)) and not run.stderr, run.stderr
    else:
        assert run.stderr.startswith(f"warning: {Path('log', 'last.pt')} is"), run.stderr
        assert "model_00008.pt, step 8" in run.stdout, run.stdout
        conftest.assert_same_end(log, whole)
    return 1


# ---------- flags
JUNK = ["", " ", "nan", "inf", "-inf", "-1", "1e3", "1.5", "٣", "0x10", "1_0", "x" * 5000, "\n",
        "é☃", "\udcff", "None", "--B", "9" * 5000, str(2**63), str(-2**63), str(2**64)]
NUMBERS = {  # neither refused nor cheap is nothing here: this tests manners, not patience
    int: ["0", "1", "2", "3", "7", "16", "33", str(2**40), str(2**63 - 1)],
    float: ["0", "-0.0", "5e-324", "1e-300", "0.5", "3", "1e30", "1e308", "1.8e308", "1e400"],
}
NAMES = ["nowhere", "text.txt", "empty", "junk.bin", "/dev/null", "/proc/x", ".", "é ☃", "a*[b]?",
         "n" * 300, "old", "old/last.pt", "cut.pt", "data", "x/y", "-", "\udcff", "line\nend"]
VALUES = dict(
    max_steps=["1", "2"], sample_length=["1", "7", "40"], num_samples=["0", "1", "3"],
    total_batch_size=["16", "48", "256", str(2**62)], device=["cpu", "cuda:9", "mps", "tpu"],
    prompt=["The sea", "é☃", "\udcff", "-", "<|endoftext|>", " ", "word " * 200])
START = """
import fineweb, modern, plot, plumbing.errors, train_gpt2
main, sys.stdin = train_gpt2.main, open(os.devnull)
train_gpt2.main = lambda argv: """
PROGRAMS = {  # name: (its part of the draws, what starts it)
    "train_gpt2.py": (6, "main(argv)"),
    "modern.py": (2, "main(argv, modern.ModernGPT)"),
    "fineweb.py": (1, "fineweb.main(argv)"),
    "plot.py": (1, "sys.modules.pop('matplotlib') or plumbing.errors.run_main("
                "'plot.py', lambda: plot.plot(argv))"),
}


def draw_flag(rng, field):
    meta, name = field.metadata, field.name
    if field.type is bool:
        return rng.choice([f"--{name}"] * 12 + [f"--no-{name}", f"--{name}=1", f"--{name}="])
    good = VALUES.get(name) or meta["choices"] or NUMBERS.get(field.type, NAMES)
    value = rng.choice(good if rng.random() < 0.85 else JUNK)
    if rng.random() < 0.04:
        name = rng.choice([name.replace("_", "-"), name[:-1], name + "s", name.upper()])
    return f"--{name}={value}"


def draw_command(rng, program, base):
    if program == "plot.py":
        names = [rng.choice([*NAMES, *["old"] * 8]) for _ in range(rng.randint(1, 3))]
        return [*names, *rng.choice([[], ["-o", rng.choice(NAMES)], ["--out=p.svg"]])]
    cls = train_gpt2.TrainConfig
    if program == "fineweb.py":
        cls, files = fineweb.Flags, ["text.txt", "rows.jsonl"] * 8 + NAMES
        base = [f"--files={rng.choice(files)}", "--out=out", "--num_proc=1"]
    often = ("resume", "init", "eval_only", "inspect", "shard_size", "text_column")
    weight = [4 if f.name in often else 1 for f in fields(cls)]
    argv = base + [draw_flag(rng, f) for f in rng.choices(fields(cls), weight, k=rng.randint(1, 4))]
    if "--resume" in argv and rng.random() < 0.8:
        argv = [a for a in argv if a.split("=")[0] not in ("--max_steps", "--total_batch_size")]
        argv.append("--log_dir=old")
    return argv


def flags(stage, rng, here):
    program = rng.choices(list(PROGRAMS), [share for share, _ in PROGRAMS.values()])[0]
    copy_until_8(stage.whole("plain")[0], here / "old")
    (here / "empty").touch()
    (here / "junk.bin").write_bytes(rng.randbytes(3000))
    (here / "cut.pt").write_bytes((here / "old" / "last.pt").read_bytes()[:9000])
    for name in ("text.txt", "rows.jsonl", "data"):
        os.symlink(stage.folder / name, here / name)
    base = [*TINY, f"--data={stage.shards}", "--max_steps=2", "--total_batch_size=32"]
    argv = draw_command(rng, program, base)
    print(f"  {program} {' '.join(repr(a[:60]) for a in argv if a not in base)}")
    before = set(here.rglob("*"))
    patch = COMPILE.format('"eager"') + START + PROGRAMS[program][1]
    run = stage.forks.run(*argv, cwd=here, patch=patch)
    if "[transformers]" not in run.stderr:
        diverged = "weights were not updated" in run.stderr  # from a learning rate of 1e30
        assert_manners(program, run.status, run.stderr, [1] if diverged else [0, 2])
    if run.status == 2 and program != "fineweb.py":
        assert set(here.rglob("*")) == before, f"something was written: {run.stderr}"
    return 1


# ---------- disk
FILL = """
import builtins

def fill(real=open):
    def opened(path, mode="r", *args, **kwargs):
        return no_space() if "+" in mode else real(path, mode, *args, **kwargs)
    builtins.open = opened
    no_space()
"""
MOMENTS = {  # of a run of 12 steps that saves at 4, 8 and 12; {act}: no_space once, fill for good
    "lock": 'at("os.open", {act}, match=".lock")',
    "config.json": 'at("builtins.open", {act}, match="config.json.tmp")',
    "log line": "torn_log({act}, when=lambda n: n == {nth})",
    "samples line": 'at("builtins.open", {act}, nth=2 + {nth}, match="samples.txt")',
    "save: open": 'at("builtins.open", {act}, match="last.pt.tmp")',
    "save: write": 'torn_save({act}, when=lambda n, state: state["step"] < 12)',
    "save: fsync": 'at("os.fsync", {act}, nth=6 + {nth})',
    "save: rename": 'at("os.replace", {act}, match="last.pt")',
    "kept: link": 'at("os.link", {act}, nth=1 + {nth} % 2)',
    "last: write": 'torn_save({act}, when=lambda n, state: state["step"] == 12)',
    "curves": 'del sys.modules["matplotlib"]; os.makedirs("log", exist_ok=True)\n'
              'at("plumbing.reporter.Reporter.draw", lambda: os.symlink("/dev/full", '
              '"log/curves.png.tmp"), nth={nth} % 3 + 1)',
}


def disk(stage, rng, here):
    name = list(MOMENTS)[rng.number % len(MOMENTS)]
    act, nth = rng.choice(["no_space", "fill"]), rng.randint(1, 20)
    (whole, _), log, resumed = stage.whole("letters"), here / "log", rng.random() < 0.5
    print(f"  {name}, {act}, {nth}{', of a resume' * resumed}")
    if resumed:
        copy_until_8(whole, log)
    patch = BYTES + FILL + MOMENTS[name].format(act=act, nth=nth)
    run = stage.forks.run(*stage.flags("letters"), "--resume", cwd=here, patch=patch)
    assert_manners("train_gpt2.py", run.status, run.stderr, statuses=(0, 1, 2))
    assert not resumed or newest(log) >= 8, run.stderr
    if act == "no_space":  # once, it ends no run but before the first step and in the last save
        assert bool(run.status) == (name in ("lock", "config.json", "last: write")), run.stderr
    (log / "curves.png.tmp").unlink(missing_ok=True)
    stage.forks.run(*stage.flags("letters"), "--resume", cwd=here, patch=BYTES).good()
    if "step 8 could not be saved" in run.stderr:  # it is kept by no later save
        shutil.copy(whole / "model_00008.pt", log)
    if run.status or "lines could not be written" not in run.stderr:  # of the log of a good end
        conftest.assert_same_end(log, whole)
        assert not differing_lines(log, whole, "samples.txt")
    return 1


# ---------- world
RUN = 'exec "$@"'
# root obeys no mode, unless it gives that right away
MORTAL = "exec setpriv --bounding-set=-dac_override" if os.getuid() == 0 else "exec"
WORLDS = {  # name: shell script; where nothing else is odd, the name is that of the folder
    "C": f"export LC_ALL=C; {RUN}", "ascii": f"export PYTHONIOENCODING=ascii; {RUN}",
    "no stdin": f"{RUN} <&-", "no stdout": f"{RUN} >&-", "no stderr": f"{RUN} 2>&-",
    "no streams": f"{RUN} <&- >&- 2>&-", "full stdout": f"{RUN} > /dev/full",
    "few files": f"ulimit -n 32; {RUN}", "no home": f"unset HOME; {RUN}",
    "-OO": f"export PYTHONOPTIMIZE=2; {RUN}", "WORLD_SIZE=2": f"export WORLD_SIZE=2; {RUN}",
    "read-only": f'chmod -R a-w code; {MORTAL} "$@"',
    "two words ": RUN, "line\nend": RUN, "é☃ №": RUN, "a*[b-c]?{d}": RUN, "$HOME;`id`'\"": RUN,
}
COMMANDS = {
    "train": "train_gpt2.py --log_dir={}/log",
    "resume": "train_gpt2.py --log_dir={}/log --resume",
    "fineweb": "fineweb.py --files {text} --out={}/shards --num_proc=1 --shard_size=700",
    "hellaswag": "hellaswag.py -m {}/log/last.pt -d cpu --limit=4 --data_file={hella}",
    "plot": "plot.py {}/log",
}


def world(stage, rng, here):
    which, number = divmod(rng.number, len(COMMANDS))
    place, name = list(WORLDS)[which % len(WORLDS)], list(COMMANDS)[number]
    print(f"  {name} in the world of {place!r}")
    (whole, _), root, (program, *more) = stage.whole("words"), ROOT, COMMANDS[name].split()
    here = here / (place if WORLDS[place] == RUN else "x")
    here.mkdir()
    if name == "resume":
        copy_until_8(whole, here / "log")
    elif name in ("hellaswag", "plot"):
        shutil.copytree(whole, here / "log")
    if place == "read-only":
        root, skip = here / "code", (".*", "tests", "hellaswag", "edu_fineweb10B")
        shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns(*skip))
    if program == "train_gpt2.py":
        more = [*stage.flags("words"), *more]
    more = [x.format(here, text=stage.text, hella=stage.hella) for x in more]
    # as a user starts it, from the shell
    line = ["sh", "-c", WORLDS[place], "sh", sys.executable, str(root / program), *more]
    run = subprocess.run(line, cwd=here, capture_output=True, text=True, errors="replace",
                         timeout=300)
    if place == "WORLD_SIZE=2" and name not in ("fineweb", "plot"):
        assert "unset WORLD_SIZE" in run.stderr, run.stderr
        return assert_manners("train_gpt2.py", run.returncode, run.stderr, [2]) or 1
    if place == "full stdout":  # all is done, but not all was said
        assert run.returncode == 1 and not run.stderr, run.stderr
    else:
        assert_manners(program, run.returncode, run.stderr, [0])
    if name in ("train", "resume"):
        conftest.assert_same_end(here / "log", whole)
        assert not differing_lines(here / "log", whole, "samples.txt")
    made = "shards/edufineweb_train_000001.npy" if name == "fineweb" else "log/curves.png"
    if name != "hellaswag":
        assert (here / made).exists()
    elif place not in ("no stdout", "no streams", "full stdout"):
        assert "acc_norm: " in run.stdout, run.stdout
    return 1


# ---------- the command
zero = functools.partial(kills, variant="zero")
KINDS = dict(kills=(kills, 150), zero=(zero, 50), bits=(bits, 250), flags=(flags, 400),
             disk=(disk, 4 * len(MOMENTS)), world=(world, len(WORLDS) * len(COMMANDS)))


def trial(stage, kind, seed):
    """One trial: (how often it has attacked, how often it has failed)."""
    here, rng = stage.folder / f"{kind}-{seed}", random.Random(f"{kind} {seed}")
    rng.number = seed
    here.mkdir()
    with contextlib.redirect_stdout(io.StringIO()) as said:
        try:
            return KINDS[kind][0](stage, rng, here), 0
        except Exception:
            fault = said.getvalue() + traceback.format_exc(limit=-2)[-2000:]
        finally:
            shutil.rmtree(here, ignore_errors=True)
    print(f"FAILED: {kind} --seed {seed} --n 1\n{fault}", flush=True)
    return 1, 1


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("which", nargs="*", metavar="kind", help=", ".join(KINDS))
    parser.add_argument("--seed", type=int, default=random.randrange(10**9), help="of the first")
    parser.add_argument("--n", type=int, help="attacks of each kind (default: its own number)")
    args = parser.parse_args()
    total = 0
    with tempfile.TemporaryDirectory() as folder:
        stage = Stage(Path(folder))
        for kind in args.which or KINDS:
            start, done, failed, seed = time.monotonic(), 0, 0, args.seed
            while done < (args.n or KINDS[kind][1]):
                attacks, faults = trial(stage, kind, seed)
                done, failed, seed = done + attacks, failed + faults, seed + 1
            print(f"{kind}: {done} from seed {args.seed}, {failed} failed, "
                  f"{time.monotonic() - start:.0f} s", flush=True)
            total += failed
        stage.forks.close()
    return bool(total)


if __name__ == "__main__":
    sys.exit(main())
