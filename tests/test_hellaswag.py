"""hellaswag.py: the data file and its download, packing, scoring, batches of ranks, the command."""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import requests
import tiktoken
import torch
from torch import nn
from torch.nn import functional as F

import hellaswag
import train_gpt2
from conftest import ROOT, has_vocabulary
from hellaswag import evaluate, load_examples, pack, render_example, score_batch

ROOF = {"ctx": "A man is sitting on a roof. he", "label": 3, "endings": [
    "is using wrap to wrap a pair of skis.", "is ripping level tiles off.", "is holding a rubik's cube.",
    "starts pulling up roofing on a roof."]}


def by_bytes(text):
    return list(text.encode())


def tiny_gpt(vocab_size=40, block_size=96, n_layer=2, n_head=2, n_embd=32, **more):
    """Return a model with large random weights, so that losses differ clearly."""
    torch.manual_seed(0)
    model = train_gpt2.GPT(train_gpt2.GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd, **more))
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    return model


def constant_model(logits):
    """Return a model that predicts the same logits at every position."""
    return SimpleNamespace(hidden_states=lambda tokens, position, mask: torch.zeros(*tokens.shape, 1),
                           logits=lambda h: logits.expand(*h.shape[:-1], -1))


@torch.no_grad()
def one_at_a_time(model, context, endings):
    """Return (sum, mean) of the losses of each ending, scored in a sequence of its own."""
    losses = []
    for ending in endings:
        tokens = torch.tensor([context + ending])
        loss = F.cross_entropy(model(tokens)[0][0, :-1], tokens[0, 1:], reduction="none")
        losses.append(loss[len(context) - 1 :])
    return torch.stack([x.sum() for x in losses]), torch.stack([x.mean() for x in losses])


def random_texts(n, vocab_size=40):
    """Return n random (context, endings, label)."""
    rng = np.random.default_rng(0)
    sizes = [[int(rng.integers(1, m)) for m in (60, 30, 30, 30, 30)] for _ in range(n)]
    texts = [[rng.integers(vocab_size, size=m).tolist() for m in row] for row in sizes]
    return [(context, endings, int(rng.integers(4))) for context, *endings in texts]


def random_examples(n):
    return [pack(*text) for text in random_texts(n)]


def write_lines(path, examples):
    path.write_text("".join(json.dumps(e) + "\n" for e in examples), encoding="utf-8")
    return str(path)


@pytest.fixture
def bpe():
    """Return GPT-2's encode function."""
    if not has_vocabulary():
        pytest.skip("no local copy of GPT-2's vocabulary")
    return tiktoken.get_encoding("gpt2").encode_ordinary


def test_render_example(bpe):
    for encode in (bpe, None, lambda text: np.array(bpe(text), np.uint16)):
        data, tokens, mask, label = render_example(ROOF, encode)
        assert tokens.shape == (4, 20) and tokens.dtype == mask.dtype == torch.long and label == 3
        assert data["ctx_tokens"] == [32, 582, 318, 5586, 319, 257, 9753, 13, 339]
        assert data["ending_tokens"][3] == [4940, 10427, 510, 9753, 278, 319, 257, 9753, 13]
        assert mask.sum(dim=1).tolist() == [len(e) for e in data["ending_tokens"]] == [11, 6, 8, 9]
        assert tokens[3].tolist() == data["ctx_tokens"] + data["ending_tokens"][3] + [0, 0]
        assert mask[3].tolist() == [0] * 9 + [1] * 9 + [0, 0]
    data, *_ = render_example({**ROOF, "ctx": "a <|endoftext|> b"})  # ordinary text
    assert data["ctx_tokens"] == [64, 1279, 91, 437, 1659, 5239, 91, 29, 275]


BROKEN = [{"endings": ROOF["endings"][:3]}, {"endings": None}, {"label": 4}, {"label": "3"}, {"ctx": ""},
          {"ctx": None}]


@pytest.mark.parametrize("line", [json.dumps(ROOF)[:-9], "\xff\xfe\xfa", "[]", "7", '{"ctx": "a"}']
                         + [json.dumps({**ROOF, **change}) for change in BROKEN])
