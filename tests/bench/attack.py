"""
Attack the project and count what breaks. Run by hand, on Linux, half an hour on two idle cores:

    python tests/bench/attack.py                             # everything
    python tests/bench/attack.py kills bits --n 1000         # these kinds, so many of each
    python tests/bench/attack.py flags --seed 417 --n 1      # that one once more, as a failure says

    kills   SIGKILL at a line or a call by chance, again and again; the end is bit-equal
    zero    the same under --zero while the number of processes changes; the end agrees to 1e-5
    bits    a flipped bit or a cut end of a checkpoint is refused or harmless, the next older serves
    flags   flags by chance, good and bad: status 0, or one line and status 2 and nothing written
    disk    a disk that fills at some moment takes nothing that was good; with room it goes on
    world   odd environments, streams, rights and names, for all the commands

A trial is drawn from its own seed: the first has that of --seed, the next one more. Exits with 1
where anything failed.
"""

import argparse
import contextlib
import functools
import io
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from dataclasses import fields
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
import conftest  # noqa: E402
from conftest import TINY, copy_until_8, equal, weights  # noqa: E402
from processes import Forks  # noqa: E402

TEXT = "The sea – said Élise – is never the same sea twice; naïve ☃ or not, it goes on. "
BYTES = 'import plumbing.tokens; plumbing.tokens.load_bpe = lambda timeout: (None, "no network")\n'
SAMPLES = ["--num_samples=2", "--prompt=The sea –", "--sample_length=16"]
WORDS = ["--vocab_size=50304", "--n_embd=8", "--hellaswag=6", "--data={text}", *SAMPLES]
VARIANTS = {  # name: flags, patch
    "plain": ([], ""),
    "later": (["--dtype=bfloat16", "--shuffle=windows", "--optimizer=muon", "--pos=rope"], ""),
    "letters": (["--data={text}", *SAMPLES], BYTES),
    "words": (WORDS, ""),
    "zero": (["--total_batch_size=192", "--B=2", "--max_steps=20", "--shuffle=windows"], ""),
}


class Stage:
    """What the trials of a call share: data, the process that forks, runs that nobody disturbs."""

    def __init__(self, folder):
        self.folder, self.text, examples = folder, folder / "text.txt", folder / "hella.jsonl"
        self.text.write_text("".join(f"{i}. {TEXT}" for i in range(60)), encoding="utf-8")
        example = dict(ctx="The sea", endings=["is wide.", "is a sea", "dry", "runs"], label=0)
        examples.write_text("".join(json.dumps(example | {"label": i % 4}) + "\n"
                                    for i in range(8)))
        os.environ |= {"HELLASWAG_FILE": str(examples), "HF_HUB_OFFLINE": "1",
                       "HF_HOME": str(folder / "hub")}
        self.shards = conftest.write_shards(folder / "data", sizes=(700, 500, 333), val=1001)
        (folder / "console").mkdir()
        self.forks = Forks(folder / "console")

    def flags(self, variant):
        flags = [*TINY, f"--data={self.shards}", *VARIANTS[variant][0]]
        return [flag.format(text=self.text) for flag in flags]

    @functools.cache  # noqa: B019
    def whole(self, variant):
        """(log_dir of an undisturbed run, how often it and a resumed one come by each line)"""
        here, counts = self.folder / f"whole-{variant}", Counter()
        here.mkdir()

        def counted(name, *flags, start=self.forks.start):
            counters = [f"count_lines({str(here / f'{name}{i}.json')!r})" for i in range(2)]
            if start == self.forks.start:
                start(*self.flags(variant), f"--log_dir={name}", *flags, cwd=here,
                      patch=VARIANTS[variant][1] + counters[0]).end().good()
            else:
                of = {i: dict(patch=counter) for i, counter in enumerate(counters)}
                start(2, *self.flags(variant), f"--log_dir={name}", *flags, cwd=here,
                      of=of).end().good()
            for path in here.glob(f"{name}?.json"):
                counts.update({k: v for k, v in json.loads(path.read_text()).items()
                               if v > counts[k]})

        counted("log")
        if variant == "zero":
            counted("two", "--zero", start=self.forks.ranks)
            counted("two", "--zero", "--resume", start=self.forks.ranks)
        else:
            copy_until_8(here / "log", here / "again")
            counted("again", "--resume")
        return here / "log", counts


