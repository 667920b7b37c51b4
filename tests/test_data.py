"""The batch of a step is a pure function of step, seed and data; compared with its definition."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, write_shards

import train_gpt2
from train_gpt2 import DataLoaderLite, Shard, TokenStream, UserError, get_tokenizer


def counting_stream(*sizes):
    """A stream of shards whose token at position i is i."""
    parts = np.split(np.arange(sum(sizes), dtype=np.uint16), np.cumsum(sizes)[:-1])
    return TokenStream([Shard(f"train_{i}", len(part), array=part) for i, part in enumerate(parts)])


@pytest.mark.parametrize("sizes, T, B, W, R", [
    ((98,), 7, 1, 1, 3),  # position 98 would be the last target of a 14th window: there are 13
    ((97, 3, 1, 58), 5, 2, 3, 12),  # shards shorter than a window
    ((41, 40), 16, 3, 2, 12),  # five windows, fewer than a step reads
    ((65, 64, 65342), 13, 4, 8, 64),  # token ids up to 65,470
    ((17,), 16, 2, 1, 4),  # a single window
])  # fmt: skip
def test_sequential_order_equals_its_definition(sizes, T, B, W, R):
    """Sequence i of step s is window (sR + i) mod n, read by micro-step m, rank k at batch index b.

    For more than three epochs; windows may straddle shards, steps may straddle epochs.
    """
    tokens, n = counting_stream(*sizes), (sum(sizes) - 1) // T
    loaders = [DataLoaderLite(B, T, k, W, tokens, R) for k in range(W)]
    for s in range(3 * n // R + 2):
        for m in range(R // (B * W)):
            for k in range(W):
                x, y = loaders[k].next_batch()
                assert x.shape == y.shape == (B, T) and x.dtype == y.dtype == torch.int64
                for b in range(B):
                    start = (s * R + (m * W + k) * B + b) % n * T
                    assert x[b].tolist() == list(range(start, start + T))
                    assert y[b].tolist() == list(range(start + 1, start + T + 1))


@pytest.mark.parametrize("shuffle", ["none", "windows"])
def test_any_world_size_and_micro_batch_reads_the_same_sequences(shuffle):
    """For three epochs, each window once per epoch; a loader can be reset to any step at any time."""
    T, R, n = 5, 48, 109
    tokens = counting_stream(200, 129, n * T + 2 - 329)
    loader = DataLoaderLite(R, T, 0, 1, tokens, R, shuffle, 7)
    one = torch.stack([loader.next_batch()[0] for _ in range(3 * n // R + 1)])
    windows = (one[:, :, 0] // T).flatten().tolist()
    for epoch in range(3):
        assert sorted(windows[epoch * n:(epoch + 1) * n]) == list(range(n))
    for W, B in [(k, b) for k in (1, 2, 3, 4, 8) for b in (1, 2, R // k)]:
        loaders = [DataLoaderLite(B, T, k, W, tokens, R, shuffle, 7) for k in range(W)]
        for step in (4, 0, 2, 5, 3, 1):
            for loader in loaders:
                loader.reset(step)
            inputs = [loader.next_batch()[0] for _ in range(R // (B * W)) for loader in loaders]
            assert torch.equal(torch.cat(inputs), one[step]), (W, B, step)
            loaders[0].next_batch()  # the next reset comes in mid-step


def epoch_orders(n, seed, epochs):
    loader = DataLoaderLite(n, 4, 0, 1, counting_stream(n * 4 + 1), n, "windows", seed)
    return [(loader.next_batch()[0][:, 0] // 4).tolist() for _ in range(epochs)]


def test_shuffled_order_is_pinned():
    """A run that is resumed with a later version must read the same data."""
    assert epoch_orders(12, 1337, 2) == [[0, 7, 1, 10, 11, 5, 3, 9, 2, 6, 8, 4],
                                         [11, 5, 10, 8, 7, 3, 9, 6, 2, 0, 4, 1]]
    assert epoch_orders(12, 2**40 + 5, 1) == [[0, 10, 8, 9, 11, 5, 4, 7, 2, 1, 6, 3]]


def test_token_outside_the_vocabulary_names_shard_and_offset():
    tokens = counting_stream(300, 200, 100)
    loader = DataLoaderLite(2, 16, 0, 1, tokens, 2, vocab_size=504)
    for _ in range(15):  # positions up to 496
        loader.next_batch()
    with pytest.raises(UserError, match="train_2 has token 512 at offset 12.*--vocab_size 504"):
        loader.next_batch()  # the largest of its tokens
    DataLoaderLite(2, 16, 0, 1, tokens, 2, vocab_size=600).read(np.arange(37))


def test_a_window_needs_one_token_more_than_its_inputs():
    assert DataLoaderLite(1, 16, 0, 1, counting_stream(10, 7)).n_windows == 1
    with pytest.raises(UserError, match="train_0, train_1: .*16 tokens .*--T"):
        DataLoaderLite(1, 16, 0, 1, counting_stream(10, 6))


@pytest.mark.parametrize("shuffle", ["none", "windows"])
def test_inspect_shows_the_input_of_the_model(tmp_path, monkeypatch, capsys, shuffle):
    """Text, shard and offset of each sequence, compared with the batches of a training run.

    In the first epoch, at its end, and in the second.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_gpt2.RunLog, "draw_curves", lambda self, timeout=0.0: None)  # takes seconds
    tokenizer = get_tokenizer("bytes")
    monkeypatch.setattr(train_gpt2, "get_tokenizer", lambda name="gpt2": tokenizer)
    data = Path(write_shards(tmp_path / "data", sizes=(433, 434, 433), high=94))  # ASCII
    streams = {path.name: np.load(path) for path in data.glob("*train*")}
    n = (sum(map(len, streams.values())) - 1) // 16
    steps = 2 * n // 16
    flags = [*TINY, f"--data={data}", f"--shuffle={shuffle}", f"--max_steps={steps}", "--eval_every=0",
             "--save_every=0", "--checkpoint_every=0", "--n_layer=1", "--n_embd=8", "--warmup_steps=1",
             "--vocab_size=256"]
    batches, forward = [], train_gpt2.GPT.forward

    def record(self, idx, targets=None):
        batches.append(idx.clone())
        return forward(self, idx, targets)

    monkeypatch.setattr(train_gpt2.GPT, "forward", record)
    assert train_gpt2.main(flags) == 0
    batches = torch.cat(batches).view(steps, 16, 16)
    before = set(tmp_path.iterdir())
    for step in (0, 3, n // 16, steps - 1):
        capsys.readouterr()
        # --B must make no difference
        assert train_gpt2.main([*flags, f"--inspect={step}", f"--B={4 if step else 1}"]) == 0
        head = "step _ sequence _: epoch _ window _ (\\S+) offset _\n".replace("_", r"(\d+)")
        _, *parts = re.split("^" + head, capsys.readouterr().out, flags=re.MULTILINE)
        assert len(parts) == 16 * 7
        for i in range(16):
            *numbers, name, offset, text = parts[7 * i:7 * i + 7]
            ids = batches[step, i].numpy()
            epoch, window = divmod(step * 16 + i, n)
            assert list(map(int, numbers[:3])) == [step, i, epoch]
            assert int(numbers[3]) == window or shuffle == "windows"
            assert text == tokenizer.decode(list(ids)) + "\n"
            start = streams[name][int(offset):int(offset) + 16]  # a window may straddle shards
            assert 0 < len(start) and np.array_equal(start, ids[:len(start)])
    assert set(tmp_path.iterdir()) == before
