"""hellaswag.py: the data file and its download, packing, scoring, batches of ranks, the command."""

import contextlib
import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiktoken
import torch
from torch import nn
from torch.nn import functional as F

import hellaswag
import train_gpt2
from conftest import ROOT, SHARED, has_vocabulary
from hellaswag import evaluate, load_examples, pack, render_example, score_batch

REAL_EXAMPLES = SHARED / "data" / "hellaswag_val_1000.jsonl"
ROOF = {"ctx": "A man is sitting on a roof. he", "label": 3, "endings": [
    "is using wrap to wrap a pair of skis.", "is ripping level tiles off.",
    "is holding a rubik's cube.", "starts pulling up roofing on a roof."]}


def by_bytes(text):
    return list(text.encode())


def tiny_gpt(vocab_size, block_size, n_layer=2, n_head=2, n_embd=32, **more):
    """Return a model with large random weights, so that losses differ clearly."""
    torch.manual_seed(0)
    sizes = dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd, vocab_size=vocab_size)
    model = train_gpt2.GPT(train_gpt2.GPTConfig(block_size=block_size, **sizes, **more))
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    return model


def constant_model(logits):
    """Return a model that predicts the same logits at every position."""
    return SimpleNamespace(
        hidden_states=lambda tokens, position, mask: torch.zeros(*tokens.shape, 1),
        logits=lambda h: torch.as_tensor(logits).expand(*h.shape[:-1], -1))


@torch.no_grad()
def one_at_a_time(model, context, endings):
    """Return (sum, mean) of the losses of each ending, scored in a sequence of its own."""
    losses = []
    for ending in endings:
        tokens = torch.tensor([context + ending])
        logits, _ = model(tokens)
        loss = F.cross_entropy(logits[0, :-1], tokens[0, 1:], reduction="none")
        losses.append(loss[len(context) - 1 :])
    return torch.stack([x.sum() for x in losses]), torch.stack([x.mean() for x in losses])


def random_examples(n, vocab_size):
    """Return n random (context, endings, label)."""
    rng = np.random.default_rng(0)
    texts = [[rng.integers(vocab_size, size=rng.integers(1, m)).tolist() for m in (60, *[30] * 4)]
             for _ in range(n)]
    return [(context, endings, int(rng.integers(4))) for context, *endings in texts]


def write_lines(path, examples):
    path.write_text("".join(json.dumps(e) + "\n" for e in examples), encoding="utf-8")
    return str(path)


@pytest.fixture
def bpe():
    """Return GPT-2's encode function."""
    if not has_vocabulary():
        pytest.skip("no local copy of GPT-2's vocabulary")
    return tiktoken.get_encoding("gpt2").encode_ordinary


def test_import_is_silent_and_light():
    heavy = "['tiktoken', 'requests', 'train_gpt2', 'transformers']"
    code = (f"import os, sys, hellaswag; print([m for m in {heavy} if m in sys.modules], "
            "os.environ['OMP_WAIT_POLICY'])")
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (run.stdout, run.stderr) == ("[] PASSIVE\n", "")


def test_render_example(bpe):
    for encode in (bpe, None, lambda text: np.array(bpe(text), np.uint16)):
        data, tokens, mask, label = render_example(ROOF, encode)
        assert tokens.shape == mask.shape == (4, 20) and label == 3
        assert tokens.dtype == mask.dtype == torch.long
        assert data["ctx_tokens"] == [32, 582, 318, 5586, 319, 257, 9753, 13, 339]
        assert data["ending_tokens"][3] == [4940, 10427, 510, 9753, 278, 319, 257, 9753, 13]
        assert mask.sum(dim=1).tolist() == [len(e) for e in data["ending_tokens"]] == [11, 6, 8, 9]
        assert tokens[3].tolist() == data["ctx_tokens"] + data["ending_tokens"][3] + [0, 0]
        assert mask[3].tolist() == [0] * 9 + [1] * 9 + [0, 0]
    data, *_ = render_example({**ROOF, "ctx": "a <|endoftext|> b"})  # ordinary text
    assert data["ctx_tokens"] == [64, 1279, 91, 437, 1659, 5239, 91, 29, 275]