# -----------------------------------------------------------------------------
# kills, zero

CALLS = ["os.replace", "os.fsync", "os.link", "os.remove", "os.makedirs", "os.open", "torch.load",
         "torch.set_rng_state", "numpy.fromfile", "zipfile.ZipFile.testzip", "json.dumps",
         "torch.nn.utils.clip_grad_norm_", "torch.Tensor.backward"]
TALKS = [f"torch.distributed.{name}" for name in (
    "all_reduce", "all_gather_object", "send", "recv", "init_process_group",
    "destroy_process_group")]
FILES = ("checkpoint.py", "files.py", "reporter.py", "machine.py")


def draw_point(rng, lines, calls):
    """A patch that kills somewhere, or as the run ends where it does not come by so often."""
    nth, kind = 1 + int(rng.expovariate(0.2)), rng.random()
    if kind < 0.6:
        near = [line for line in lines if line.startswith(FILES)] if kind < 0.3 else lines
        place = rng.choice(sorted(near))
        return f"at_line({place!r}, {rng.randint(1, lines[place])}, kill)"
    end = 'at("plumbing.errors.leave", kill)'
    if kind < 0.75:
        torn = rng.choice(["torn_save(kill, when=lambda n, state:", "torn_log(kill, when=lambda n:"])
        return f"{torn} n == {nth}); {end}"
    name, before = rng.choice(calls), rng.random() < 0.5
    return f"at({name!r}, kill, nth={nth}, before={before}); {end}"


def newest(log):
    """The newest step in a log_dir; every checkpoint there must be whole."""
    return max((weights(log, path.name)["step"] for path in log.glob("*.pt")), default=0)


def same_files(a, b):
    return {p.name: p.read_bytes() for p in a.iterdir()} == \
        {p.name: p.read_bytes() for p in b.iterdir()}


def kills(stage, rng, here):
    """A chain of kills; now and then it begins as a fresh run over an older one, which is kept."""
    variant = rng.choice([v for v in VARIANTS if v != "zero"])
    (whole, lines), patch, log = stage.whole(variant), VARIANTS[variant][1], here / "log"
    over, count, step = rng.random() < 0.15, 0, 0
    if over:
        shutil.copytree(whole, log)
    for first in [True] + [False] * rng.randrange(5):
        point = draw_point(rng, lines, CALLS)
        print(f"  {variant}{' over an older run' * (over and first)}: {point}")
        resume = [] if over and first else ["--resume"]
        run = stage.forks.run(*stage.flags(variant), *resume, cwd=here, patch=patch + point).killed()
        assert not over or any(same_files(whole, p) for p in here.iterdir()), "an old run is lost"
        assert newest(log) >= step or over, f"step {step} was there, and now {newest(log)}"
        late, step = "try next" in run.stdout or "is finished" in run.stdout, newest(log)
        count += not late
        if late:
            break
    stage.forks.run(*stage.flags(variant), "--resume", cwd=here, patch=patch).good()
    conftest.assert_same_end(log, whole)
    assert (log / "samples.txt").read_bytes() == (whole / "samples.txt").read_bytes()
    return count


