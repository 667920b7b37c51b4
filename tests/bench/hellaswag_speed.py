"""
HellaSwag scored as packed sequences against one example at a time, 124M, float32.

    python tests/bench/hellaswag_speed.py                            # synthetic examples, 3 minutes
    python tests/bench/hellaswag_speed.py --file hellaswag_val.jsonl --device cuda

Both ways score the same examples, tokenized beforehand, with the same randomly initialized GPT-2.
Each of four blocks is scored by both ways in turn. Prints the ratio of the median times of a block,
and for how many examples both ways predict the same ending.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import tiktoken
import torch
from runs import ROOT, make_parser, write_hellaswag
from torch.nn import functional as F

sys.path.insert(0, str(ROOT))

import hellaswag  # noqa: E402
from train_gpt2 import GPT, GPTConfig  # noqa: E402


def predict_one_at_a_time(model, rendered, device):
    """Endings with the lowest mean loss, by forward passes of four padded sequences each."""
    predictions = []
    for _, tokens, mask, _ in rendered:
        tokens, mask = tokens.to(device), mask.to(device)[:, 1:]
        logits = model(tokens)[0][:, :-1]
        losses = F.cross_entropy(logits.reshape(-1, logits.size(-1)), tokens[:, 1:].reshape(-1),
                                 reduction="none").view(4, -1)
        predictions.append(((losses * mask).sum(dim=1) / mask.sum(dim=1)).argmin().item())
    return predictions


def predict_packed(model, examples, device):
    """The same by hellaswag.py, in the order of `examples`."""
    predictions = {}
    for batch in hellaswag.rank_batches(examples, 0, 1, hellaswag.BATCH_TOKENS[device]):
        choices = hellaswag.score_batch(model, batch, device)[1].argmin(dim=1).tolist()
        predictions |= {id(e): choice for e, choice in zip(batch, choices, strict=True)}
    return [predictions[id(e)] for e in examples]


@torch.no_grad()
def main():
    parser = make_parser(__doc__)
    parser.add_argument("--file", help="examples in HellaSwag's format (default: synthetic)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--n", type=int, default=240, help="examples (240)")
    parser.add_argument("--n_layer", type=int, default=12, help="layers of the model (12)")
    args = parser.parse_args()
    torch.manual_seed(1337)
    model = GPT(GPTConfig(vocab_size=50304, n_layer=args.n_layer)).to(args.device).eval()
    encode = tiktoken.get_encoding("gpt2").encode_ordinary
    with tempfile.TemporaryDirectory() as work_dir:
        path = args.file or write_hellaswag(Path(work_dir) / "examples.jsonl", args.n)
        examples = hellaswag.load_examples(path, args.n, model.config.block_size, encode)
        rendered = [hellaswag.render_example(example, encode) for example, _
                    in zip(hellaswag.iterate_examples("val", path), examples, strict=False)]
    ways = (predict_one_at_a_time, rendered, slow_s := []), (predict_packed, examples, fast_s := [])
    equal, size = 0, -(-len(examples) // 4)
    for predict, inputs, _ in ways:  # warm up
        predict(model, inputs[:3], args.device)
    for first in range(0, len(examples), size):
        results = []
        for predict, inputs, times in ways:
            start = time.perf_counter()
            # predictions are Python numbers: the device has finished
            results.append(predict(model, inputs[first:first + size], args.device))
            times.append((time.perf_counter() - start) / len(results[-1]))
        equal += sum(a == b for a, b in zip(*results, strict=True))
    slow, fast = statistics.median(slow_s), statistics.median(fast_s)
    print(f"{len(examples)} examples on {args.device}: {1e3 * slow:.1f} ms each one at a time, "
          f"{1e3 * fast:.1f} ms packed, ratio {slow / fast:.2f}, {equal} equal predictions")


if __name__ == "__main__":
    main()
