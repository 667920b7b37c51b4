"""hellaswag.py: the file and its download, packing, scoring, the ranks' shares, the command."""

import contextlib
import hashlib
import http.server
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hellaswag
import train_gpt2
from conftest import ROOT, SHARED, has_vocabulary
from hellaswag import evaluate, load_examples, pack, prepare, render_example, score_batch
from plumbing.errors import UserError
from plumbing.tokens import Tokenizer, get_tokenizer

REAL_EXAMPLES = SHARED / "data" / "hellaswag_val_1000.jsonl"
ROOF = {"ctx": "A man is sitting on a roof. he", "label": 3, "endings": [
    "is using wrap to wrap a pair of skis.", "is ripping level tiles off.",
    "is holding a rubik's cube.", "starts pulling up roofing on a roof."]}
by_bytes = Tokenizer().encode  # GPT-2's single-byte tokens: needs no vocabulary


def tiny_gpt(vocab_size, block_size, n_layer=2, n_head=2, n_embd=32, **more):
    """The trainer's model with large random weights, so that losses spread out."""
    torch.manual_seed(0)
    config = train_gpt2.GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd, **more)
    model = train_gpt2.GPT(config)
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    return model


class Constant(nn.Module):
    """Gives every token id the same logit at every place, whatever it reads."""

    def __init__(self, logits):
        super().__init__()
        self.row = torch.as_tensor(logits)

    def hidden(self, idx, pos, mask):
        return torch.zeros(*idx.shape, 1)

    def logits(self, h):
        return self.row.expand(*h.shape[:-1], -1)


@torch.no_grad()
def one_at_a_time(model, context, endings):
    """(sum, mean) of four right-padded rows: what the packed scorer has to agree with."""
    size = len(context) + max(len(e) for e in endings)
    rows = torch.tensor([[*context, *e] + [0] * (size - len(context) - len(e)) for e in endings])
    logits = model.logits(model.hidden(rows)[:, :-1]).flatten(0, 1)
    loss = F.cross_entropy(logits, rows[:, 1:].flatten(), reduction="none").view(4, -1)
    kept = [loss[k, len(context) - 1 : len(context) + len(e) - 1] for k, e in enumerate(endings)]
    return torch.stack([x.sum() for x in kept]), torch.stack([x.mean() for x in kept])


def random_examples(n, vocab_size, seed=0):
    """n random (context, endings, label)."""
    rng = np.random.default_rng(seed)

    def tokens(low, high):
        return rng.integers(vocab_size, size=rng.integers(low, high)).tolist()

    return [
        (tokens(1, 60), [tokens(1, 30) for _ in range(4)], int(rng.integers(4))) for _ in range(n)
    ]


def write_lines(path, examples):
    path.write_text("".join(json.dumps(e) + "\n" for e in examples), encoding="utf-8")
    return str(path)


@pytest.fixture
def bpe():
    """GPT-2's tokenizer from a local copy of its vocabulary."""
    if not has_vocabulary():
        pytest.skip("no local copy of GPT-2's vocabulary")
    return get_tokenizer("gpt2")


# -----------------------------------------------------------------------------
# Import, rendering, reading


def test_import_is_silent_and_light():
    heavy = "['tiktoken', 'requests', 'train_gpt2', 'transformers']"
    code = f"import sys, hellaswag; print([m for m in {heavy} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (run.stdout, run.stderr) == ("[]\n", "")


def test_render_example_golden_tokens(bpe):
    data, tokens, mask, label = render_example(ROOF)
    assert tokens.shape == mask.shape == (4, 20) and label == 3
    assert tokens.dtype == mask.dtype == torch.long
    assert data["ctx_tokens"] == [32, 582, 318, 5586, 319, 257, 9753, 13, 339]
    assert data["ending_tokens"][3] == [4940, 10427, 510, 9753, 278, 319, 257, 9753, 13]
    assert mask.sum(dim=1).tolist() == [len(e) for e in data["ending_tokens"]] == [11, 6, 8, 9]
    assert tokens[3].tolist() == data["ctx_tokens"] + data["ending_tokens"][3] + [0, 0]
    assert mask[3].tolist() == [0] * 9 + [1] * 9 + [0, 0]