def zero(stage, rng, here):
    """2, 3, 1, 2 processes, each time one of them is killed; at the end 2 go on undisturbed."""
    whole, lines = stage.whole("zero")
    flags, log, count, step = [*stage.flags("zero"), "--zero", "--resume"], here / "log", 0, 0
    for n in (2, 3, 1, 2)[:rng.randint(2, 4)]:
        point, victim = draw_point(rng, lines, CALLS + TALKS), rng.randrange(n)
        print(f"  rank {victim} of {n}: {point}")
        of = {victim: dict(patch=point)}
        ranks = stage.forks.ranks(n, *flags, cwd=here, of=of).end(as_torchrun=True)
        for rank, run in enumerate(ranks):
            assert "Traceback" not in run.stderr or "peer" in run.stderr, run.stderr
            assert rank == victim or run.status is not None
        ranks[victim].killed()
        assert newest(log) >= step, f"step {step} was there, and now {newest(log)}"
        late, step = "try next" in ranks[0].stdout + ranks[0].stderr, newest(log)
        count += not late
        if late:
            break
    stage.forks.ranks(2, *flags, cwd=here).end().good()
    conftest.assert_close(conftest.read_log(log), conftest.read_log(whole))
    return count


# -----------------------------------------------------------------------------
# bits


def frame_of(path):
    """Positions in a zip file that are no tensor's bytes, so no CRC is over all of them."""
    frame, blob = set(range(path.stat().st_size)), path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if "/data/" in entry.filename:
                i = entry.header_offset
                start = i + 30 + sum(int.from_bytes(blob[i + k:i + k + 2], "little")
                                     for k in (26, 28))
                frame -= set(range(start, start + entry.file_size))
    return sorted(frame)


def bits(stage, rng, here):
    from plumbing.checkpoint import find_checkpoint, read_checkpoint
    from plumbing.errors import UserError

    whole, _ = stage.whole("plain")
    good, last = {s: weights(whole, f"model_{s:05d}.pt") for s in (8, 12)}, here / "log" / "last.pt"
    copy_until_8(whole, here / "log")
    last.unlink()
    blob = bytearray((whole / "last.pt").read_bytes())
    if rng.random() < 0.2:
        blob = blob[:rng.randrange(len(blob))]
        print(f"  cut to {len(blob)} bytes")
    else:
        frame = frame_of(whole / "last.pt")
        i, bit = rng.choice([rng.choice(frame), rng.randrange(len(blob))]), rng.randrange(8)
        blob[i] ^= 1 << bit
        print(f"  bit {bit} of byte {i}")
    last.write_bytes(blob)
    harmless = False
    try:
        harmless = equal(read_checkpoint(str(last)), good[12])
        assert harmless, "it was read, and is not what was written"
    except UserError as e:
        assert "\n" not in str(e) and str(last) in str(e), e
    with contextlib.redirect_stderr(io.StringIO()) as warnings:
        found = find_checkpoint(str(here / "log"))
    assert equal({k: found[k] for k in good[8]}, good[12 if harmless else 8])
    assert len(warnings.getvalue().splitlines()) == (not harmless), warnings.getvalue()
    if not harmless and rng.random() < 0.2:
        run = stage.forks.run(*stage.flags("plain"), "--resume", cwd=here).good()
        assert "model_00008.pt, step 8" in run.stdout, run.stdout
        conftest.assert_same_end(here / "log", whole)
    return 1


# -----------------------------------------------------------------------------
# flags

JUNK = ["", " ", "nan", "inf", "-inf", "-1", "1e3", "1.5", "٣", "0x10", "1_0", "x" * 5000, "\n", "é☃",
        "\udcff", "None", "--B", "9" * 5000, str(2**63), str(-2**63), str(2**64)]
NUMBERS = {  # what is neither refused nor cheap is not drawn: this measures manners, not patience
    int: ["0", "1", "2", "3", "7", "16", "33", str(2**40), str(2**63 - 1)],
    float: ["0", "-0.0", "5e-324", "1e-300", "0.5", "3", "1e30", "1e308", "1.8e308", "1e400"],
}
MODEST = dict(max_steps=["1", "2"], sample_length=["1", "7", "40"], num_samples=["0", "1", "3"],
              total_batch_size=["16", "32", "48", "256", str(2**62)])
