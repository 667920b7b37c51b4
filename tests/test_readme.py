"""What the README says to type can be typed."""

import os
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT, TINY, write_shards

import fineweb
import modern
import train_gpt2

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands():
    """The words behind each .py file that a block of the README runs."""
    text = "\n".join(block for kind, block in BLOCKS if not kind).replace("\\\n", " ")
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        for i, word in enumerate(words):
            if word.endswith(".py") and re.match(r"(pip|python|torchrun|TORCH|srun)", words[0]):
                yield word, words[i + 1:]


def test_flags_in_the_readme_are_flags():
    parse = {"train_gpt2.py": lambda words: train_gpt2.parse_flags(words, train_gpt2.GPT),
             "modern.py": lambda words: train_gpt2.parse_flags(words, modern.ModernGPT),
             "fineweb.py": fineweb.parse_args}
    seen = set()
    for script, words in commands():
        assert (ROOT / script).exists(), script
        if script in parse:
            parse[script](words)
            seen.add(script)
    assert seen == set(parse)


def test_every_flag_in_the_text_is_known():
    known = {f"--{name}" for name in train_gpt2.TrainConfig.__dataclass_fields__}
    known |= {f"--{name}" for name in fineweb.Flags.__dataclass_fields__}
    others = {"--nproc_per_node", "--standalone", "--max_restarts", "--nnodes", "--rdzv_backend",
              "--rdzv_endpoint", "--help", "--limit", "--nodes", "--ntasks-per-node",
              "--gpus-per-node", "--cpus-per-task", "--signal"}  # fmt: skip
    text = "\n".join(line for line in README.splitlines() if "tests/bench/" not in line)
    assert set(re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*\w", text)) <= known | others


def test_the_lines_for_a_notebook_run(forks, tmp_path):
    (python,) = (block for kind, block in BLOCKS if kind == "python")
    shape = ["--vocab_size=50257", "--block_size=64", "--n_layer=1", "--n_embd=8"]
    data = write_shards(tmp_path / "shards")
    forks.run(*TINY, *shape, "--max_steps=1", f"--data={data}", cwd=tmp_path).good()
    done = subprocess.run([sys.executable, "-c", python], cwd=tmp_path, capture_output=True,
                          text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert re.search(r"loss \d+\.\d+", done.stdout)
    assert python.count("\n") <= 7


@pytest.mark.parametrize("path", re.findall(r"\]\(([\w./-]+)\)", README))
def test_links_lead_somewhere(path):
    assert (ROOT / path).exists()