def test_text_that_looks_like_a_special_token_is_text(bpe):
    data, *_ = render_example({**ROOF, "ctx": "a <|endoftext|> b"})
    assert data["ctx_tokens"] == [64, 1279, 91, 437, 1659, 5239, 91, 29, 275]


def test_iterate_skips_blank_lines_and_reads_unlabelled_test_split(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(ROOF) + "\n\n" + json.dumps(ROOF))
    assert list(hellaswag.iterate_examples("val", path)) == [ROOF, ROOF]
    unlabelled = {k: v for k, v in ROOF.items() if k != "label"}
    write_lines(path, [unlabelled])
    assert list(hellaswag.iterate_examples("test", path)) == [unlabelled]


DAMAGED = [json.dumps(ROOF)[:-9], "\xff\xfe\xfa", "[]", "7", json.dumps({"ctx": "a"})]
WRONG = [{"endings": ROOF["endings"][:3]}, {"endings": None}, {"label": 4}, {"label": "3"},
         {"ctx": ""}]


@pytest.mark.parametrize("line", DAMAGED + [json.dumps({**ROOF, **wrong}) for wrong in WRONG])
def test_damaged_line_is_named(tmp_path, line):
    path = tmp_path / "x.jsonl"
    path.write_bytes(json.dumps(ROOF).encode() + b"\n" + line.encode("latin-1") + b"\n")
    with pytest.raises(UserError, match=r"x\.jsonl, line 2 ") as error:
        load_examples(path, None, 64, by_bytes)
    assert "\n" not in str(error.value)
    assert len(load_examples(path, 1, 512, by_bytes)) == 1  # what comes after is not looked at


def test_a_missing_and_an_empty_file_are_named(tmp_path):
    with pytest.raises(UserError, match="nowhere.jsonl cannot be read"):
        load_examples(tmp_path / "nowhere.jsonl", 5, 64, by_bytes)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="empty.jsonl holds no examples"):
        load_examples(tmp_path / "empty.jsonl", 5, 64, by_bytes)


# -----------------------------------------------------------------------------
# Packing and scoring


def test_pack_is_as_its_docstring_shows():
    e = pack([65, 66], [[67, 68], [69], [70, 71, 72], [73, 74]], label=2)
    assert e.tokens.tolist() == [65, 66, 67, 70, 71, 73]
    assert e.segment.tolist() == [0, 0, 1, 3, 3, 4]
    assert e.position.tolist() == [0, 1, 2, 2, 3, 2]
    assert e.target.T.tolist() == [
        [-1, 67, 68, -1, -1, -1],
        [-1, 69, -1, -1, -1, -1],
        [-1, 70, -1, 71, 72, -1],
        [-1, 73, -1, -1, -1, 74],
    ]