NAMES = ["nowhere", "text.txt", "empty", "junk.bin", "/dev/null", "/proc/x", ".", "é ☃",
         "a*[b]?", "n" * 300, "old", "old/last.pt", "cut.pt", "data", "x/y", "-", "\udcff", "line\nend"]
PROMPTS = ["The sea", "é☃", "\udcff", "-", "<|endoftext|>", " ", "word " * 200]
PROGRAMS = {  # name: (its part of the draws, the patch that starts it)
    "train_gpt2.py": (6, ""),
    "modern.py": (2, "import modern, train_gpt2; main = train_gpt2.main\n"
                  "train_gpt2.main = lambda argv: main(argv, modern.ModernGPT)\n"),
    "fineweb.py": (1, "import fineweb, train_gpt2; train_gpt2.main = fineweb.main\n"),
    "plot.py": (1, "del sys.modules['matplotlib']; import plot, train_gpt2; from plumbing.errors import run_main\n"
                "train_gpt2.main = lambda argv: run_main('plot.py', lambda: plot.plot(argv))\n"),
}
QUICK = ('import functools, torch; torch.compile = functools.partial(torch.compile, backend="eager")'
         '\nsys.stdin = open(os.devnull)\n')
DOCUMENTED = ("The weights were not updated",)  # what a run with sane files may end with, status 1


def draw_flag(rng, field):
    meta, name = field.metadata, field.name
    if meta["kind"] is bool:
        return [rng.choice([f"--{name}"] * 12 + [f"--no-{name}", f"--{name}=1", f"--{name}="])]
    if meta["choices"]:
        good = meta["choices"]
    else:
        good = dict(MODEST, prompt=PROMPTS, device=["cpu", "cpu:0", "cuda", "mps", "tpu"]).get(
            name, NUMBERS.get(meta["kind"], NAMES))
    value = rng.choice(good if rng.random() < 0.85 else JUNK)
    if rng.random() < 0.04:
        name = rng.choice([name.replace("_", "-"), name[:-1], name + "s", name.upper()])
    return [f"--{name}={value}"] if rng.random() < 0.9 else [f"--{name}", value]


def draw_command(rng, program, base):
    import fineweb
    import train_gpt2

    if program == "plot.py":
        names = [rng.choice([*NAMES, *["old"] * 8]) for _ in range(rng.randint(1, 3))]
        return [*names, *rng.choice([[], ["-o", rng.choice(NAMES)], ["--out=p.svg"]])]
    cls = fineweb.Flags if program == "fineweb.py" else train_gpt2.TrainConfig
    flags = base if cls is train_gpt2.TrainConfig else [
        f"--files={rng.choice(['text.txt', 'rows.jsonl', *NAMES])}", "--out=out", "--num_proc=1"]
    weight = [4 if f.name in ("resume", "init", "eval_only", "inspect") else 1 for f in fields(cls)]
    drawn = rng.choices(fields(cls), weight, k=rng.randint(1, 4))
    if program == "modern.py":
        pass
    return flags + [word for field in drawn for word in draw_flag(rng, field)]


def tree(folder):
    return {str(p): p.stat().st_mtime_ns for p in folder.rglob("*") if not p.is_dir()}


