"""
How much faster is HellaSwag packed than one example at a time? Run by hand, nothing downloaded:

    python tests/bench/hella.py FILE.jsonl                  # float32 on the CPU; target 2.2 times
    python tests/bench/hella.py FILE.jsonl --device cuda    # target 20 times

Both ways score the same examples, tokenized beforehand, with the same random GPT-2 (124M). The
examples are taken a block at a time, each block by both ways in turn, so that both meet the same
state of the machine; printed is the ratio of the medians of the blocks' times, and whether every
prediction agrees (two losses of a random model may lie closer than rounding).
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import hellaswag  # noqa: E402
from plumbing.tokens import get_tokenizer  # noqa: E402
from train_gpt2 import GPT, GPTConfig  # noqa: E402


@torch.no_grad()
def one_at_a_time(model, rendered, device):
    """Predictions by mean loss: four right-padded rows of one example per forward pass."""
    predictions = []
    for _, tokens, mask, _ in rendered:
        tokens, mask = tokens.to(device), mask.to(device)
        logits, _ = model(tokens)
        targets, mask = tokens[:, 1:], mask[:, 1:]
        flat = logits[:, :-1].reshape(-1, logits.size(-1))
        losses = F.cross_entropy(flat, targets.reshape(-1), reduction="none").view(4, -1)
        means = (losses * mask).sum(dim=1) / mask.sum(dim=1)
        predictions.append(means.argmin().item())
    return predictions


def packed(model, examples, device):
    """Predictions by mean loss of the scorer in hellaswag.py, in the order of `examples`."""
    place = {id(e): i for i, e in enumerate(examples)}
    predictions = [0] * len(examples)
    size = hellaswag.BATCH_TOKENS["cpu" if device == "cpu" else "cuda"]
    for share in hellaswag.shares(examples, 0, 1, size):
        _, means = hellaswag.score_batch(model, share, device)
        for example, choice in zip(share, means.argmin(dim=1).tolist(), strict=True):
            predictions[place[id(example)]] = choice
    return predictions


def timed(function, *args):
    """(seconds, result); results are on the CPU, so the device has finished."""
    start = time.perf_counter()
    result = function(*args)
    return time.perf_counter() - start, result


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("file", help="examples in HellaSwag's format")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--n", type=int, default=240, help="examples")
    parser.add_argument("--blocks", type=int, default=3, help="blocks they are timed in")
    args = parser.parse_args()

    torch.manual_seed(1337)
    model = GPT(GPTConfig(vocab_size=50304)).to(args.device).eval()
    encode = get_tokenizer("gpt2").encode
    examples = hellaswag.load_examples(args.file, args.n, model.config.block_size, encode)
    rendered = [
        hellaswag.render_example(e, encode)
        for e, _ in zip(hellaswag.iterate_examples("val", args.file), examples, strict=False)
    ]
    one_at_a_time(model, rendered[:3], args.device)  # warm up
    packed(model, examples[:20], args.device)
    size = -(-len(examples) // args.blocks)
    times, agree = ([], []), 0
    for start in range(0, len(examples), size):
        part = slice(start, start + size)
        slow, want = timed(one_at_a_time, model, rendered[part], args.device)
        fast, got = timed(packed, model, examples[part], args.device)
        times[0].append(slow / len(want))
        times[1].append(fast / len(want))
        agree += sum(a == b for a, b in zip(want, got, strict=True))
        print(f"examples {start:5d}: {1e3 * slow / len(want):7.1f} ms each one at a time, "
              f"{1e3 * fast / len(want):7.1f} packed: {slow / fast:.2f}x", flush=True)  # fmt: skip
    ratio = statistics.median(times[0]) / statistics.median(times[1])
    print(f"{len(examples)} examples on {args.device}: ratio of medians {ratio:.2f}, "
          f"{agree} predictions agree")  # fmt: skip


if __name__ == "__main__":
    main()