def compare_with_one_at_a_time(model, texts):
    """Losses to 1e-5 and every prediction, by sum and by mean, in batches of mixed lengths."""
    predictions = []
    for start in range(0, len(texts), 7):
        part = texts[start : start + 7]
        sums, means = score_batch(model, [pack(*t) for t in part], "cpu")
        assert sums.shape == means.shape == (len(part), 4) and not sums.requires_grad
        for i, (context, endings, _) in enumerate(part):
            want_sum, want_mean = one_at_a_time(model, context, endings)
            torch.testing.assert_close(sums[i].float(), want_sum, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(means[i].float(), want_mean, rtol=1e-5, atol=1e-5)
            assert sums[i].argmin() == want_sum.argmin()
            assert means[i].argmin() == want_mean.argmin()
            predictions.append((int(want_sum.argmin()), int(want_mean.argmin())))
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
        data, *_ = render_example(example, bpe.encode)
        ids = [[i % 2003 for i in e] for e in (data["ctx_tokens"], *data["ending_tokens"])]
        texts.append((ids[0], ids[1:], data["label"]))  # a small vocabulary, to save time
    predictions = compare_with_one_at_a_time(tiny_gpt(2003, block_size=256), texts)
    assert len(set(predictions)) > 8  # the model does choose


def test_rows_may_be_longer_than_the_block_size():
    model = tiny_gpt(50, block_size=24)
    texts = [([1] * 6, [[k] * 18 for k in range(4)], 0)]
    assert len(pack(*texts[0]).tokens) > 24
    compare_with_one_at_a_time(model, texts)


def test_ties_go_to_the_first():
    model = tiny_gpt(50, block_size=64)
    endings = [[7, 8, 9], [5], [5], [7, 8, 9]]
    assert pack([1, 2], endings, 0).tokens.tolist() == [1, 2, 7, 8]  # equal endings share a place
    for seed in range(20):
        context = np.random.default_rng(seed).integers(50, size=9).tolist()
        sums, means = score_batch(model, [pack(context, endings, 0)], "cpu")
        for x in (sums[0], means[0]):
            assert x[0] == x[3] and x[1] == x[2] and int(x.argmin()) in (0, 1)
    # Where each token costs the same, ln 10, so does the mean over any number of them.
    uneven = pack([1], [[2] * 7, [3] * 3, [4] * 11, [5]], 0)
    sums, means = score_batch(Constant([0.0] * 10), [uneven], "cpu")
    assert means[0].argmin() == 0 and len(set(means[0].tolist())) == 1
    assert sums[0].argmin() == 3


def test_a_rigged_model_scores_all():
    texts = random_examples(40, vocab_size=9)
    for _, endings, label in texts:
        endings[label] = [9] * 5
    logits = [0.0] * 9 + [8.0]
    result = evaluate(Constant(logits), [pack(*t) for t in texts], "cpu")
    assert result.correct == result.correct_norm == result.total == 40
    logits[9] = -8.0
    assert evaluate(Constant(logits), [pack(*t) for t in texts], "cpu").correct_norm == 0


def test_cropping_keeps_the_end_and_is_counted(tmp_path):
    texts = [ROOF, {**ROOF, "ctx": "x" * 300 + ROOF["ctx"]}]
    path = write_lines(tmp_path / "x.jsonl", texts)
    block = len(ROOF["ctx"]) + 1 + max(len(e) for e in ROOF["endings"])  # a token is a byte here
    whole, cut = load_examples(path, None, block, by_bytes)
    assert (whole.cropped, cut.cropped) == (False, True)
    assert whole.tokens.tolist() == cut.tokens.tolist()
    assert (whole.target == cut.target).all()
    assert prepare(ROOF, block - 1, by_bytes).cropped
    assert evaluate(tiny_gpt(256, block), [whole, cut, cut], "cpu").cropped == 2

    short = prepare(ROOF, 8, by_bytes)  # one token of context, the last seven of each ending
    assert (short.segment == 0).sum() == 1 and short.position.max() == 6
    assert (short.target >= 0).sum(axis=0).tolist() == [7] * 4
    assert Tokenizer().decode(short.target[:, 3][short.target[:, 3] >= 0]) == "a roof."
    assert evaluate(tiny_gpt(256, 8), [short], "cpu").cropped == 1


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("n", [0, 1, 5, 61])
def test_each_example_counts_on_one_rank(monkeypatch, world_size, n):
    monkeypatch.setitem(hellaswag.BATCH_TOKENS, "cpu", 300)
    examples = [pack(*t, cropped=i % 3 == 0) for i, t in enumerate(random_examples(n, 40))]
    model = tiny_gpt(40, block_size=96)
    alone = evaluate(model, examples, "cpu")
    assert alone.total == n and alone.cropped == sum(e.cropped for e in examples)
    results, calls = [], []
    for rank in range(world_size):
        calls.append(0)

        def between(rank=rank):
            calls[rank] += 1

        results.append(evaluate(model, examples, "cpu", rank, world_size, between=between))
    assert tuple(map(sum, zip(*results, strict=True))) == alone
    assert len(set(calls)) == 1  # else a collective in between() would hang
    seen = [id(e) for rank in range(world_size)
            for share in hellaswag.shares(examples, rank, world_size, 300) for e in share]
    assert sorted(seen) == sorted(id(e) for e in examples)


def test_batches_are_bounded_and_hardly_padded():
    examples = [pack(*t) for t in random_examples(400, 40)]
    sizes = []
    for share in hellaswag.shares(examples, 0, 1, 1024):
        longest = max(len(e.tokens) for e in share)
        assert len(share) * longest <= 1024
        sizes.append((len(share) * longest, sum(len(e.tokens) for e in share)))
    assert sum(s[0] for s in sizes) < 1.03 * sum(s[1] for s in sizes)
    assert len(list(hellaswag.shares(examples, 0, 1, 1))) == 400  # one too long still has its turn


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_stays_also_where_between_raises(training):
    examples = [pack(*t) for t in random_examples(30, 40)]
    model = tiny_gpt(40, block_size=96).train(training)
    modes = []
    between = lambda: modes.append(model.training)  # noqa: E731
    assert evaluate(model, examples, "cpu", between=between).total == 30
    assert model.training is training and len(modes) > 1 and not any(modes)
    assert all(p.grad is None for p in model.parameters())
    calls = iter([1, 0])
    with pytest.raises(ZeroDivisionError):  # as a signal does it, here behind the second batch
        evaluate(model, examples, "cpu", between=lambda: 1 // next(calls))
    assert model.training is training and next(calls, None) is None


def test_losses_are_float32_under_autocast():
    texts = random_examples(20, 300)
    model, examples = tiny_gpt(300, block_size=96), [pack(*t) for t in texts]
    _, want = score_batch(model, examples, "cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, means = score_batch(model, examples, "cpu")
    assert means.dtype == torch.float64 and (means - want).abs().max() < 0.3
    logits = torch.arange(10.0)  # exact in bfloat16, so only the loss could round
    one = pack([1], [[3], [0], [9], [2]], 0)
    sums, _ = score_batch(Constant(logits.bfloat16()), [one], "cpu")
    torch.testing.assert_close(sums[0].float(), logits.logsumexp(0) - logits[[3, 0, 9, 2]])


def test_score_lines_have_the_standard_error():
    lines = hellaswag.score_lines(2871, 2967, 10042)
    assert lines == ["acc: 2871/10042=0.2859 +- 0.0045", "acc_norm: 2967/10042=0.2955 +- 0.0046"]
    lines = hellaswag.score_lines(0, 1, 1)
    assert lines == ["acc: 0/1=0.0000 +- 0.0000", "acc_norm: 1/1=1.0000 +- 0.0000"]


def test_shown_examples_mark_the_right_ending_and_the_choice(capsys):
    texts = [ROOF, {**ROOF, "ctx": "He", "label": 1}, ROOF]
    examples = [prepare(e, 200, by_bytes) for e in texts]
    model = tiny_gpt(256, 200)
    means = score_batch(model, examples, "cpu")[1]
    hellaswag.show_examples(model, examples, "cpu", Tokenizer().decode, n=2)
    _, *lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("example ")] == [
        "example 1: " + ROOF["ctx"], "example 2: He"]
    for i, shown in enumerate((lines[1:5], lines[6:10])):
        assert len(lines) == 10
        for k, line in enumerate(shown):
            marks, loss, text = line[2:4], line[5:12], line[14:]
            assert marks == "= "[k != texts[i]["label"]] + "> "[k != int(means[i].argmin())]
            assert float(loss) == pytest.approx(float(means[i, k]), abs=6e-5)
            assert text == ROOF["endings"][k]


# -----------------------------------------------------------------------------
# The download, from a server of our own

GOOD = "".join(json.dumps({**ROOF, "ind": i}) + "\n" for i in range(500)).encode()


@contextlib.contextmanager
def server(behave):
    """Serve on 127.0.0.1; `behave(handler)` answers a GET. Yields (url, list of requests)."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            with contextlib.suppress(OSError):
                behave(self)

        def log_message(self, *args):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads, httpd.block_on_close = True, False
    httpd.over = threading.Event()
    thread = threading.Thread(target=httpd.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{httpd.server_port}/val.jsonl", asked
    finally:
        httpd.over.set()
        httpd.shutdown()
        httpd.server_close()
        thread.join()


def send(handler, body, status=200, stop=None):
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body[:stop])
    handler.wfile.flush()


@pytest.fixture
def net(monkeypatch):
    """Our file is the known one, and no proxy is between us and the server."""
    known = (len(GOOD), hashlib.sha256(GOOD).hexdigest())
    monkeypatch.setitem(hellaswag.KNOWN_FILES, "val", known)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HELLASWAG_FILE", raising=False)


def test_known_file_is_the_published_one():
    sha256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"
    assert hellaswag.KNOWN_FILES["val"] == (12246618, sha256)


def test_download_good_then_kept_then_repaired(net, tmp_path, monkeypatch):
    path = str(tmp_path / "sub" / "val.jsonl")
    with server(lambda h: send(h, GOOD)) as (url, asked):
        monkeypatch.setenv("HELLASWAG_URL", url)
        assert hellaswag.download("val", path) == path
        assert hellaswag.download("val", path) == path and len(asked) == 1
        assert Path(path).read_bytes() == GOOD
        assert len(list(hellaswag.iterate_examples("val", path))) == 500
        for broken in (GOOD[:-5], b"", GOOD[:-3] + b"x}\n"):  # cut off, empty, a changed byte
            Path(path).write_bytes(broken)
            hellaswag.download("val", path)
            assert Path(path).read_bytes() == GOOD
        assert len(asked) == 4
        hellaswag.download("train", str(tmp_path / "train.jsonl"))
        assert sorted(p.name for p in tmp_path.rglob("*.*")) == ["train.jsonl", "val.jsonl"]
    hellaswag.download("val", path)  # put there by hand, it needs no server
    Path(path).write_bytes(GOOD[:-5])
    with pytest.raises(UserError, match="val.jsonl is missing or damaged .* put it there"):
        hellaswag.download("val", path)


def test_where_the_file_is_and_a_file_of_ones_own(net, tmp_path, monkeypatch):
    monkeypatch.setattr(hellaswag, "HERE", str(tmp_path))
    path = str(tmp_path / "hellaswag" / "hellaswag_val.jsonl")
    assert hellaswag.data_file("val") == path and not list(tmp_path.iterdir())
    with server(lambda h: send(h, GOOD)) as (url, asked):
        assert hellaswag.download(url=url) == path
        own = write_lines(tmp_path / "own.jsonl", [ROOF])  # of no known size, and taken as it is
        monkeypatch.setenv("HELLASWAG_FILE", own)
        assert hellaswag.download("val", url=url) == hellaswag.data_file("val") == own
        assert len(asked) == 1
    assert len(load_examples(hellaswag.data_file("val"), 5, 200, by_bytes)) == 1


FAULTS = {  # what the server does, and what the user reads of it
    "page": (lambda h: send(h, b"<html>" * 99), "another file, 594 bytes"),
    "bytes": (lambda h: send(h, GOOD[:-3] + b"x}\n"), f"another file, {len(GOOD):,} bytes"),
    "cut": (lambda h: send(h, GOOD, stop=5000), "IncompleteRead"),
    "404": (lambda h: send(h, b"no", status=404), "404"),
    "503": (lambda h: send(h, GOOD, status=503), "503"),
    "closed": (lambda h: None, "ConnectionError"),
    # Silence for as long as the test goes on, before the answer and in the middle of it.
    "hang": (lambda h: h.server.over.wait(), "timeout=0.2"),
    "stall": (lambda h: (send(h, GOOD, stop=1000), h.server.over.wait()), "timed out"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_failed_download_leaves_nothing_and_says_where(net, tmp_path, monkeypatch, fault):
    behave, reason = FAULTS[fault]
    if fault in ("hang", "stall"):
        monkeypatch.setattr(hellaswag, "ANSWER_S", 0.2)
    path = tmp_path / "val.jsonl"
    with server(behave) as (url, _), pytest.raises(UserError) as error:
        hellaswag.download("val", path, url)
    message = str(error.value)
    assert reason in message and url in message and str(path) in message and "\n" not in message
    assert not list(tmp_path.iterdir())


def test_dead_port_bad_address_and_bad_folder(net, tmp_path):
    with server(lambda h: None) as (url, _):
        pass  # nobody listens there any more
    for address, reason in ((url, "ConnectionError"), ("no_address", "MissingSchema")):
        with pytest.raises(UserError, match=f"{reason}.* put it there"):
            hellaswag.download("val", tmp_path / "val.jsonl", address)
    (tmp_path / "file").write_text("")
    refused = pytest.raises(UserError, match="file/val.jsonl is missing.* put it there")
    with server(lambda h: send(h, GOOD)) as (url, _), refused:
        hellaswag.download("val", tmp_path / "file" / "val.jsonl", url)


def test_a_cut_off_file_without_a_known_hash_is_refused(net, tmp_path):
    with server(FAULTS["cut"][0]) as (url, _), pytest.raises(UserError, match="IncompleteRead"):
        hellaswag.download("test", tmp_path / "test.jsonl", url)
    assert not (tmp_path / "test.jsonl").exists()


def test_two_nodes_that_fetch_at_once_to_one_disk(net, tmp_path):
    path = tmp_path / "val.jsonl"
    both = threading.Barrier(2)

    def answer(handler):
        both.wait()
        send(handler, GOOD)

    with server(answer) as (url, asked):
        with ThreadPoolExecutor() as nodes:
            list(nodes.map(hellaswag.download, ["val"] * 2, [path] * 2, [url] * 2))
    assert len(asked) == 2 and [p.name for p in tmp_path.iterdir()] == ["val.jsonl"]
    assert path.read_bytes() == GOOD


# -----------------------------------------------------------------------------
# The command


class Started(Exception):
    """In place of the trainer: its command line."""


@pytest.fixture
def command(monkeypatch, tmp_path):
    """score() up to the start of the trainer: its command line as a list, and HELLASWAG_FILE."""
    monkeypatch.setattr(hellaswag, "get_tokenizer", lambda name: None)
    monkeypatch.setenv("HELLASWAG_FILE", write_lines(tmp_path / "six.jsonl", [ROOF] * 6))
    monkeypatch.setattr(os, "execv", lambda program, argv: (_ for _ in ()).throw(Started(argv)))

    def run(*args):
        with pytest.raises(Started) as started:
            hellaswag.score(list(args))
        return started.value.args[0], os.environ["HELLASWAG_FILE"]

    return run


def save(path, **facts):
    torch.save({"model": {}, "config": {}} | facts, path)
    return str(path)


def test_command_starts_the_trainer(command, tmp_path):
    argv, _ = command()
    assert argv[:4] == [sys.executable, str(ROOT / "train_gpt2.py"), "--init", "gpt2"]
    flags = ("--device auto", "--hellaswag 10042", "--eval_only", "--val_tokens 0",
             "--num_samples 0", "--dtype float32")
    assert all(flag in " ".join(argv[4:]) for flag in flags)
    own = write_lines(tmp_path / "own.jsonl", [ROOF])
    argv, file = command("-m", "a b.pt", "-d", "cuda:1", "--limit", "7", "--data_file", own)
    assert argv[3] == "a b.pt" and file == own
    assert "--device cuda:1 --hellaswag 7 " in " ".join(argv)


def test_command_starts_the_script_of_the_checkpoint(command, tmp_path):
    for arch in (None, "gpt2", "modern", "mine", "../plot"):
        script = "modern.py" if arch == "modern" else "train_gpt2.py"  # which knows what to say
        facts = {"arch": arch, "tokenizer": "gpt2"} if arch else {}
        argv, _ = command("-m", save(tmp_path / "x.pt", **facts))
        assert argv[1] == str(ROOT / script)
    Path(tmp_path / "x.pt").write_bytes(b"PK junk")  # what is wrong with it, the trainer says
    assert command("-m", str(tmp_path / "x.pt"))[0][1] == str(ROOT / "train_gpt2.py")


def test_command_downloads_once_a_machine(command, net, monkeypatch):
    asked = []
    monkeypatch.setattr(hellaswag, "download", lambda split: asked.append(split) or os.devnull)
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        monkeypatch.setenv("HELLASWAG_FILE", "")
        command()
    assert asked == ["val"]


MISTAKES = {
    "--model_type=": "must not be empty",
    "-m of_bytes.pt": "of_bytes.pt knows bytes",
    "--data_file nowhere.jsonl": "nowhere.jsonl cannot be read",
    "--data_file bad.jsonl": "bad.jsonl, line 1 is damaged",
    "--limit 0": "--limit 0: must be at least 1",
    "--limit x": "--limit",
    "--lim 3": "did you mean --limit?",
    "extra": "extra",
}


@pytest.mark.parametrize("typed, message", MISTAKES.items())
def test_mistakes_are_said_before_the_trainer_starts(
        command, tmp_path, monkeypatch, typed, message):
    monkeypatch.chdir(tmp_path)
    save("of_bytes.pt", tokenizer="bytes")
    Path("bad.jsonl").write_text("{")
    with pytest.raises(UserError) as error:
        hellaswag.score(typed.split())
    assert message in str(error.value) and "\n" not in str(error.value)


def test_help_fits_100_columns(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "250")
    with pytest.raises(SystemExit) as stop:
        hellaswag.score(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and max(map(len, text.splitlines())) <= 100
    for flag in ("-m", "--model_type", "-d", "--device", "--limit", "--data_file", "default"):
        assert flag in text


@pytest.fixture
def tiny(bpe, tmp_path):
    """(path of a checkpoint with GPT-2's vocabulary, its model, path of ten examples)."""
    model = tiny_gpt(50304, 28, n_layer=1, n_head=1, n_embd=8)
    save(tmp_path / "tiny.pt", model=model.state_dict(), config=vars(model.config), flags={},
         tokenizer="gpt2")
    texts = [{**ROOF, "ctx": " ".join(ROOF["ctx"].split()[i:] + ["of", "it"] * i), "label": i % 4}
             for i in range(9)]
    examples = write_lines(tmp_path / "ten.jsonl", [*texts, {**ROOF, "ctx": "x " * 40}])
    return str(tmp_path / "tiny.pt"), model, examples


def start(*args, cwd, processes=1):
    """hellaswag.py as a user types it."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    line = [sys.executable, *torchrun * (processes > 1), str(ROOT / "hellaswag.py"), "-d", "cpu"]
    return subprocess.Popen([*line, *args], cwd=cwd, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


@pytest.mark.parametrize("processes", [1, 2])
def test_command_scores_a_checkpoint(tiny, bpe, tmp_path, processes):
    path, model, file = tiny
    run = start("-m", path, "--data_file", file, processes=processes, cwd=tmp_path)
    out, err = run.communicate()
    assert run.returncode == 0, err
    examples = load_examples(file, None, 28, bpe.encode)
    right = [0, 0]
    for e in examples:
        context = e.tokens[e.segment == 0].tolist()
        endings = [ids[ids >= 0].tolist() for ids in e.target.T]
        for i, losses in enumerate(one_at_a_time(model, context, endings)):
            right[i] += int(losses.argmin()) == e.label
    lines = out.splitlines()
    assert lines[-2:] == hellaswag.score_lines(*right, 10)
    assert f"HellaSwag accuracy: {right[1]}/10={right[1] / 10:.4f}" in lines
    assert sum(line.startswith("example ") for line in lines) == 4
    assert "1 cut on the left to 28 tokens" in lines
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ten.jsonl", "tiny.pt"]


def test_the_trainers_status_and_words_are_the_commands(bpe, tmp_path):
    file = write_lines(tmp_path / "one.jsonl", [ROOF])
    run = start("-m", "nothing.pt", "--data_file", file, cwd=tmp_path)
    out, err = run.communicate()
    assert (run.returncode, out) == (2, "")
    assert "nothing.pt: there is no such checkpoint" in err and err.count("\n") == 1


def test_a_signal_ends_the_trainer_too(tiny, tmp_path):
    path, _, file = tiny
    many = tmp_path / "many.jsonl"
    many.write_text(Path(file).read_text() * 500)
    run = start("-m", path, "--data_file", str(many), "--limit", "5000", cwd=tmp_path)
    assert "example 1: " in "".join(itertools.islice(run.stdout, 3))  # from the trainer
    run.send_signal(signal.SIGTERM)
    out, _ = run.communicate()
    assert run.returncode in (-signal.SIGTERM, 128 + signal.SIGTERM)
    assert "acc_norm" not in out  # it had not come to its end
