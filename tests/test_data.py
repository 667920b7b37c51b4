"""The order of the data: a function of the step, held against a direct definition of it."""

import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, write_shards

import train_gpt2
from plumbing.errors import UserError
from plumbing.tokens import EOT, Tokenizer, open_shards
from train_gpt2 import DataLoaderLite


def counting_shards(folder, sizes):
    """Train shards whose tokens are 0, 1, 2, ... so that a token says where it stood."""
    folder.mkdir(exist_ok=True)
    cuts = np.cumsum([0, *sizes])
    for i, (start, end) in enumerate(zip(cuts[:-1], cuts[1:], strict=True), 1):
        np.save(folder / f"edufineweb_train_{i:06d}.npy", np.arange(start, end, dtype=np.uint16))
    return open_shards(folder, "train")


def read_step(tokens, step, B, W, T, R, **settings):
    """x of a step, (R, T), put together from what W processes read with micro-batches of B."""
    rows = np.full((R, T), -1)
    for k in range(W):
        loader = DataLoaderLite(B, T, k, W, tokens, R, **settings)
        loader.reset(step)
        for m in range(R // (B * W)):
            x, y = loader.next_batch()
            assert torch.equal(y[:, :-1], x[:, 1:])
            first = (m * W + k) * B
            assert (rows[first : first + B] == -1).all()
            rows[first : first + B] = x
    return rows


@pytest.mark.parametrize(
    "sizes, T, B, W, R",
    [
        ((98,), 7, 1, 1, 3),  # the last target would be one beyond the end: 13 windows
        ((97, 3, 1, 58), 5, 2, 3, 12),  # shards shorter than a window
        ((41, 40), 16, 3, 2, 12),  # five windows, fewer than a step reads
        ((65, 64, 65342), 13, 4, 8, 64),  # token ids up to 65,470
        ((17,), 16, 2, 1, 4),  # a single window
    ],
)
def test_faithful_order_against_its_definition(tmp_path, sizes, T, B, W, R):
    """Row i of step s is window (sR + i) mod n; i belongs to micro-step m, process k, row b."""
    tokens = counting_shards(tmp_path, sizes)
    N = sum(sizes)
    n = (N - 1) // T
    stream = list(range(N))
    loaders = [DataLoaderLite(B, T, k, W, tokens, R) for k in range(W)]
    for s in range(3 * n // R + 2):
        for m in range(R // (B * W)):
            for k in range(W):
                x, y = loaders[k].next_batch()
                for b in range(B):
                    w = (s * R + (m * W + k) * B + b) % n
                    assert x[b].tolist() == stream[w * T : w * T + T]
                    assert y[b].tolist() == stream[w * T + 1 : w * T + T + 1]


@pytest.mark.parametrize("shuffle", ["none", "windows"])
def test_any_number_of_processes_reads_the_same_rows(tmp_path, shuffle):
    """For three epochs, every window once in each; a restart anywhere continues the same."""
    T, R, n = 5, 48, 109
    tokens = counting_shards(tmp_path, (200, 129, n * T + 2 - 329))
    settings = dict(T=T, R=R, shuffle=shuffle, seed=7)
    loader = DataLoaderLite(R, T, 0, 1, tokens, R, shuffle, 7)
    one = [loader.next_batch()[0].numpy() for _ in range(3 * n // R + 1)]
    windows = np.concatenate(one)[:, 0] // T
    for epoch in range(3):
        assert sorted(windows[epoch * n : (epoch + 1) * n]) == list(range(n))
    for W in (1, 2, 3, 4, 8):
        for B in {1, 2, R // W} if W != 3 else {1, 4, 16}:
            for step in (4, 0, 2, 5, 3, 1):  # each in new loaders: nothing but the step counts
                rows = read_step(tokens, step, B, W, **settings)
                assert np.array_equal(rows, one[step]), (W, B, step)


def test_permutations_differ_by_epoch_and_by_seed(tmp_path):
    T, n = 4, 300
    tokens = counting_shards(tmp_path, (n * T + 1,))

    def epochs(seed):
        loader = DataLoaderLite(n, T, 0, 1, tokens, n, "windows", seed)
        return [(loader.next_batch()[0][:, 0] // T).tolist() for _ in range(4)]

    first, again, other = epochs(1), epochs(1), epochs(2)
    assert first == again
    seen = {tuple(order) for order in [range(n), *first, *other]}
    assert len(seen) == 9  # all different, and none is the order of the file
    # not merely rotated or reversed: neighbours are rarely neighbours still
    for order in first:
        assert np.mean(np.abs(np.diff(order)) == 1) < 0.05


@pytest.mark.parametrize("shuffle", ["none", "windows"])
def test_reset_in_the_middle_of_a_step_and_back(tmp_path, shuffle):
    tokens = counting_shards(tmp_path, (1234,))
    loader = DataLoaderLite(2, 8, 1, 2, tokens, 16, shuffle, 3)
    straight = [loader.next_batch()[0] for _ in range(60)]  # 15 steps of 4 micro-steps
    for step in (7, 3, 14, 0):
        loader.reset(step)
        for x in straight[4 * step : 4 * step + 3]:  # breaks off before the step is over
            assert torch.equal(loader.next_batch()[0], x)
    loader.reset()
    assert torch.equal(loader.next_batch()[0], straight[0])


@pytest.mark.parametrize("shuffle", ["none", "windows"])
def test_batch_shape_never_changes(tmp_path, shuffle):
    """Three times more steps than data, which is not a whole number of batches."""
    tokens = counting_shards(tmp_path, (1000, 337))
    loader = DataLoaderLite(3, 16, 0, 1, tokens, 6, shuffle)
    for _ in range(3 * 2 * 83 // 6 + 2):
        x, y = loader.next_batch()
        assert x.shape == y.shape == (3, 16)
        assert x.dtype == y.dtype == torch.int64


def test_first_shard_as_build_nanogpt_reads_it(tmp_path):
    """Process k of W starts at token k*B*T of the shard and moves on by W*B*T; the inputs are the
    next B*T tokens in rows of T, the targets those one further. (At its end build-nanogpt drops
    the tail: only whole strides of the shard are compared.)"""
    B, T, W, micro_steps = 3, 8, 4, 2
    tokens = counting_shards(tmp_path, (2000, 500))
    for k in range(W):
        loader = DataLoaderLite(B, T, k, W, tokens, B * W * micro_steps)
        start = k * B * T
        for _ in range(2000 // (B * T * W)):
            piece = torch.arange(start, start + B * T + 1)
            x, y = loader.next_batch()
            assert torch.equal(x, piece[:-1].view(B, T)) and torch.equal(y, piece[1:].view(B, T))
            start += B * T * W


MEMORY = """
import os, resource, sys, time
import psutil
sys.path.insert(0, {root!r})
from plumbing.tokens import open_shards
from train_gpt2 import DataLoaderLite

process = psutil.Process()
mb = lambda: process.memory_info().rss / 1e6
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
def sweep(loader, n):
    return max((loader.next_batch(), mb())[1] for _ in range(n))

DataLoaderLite(8, 1024, 0, 1, open_shards({small!r}, "train"), 8).next_batch()  # all code is loaded
base = mb()
for shuffle in ("none", "windows"):
    tokens = open_shards({one!r}, "train")
    loader = DataLoaderLite(8, 1024, 0, 1, tokens, 512, shuffle)
    top = sweep(loader, 1500)  # far apart, so that a memory map would hold it all
    for i in range(0, 12000, 20):
        loader.reset(i % 190)
        top = max(top, sweep(loader, 1))
    print(shuffle, top - base)
tokens = open_shards({many!r}, "train")
base, base_peak, start = mb(), peak(), time.perf_counter()
loader = DataLoaderLite(8, 1024, 0, 1, tokens, 512, "windows")
loader.next_batch()
print("start", time.perf_counter() - start)
print("ten_billion", max(mb() - base, peak() - base_peak))
loader.reset(loader.n_windows // 512)  # the step across the border of two epochs
print("two_epochs", max(sweep(loader, 64), peak()) - max(base, base_peak))
print("tokens", len(tokens))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs sparse files and getrusage")
def test_memory_does_not_grow_with_the_data(tmp_path):
    """A shard of 100M tokens: under 50 MB more. 10B tokens shuffled: 3 s and 100 MB an epoch."""
    one, many = tmp_path / "one", tmp_path / "many"
    one.mkdir(), many.mkdir()
    shard = one / "edufineweb_train_000001.npy"
    with open(shard, "wb") as f:  # all zeros, and no blocks on the disk
        np.lib.format.write_array_header_1_0(f, {"descr": "<u2", "fortran_order": False,
                                                 "shape": (10**8,)})
        f.truncate(f.tell() + 2 * 10**8)
    for i in range(100):
        (many / f"edufineweb_train_{i:06d}.npy").symlink_to(shard)
    small = write_shards(tmp_path / "small", sizes=(100_000,))
    script = MEMORY.format(root=str(ROOT), one=str(one), many=str(many), small=small)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {k: float(v) for k, v in (line.split() for line in done.stdout.splitlines())}
    print(found)
    assert found["none"] < 50 and found["windows"] < 50
    assert found["tokens"] == 1e10
    assert found["start"] < 3 and found["ten_billion"] < 100
    assert found["two_epochs"] < 200  # a step across the border needs both orders


# -----------------------------------------------------------------------------
# Through the command


class SmallVocabulary:
    """In the place of tiktoken's gpt2, so that the tests need neither it nor a network."""

    def encode_to_numpy(self, text, disallowed_special=()):
        return np.frombuffer(text.encode(), np.uint8).astype(int) + 1000

    def decode_bytes(self, ids):
        return b"".join(b"<|endoftext|>" if i == EOT else bytes([i - 1000]) for i in ids)


@pytest.fixture
def main(monkeypatch, capsys, tmp_path):
    """train_gpt2.main in this process: (status, stdout, stderr); leaves no signal handler."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # no curves: they take a second a run
    monkeypatch.setattr("tiktoken.get_encoding", lambda name: SmallVocabulary())
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)

    def run(*flags):
        handlers = [(s, signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)]
        capsys.readouterr()
        try:
            with pytest.raises(SystemExit) as stop:
                train_gpt2.main([*TINY, *flags])
        finally:
            for s, handler in handlers:
                signal.signal(s, handler)
        return stop.value.code, *capsys.readouterr()

    return run


@pytest.mark.parametrize("offset, saved", [(9, None), (1100, 4)])
def test_token_beyond_the_vocabulary(tmp_path, main, offset, saved):
    """Named with its shard and offset: before anything is written where the first batch has it,
    else at the step that would read it, of 256 tokens; what was saved before is untouched."""
    folder = write_shards(tmp_path / "shards", sizes=(3000, 3000))
    path = tmp_path / "shards" / "edufineweb_train_000001.npy"
    tokens = np.load(path)
    tokens[offset] = 512
    np.save(path, tokens)
    status, out, err = main(f"--data={folder}")
    assert status == 2 and len(err.splitlines()) == 1, err
    assert all(x in err for x in (path.name, "512", str(offset), "--vocab_size")), err
    if saved is None:
        assert not (tmp_path / "log").exists() and "step     0" not in out
    else:
        assert torch.load(tmp_path / "log" / "last.pt", weights_only=True)["step"] == saved
        assert f"step     {offset // 256 - 1}" in out and f"step     {offset // 256} " not in out
    loader = DataLoaderLite(8, 16, 0, 1, open_shards(folder, "train"), vocab_size=512)
    with pytest.raises(UserError, match=f"{path.name}.* 512 .*{offset}"):
        for _ in range(60):
            loader.next_batch()
    status, out, err = main(f"--data={folder}", "--vocab_size=513", "--max_steps=1",
                            "--val_tokens=16")
    assert status == 0, err


@pytest.mark.parametrize("sizes, val", [((10, 6), 1000), ((3000,), 16)])
def test_less_than_one_window(tmp_path, main, sizes, val):
    """T tokens are not enough: the last target is one further."""
    folder = write_shards(tmp_path / "shards", sizes=sizes, val=val)
    status, out, err = main(f"--data={folder}")
    assert status == 2 and len(err.splitlines()) == 1, err
    assert "16 tokens" in err and "--T" in err and "edufineweb_" in err


def book_shards(folder, count, tokenizer):
    """Shards of `count` tokens of the play, cut into documents of a few lines, and the same val."""
    folder.mkdir()
    play = (ROOT / "input.txt").read_text(encoding="utf-8").split("\n\n")
    ids = np.concatenate([np.append(EOT, tokenizer.encode(t)) for t in play[:count]])
    ids = ids[:count].astype(np.uint16)
    for i, part in enumerate((ids[:200], *np.array_split(ids, 3))):
        np.save(folder / f"edufineweb_{'train' if i else 'val'}_{i:06d}.npy", part)
    return folder


@pytest.mark.parametrize("shuffle", ["none", "windows"])
@pytest.mark.parametrize("kind", ["shards", "text"])
def test_inspect_shows_what_the_model_is_fed(tmp_path, main, monkeypatch, shuffle, kind):
    """Row by row, text, shard, offset and document; in the first epoch, across its end, and in the
    second. The batches are recorded where the model takes them."""
    if kind == "shards":
        tokenizer = Tokenizer(SmallVocabulary())
        data, vocab = book_shards(tmp_path / "data", 1300, tokenizer), 50304
        streams = {p.name: np.load(p) for p in data.glob("*train*")}
    else:
        tokenizer, vocab = Tokenizer(), 256

        def no_vocabulary(name):
            raise OSError("no network")

        monkeypatch.setattr("tiktoken.get_encoding", no_vocabulary)
        data = tmp_path / "play.txt"
        data.write_text((ROOT / "input.txt").read_text(encoding="utf-8")[:2900], encoding="utf-8")
        ids = tokenizer.encode(data.read_text(encoding="utf-8"))
        streams = {data.name: ids[: int(0.9 * len(ids))]}
    n = (sum(map(len, streams.values())) - 1) // 16
    steps = 2 * n // 16
    flags = [f"--data={data}", f"--shuffle={shuffle}", "--max_steps", str(steps),
             "--eval_every=1000", "--save_every=0", "--checkpoint_every=0", "--n_layer=1",
             "--n_embd=8", f"--vocab_size={vocab}", "--warmup_steps=1", "--val_tokens=16"]
    fed, forward = [], train_gpt2.GPT.forward

    def record(self, idx, targets=None):
        if torch.is_grad_enabled():
            fed.append(idx.clone())
        return forward(self, idx, targets)

    monkeypatch.setattr(train_gpt2.GPT, "forward", record)
    status, out, err = main(*flags)
    assert status == 0, err
    assert sum(len(x) for x in fed) >= 16 * steps
    fed = torch.cat(fed).view(-1, 16, 16)
    before = set(tmp_path.iterdir())
    for step in (0, 3, n // 16, steps - 1):
        # --B and the number of processes make no difference to a step
        status, out, err = main(*flags, f"--inspect={step}", f"--B={4 if step else 1}")
        assert status == 0, err
        head = "step _ row _: epoch _ window _ (\\S+) offset _ document _\n".replace("_", r"(\d+)")
        _, *parts = re.split("^" + head, out, flags=re.MULTILINE)
        assert len(parts) == 16 * 8
        epochs = set()
        for row in range(16):
            s, r, epoch, window, name, offset, document, text = parts[8 * row : 8 * row + 8]
            ids = fed[step, row].numpy()
            assert (int(s), int(r)) == (step, row)
            assert text == tokenizer.decode(ids) + "\n"
            offset = int(offset)
            here = streams[name][offset : offset + 16]  # the window may straddle shards
            assert np.array_equal(here, ids[: len(here)]) and len(here) > 0
            assert int(document) == (streams[name][: offset + 1] == EOT).sum()
            assert int(epoch) == (step * 16 + row) // n
            if shuffle == "none":
                assert int(window) == (step * 16 + row) % n
            epochs.add(int(epoch))
        assert epochs == ({0, 1} if step == n // 16 and n % 16 else {step * 16 // n})
    assert set(tmp_path.iterdir()) == before