def test_damaged_line_is_named(tmp_path, line):
    path = tmp_path / "x.jsonl"
    path.write_bytes(json.dumps(ROOF).encode() + b"\n\n" + line.encode("latin-1") + b"\n")
    with pytest.raises(ValueError, match=r"x\.jsonl, line 3: not a HellaSwag example"):
        load_examples(path, None, 64, by_bytes)
    assert len(load_examples(path, 1, 512, by_bytes)) == 1  # later lines are not read
    path.write_text("\n")
    with pytest.raises(ValueError, match="x.jsonl contains no examples"):
        load_examples(path, 5, 64, by_bytes)
    unlabelled = {"ctx": "a", "endings": list("bcde")}  # as in the test split
    assert list(hellaswag.iterate_examples("test", write_lines(path, [unlabelled]))) == [unlabelled]


def test_pack_matches_its_docstring():
    e = pack([65, 66], [[67, 68], [69], [70, 71, 72], [73, 74]], label=2)
    assert e.tokens.tolist() == [65, 66, 67, 70, 71, 73]
    assert e.segment.tolist() == [0, 0, 1, 3, 3, 4]
    assert e.position.tolist() == [0, 1, 2, 2, 3, 2]
    assert e.target.T.tolist() == [[-1, 67, 68, -1, -1, -1], [-1, 69, -1, -1, -1, -1],
                                   [-1, 70, -1, 71, 72, -1], [-1, 73, -1, -1, -1, 74]]


@pytest.mark.parametrize("pos", ["learned", "rope"])
def test_every_prediction_equals_scoring_one_at_a_time(pos):
    """By sum and by mean, in batches of mixed lengths."""
    texts, model, right = random_texts(150, vocab_size=300), tiny_gpt(300, pos=pos), [0, 0]
    texts[0] = ([1] * 6, [[k] * 90 for k in range(4)], 0)
    assert len(pack(*texts[0]).tokens) > model.config.block_size  # only the positions have to fit
    for start in range(0, len(texts), 7):
        part = texts[start : start + 7]
        scores = score_batch(model, [pack(*t) for t in part], "cpu")
        assert all(x.shape == (len(part), 4) and not x.requires_grad for x in scores)
        for i, (context, endings, label) in enumerate(part):
            for k, expected in enumerate(one_at_a_time(model, context, endings)):
                torch.testing.assert_close(scores[k][i].float(), expected, rtol=1e-5, atol=1e-5)
                assert scores[k][i].argmin() == expected.argmin()
                right[k] += int(expected.argmin()) == label
    assert evaluate(model, [pack(*t) for t in texts], "cpu") == (*right, 150, 0)


def test_ties_go_to_the_first():
    model, endings = tiny_gpt(50), [[7, 8, 9], [5], [5], [7, 8, 9]]
    assert pack([1, 2], endings, 0).tokens.tolist() == [1, 2, 7, 8]  # equal endings share tokens
    for seed in range(20):
        context = np.random.default_rng(seed).integers(50, size=9).tolist()
        for x in score_batch(model, [pack(context, endings, 0)], "cpu"):
            assert x[0, 0] == x[0, 3] and x[0, 1] == x[0, 2] and int(x[0].argmin()) in (0, 1)
    # With equal token losses, ln 10, the means of endings of any length are equal.
    uneven = pack([1], [[2] * 7, [3] * 3, [4] * 11, [5]], 0)
    sums, means = score_batch(constant_model(torch.zeros(10)), [uneven], "cpu")
    assert means[0].argmin() == 0 and len(set(means[0].tolist())) == 1
    assert sums[0].argmin() == 3


