"""
Attack the project and count what breaks. Run by hand, on Linux; half an hour on two cores:

    python tests/bench/attack.py                             # everything
    python tests/bench/attack.py kills bits --n 1000         # these kinds, so many of each
    python tests/bench/attack.py flags --seed 417 --n 1      # that one once more, as a failure says

    kills   SIGKILL at a line or a call by chance, again and again; the end is bit-equal
    zero    the same under --zero while the number of processes changes; the end agrees to 1e-5
    bits    a flipped bit or a cut end of a checkpoint is refused or harmless, the next older serves
    flags   flags by chance, good and bad: status 0, or one line, status 2 and nothing written
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
from conftest import (  # noqa: E402
    TINY, assert_close, copy_until_8, differing_lines, equal, read_log, weights, write_shards,
)
from processes import Forks  # noqa: E402

TEXT = "The sea – said Élise – is never the same sea twice; naïve ☃ or not, it goes on. "
SAMPLES = ["--data={text}", "--num_samples=2", "--prompt=The sea –", "--sample_length=16"]
BYTES = 'import plumbing.tokens; plumbing.tokens.load_bpe = lambda timeout: (None, "no network")\n'
COMPILE = "import functools, torch\ntorch.compile = functools.partial(torch.compile, backend={!r})\n"
VARIANTS = {  # name: flags, patch
    "plain": ([], ""),
    "later": (["--dtype=bfloat16", "--shuffle=windows", "--optimizer=muon", "--pos=rope"], ""),
    "compiled": (["--compile", "--n_layer=1"], COMPILE.format("aot_eager")),
    "letters": (SAMPLES, BYTES),
    "words": ([*SAMPLES, "--vocab_size=50304", "--n_embd=8", "--hellaswag=6"], ""),
    "zero": (["--zero", "--total_batch_size=192", "--max_steps=20", "--shuffle=windows"], ""),
}


class Stage:
    """What the trials of a call share: data, the process that forks, runs that nobody disturbs."""

    def __init__(self, folder):
        self.folder, self.text, self.hella = folder, folder / "text.txt", folder / "hella.jsonl"
        self.text.write_text("".join(f"{i}. {TEXT}" for i in range(60)), encoding="utf-8")
        example = dict(ctx="The sea", endings=["is wide.", "is a sea", "dry", "runs"])
        lines = [json.dumps(example | dict(label=i % 4)) for i in range(8)]
        self.hella.write_text("\n".join(lines))
        os.environ |= dict(HELLASWAG_FILE=str(self.hella), HF_HUB_OFFLINE="1")
        self.shards = write_shards(folder / "data", sizes=(700, 500, 333), val=1001)
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

        def counted(name, *more, n=1):
            nonlocal lines
            files = [here / f"{name}.{rank}.json" for rank in range(n)]
            of = {rank: dict(patch=f"count_lines({str(f)!r})") for rank, f in enumerate(files)}
            self.forks.ranks(n, *self.flags(variant), f"--log_dir={name}", *more, cwd=here, of=of,
                             patch=VARIANTS[variant][1]).end().good()
            for f in files:
                lines |= Counter(json.loads(f.read_text()))  # of the two counts the larger

        counted("log")
        if variant == "zero":
            counted("two", n=2)
            return here / "log", lines | self.whole("plain")[1]
        copy_until_8(here / "log", here / "again")
        counted("again", "--resume")
        return here / "log", lines


def newest(log):
    """The newest step in a log_dir; every checkpoint there must be whole."""
    return max((weights(log, path.name)["step"] for path in log.glob("*.pt")), default=0)


def assert_same_end(log, whole, kept=True):
    """Two finished runs are one, to the last bit. kept: the checkpoints that are kept, too."""
    for name in ("log.txt", "samples.txt"):
        assert (n := differing_lines(log, whole, name)) == 0, f"{n} lines of {name} differ"
    a, b = weights(log), weights(whole)
    for part in ("step", "model", "optimizer", "val_loss"):
        assert equal(a[part], b[part]), f"{part} of last.pt differs"
    names = [sorted(p.name for p in x.iterdir() if p.suffix in (".pt", ".tmp"))
             for x in (log, whole)]
    assert not kept or names[0] == names[1], names


def assert_manners(program, status, stderr, statuses=(0, 2)):
    """A run that ended well has at most warned; another has said one line, or a table."""
    told = f"status {status}: {stderr[-900:]}"
    error = [x for x in stderr.splitlines() if not x.startswith("warning: ")]
    assert status in statuses and "Traceback" not in stderr, told
    assert bool(error) == bool(status), told
    assert not error or error[0].startswith(f"{program}: error: "), told
    assert all(" | " in line for line in error[1:]), told


# -----------------------------------------------------------------------------
# kills, zero

CALLS = ["os.replace", "os.fsync", "os.link", "os.remove", "os.makedirs", "os.open", "torch.load",
         "torch.set_rng_state", "numpy.fromfile", "zipfile.ZipFile.testzip", "json.dumps",
         "torch.nn.utils.clip_grad_norm_", "torch.Tensor.backward", "torch.distributed.send",
         "torch.distributed.recv", "torch.distributed.all_reduce",
         "torch.distributed.all_gather_object", "torch.distributed.init_process_group"]
FILES = ("checkpoint.py", "files.py", "reporter.py", "machine.py")
END = 'at("plumbing.errors.leave", kill)'


def draw_point(rng, lines, calls):
    """A patch that kills somewhere, or as the run ends where it does not come by so often."""
    nth, kind = 1 + int(rng.expovariate(0.2)), rng.random()
    if kind < 0.6:
        place = rng.choice(sorted(x for x in lines if kind < 0.3 or x.startswith(FILES)))
        return f"at_line({place!r}, {rng.randint(1, lines[place])}, kill)"
    if kind < 0.75:
        torn = rng.choice(["torn_save(kill, when=lambda n, _:", "torn_log(kill, when=lambda n:"])
        return f"{torn} n == {nth}); {END}"
    return f"at({rng.choice(calls)!r}, kill, nth={nth}, before={rng.random() < 0.5}); {END}"


def chain(stage, rng, here, variant, processes, older=False):
    """Start runs of so many processes and kill each of them: the number of kills.
    older: the first is a fresh start over an older run."""
    (whole, lines), log, count, step = stage.whole(variant), here / "log", 0, 0
    flags, calls = stage.flags(variant), CALLS if max(processes) > 1 else CALLS[:-5]
    if older:
        shutil.copytree(whole, log)
    for i, n in enumerate(processes):
        point, victim = draw_point(rng, lines, calls), rng.randrange(n)
        print(f"  {variant}, rank {victim} of {n}{', over an older run' * older}: {point}")
        resume = ["--resume"] if i or not older else []
        of = {victim: dict(patch=point)}
        ranks = stage.forks.ranks(n, *flags, *resume, cwd=here, patch=VARIANTS[variant][1], of=of)
        ranks.end(as_torchrun=True)[victim].killed()
        for run in ranks:
            assert "Traceback" not in run.stderr or "by peer" in run.stderr, run.stderr
        if older:
            olds = [p for p in here.iterdir() if (p / "model_00012.pt").exists()]
            assert any(not differing_lines(p, whole) for p in olds), "the older run is lost"
        assert newest(log) >= step or older, f"step {step} was there, and now {newest(log)}"
        step, said = newest(log), ranks[0].stdout
        if "try next" in said or "is finished" in said:  # so late that no more can be killed
            return max(count, 1)
        count += 1
    return count


def kills(stage, rng, here):
    variant = rng.choice([v for v in VARIANTS if v != "zero"])
    count = chain(stage, rng, here, variant, [1] * rng.randint(1, 5), rng.random() < 0.15)
    stage.forks.run(*stage.flags(variant), "--resume", cwd=here, patch=VARIANTS[variant][1]).good()
    assert_same_end(here / "log", stage.whole(variant)[0])
    return count


def zero(stage, rng, here):
    count = chain(stage, rng, here, "zero", (2, 3, 1, 2)[:rng.randint(2, 4)])
    stage.forks.ranks(2, *stage.flags("zero"), "--resume", cwd=here).end().good()
    assert_close(read_log(here / "log"), read_log(stage.whole("zero")[0]))
    return count


# -----------------------------------------------------------------------------
# bits


def damage(rng, path):
    """The bytes of a checkpoint with one wrong bit, or without their end."""
    blob = bytearray(path.read_bytes())
    if rng.random() < 0.2:
        return blob[:rng.randrange(len(blob))]
    with zipfile.ZipFile(path) as archive:
        header = rng.choice(archive.infolist()).header_offset + rng.randrange(100)
        place = rng.choice([header, rng.randrange(archive.start_dir, len(blob)),
                            rng.randrange(len(blob))])
    print(f"  bit {(bit := rng.randrange(8))} of byte {place}")
    blob[place] ^= 1 << bit
    return blob


def bits(stage, rng, here):
    from plumbing.checkpoint import find_checkpoint, read_checkpoint
    from plumbing.errors import UserError

    (whole, _), log = stage.whole("plain"), here / "log"
    good, last = {step: weights(whole, f"model_{step:05d}.pt") for step in (8, 12)}, log / "last.pt"
    copy_until_8(whole, log)
    last.unlink()
    last.write_bytes(damage(rng, whole / "last.pt"))
    harmless = False
    try:
        harmless = equal(read_checkpoint(str(last)), good[12])
        assert harmless, "it was read, and is not what was written"
    except UserError as e:
        assert "\n" not in str(e) and str(last) in str(e), e
    with contextlib.redirect_stderr(io.StringIO()) as said:
        found = find_checkpoint(str(log))
    assert equal({k: found[k] for k in good[8]}, good[12 if harmless else 8])
    assert len(said.getvalue().splitlines()) == (not harmless), said.getvalue()
    if not harmless and rng.random() < 0.2:
        run = stage.forks.run(*stage.flags("plain"), "--resume", cwd=here).good()
        assert "model_00008.pt, step 8" in run.stdout, run.stdout
        assert_same_end(log, whole)
    return 1


# -----------------------------------------------------------------------------
# flags

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
    total_batch_size=["16", "32", "48", "256", str(2**62)], device=["cpu", "cuda:9", "mps", "tpu"],
    prompt=["The sea", "é☃", "\udcff", "-", "<|endoftext|>", " ", "word " * 200])
PROGRAMS = {  # name: (its part of the draws, the patch that starts it)
    "train_gpt2.py": (6, ""),
    "modern.py": (2, "import modern, train_gpt2; main = train_gpt2.main\n"
                  "train_gpt2.main = lambda argv: main(argv, modern.ModernGPT)\n"),
    "fineweb.py": (1, "import fineweb, train_gpt2; train_gpt2.main = fineweb.main\n"),
    "plot.py": (1, "del sys.modules['matplotlib']; import plot, plumbing.errors, train_gpt2\n"
                "train_gpt2.main = lambda argv: plumbing.errors.run_main('plot.py', "
                "lambda: plot.plot(argv))\n"),
}


def draw_flag(rng, field):
    meta, name = field.metadata, field.name
    if meta["kind"] is bool:
        return [rng.choice([f"--{name}"] * 12 + [f"--no-{name}", f"--{name}=1", f"--{name}="])]
    good = VALUES.get(name) or meta["choices"] or NUMBERS.get(meta["kind"], NAMES)
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
    cls = train_gpt2.TrainConfig
    if program == "fineweb.py":
        cls, files = fineweb.Flags, ["text.txt", "rows.jsonl"] * 8 + NAMES
        base = [f"--files={rng.choice(files)}", "--out=out", "--num_proc=1"]
    often = ("resume", "init", "eval_only", "inspect", "shard_size", "text_column")
    weight = [4 if f.name in often else 1 for f in fields(cls)]
    drawn = rng.choices(fields(cls), weight, k=rng.randint(1, 4))
    argv = base + [word for field in drawn for word in draw_flag(rng, field)]
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
    (here / "rows.jsonl").write_text(json.dumps(dict(text=TEXT)) + "\n")
    shutil.copy(stage.text, here / "text.txt")
    os.symlink(stage.shards, here / "data")
    base = [*TINY, f"--data={stage.shards}", "--max_steps=2", "--total_batch_size=32"]
    argv = draw_command(rng, program, base)
    print(f"  {program} {' '.join(repr(a[:60]) for a in argv if a not in base)}")

    def files():
        return {str(p): p.stat().st_mtime_ns for p in here.rglob("*") if p.is_file()}

    before = files()
    patch = COMPILE.format("eager") + "sys.stdin = open(os.devnull)\n" + PROGRAMS[program][1]
    run = stage.forks.run(*argv, cwd=here, patch=patch)
    if "not updated" in run.stderr:  # a learning rate of 1e30: the loss is not finite any more
        assert_manners(program, run.status, run.stderr, statuses=[1])
    elif run.status != 0 or "[transformers]" not in run.stderr:
        assert_manners(program, run.status, run.stderr)
    if run.status == 2 and program != "fineweb.py":
        assert files() == before, f"files were touched: {run.stderr}"
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
MOMENTS = {  # of a run of 12 steps that saves at 4, 8 and 12; {act}: no_space once, fill for good
    "lock": 'at("os.open", {act}, match=".lock")',
    "cut log": 'at("builtins.open", {act}, match="log.txt.tmp")',
    "config.json": 'at("builtins.open", {act}, match="config.json.tmp")',
    "log line": "torn_log({act}, when=lambda n: n == {nth})",
    "samples line": 'at("builtins.open", {act}, nth=2 + {nth}, match="samples.txt")',
    "save: open": 'at("builtins.open", {act}, match="last.pt.tmp")',
    "save: write": 'torn_save({act}, when=lambda n, state: state["step"] < 12)',
    "save: fsync": 'at("os.fsync", {act}, nth=6 + {nth})',
    "save: rename": 'at("os.replace", {act}, match="last.pt")',
    "kept: open": 'at("builtins.open", {act}, match="model_00008.pt.tmp")',
    "kept: link": 'at("os.link", {act})',
    "last: write": 'torn_save({act}, when=lambda n, state: state["step"] == 12)',
    "last: rename": 'at("os.replace", {act}, match="model_00012.pt.tmp")',
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
    patch = BYTES + FILL + MOMENTS[name].format(act=act, nth=nth)
    run = stage.forks.run(*stage.flags("letters"), "--resume", cwd=here, patch=patch)
    assert_manners("train_gpt2.py", run.status, run.stderr, statuses=(0, 1, 2))
    assert not resumed or newest(log) >= 8, run.stderr
    if act == "no_space":  # once, it ends no run but before the first step and in the last save
        fatal = name in ("lock", "cut log", "config.json", "last: write", "last: rename")
        assert bool(run.status) == fatal, f"status {run.status}: {run.stderr}"
    (log / "curves.png.tmp").unlink(missing_ok=True)
    stage.forks.run(*stage.flags("letters"), "--resume", cwd=here, patch=BYTES).good()
    if run.status or "lines could not be written" not in run.stderr:  # it was said what is missing
        assert_same_end(log, whole, kept="step 8 could not be saved" not in run.stderr)
    return 1


# -----------------------------------------------------------------------------
# world

RUN = 'exec "$@"'
# root obeys no mode, unless it gives that right away
MORTAL = "exec setpriv --bounding-set=-dac_override" if os.getuid() == 0 else "exec"
WORLDS = {  # name: shell script; where it is another world by its folder, that
    "C": f"export LC_ALL=C; {RUN}",
    "ascii": f"export PYTHONIOENCODING=ascii; {RUN}",
    "no stdin": f"{RUN} <&-",
    "no stdout": f"{RUN} >&-",
    "no stderr": f"{RUN} 2>&-",
    "no streams": f"{RUN} <&- >&- 2>&-",
    "full stdout": f"{RUN} > /dev/full",
    "few files": f"ulimit -n 32; {RUN}",
    "no home": f"unset HOME; {RUN}",
    "-OO": f"export PYTHONOPTIMIZE=2; {RUN}",
    "WORLD_SIZE=2": f"export WORLD_SIZE=2; {RUN}",
    "read-only": f'{MORTAL} "$@"',
    "two words ": RUN, "line\nend": RUN, "é☃ №": RUN, "a*[b-c]?{d}": RUN, "$HOME;`id`'\"": RUN,
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
    skip = shutil.ignore_patterns(".*", "__pycache__", "tests", "hellaswag", "edu_fineweb10B")
    shutil.copytree(ROOT, folder / "checkout", ignore=skip)
    for path in [folder / "checkout", *(folder / "checkout").rglob("*")]:
        path.chmod(path.stat().st_mode & ~0o222)
    return folder / "checkout"


def started(stage, name, world, here):
    """A command as a user starts it, from the shell."""
    root = locked_checkout(stage.folder) if world == "read-only" else ROOT
    program, *more = COMMANDS[name]
    more = [x.format(here=here, text=stage.text, hella=stage.hella) for x in more]
    if program == "train_gpt2.py":
        more = [*stage.flags("words"), *more]
    line = ["sh", "-c", WORLDS[world], "sh", sys.executable, str(root / program), *more]
    return subprocess.run(line, cwd=here, capture_output=True, text=True, errors="replace",
                          timeout=300)


def world(stage, rng, here):
    which, number = divmod(rng.number, len(COMMANDS))
    place, name = list(WORLDS)[which % len(WORLDS)], list(COMMANDS)[number]
    whole, _ = stage.whole("words")
    print(f"  {name} in the world of {place!r}")
    here = here / (place if WORLDS[place] == RUN else "x")
    here.mkdir()
    if name == "resume":
        copy_until_8(whole, here / "log")
    elif name in ("hellaswag", "plot"):
        shutil.copytree(whole, here / "log")
    run = started(stage, name, place, here)
    if place == "WORLD_SIZE=2" and name not in ("fineweb", "plot"):
        assert "unset WORLD_SIZE" in run.stderr, run.stderr
        return assert_manners(COMMANDS["train"][0], run.returncode, run.stderr, [2]) or 1
    if place == "full stdout":  # all is done, but not all was said
        assert run.returncode == 1 and not run.stderr, run.stderr
    else:
        assert_manners(COMMANDS[name][0], run.returncode, run.stderr, [0])
    if name in ("train", "resume"):
        assert_same_end(here / "log", whole)
    if name in ("train", "resume", "plot"):
        assert (here / "log" / "curves.png").exists()
    elif name == "fineweb":
        assert len(list((here / "shards").glob("*.npy"))) > 2
    elif place not in ("no stdout", "no streams", "full stdout"):
        assert "acc_norm: " in run.stdout, run.stdout
    return 1


# -----------------------------------------------------------------------------
# The command

KINDS = dict(kills=(kills, 150), zero=(zero, 50), bits=(bits, 250), flags=(flags, 400),
             disk=(disk, 4 * len(MOMENTS)), world=(world, len(WORLDS) * len(COMMANDS)))


def trial(stage, kind, seed):
    """One trial: (how often it has attacked, what went wrong or None)."""
    here, rng = stage.folder / f"{kind}-{seed}", random.Random(f"{kind} {seed}")
    rng.number, count, fault = seed, 1, None
    here.mkdir()
    with contextlib.redirect_stdout(io.StringIO()) as said:
        try:
            count = KINDS[kind][0](stage, rng, here)
        except Exception:
            fault = said.getvalue() + "".join(traceback.format_exc(limit=-2))[-2000:]
    shutil.rmtree(here)
    return count, fault


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("which", nargs="*", metavar="kind", help=", ".join(KINDS))
    parser.add_argument("--seed", type=int, help="of the first trial")
    parser.add_argument("--n", type=int, help="attacks of each kind (default: its own number)")
    args = parser.parse_args()
    if unknown := set(args.which) - set(KINDS):
        parser.error(f"no such kind: {', '.join(unknown)}")
    first, total = random.randrange(10**6) * 1000 if args.seed is None else args.seed, 0
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