def flags(stage, rng, here):
    program = rng.choices(list(PROGRAMS), [share for share, _ in PROGRAMS.values()])[0]
    whole, _ = stage.whole("plain")
    copy_until_8(whole, here / "old")
    (here / "empty").touch()
    (here / "junk.bin").write_bytes(rng.randbytes(3000))
    (here / "cut.pt").write_bytes((whole / "last.pt").read_bytes()[:9000])
    (here / "rows.jsonl").write_text(json.dumps(dict(text=TEXT)) + "\n")
    shutil.copy(stage.text, here / "text.txt")
    os.symlink(stage.shards, here / "data")
    base = [*TINY, f"--data={stage.shards}", "--max_steps=2", "--total_batch_size=32"]
    argv = draw_command(rng, program, base)
    if "--resume" in argv and rng.random() < 0.8:
        argv = [a for a in argv if a.split("=")[0] not in ("--max_steps", "--total_batch_size")]
        argv.append("--log_dir=old")
    print(f"  {program} {' '.join(repr(a[:60]) for a in argv if a not in base)}")
    before = tree(here)
    run = stage.forks.run(*argv, cwd=here, patch=QUICK + PROGRAMS[program][1])
    error = [x for x in run.stderr.splitlines() if not x.startswith("warning: ")]
    told = f"status {run.status}: {run.stderr[-500:]}"
    if os.environ.get('DBG'): print(told[:200].split(chr(10))[0], file=open(os.environ['DBG'],'a'))
    assert "Traceback" not in run.stderr, told
    assert run.status in (0, 2) or any(x in run.stderr for x in DOCUMENTED), told
    if run.status == 0:
        assert not error or "transformers" in run.stderr, told
    else:
        assert error[0].startswith(f"{program}: error: "), told
        assert all(" | " in line for line in error[1:]), told
    if run.status == 2 and program != "fineweb.py":
        assert tree(here) == before, f"files were touched; {told}"
    return 1


# -----------------------------------------------------------------------------
# disk