BROKEN = [{"endings": ROOF["endings"][:3]}, {"endings": None}, {"label": 4}, {"label": "3"},
          {"ctx": ""}, {"ctx": None}]


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


def compare_with_one_at_a_time(model, texts):
    """Compare losses and predictions, by sum and by mean, in batches of mixed lengths."""
    predictions = []
    for start in range(0, len(texts), 7):
        part = texts[start : start + 7]
        scores = score_batch(model, [pack(*t) for t in part], "cpu")
        assert all(x.shape == (len(part), 4) and not x.requires_grad for x in scores)
        for i, (context, endings, _) in enumerate(part):
            expected = one_at_a_time(model, context, endings)
            for x, y in zip(scores, expected, strict=True):
                torch.testing.assert_close(x[i].float(), y, rtol=1e-5, atol=1e-5)
                assert x[i].argmin() == y.argmin()
            predictions.append(tuple(int(y.argmin()) for y in expected))
    return predictions


@pytest.mark.parametrize("pos", ["learned", "rope"])
def test_every_prediction_equals_scoring_one_at_a_time(pos):
    texts = random_examples(150, vocab_size=300)
    model = tiny_gpt(300, block_size=96, pos=pos)
    predictions = compare_with_one_at_a_time(model, texts)
    result = evaluate(model, [pack(*t) for t in texts], "cpu")
    right = [(p[0] == t[2], p[1] == t[2]) for p, t in zip(predictions, texts, strict=True)]
    assert result == (*map(sum, zip(*right, strict=True)), 150, 0)


def test_every_prediction_on_real_examples(bpe):
    if not REAL_EXAMPLES.exists():
        pytest.skip("no real examples here")
    texts = []
    for example in list(hellaswag.iterate_examples("val", REAL_EXAMPLES))[:120]:
        data, *_ = render_example(example, bpe)
        ids = [[i % 2003 for i in e] for e in (data["ctx_tokens"], *data["ending_tokens"])]
        texts.append((ids[0], ids[1:], data["label"]))  # a small vocabulary, to save time
    predictions = compare_with_one_at_a_time(tiny_gpt(2003, block_size=256), texts)
    assert len(set(predictions)) > 8  # not always the same
    long = ([1] * 6, [[k] * 18 for k in range(4)], 0)  # packed it exceeds the block size
    assert len(pack(*long).tokens) > 24
    compare_with_one_at_a_time(tiny_gpt(50, block_size=24), [long])


def test_ties_go_to_the_first():
    model = tiny_gpt(50, block_size=64)
    endings = [[7, 8, 9], [5], [5], [7, 8, 9]]
    assert pack([1, 2], endings, 0).tokens.tolist() == [1, 2, 7, 8]  # equal endings share tokens
    for seed in range(20):
        context = np.random.default_rng(seed).integers(50, size=9).tolist()
        for x in score_batch(model, [pack(context, endings, 0)], "cpu"):
            assert x[0, 0] == x[0, 3] and x[0, 1] == x[0, 2] and int(x[0].argmin()) in (0, 1)
    # With equal token losses, ln 10, the means of endings of any length are equal.
    uneven = pack([1], [[2] * 7, [3] * 3, [4] * 11, [5]], 0)
    sums, means = score_batch(constant_model([0.0] * 10), [uneven], "cpu")
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
    examples = [pack(*t, cropped=i % 3 == 0) for i, t in enumerate(random_examples(n, 40))]
    model = tiny_gpt(40, block_size=96)
    alone = evaluate(model, examples, "cpu")
    assert alone.total == n and alone.cropped == sum(e.cropped for e in examples)
    calls = [[] for _ in range(world_size)]
    results = [evaluate(model, examples, "cpu", rank, world_size, lambda c=calls[rank]: c.append(1))
               for rank in range(world_size)]
    assert tuple(map(sum, zip(*results, strict=True))) == alone
    assert len({len(c) for c in calls}) == 1  # otherwise a collective would hang
    seen = [id(e) for rank in range(world_size)
            for batch in hellaswag.rank_batches(examples, rank, world_size, 300) for e in batch]
    assert sorted(seen) == sorted(id(e) for e in examples)


