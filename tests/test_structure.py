"""Five scripts: each works when copied alone, imports quickly, and has short functions."""

import ast
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import TINY, weights
from processes import ROOT

SCRIPTS = ["fineweb.py", "hellaswag.py", "modern.py", "plot.py", "train_gpt2.py"]
HEAVY = {"torch._dynamo", "transformers", "datasets", "tiktoken", "requests", "matplotlib", "wandb",
         "filelock", "pyarrow"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_function_is_long(name):
    tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    long = [f.name for f in functions if f.end_lineno - f.lineno >= 50]
    assert set(long) <= {"build_parser"} and "main" in [f.name for f in functions]


@pytest.mark.parametrize("name, unused", [
    ("fineweb", {"torch", "train_gpt2"}), ("plot", {"torch", "train_gpt2"}), ("hellaswag", {"train_gpt2"}),
    ("train_gpt2", set()), ("modern", set())])
def test_import_is_silent_and_light(tmp_path, name, unused):
    """Nothing is printed or written; optional packages and other scripts are imported when used."""
    for script in {name, "train_gpt2"} if name == "modern" else {name}:
        shutil.copy(ROOT / f"{script}.py", tmp_path)
    before = set(tmp_path.iterdir())
    code = f"import sys, {name}; print(sorted({HEAVY | unused!r} & {{*sys.modules}}))"
    done = subprocess.run([sys.executable, "-B", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("[]\n", "") and set(tmp_path.iterdir()) == before


@pytest.fixture
def alone(tmp_path):
    """alone(script, *flags) starts a script copied alone into tmp_path, without a network."""
    def start(script, *flags):
        shutil.copy(ROOT / script, tmp_path)
        env = os.environ | dict(TIKTOKEN_CACHE_DIR="", HTTPS_PROXY="http://127.0.0.1:9", NO_PROXY="")
        return subprocess.Popen([sys.executable, "-u", script, *flags], cwd=tmp_path, env=env, text=True,
                                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    return start


@pytest.mark.skipif(os.name == "nt", reason="needs SIGTERM")
def test_train_gpt2_alone(alone, tmp_path):
    """train_gpt2.py alone trains, stops on SIGTERM, resumes, samples and evaluates."""
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question. " * 100)
    flags = [*TINY, "--data=text.txt", "--num_samples=1"]
    run = alone("train_gpt2.py", *flags, "--max_steps=1000000")
    next(line for line in run.stdout if line.startswith("step     3"))
    run.send_signal(signal.SIGTERM)
    _, stderr = run.communicate()
    assert run.returncode == 128 + signal.SIGTERM, stderr
    ckpt = weights(tmp_path / "log")
    ckpt["flags"]["hellaswag"] = 10  # as on a machine that has hellaswag.py
    torch.save(ckpt, tmp_path / "log" / "last.pt")
    for more in ["--resume", f"--max_steps={ckpt['step'] + 2}"], ["--init=log/last.pt", "--eval_only"]:
        run = alone("train_gpt2.py", "--device=cpu", "--num_samples=1", *more)
        stdout, stderr = run.communicate()
        assert run.returncode == 0 and "validation loss: " in stdout and "sample 0: " in stdout, stderr
        assert len([line for line in stderr.splitlines() if "HellaSwag is off: " in line]) == 1, stderr


@pytest.mark.parametrize("command, word", [
    (["modern.py"], "train_gpt2.py"), (["hellaswag.py", "-m", "log/last.pt"], "train_gpt2.py"),
    (["train_gpt2.py", "--device=cpu"], "input.txt"),
    (["train_gpt2.py", "--device=cpu", "--hellaswag=9", "--data=train_gpt2.py"], "--hellaswag 9")])
def test_missing_file_is_one_line(alone, command, word):
    process = alone(*command)
    _, stderr = process.communicate()
    errors = [line for line in stderr.splitlines() if not line.startswith("warning: ")]
    assert process.returncode == 2 and len(errors) == 1 and word in errors[0], stderr