FILL = """
import builtins, io
full, real_open = [], open

class Disk(io.FileIO):
    def write(self, data):
        if full:
            no_space()
        return super().write(data)

def opened(path, mode="r", *args, **kwargs):
    if mode in ("w+b", "r+b"):
        return io.BufferedRandom(Disk(path, mode.replace("b", "")))
    return real_open(path, mode, *args, **kwargs)

def fill():
    full.append(True)
    no_space()

builtins.open = opened
"""
MOMENTS = {  # of a run of 12 steps that saves at 4, 8 and 12; {act}: no_space once, or fill for good
    "lock": 'at("os.open", {act}, match=".lock")',
    "cut log": 'at("builtins.open", {act}, match="log.txt.tmp")',
    "config.json": 'at("builtins.open", {act}, match="config.json.tmp")',
    "log line": "torn_log({act}, when=lambda n: n == {nth})",
    "samples line": 'at("builtins.open", {act}, nth=2 + {nth}, match="samples.txt")',
    "save: open": 'at("builtins.open", {act}, match="last.pt.tmp")',
    "save: write": 'torn_save({act}, when=lambda n, state: state["step"] < 12)',
    "save: fsync": 'at("os.fsync", {act}, nth=6 + {nth})',
    "save: rename": 'at("os.replace", {act}, match="last.pt.tmp")',
    "kept: open": 'at("builtins.open", {act}, match="model_00008.pt.tmp")',
    "kept: link": 'at("os.link", {act})',
    "last: write": 'torn_save({act}, when=lambda n, state: state["step"] == 12)',
    "last: rename": 'at("os.replace", {act}, match="model_00012")',
    "last: link": 'at("os.link", {act}, match="model_00012")',
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
    command = dict(cwd=here, patch=BYTES + FILL + MOMENTS[name].format(act=act, nth=nth))
    run = stage.forks.run(*stage.flags("letters"), "--resume", **command)
    told = f"status {run.status}: {run.stderr[-500:]}"
    error = [x for x in run.stderr.splitlines() if not x.startswith("warning: ")]
    assert run.status in (0, 1, 2) and len(error) == (run.status > 0), told
    assert not error or error[0].startswith("train_gpt2.py: error: "), told
    assert not resumed or newest(log) >= 8, told
    if act == "no_space":  # one failure: a last save ends the run, as does one before the first step
        early = name in ("lock", "cut log", "config.json")
        assert (run.status > 0) == (early or name in ("last: write", "last: rename")), told
    lost = run.status == 0 and "lines could not be written" in run.stderr
    (log / "curves.png.tmp").unlink(missing_ok=True)
    stage.forks.run(*stage.flags("letters"), "--resume", cwd=here, patch=BYTES).good()
    if not lost:
        conftest.assert_same_end(log, whole)
        assert (log / "samples.txt").read_bytes() == (whole / "samples.txt").read_bytes()
    return 1


# -----------------------------------------------------------------------------
# world

RUN = 'exec "$@"'
NOBODY = "exec setpriv --reuid 65534 --regid 65534 --clear-groups" if os.getuid() == 0 else "exec"
WORLDS = {  # name: (shell script, folder)
    "C": (f"export LC_ALL=C; {RUN}", "x"),
    "ascii": (f"export PYTHONIOENCODING=ascii; {RUN}", "x"),
    "no stdin": (f"{RUN} <&-", "x"),
    "no stdout": (f"{RUN} >&-", "x"),
    "no stderr": (f"{RUN} 2>&-", "x"),
    "no streams": (f"{RUN} <&- >&- 2>&-", "x"),
    "full stdout": (f"{RUN} > /dev/full", "x"),
    "few files": (f"ulimit -n 32; {RUN}", "x"),
    "no home": (f"unset HOME; {RUN}", "x"),
    "no environment": (f'exec env -i TIKTOKEN_CACHE_DIR="$TIKTOKEN_CACHE_DIR" '
                       f'HELLASWAG_FILE="$HELLASWAG_FILE" PATH="$PATH" OMP_NUM_THREADS=1 "$@"', "x"),
    "-OO": (f"export PYTHONOPTIMIZE=2; {RUN}", "x"),
    "WORLD_SIZE=2": (f"export WORLD_SIZE=2; {RUN}", "x"),
    "read-only": (f'{NOBODY} "$@"', "x"),
    "space": (RUN, "two words "),
    "line end": (RUN, "line\nend"),
    "unicode": (RUN, "é☃ №"),
    "glob": (RUN, "a*[b-c]?{d}"),
    "shell": (RUN, "$HOME;`id`'\""),
}
COMMANDS = {
    "train": ["train_gpt2.py", "--log_dir={here}/log"],
    "resume": ["train_gpt2.py", "--log_dir={here}/log", "--resume"],
    "fineweb": ["fineweb.py", "--files", "{text}", "--out={here}/shards", "--num_proc=1",
                "--shard_size=700"],
    "hellaswag": ["hellaswag.py", "-m", "{here}/log/last.pt", "-d", "cpu", "--limit=4",
                  "--data_file={hella}"],
    "plot": ["plot.py", "{here}/log"],
}


@functools.cache
def locked_checkout(folder):
    """A copy of the project in which nobody may write."""
    copy = folder / "checkout"
    ignore = shutil.ignore_patterns(".*", "__pycache__", "tests", "hellaswag", "edu_fineweb10B")
    shutil.copytree(ROOT, copy, ignore=ignore)
    for path in [copy, *copy.rglob("*")]:
        path.chmod(path.stat().st_mode & ~0o222 | 0o444)
    return copy


def started(stage, name, script, here, root):
    """A command as a user starts it, from the shell."""
    program, *flags = COMMANDS[name]
    if program == "train_gpt2.py":
        flags = [*stage.flags("words"), *flags]
    flags = [f.format(here=here, text=stage.text, hella=stage.folder / "hella.jsonl")
             for f in flags]
    return subprocess.run(["sh", "-c", script, "sh", sys.executable, str(root / program), *flags],
                          cwd=here, capture_output=True, text=True, errors="replace", timeout=300)


def world(stage, rng, here):
    which, number = divmod(rng.number, len(COMMANDS))
    place, name = list(WORLDS)[which % len(WORLDS)], list(COMMANDS)[number]
    (script, folder), (whole, _), root = WORLDS[place], stage.whole("words"), ROOT
    print(f"  {name} in the world of {place}")
    here = here / folder
    here.mkdir()
    if name == "resume":
        copy_until_8(whole, here / "log")
    elif name in ("hellaswag", "plot"):
        shutil.copytree(whole, here / "log")
    if place == "read-only":
        root = locked_checkout(stage.folder)
        if os.getuid() == 0:
            stage.folder.chmod(0o755)
            here.parent.chmod(0o755)
            for path in [here, *here.rglob("*")]:
                os.chown(path, 65534, 65534)
    run = started(stage, name, script, here, root)
    told = f"status {run.returncode}: {run.stdout[-500:]} {run.stderr[-500:]}"
    assert "Traceback" not in run.stderr, told
    if place == "WORLD_SIZE=2" and name not in ("fineweb", "plot"):
        assert run.returncode == 2 and "unset" in run.stderr.splitlines()[-1], told
        return 1
    assert run.returncode == (place == "full stdout"), told  # all is done, but not all was said
    assert all(x.startswith("warning: ") for x in run.stderr.splitlines()), told
    if name in ("train", "resume"):
        conftest.assert_same_end(here / "log", whole)
        assert (here / "log" / "samples.txt").read_bytes() == (whole / "samples.txt").read_bytes()
        assert (here / "log" / "curves.png").exists(), told
    elif name == "fineweb":
        assert len(list((here / "shards").glob("*.npy"))) > 2, told
    elif name == "plot":
        assert (here / "log" / "curves.png").exists(), told
    elif place not in ("no stdout", "no streams", "full stdout"):
        assert "acc_norm: " in run.stdout, told
    return 1


# -----------------------------------------------------------------------------
# The command

KINDS = dict(kills=(kills, 150), zero=(zero, 50), bits=(bits, 250), flags=(flags, 400),
             disk=(disk, 4 * len(MOMENTS)), world=(world, len(WORLDS) * len(COMMANDS)))


def trial(stage, kind, seed):
    """One trial: (how often it has attacked, what went wrong or None)."""
    here, rng = stage.folder / f"{kind}-{seed}", random.Random(f"{kind} {seed}")
    rng.number = seed
    here.mkdir()
    fault = None
    with contextlib.redirect_stdout(io.StringIO()) as said:
        try:
            count = KINDS[kind][0](stage, rng, here)
        except Exception as e:
            frame = traceback.extract_tb(e.__traceback__)[-1]
            fault = f"{said.getvalue()}{type(e).__name__} in line {frame.lineno}: {str(e)[:2500]}"
            count = 1
    shutil.rmtree(here)
    return count, fault


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("which", nargs="*", metavar="kind", help=", ".join(KINDS))
    parser.add_argument("--seed", type=int, default=None, help="of the first trial")
    parser.add_argument("--n", type=int, help="attacks of each kind (default: its own number)")
    args = parser.parse_args()
    if unknown := set(args.which) - set(KINDS):
        parser.error(f"no such kind: {', '.join(unknown)}")
    first = random.randrange(10**6) * 1000 if args.seed is None else args.seed
    total = 0
    with tempfile.TemporaryDirectory() as folder:
        stage = Stage(Path(folder))
        for kind in args.which or KINDS:
            start, done, faults = time.monotonic(), 0, 0
            for seed in itertools.count(first):
                if done >= (args.n or KINDS[kind][1]):
                    break
                count, fault = trial(stage, kind, seed)
                done += count
                if fault:
                    faults += 1
                    print(f"FAILED: {kind} --seed {seed} --n 1\n{fault}", flush=True)
            total += faults
            print(f"{kind}: {done} from seed {first}, {faults} failed, "
                  f"{time.monotonic() - start:.0f} s", flush=True)
        stage.forks.close()
    return bool(total)


if __name__ == "__main__":
    sys.exit(main())
