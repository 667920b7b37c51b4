"""The house: who may import whom, how long a function may be, what an import costs."""

import ast
import subprocess
import sys

import pytest
from processes import ROOT

COMMANDS = {p.stem: p for p in ROOT.glob("*.py")}
PLUMBING = {f"plumbing.{p.stem}": p for p in ROOT.glob("plumbing/*.py")}
PRODUCT = COMMANDS | PLUMBING


def imports(path):
    """The modules of this project that a file imports, those inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name}: write the whole name"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and "import" in ast.unparse(node.func):
            found |= {a.value for a in node.args if isinstance(a, ast.Constant)}
    return found & PRODUCT.keys()


def test_no_import_circle():
    graph = {name: imports(path) for name, path in PRODUCT.items()}
    assert graph["train_gpt2"] and graph["plumbing.reporter"]  # it does find some
    while graph:
        leaves = {name for name, others in graph.items() if not others & graph.keys()}
        assert leaves, f"a circle among {sorted(graph)}"
        graph = {name: others for name, others in graph.items() if name not in leaves}


@pytest.mark.parametrize("name", sorted(PLUMBING))
def test_plumbing_knows_no_command(name):
    assert not imports(PLUMBING[name]) & COMMANDS.keys()


def functions(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name, node.end_lineno - node.lineno + 1


@pytest.mark.parametrize("name", sorted(PRODUCT))
def test_no_function_is_long(name):
    for function, lines in functions(PRODUCT[name]):
        assert lines <= 50, (name, function, lines)


def test_the_loop_is_read_at_a_glance():
    assert dict(functions(COMMANDS["train_gpt2"]))["train"] <= 45


def test_import_is_silent_and_light(tmp_path):
    """Nothing is printed, written or fetched; of what is heavy only torch is loaded."""
    heavy = ("transformers", "datasets", "tiktoken", "requests", "matplotlib", "wandb",
             "torch._dynamo", "filelock", "pyarrow")
    commands = ", ".join(sorted(COMMANDS))
    code = (f"import sys; sys.path.insert(0, sys.argv[1]); import {commands}; "
            f"print([m for m in {heavy} if m in sys.modules])")
    result = subprocess.run([sys.executable, "-B", "-c", code, str(ROOT)], capture_output=True,
                            text=True, cwd=tmp_path)
    assert (result.stdout, result.stderr) == ("[]\n", "")
    assert not list(tmp_path.iterdir())