def test_batches_are_bounded_and_have_little_padding():
    examples = [pack(*t) for t in random_examples(400, 40)]
    padded = 0
    for batch in hellaswag.rank_batches(examples, 0, 1, 1024):
        size = len(batch) * max(len(e.tokens) for e in batch)
        assert size <= 1024
        padded += size
    assert padded < 1.03 * sum(len(e.tokens) for e in examples)
    assert len(list(hellaswag.rank_batches(examples, 0, 1, 1))) == 400  # no example is split


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_is_restored_even_after_an_exception(training):
    examples = [pack(*t) for t in random_examples(30, 40)]
    model = tiny_gpt(40, block_size=96).train(training)
    modes = []
    evaluate(model, examples, "cpu", on_batch_end=lambda: modes.append(model.training))
    assert model.training is training and len(modes) > 1 and not any(modes)
    calls = iter([1, 0])
    with pytest.raises(ZeroDivisionError):  # in the second batch
        evaluate(model, examples, "cpu", on_batch_end=lambda: 1 // next(calls))
    assert model.training is training and next(calls, None) is None


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no pseudo-terminals")
def test_progress_bar_survives_the_loss_of_the_terminal(monkeypatch):
    screen, terminal = os.openpty()
    monkeypatch.setattr(sys, "stderr", open(terminal, "w"))
    examples = [pack(*t) for t in random_examples(50, 40)]
    model, close = tiny_gpt(40, block_size=96), iter([lambda: os.close(screen)])
    for _ in range(2):
        result = evaluate(model, examples, "cpu", progress=True,
                          on_batch_end=lambda: time.sleep(0.15) or next(close, int)())
        assert result.total == 50
    with pytest.raises(OSError), sys.stderr:  # the terminal is really gone
        sys.stderr.write("\n" * 10000)


def test_losses_are_float32_under_autocast():
    model, examples = tiny_gpt(300, 96), [pack(*t) for t in random_examples(20, 300)]
    _, want = score_batch(model, examples, "cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, means = score_batch(model, examples, "cpu")
    assert means.dtype == torch.float64 and (means - want).abs().max() < 0.3
    logits = torch.arange(10.0)  # exact in bfloat16, so only the loss could be rounded
    one = pack([1], [[3], [0], [9], [2]], 0)
    sums, _ = score_batch(constant_model(logits.bfloat16()), [one], "cpu")
    torch.testing.assert_close(sums[0].float(), logits.logsumexp(0) - logits[[3, 0, 9, 2]])


def test_shown_examples_mark_the_correct_and_the_chosen_ending(capsys, tmp_path):
    texts = [ROOF, {**ROOF, "ctx": "He", "label": 1}, ROOF]
    examples = load_examples(write_lines(tmp_path / "x.jsonl", texts), None, 200, by_bytes)
    model = tiny_gpt(256, 200)
    means = score_batch(model, examples, "cpu")[1]
    hellaswag.show_examples(model, examples, "cpu", lambda ids: bytes(ids).decode(), n=2)
    _, *lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10 and hellaswag.score_lines(2871, 2967, 10042) == [
        "acc: 2871/10042=0.2859 +- 0.0045", "acc_norm: 2967/10042=0.2955 +- 0.0046"]
    for i, (heading, *endings) in enumerate((lines[:5], lines[5:])):
        assert heading == f"example {i + 1}: {texts[i]['ctx']}"
        for k, line in enumerate(endings):
            marks = "= "[k != texts[i]["label"]] + "> "[k != int(means[i].argmin())]
            assert line == f"  {marks} {means[i, k]:7.4f}  {ROOF['endings'][k]}"


SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"
GOOD = "".join(json.dumps({**ROOF, "ind": i}) + "\n" for i in range(500)).encode()


@pytest.fixture
def serve(monkeypatch):
    """serve(behave) -> URL of a local server; behave(handler) answers a GET. GOOD is known."""
    assert hellaswag.KNOWN_FILES["val"] == (12246618, SHA256)
    known = (len(GOOD), hashlib.sha256(GOOD).hexdigest())
    monkeypatch.setitem(hellaswag.KNOWN_FILES, "val", known)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HELLASWAG_FILE", raising=False)
    over, servers = threading.Event(), []

    def serve(behave):
        methods = {"do_GET": behave, "log_message": lambda *_: None, "over": over}
        handler = type("Handler", (http.server.BaseHTTPRequestHandler,), methods)
        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
        servers[0].daemon_threads, servers[0].block_on_close = True, False
        threading.Thread(target=servers[0].serve_forever, args=(0.05,)).start()
        return f"http://127.0.0.1:{servers[0].server_port}/val.jsonl"

    yield serve
    over.set()
    servers[0].shutdown()
    servers[0].server_close()


def send(handler, body, status=200, stop=None):
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    with contextlib.suppress(OSError):
        handler.wfile.write(body[:stop])


def test_download_once_and_again_if_damaged(serve, tmp_path, monkeypatch):
    requests = []
    monkeypatch.setattr(hellaswag, "HERE", str(tmp_path))
    monkeypatch.setenv("HELLASWAG_URL", serve(lambda h: requests.append(1) or send(h, GOOD)))
    path = Path(hellaswag.data_file())
    assert path == tmp_path / "hellaswag" / "hellaswag_val.jsonl" and not path.parent.exists()
    for content in (None, GOOD, GOOD[:-5], b"", GOOD[:-3] + b"x}\n"):  # all but GOOD are replaced
        if content is not None:
            path.write_bytes(content)
        assert hellaswag.download() == str(path) and path.read_bytes() == GOOD
    assert len(requests) == 4 and os.listdir(path.parent) == [path.name]
    hellaswag.download("train", tmp_path / "train.jsonl")  # its hash is not known
    own = write_lines(tmp_path / "own.jsonl", [ROOF])
    monkeypatch.setenv("HELLASWAG_FILE", own)  # used unchecked
    assert hellaswag.download("val") == hellaswag.data_file("val") == own and len(requests) == 5


# split, what the server does, and what the error names
FAULTS = [
    ("val", lambda h: send(h, b"<html>" * 99), "unexpected content, 594 bytes"),
    ("val", lambda h: send(h, GOOD[:-3] + b"x}\n"), f"unexpected content, {len(GOOD):,} bytes"),
    ("test", lambda h: send(h, GOOD, stop=5000), "IncompleteRead"),
    ("test", lambda h: send(h, b"no", status=404), "404"),
    ("val", lambda h: None, "ConnectionError"),
    ("val", lambda h: send(h, GOOD), "FileExistsError"),
    # No data until the test ends, before the response or in the middle of it.
    ("val", lambda h: h.over.wait(), "timeout=0.2"),
    ("val", lambda h: (send(h, GOOD, stop=1000), h.over.wait()), "timed out"),
]


@pytest.mark.parametrize("split, behave, reason", FAULTS)
def test_failed_download_leaves_no_file(serve, tmp_path, monkeypatch, split, behave, reason):
    if "time" in reason:
        monkeypatch.setattr(hellaswag, "REQUEST_TIMEOUT_S", 0.2)
    url, path = serve(behave), Path(__file__ if "Exists" in reason else tmp_path, "x.jsonl")
    with pytest.raises(OSError) as error:
        hellaswag.download(split, path, url)
    message = str(error.value)
    assert message.startswith(f"could not download HellaSwag from {url} to {path} (")
    assert reason in message and message.endswith("copy it there") and "\n" not in message
    assert not list(tmp_path.iterdir())


def save(path, **entries):
    torch.save({"model": {}, "config": {}} | entries, path)
    return str(path)


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
            UserError=StubUserError, peek_checkpoint=lambda path: torch.load(path),
            main=lambda argv, name=name: (name, " ".join(argv), os.environ["HELLASWAG_FILE"])))
    return lambda *args: hellaswag.main(list(args))