def test_cropping_keeps_the_end_and_is_counted(tmp_path):
    path = write_lines(tmp_path / "x.jsonl", [ROOF, {**ROOF, "ctx": "x" * 300 + ROOF["ctx"]}])
    block = len(ROOF["ctx"]) + 1 + max(len(e) for e in ROOF["endings"])  # a token is a byte here
    whole, cut = load_examples(path, None, block, by_bytes)
    assert (whole.cropped, cut.cropped) == (False, True)
    assert whole.tokens.tolist() == cut.tokens.tolist() and (whole.target == cut.target).all()
    assert load_examples(path, 1, block - 1, by_bytes)[0].cropped
    assert evaluate(tiny_gpt(256, block), [whole, cut, cut], "cpu").cropped == 2

    (short,) = load_examples(path, 1, 8, by_bytes)  # one context token, seven of each ending
    assert (short.segment == 0).sum() == 1 and short.position.max() == 6
    assert bytes(short.target[:, 3][short.target[:, 3] >= 0].tolist()) == b"a roof."


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("n", [0, 1, 5, 61])
def test_each_example_counts_on_one_rank(monkeypatch, world_size, n):
    monkeypatch.setitem(hellaswag.BATCH_TOKENS, "cpu", 300)
    examples = [pack(*t, cropped=i % 3 == 0) for i, t in enumerate(random_texts(n))]
    model = tiny_gpt()
    alone = evaluate(model, examples, "cpu")
    assert alone.total == n and alone.cropped == sum(e.cropped for e in examples)
    calls = [[] for _ in range(world_size)]
    results = [evaluate(model, examples, "cpu", rank, world_size, lambda c=calls[rank]: c.append(1))
               for rank in range(world_size)]
    assert tuple(map(sum, zip(*results, strict=True))) == alone
    assert len({len(c) for c in calls}) == 1  # otherwise a collective would hang


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_is_restored_even_after_an_exception(training):
    examples, model, modes = random_examples(30), tiny_gpt().train(training), []
    evaluate(model, examples, "cpu", on_batch_end=lambda: modes.append(model.training))
    assert model.training is training and len(modes) > 1 and not any(modes)
    calls = iter([1, 0])
    with pytest.raises(ZeroDivisionError):  # in the second batch
        evaluate(model, examples, "cpu", on_batch_end=lambda: 1 // next(calls))
    assert model.training is training and next(calls, None) is None


GOOD = "".join(json.dumps({**ROOF, "ind": i}) + "\n" for i in range(500)).encode()


@pytest.fixture
def server(monkeypatch):
    """The stub that answers requests.get: status, content or error; urls are recorded. GOOD is known."""
    monkeypatch.setitem(hellaswag.KNOWN_FILES, "val", (len(GOOD), hashlib.sha256(GOOD).hexdigest()))
    monkeypatch.delenv("HELLASWAG_FILE", raising=False)
    server = SimpleNamespace(urls=[], status=200, content=GOOD, error=None)

    def get(url, timeout):
        assert timeout == hellaswag.REQUEST_TIMEOUT_S
        server.urls.append(url)
        if server.error:
            raise server.error
        response = requests.Response()
        response.status_code, response._content = server.status, server.content
        return response

    monkeypatch.setattr(requests, "get", get)
    return server


def test_download_once_and_again_if_damaged(server, tmp_path, monkeypatch):
    monkeypatch.setattr(hellaswag, "HERE", str(tmp_path))
    monkeypatch.setenv("HELLASWAG_URL", "http://mirror/val.jsonl")
    path = Path(hellaswag.data_file())
    assert path == tmp_path / "hellaswag" / "hellaswag_val.jsonl" and not path.parent.exists()
    for content in (None, GOOD, GOOD[:-5], b"", GOOD[:-3] + b"x}\n"):  # all but GOOD are replaced
        if content is not None:
            path.write_bytes(content)
        assert hellaswag.download() == str(path) and path.read_bytes() == GOOD
    assert server.urls == ["http://mirror/val.jsonl"] * 4 and os.listdir(path.parent) == [path.name]
    hellaswag.download("train", tmp_path / "train.jsonl")  # its hash is not known
    own = write_lines(tmp_path / "own.jsonl", [ROOF])
    monkeypatch.setenv("HELLASWAG_FILE", own)  # used unchecked
    assert hellaswag.download("val") == hellaswag.data_file("val") == own and len(server.urls) == 5


@pytest.mark.parametrize("answer, reason", [
    (dict(content=b"<html>" * 99), "unexpected content, 594 bytes"),
    (dict(content=GOOD[:-3] + b"x}\n"), "unexpected content"),
    (dict(status=404), "404"),
    (dict(error=requests.exceptions.ChunkedEncodingError("IncompleteRead")), "IncompleteRead"),
    (dict(error=requests.exceptions.ReadTimeout("timed out")), "ReadTimeout: timed out"),
    ({}, "FileExistsError")])
def test_failed_download_leaves_no_file(server, tmp_path, answer, reason):
    vars(server).update(answer)
    path = Path(__file__ if "Exists" in reason else tmp_path, "x.jsonl")
    with pytest.raises(OSError) as error:
        hellaswag.download("val", path, "http://mirror")
    message = str(error.value)
    assert message.startswith(f"could not download HellaSwag from http://mirror to {path} (")
    assert reason in message and message.endswith("copy it there") and "\n" not in message
    assert not list(tmp_path.iterdir())


StubUserError = type("StubUserError", (Exception,), {})


@pytest.fixture
def command(monkeypatch, tmp_path):
    """command(*args) runs hellaswag.main with stub trainers: (module, argv, data file)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hellaswag, "HERE", str(tmp_path))
    monkeypatch.setenv("HELLASWAG_FILE", "default.jsonl")
    for name in ("train_gpt2", "modern"):
        (tmp_path / f"{name}.py").touch()
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(
            UserError=StubUserError, peek_checkpoint=torch.load,
            main=lambda argv, name=name: (name, " ".join(argv), os.environ["HELLASWAG_FILE"])))
    return lambda *args: hellaswag.main(list(args))


def test_command_calls_the_script_that_made_the_checkpoint(command):
    flags = "--preset gpt2 --eval_only --val_tokens 0 --num_samples 0 --dtype float32"
    default = f"--init gpt2 --device auto --hellaswag 10042 {flags}"
    assert command() == ("train_gpt2", default, "default.jsonl")
    torch.save({"arch": "modern", "tokenizer": "gpt2"}, "a.pt")
    assert command("-m", "a.pt", "-d", "cuda:1", "--limit", "7", "--data_file", "own.jsonl") == (
        "modern", "--init a.pt --device cuda:1 --hellaswag 7 " + flags, "own.jsonl")
    torch.save({"arch": "gpt2"}, "b.pt")
    torch.save({}, "c.pt")
    Path("junk.pt").write_bytes(b"PK junk")  # the trainer reports the damage
    for path in ("b.pt", "c.pt", "junk.pt"):
        assert command("-m", path)[0] == "train_gpt2"


@pytest.mark.parametrize("args, checkpoint, message", [
    ("-m x.pt", {"tokenizer": "bytes"}, "x.pt was trained on byte tokens"),
    ("-m x.pt", {"arch": "mine"}, "x.pt needs mine.py, which is not in "),
    ("-m x.pt", {"arch": "../plot"}, "x.pt needs ../plot.py, which is not in "),
    ("--limit 0", {}, "--limit 0: must be at least 1"),
    ("--limit x", {}, "argument --limit: invalid int value: 'x'"),
    ("--lim 3", {}, "unrecognized arguments: --lim 3")])
def test_mistake_is_a_user_error(command, args, checkpoint, message):
    torch.save(checkpoint, "x.pt")
    with pytest.raises(StubUserError, match="^" + re.escape(message)):
        command(*args.split())


def run_command(*args, cwd, processes=1):
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    line = [sys.executable, *torchrun * (processes > 1), ROOT / "hellaswag.py", "-d", "cpu", *args]
    return subprocess.run(line, cwd=cwd, text=True, capture_output=True, timeout=300)


@pytest.fixture
def tiny(tmp_path):
    """Save a small checkpoint as tiny.pt. Returns its model."""
    model = tiny_gpt(50304, 28, n_layer=1, n_head=1, n_embd=8)
    ckpt = dict(model=model.state_dict(), config=vars(model.config), flags={}, tokenizer="gpt2")
    torch.save(ckpt, tmp_path / "tiny.pt")
    return model


@pytest.mark.parametrize("processes", [1, 2])
def test_command_scores_a_checkpoint(bpe, tiny, tmp_path, processes):
    contexts = [*(ROOF["ctx"][i:] + " of" * i for i in range(9)), "x " * 40]
    examples = [{**ROOF, "ctx": context, "label": i % 4} for i, context in enumerate(contexts)]
    file = write_lines(tmp_path / "ten.jsonl", examples)
    run = run_command("-m", "tiny.pt", "--data_file", file, cwd=tmp_path, processes=processes)
    assert run.returncode == 0, run.stderr
    expected = evaluate(tiny, load_examples(file, None, 28, bpe), "cpu")
    lines = run.stdout.splitlines()
    assert lines[-2:] == hellaswag.score_lines(*expected[:3])
    assert f"HellaSwag accuracy: {expected[1]}/10={expected[1] / 10:.4f}" in lines
    assert any(line.startswith("1 ") and "cropped" in line for line in lines)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ten.jsonl", "tiny.pt"]
