"""The commands, flags and links of the README exist."""

import re
import shlex

import pytest
from conftest import ROOT

import fineweb
import modern
import train_gpt2

README = (ROOT / "README.md").read_text(encoding="utf-8")
TRAINER = {"train_gpt2.py": train_gpt2.GPT, "modern.py": modern.ModernGPT}


def commands():
    """Yield (script, arguments) of every command in a code block."""
    for block in re.findall(r"^```\n(.*?)^```", README, re.MULTILINE | re.DOTALL):
        for command in re.split(r"\n|&&", block):
            is_command = re.match(r" ?(python|torchrun|TORCH)", command)
            words = shlex.split(command, comments=True) if is_command else []
            for i, word in enumerate(words):
                if word.endswith(".py"):
                    yield word, words[i + 1:]


def test_commands_of_the_readme_parse():
    seen = set()
    for script, words in commands():
        assert (ROOT / script).exists(), script
        if script in TRAINER:
            train_gpt2.build_parser(TRAINER[script]).parse_args(words)
        elif script == "fineweb.py":
            fineweb.parse_args(words)
        seen.add(script)
    assert seen >= {"train_gpt2.py", "modern.py", "fineweb.py", "hellaswag.py", "plot.py"}


def test_every_flag_in_the_readme_exists():
    known = {f"--{name}" for name in train_gpt2.build_parser(train_gpt2.GPT).defaults}
    known |= set(fineweb.build_parser()._option_string_actions)
    known |= {"--nproc_per_node", "--standalone", "--max_restarts", "--nnodes", "--rdzv_backend",
              "--rdzv_endpoint", "--limit", "--signal"}
    assert set(re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*\w", README)) <= known


def test_names_in_the_lecture_table_exist():
    table = README.split("## Follow the lecture")[1].split("\n## ")[0]
    for name in re.findall(r"`([A-Za-z_]\w*(?:\.\w+)?)`", table.split("|---|---|")[1]):
        owner, _, attribute = name.partition(".")
        value = getattr(train_gpt2, owner)
        assert not attribute or hasattr(value, attribute) or f"self.{attribute} = " in TEXT, name


TEXT = (ROOT / "train_gpt2.py").read_text(encoding="utf-8")


def test_readme_is_short():
    assert README.count("\n") <= 170


@pytest.mark.parametrize("path", re.findall(r"\]\(([\w./-]+)\)", README))
def test_links_of_the_readme_exist(path):
    assert (ROOT / path).exists()