def test_command_calls_the_script_that_made_the_checkpoint(command):
    flags = "--preset gpt2 --eval_only --val_tokens 0 --num_samples 0 --dtype float32"
    assert command() == ("train_gpt2", "--init gpt2 --device auto --hellaswag 10042 " + flags,
                         "default.jsonl")
    path = save("a.pt", arch="modern", tokenizer="gpt2")
    assert command("-m", path, "-d", "cuda:1", "--limit", "7", "--data_file", "own.jsonl") == (
        "modern", "--init a.pt --device cuda:1 --hellaswag 7 " + flags, "own.jsonl")
    Path("junk.pt").write_bytes(b"PK junk")  # the trainer reports the damage
    for path in (save("b.pt", arch="gpt2"), save("c.pt"), "junk.pt"):
        assert command("-m", path)[0] == "train_gpt2"


@pytest.mark.parametrize("args, message", [
    ("-m of_bytes.pt", "of_bytes.pt was trained on byte tokens"),
    ("-m of_mine.pt", "of_mine.pt needs mine.py, which is not in "),
    ("-m of_path.pt", "of_path.pt needs ../plot.py, which is not in "),
    ("--limit 0", "--limit 0: must be at least 1"),
    ("--limit x", "argument --limit: invalid int value: 'x'"),
    ("--lim 3", "unrecognized arguments: --lim 3")])
