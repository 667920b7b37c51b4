"""hellaswag.py: the file and its download, packing, scoring, the ranks' shares, the command."""

import contextlib
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hellaswag
from common import UserError
from tokens import Tokenizer, get_tokenizer
from hellaswag import collate, evaluate, load_examples, pack, prepare, render_example, score_batch

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
REAL_EXAMPLES = SHARED / "data" / "hellaswag_val_1000.jsonl"
ROOF = {
    "ctx": "A man is sitting on a roof. he",
    "label": 3,
    "endings": [
        "is using wrap to wrap a pair of skis.",
        "is ripping level tiles off.",
        "is holding a rubik's cube.",
        "starts pulling up roofing on a roof.",
    ],
}
by_bytes = Tokenizer().encode  # GPT-2's single-byte tokens: needs no vocabulary


class TinyGPT(nn.Module):
    """The part of GPT that scoring uses, with large random weights so that losses spread out."""

    def __init__(self, vocab_size, block_size, width=32, n_head=2, seed=0):
        super().__init__()
        self.config = types.SimpleNamespace(block_size=block_size)
        self.n_head = n_head
        self.wte, self.wpe = nn.Embedding(vocab_size, width), nn.Embedding(block_size, width)
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, vocab_size, bias=False)
        generator = torch.Generator().manual_seed(seed)
        for p in self.parameters():
            nn.init.normal_(p, std=0.5, generator=generator)

    def hidden(self, idx, pos=None, mask=None):
        pos = torch.arange(idx.shape[1]) if pos is None else pos
        x = self.wte(idx) + self.wpe(pos)
        for qkv in self.qkv:
            heads = qkv(self.norm(x)).unflatten(-1, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(*heads, attn_mask=mask, is_causal=mask is None)
            x = x + y.transpose(1, 2).flatten(2)
        return self.norm(x)


class Constant(nn.Module):
    """Gives every token id the same logit at every place, whatever it reads."""

    def __init__(self, logits, block_size=64):
        super().__init__()
        self.logits = torch.as_tensor(logits)
        self.config = types.SimpleNamespace(block_size=block_size)

    def hidden(self, idx, pos, mask):
        return torch.zeros(*idx.shape, 1)

    def lm_head(self, h):
        return self.logits.expand(*h.shape[:-1], -1)


@torch.no_grad()
def one_at_a_time(model, context, endings):
    """(sum, mean) of four right-padded rows: what the packed scorer has to agree with."""
    size = len(context) + max(len(e) for e in endings)
    rows = torch.tensor([[*context, *e] + [0] * (size - len(context) - len(e)) for e in endings])
    logits = model.lm_head(model.hidden(rows)[:, :-1]).flatten(0, 1)
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
def bpe(monkeypatch):
    """GPT-2's tokenizer from a local copy of its vocabulary."""
    if (SHARED / "tiktoken").is_dir():
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken"))
    elif "TIKTOKEN_CACHE_DIR" not in os.environ:
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


@pytest.mark.parametrize(
    "line",
    [
        json.dumps(ROOF)[:-9],
        b"\xff\xfe\xfa",
        "[]",
        "7",
        json.dumps({**ROOF, "endings": ROOF["endings"][:3]}),
        json.dumps({**ROOF, "endings": None}),
        json.dumps({**ROOF, "label": 4}),
        json.dumps({**ROOF, "label": "3"}),
        json.dumps({**ROOF, "ctx": ""}),
        json.dumps({"ctx": "a"}),
    ],
)
def test_damaged_line_is_named(tmp_path, line):
    path = tmp_path / "x.jsonl"
    line = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(json.dumps(ROOF).encode() + b"\n" + line + b"\n")
    with pytest.raises(UserError, match=r"x\.jsonl, line 2 ") as error:
        load_examples(path, None, 64, by_bytes)
    assert "\n" not in str(error.value)
    assert len(load_examples(path, 1, 512, by_bytes)) == 1  # what comes after is not looked at


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere.jsonl cannot be read"):
        load_examples(tmp_path / "nowhere.jsonl", 5, 64, by_bytes)


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
        sums, means = score_batch(model, collate([pack(*t) for t in part], "cpu"))
        assert sums.shape == means.shape == (len(part), 4) and not sums.requires_grad
        for i, (context, endings, _) in enumerate(part):
            want_sum, want_mean = one_at_a_time(model, context, endings)
            torch.testing.assert_close(sums[i].float(), want_sum, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(means[i].float(), want_mean, rtol=1e-5, atol=1e-5)
            assert sums[i].argmin() == want_sum.argmin()
            assert means[i].argmin() == want_mean.argmin()
            predictions.append((int(want_sum.argmin()), int(want_mean.argmin())))
    return predictions


def test_every_prediction_equals_scoring_one_at_a_time():
    texts = random_examples(150, vocab_size=300)
    model = TinyGPT(300, block_size=96)
    predictions = compare_with_one_at_a_time(model, texts)
    result = evaluate(model, [pack(*t) for t in texts], "cpu")
    labels = [t[2] for t in texts]
    assert result == (
        sum(p[0] == label for p, label in zip(predictions, labels, strict=True)),
        sum(p[1] == label for p, label in zip(predictions, labels, strict=True)),
        150,
        0,
    )


def test_every_prediction_on_real_examples(bpe):
    if not REAL_EXAMPLES.exists():
        pytest.skip("no real examples here")
    texts = []
    for example in list(hellaswag.iterate_examples("val", REAL_EXAMPLES))[:120]:
        data, *_ = render_example(example, bpe.encode)
        ids = [[i % 2003 for i in e] for e in (data["ctx_tokens"], *data["ending_tokens"])]
        texts.append((ids[0], ids[1:], data["label"]))  # a small vocabulary, to save time
    predictions = compare_with_one_at_a_time(TinyGPT(2003, block_size=256), texts)
    assert len(set(predictions)) > 8  # the model does choose


@pytest.mark.parametrize("pos", ["learned", "rope"])
def test_the_trainers_model_takes_packed_rows(pos):
    train_gpt2 = pytest.importorskip("train_gpt2")
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 96, "vocab_size": 300}
    model = train_gpt2.GPT(train_gpt2.GPTConfig(**sizes, pos=pos))
    for p in model.parameters():  # large, so that losses spread out
        nn.init.normal_(p, std=0.5)
    compare_with_one_at_a_time(model, random_examples(21, vocab_size=300))


def test_rows_may_be_longer_than_the_block_size():
    model = TinyGPT(50, block_size=24)
    texts = [([1] * 6, [[k] * 18 for k in range(4)], 0)]
    assert len(pack(*texts[0]).tokens) > 24
    compare_with_one_at_a_time(model, texts)


def test_ties_go_to_the_first():
    model = TinyGPT(50, block_size=64)
    endings = [[7, 8, 9], [5], [5], [7, 8, 9]]
    assert pack([1, 2], endings, 0).tokens.tolist() == [1, 2, 7, 8]  # equal endings share a place
    for seed in range(20):
        context = np.random.default_rng(seed).integers(50, size=9).tolist()
        sums, means = score_batch(model, collate([pack(context, endings, 0)], "cpu"))
        for x in (sums[0], means[0]):
            assert x[0] == x[3] and x[1] == x[2] and int(x.argmin()) in (0, 1)
    # Where each token costs the same, ln 10, so does the mean over any number of them.
    uneven = pack([1], [[2] * 7, [3] * 3, [4] * 11, [5]], 0)
    sums, means = score_batch(Constant([0.0] * 10), collate([uneven], "cpu"))
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
    longest = max(len(e) for e in ROOF["endings"]) + 1
    block = longest + len(ROOF["ctx"])  # in bytes, as the tokens are here
    whole, cut = load_examples(path, None, block, by_bytes)
    assert (whole.cropped, cut.cropped) == (False, True)
    assert whole.tokens.tolist() == cut.tokens.tolist()
    assert (whole.target == cut.target).all()
    assert prepare(ROOF, block - 1, by_bytes).cropped
    assert evaluate(TinyGPT(256, block), [whole, cut, cut], "cpu").cropped == 2

    short = prepare(ROOF, 8, by_bytes)  # one token of context, the last seven of each ending
    assert (short.segment == 0).sum() == 1 and short.position.max() == 6
    assert (short.target >= 0).sum(axis=0).tolist() == [7] * 4
    assert bytes(Tokenizer().decode(short.target[:, 3][short.target[:, 3] >= 0]), "ascii") == (
        b"a roof."
    )
    assert evaluate(TinyGPT(256, 8), [short], "cpu").cropped == 1


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("n", [0, 1, 5, 61])
def test_each_example_counts_on_one_rank(monkeypatch, world_size, n):
    monkeypatch.setitem(hellaswag.BATCH_TOKENS, "cpu", 300)
    examples = [pack(*t, cropped=i % 3 == 0) for i, t in enumerate(random_examples(n, 40))]
    model = TinyGPT(40, block_size=96)
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
    seen = [
        id(e)
        for rank in range(world_size)
        for share in hellaswag.shares(examples, rank, world_size, 300)
        for e in share
    ]
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
def test_modes_and_giving_up(training):
    examples = [pack(*t) for t in random_examples(30, 40)]
    model = TinyGPT(40, block_size=96).train(training)
    modes = []
    between = lambda: modes.append(model.training)  # noqa: E731
    assert evaluate(model, examples, "cpu", between=between).total == 30
    assert model.training is training and len(modes) > 1 and not any(modes)
    assert all(p.grad is None for p in model.parameters())
    answers = iter([False, True])
    assert evaluate(model, examples, "cpu", between=lambda: next(answers)) is None
    assert model.training is training
    with pytest.raises(ZeroDivisionError):
        evaluate(model, examples, "cpu", between=lambda: 1 // 0)
    assert model.training is training


def test_losses_are_float32_under_autocast():
    texts = random_examples(20, 300)
    model, batch = TinyGPT(300, block_size=96), collate([pack(*t) for t in texts], "cpu")
    _, want = score_batch(model, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, means = score_batch(model, batch)
    assert means.dtype == torch.float64 and (means - want).abs().max() < 0.3
    logits = torch.arange(10.0)  # exact in bfloat16, so only the loss could round
    batch = collate([pack([1], [[3], [0], [9], [2]], 0)], "cpu")
    sums, _ = score_batch(Constant(logits.bfloat16()), batch)
    torch.testing.assert_close(sums[0].float(), logits.logsumexp(0) - logits[[3, 0, 9, 2]])


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
    thread = threading.Thread(target=httpd.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{httpd.server_port}/val.jsonl", asked
    finally:
        httpd.shutdown()
        httpd.server_close()
        thread.join()


def send(handler, body, status=200, length=None, stop=None):
    handler.send_response(status)
    handler.send_header("Content-Length", str(length if length is not None else len(body)))
    handler.end_headers()
    handler.wfile.write(body[:stop])
    handler.wfile.flush()


@pytest.fixture
def net(monkeypatch):
    """Our file is the known one, the server's silence short, and no proxy between us and it."""
    known = (len(GOOD), hashlib.sha256(GOOD).hexdigest())
    monkeypatch.setitem(hellaswag.KNOWN_FILES, "val", known)
    monkeypatch.setattr(hellaswag, "ANSWER_S", 0.5)
    monkeypatch.setattr(hellaswag, "DOWNLOAD_S", 2.0)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def test_known_file_is_the_published_one():
    assert hellaswag.KNOWN_FILES["val"] == (
        12246618,
        "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588",
    )
    assert hellaswag.download.__defaults__ == (None, None)


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
        assert not list(tmp_path.rglob("*.tmp"))
    hellaswag.download("val", path)  # put there by hand, it needs no server
    Path(path).write_bytes(GOOD[:-5])
    with pytest.raises(UserError, match=r"\([\d,]+ bytes, not [\d,]+\) and could not be fetched"):
        hellaswag.download("val", path)


def hang(handler):
    time.sleep(1.5)


def drip(handler):
    send(handler, GOOD, stop=10)
    for _ in range(40):
        time.sleep(0.1)
        handler.wfile.write(b"x")
        handler.wfile.flush()


def stall(handler):
    send(handler, GOOD, stop=1000)
    time.sleep(1.5)


@pytest.mark.parametrize(
    "behave, reason",
    [
        (lambda h: send(h, b"<html>" * 99), "wrong file: 594 bytes, not"),
        (lambda h: send(h, GOOD[:-3] + b"x}\n"), "wrong file: the sha256"),
        (lambda h: send(h, GOOD, stop=5000), "broke before the end"),
        (lambda h: send(h, b"no", status=404), "404 Not Found"),
        (lambda h: send(h, GOOD, status=503), "503"),
        (lambda h: None, "ConnectionError"),
        (hang, "no answer within 0.5 s"),
        (stall, "no answer within 0.5 s"),
        (drip, "not complete after 2 s"),
    ],
    ids=["page", "bytes", "cut", "404", "503", "closed", "hang", "stall", "drip"],
)
def test_failed_download_leaves_nothing_and_says_where(net, tmp_path, behave, reason):
    path = tmp_path / "val.jsonl"
    start = time.monotonic()
    with server(behave) as (url, _):
        with pytest.raises(UserError) as error:
            hellaswag.download("val", path, url)
    assert time.monotonic() - start < 5
    message = str(error.value)
    assert reason in message and url in message and str(path) in message and "\n" not in message
    assert not path.exists() and not list(tmp_path.glob("*.tmp"))


def test_dead_port_bad_split_and_bad_folder(net, tmp_path):
    with server(hang) as (url, _):
        pass  # nobody listens there any more
    with pytest.raises(UserError, match="ConnectionError.* put it there"):
        hellaswag.download("val", tmp_path / "val.jsonl", url)
    with pytest.raises(UserError, match="no split 'dev'"):
        hellaswag.download("dev")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="not at .*file.* put it there"):
        hellaswag.download("val", tmp_path / "file" / "val.jsonl", url)


def test_a_cut_off_file_without_a_known_hash_is_refused(net, tmp_path):
    with server(lambda h: send(h, GOOD, stop=5000)) as (url, _):
        with pytest.raises(UserError, match="broke before the end"):
            hellaswag.download("test", tmp_path / "test.jsonl", url)
    assert not (tmp_path / "test.jsonl").exists()


CALL = """
import sys, fineweb, hellaswag
hellaswag.KNOWN_FILES["val"] = (int(sys.argv[2]), sys.argv[3])
hellaswag.ANSWER_S = 2.0
print("ready", flush=True)
for url in sys.stdin:
    try:
        hellaswag.download("val", sys.argv[1], url.strip())
        print("ok", flush=True)
    except fineweb.UserError as e:
        print("error", e, flush=True)
"""


@contextlib.contextmanager
def callers(n, path):
    """n processes, imported and ready: each calls download with every url on its stdin."""
    known = [str(len(GOOD)), hashlib.sha256(GOOD).hexdigest()]
    command = [sys.executable, "-c", CALL, str(path), *known]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, cwd=ROOT, **pipes) for _ in range(n)]
    try:
        for p in processes:
            assert p.stdout.readline() == "ready\n"
        yield processes
    finally:
        for p in processes:
            p.kill()
            p.communicate()


def ask(process, url):
    process.stdin.write(url + "\n")
    process.stdin.flush()


def test_processes_started_at_once(net, tmp_path):
    path = tmp_path / "val.jsonl"
    with callers(3, path) as group:
        # A dead server: those who wait for the one that asks do not wait it out again in turn.
        with server(lambda h: time.sleep(5)) as (url, asked):
            for p in group:
                ask(p, url)
            lines = [p.stdout.readline() for p in group]
            assert all(x.startswith("error ") and "no answer within 2 s" in x for x in lines), lines
            assert len(asked) == 1
        # The one that asks is killed: one other asks, the rest wait, and the old failure is over.
        answers = iter([lambda h: time.sleep(5), lambda h: (time.sleep(0.5), send(h, GOOD))])
        with server(lambda h: next(answers)(h)) as (url, asked):
            ask(group[0], url)
            while not asked:
                time.sleep(0.02)
            for p in group[1:]:
                ask(p, url)
            time.sleep(0.5)
            assert len(asked) == 1
            group[0].kill()
            assert [p.stdout.readline() for p in group[1:]] == ["ok\n"] * 2
            assert len(asked) == 2
    assert path.read_bytes() == GOOD


# -----------------------------------------------------------------------------
# The command


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """Run main() on six examples with a tiny model; returns (status, stdout lines, stderr)."""
    path = write_lines(tmp_path / "six.jsonl", [{**ROOF, "label": i % 4} for i in range(6)])
    loaded = []

    def load_weights(name, device):
        loaded.append((name, device))
        return TinyGPT(256, block_size=60), "bytes" if name == "of_bytes.pt" else "gpt2"

    fake = types.SimpleNamespace(load_weights=load_weights)
    monkeypatch.setitem(sys.modules, "train_gpt2", fake)
    monkeypatch.setattr(hellaswag, "get_tokenizer", lambda name: Tokenizer())

    def run(*args, data_file=path):
        status = hellaswag.main(["--data_file", str(data_file), "-d", "cpu", *args])
        out = capsys.readouterr()
        return status, out.out.splitlines(), out.err

    run.loaded = loaded
    return run


def test_command_prints_examples_and_scores(command):
    status, lines, err = command("-m", "log/last.pt")
    assert status == 0 and command.loaded == [("log/last.pt", torch.device("cpu"))]
    assert err == ""  # no progress bar where there is no terminal
    shown = [line for line in lines if line.startswith("example ")]
    assert len(shown) == 4 and shown[0] == "example 1: " + ROOF["ctx"][-22:]
    assert sum(line.startswith("  =") for line in lines) == 4
    assert sum(line[3:4] == ">" for line in lines) == 4
    assert lines[-3] == "6 cut on the left to 60 tokens"
    # All six are the same example, so the choice is right for one or two of the labels.
    for line, name in zip(lines[-2:], ("acc", "acc_norm"), strict=True):
        assert line in (f"{name}: 1/6=0.1667 +- 0.1521", f"{name}: 2/6=0.3333 +- 0.1925")


def test_command_limit(command):
    _, lines, _ = command("--limit", "1")
    assert lines[-1].startswith("acc_norm: ") and "/1=" in lines[-1] and "+- 0.0000" in lines[-1]


@pytest.mark.parametrize(
    "args, message",
    [
        (["-d", "nonsense"], "--device nonsense: choose cuda"),
        (["-m", ""], "must not be empty"),
        (["--device", "cuda:99"], "--device cuda:99: "),
        (["-m", "of_bytes.pt"], "of_bytes.pt knows bytes"),
        (["--data_file", "nowhere.jsonl"], "nowhere.jsonl cannot be read"),
    ],
)
def test_command_errors_are_one_line(command, args, message):
    status, _, err = command(*args)
    assert status == 2 and message in err
    assert err.startswith("hellaswag.py: error: ") and err.count("\n") == 1
    assert [name for name, _ in command.loaded] == ["of_bytes.pt"] * ("of_bytes.pt" in args)


def test_command_names_an_empty_or_damaged_file(command, tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    assert "holds no examples" in command(data_file=tmp_path / "empty.jsonl")[2]
    (tmp_path / "bad.jsonl").write_text("{")
    assert "bad.jsonl, line 1 is damaged" in command(data_file=tmp_path / "bad.jsonl")[2]


@pytest.mark.parametrize("args", [["--limit", "0"], ["--limit", "x"], ["--lim", "3"], ["extra"]])
def test_wrong_flags_exit_with_status_2(args, capsys):
    assert hellaswag.main(args) == 2
    err = capsys.readouterr().err
    assert err.startswith("hellaswag.py: error: ") and err.count("\n") == 1


def test_help_fits_100_columns(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "250")
    with pytest.raises(SystemExit) as stop:
        hellaswag.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and max(map(len, text.splitlines())) <= 100
    for flag in ("-m", "--model_type", "-d", "--device", "--limit", "--data_file", "default"):
        assert flag in text