def test_mistake_is_a_user_error(command, args, message):
    save("of_bytes.pt", tokenizer="bytes")
    save("of_mine.pt", arch="mine")
    save("of_path.pt", arch="../plot")
    with pytest.raises(StubUserError) as error:
        command(*args.split())
    assert str(error.value).startswith(message)


def run_command(*args, cwd, processes=1, script=ROOT / "hellaswag.py"):
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    line = [sys.executable, *torchrun * (processes > 1), str(script), *args]
    return subprocess.run(line, cwd=cwd, text=True, capture_output=True, timeout=300)


def test_copied_alone_the_command_names_the_trainer(tmp_path):
    run = run_command(cwd=tmp_path, script=shutil.copy(ROOT / "hellaswag.py", tmp_path))
    assert (run.returncode, run.stdout) == (2, "")
    message = f"hellaswag.py: error: train_gpt2.py is not in {tmp_path}; copy it there\n"
    assert run.stderr == message


@pytest.fixture
def tiny(tmp_path):
    """Save a small checkpoint as tiny.pt. Returns its model."""
    model = tiny_gpt(50304, 28, n_layer=1, n_head=1, n_embd=8)
    save(tmp_path / "tiny.pt", model=model.state_dict(), config=vars(model.config), flags={},
         tokenizer="gpt2")
    return model


@pytest.mark.parametrize("processes", [1, 2])
def test_command_scores_a_checkpoint(bpe, tiny, tmp_path, processes):
    texts = [{**ROOF, "ctx": " ".join(ROOF["ctx"].split()[i:] + ["of", "it"] * i), "label": i % 4}
             for i in range(9)]
    file = write_lines(tmp_path / "ten.jsonl", [*texts, {**ROOF, "ctx": "x " * 40}])
    run = run_command("-m", "tiny.pt", "-d", "cpu", "--data_file", file, cwd=tmp_path,
                      processes=processes)
    assert run.returncode == 0, run.stderr
    right = [0, 0]
    for e in load_examples(file, None, 28, bpe):
        context = e.tokens[e.segment == 0].tolist()
        endings = [ids[ids >= 0].tolist() for ids in e.target.T]
        for i, losses in enumerate(one_at_a_time(tiny, context, endings)):
            right[i] += int(losses.argmin()) == e.label
    lines = run.stdout.splitlines()
    assert lines[-2:] == hellaswag.score_lines(*right, 10)
    assert f"HellaSwag accuracy: {right[1]}/10={right[1] / 10:.4f}" in lines
    assert sum(line.startswith("example ") for line in lines) == 4
    assert any(line.startswith("1 ") and "cropped" in line for line in lines)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ten.jsonl", "tiny.pt"]


@pytest.mark.parametrize("model, data, reason", [
    ("nothing.pt", "good.jsonl", "nothing.pt"), ("tiny.pt", "nowhere.jsonl", "nowhere.jsonl"),
    ("tiny.pt", "bad.jsonl", "bad.jsonl, line 1")])
def test_error_in_the_trainer_is_one_line_of_the_command(bpe, tiny, tmp_path, model, data, reason):
    write_lines(tmp_path / "good.jsonl", [ROOF])
    (tmp_path / "bad.jsonl").write_text("{\n")
    run = run_command("-m", model, "-d", "cpu", "--data_file", data, cwd=tmp_path)
    assert run.returncode == 2 and "HellaSwag accuracy" not in run.stdout
    assert run.stderr.startswith("hellaswag.py: error: ") and reason in run.stderr
    assert run.stderr.count("\n") == 1
