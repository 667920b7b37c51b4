"""
HellaSwag: choose the most plausible of four endings (Zellers et al. 2019, arXiv:1905.07830).

    python hellaswag.py -m gpt2 -d cuda             # or gpt2-medium, gpt2-large, gpt2-xl
    python hellaswag.py -m log/last.pt --limit 500  # a checkpoint of train_gpt2.py or modern.py
    torchrun --standalone --nproc_per_node=8 hellaswag.py -m gpt2-xl

The model chooses the ending with the lowest loss after the context. `acc` compares the sum of the
token losses, which favors short endings; `acc_norm`, the number usually reported, their mean.
OpenAI's gpt2 gets acc 0.2859 and acc_norm 0.2955 on all 10,042 examples, gpt2-xl 0.3842 and 0.4893.
"""

import argparse
import contextlib
import hashlib
import importlib
import itertools
import json
import os
import sys
from collections import namedtuple
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads sleep; set before torch loads

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

HERE = os.path.dirname(os.path.abspath(__file__))
DATA_URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_{}.jsonl"
KNOWN_FILES = {  # split: (bytes, sha256)
    "val": (12_246_618, "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588")
}
REQUEST_TIMEOUT_S = 10.0


def data_file(split="val"):
    """Return the path of the file of a split ('train', 'val', 'test'), which may not exist yet."""
    return os.environ.get("HELLASWAG_FILE") or f"{HERE}/hellaswag/hellaswag_{split}.jsonl"


def download(split="val", path=None, url=None):
    """Return the path of a split's file, downloading a missing or damaged one first.

    Call this in one process per machine. A file that HELLASWAG_FILE names is used unchecked.
    """
    path = path or data_file(split)
    url = url or os.environ.get("HELLASWAG_URL") or DATA_URL.format(split)
    if path == os.environ.get("HELLASWAG_FILE"):
        return path
    try:
        if os.path.exists(path) and is_expected(Path(path).read_bytes(), split):
            return path
        import requests
        response = requests.get(url, timeout=REQUEST_TIMEOUT_S)
        response.raise_for_status()
        if not is_expected(response.content, split):
            raise OSError(f"unexpected content, {len(response.content):,} bytes")
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        tmp = f"{path}.{os.urandom(4).hex()}.tmp"  # nodes may download to one disk at the same time
        Path(tmp).write_bytes(response.content)
        os.replace(tmp, path)
    except OSError as e:  # includes the errors of requests
        raise OSError(f"could not download HellaSwag from {url} to {path} ({type(e).__name__}: {e})"
                      "; download the file elsewhere and copy it there") from e
    return path


def is_expected(content, split):
    """Return whether `content` is not empty and has the size and sha256 in KNOWN_FILES, if listed."""
    found = len(content), hashlib.sha256(content).hexdigest()
    return bool(content) and found == KNOWN_FILES.get(split, found)


def iterate_examples(split, path=None):
    """Yield the examples of a split as dicts. Raises OSError, or ValueError naming the line."""
    path = path or download(split)
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                example = json.loads(line)
                texts = [example["ctx"], *example["endings"]]
                label = 0 if split == "test" else example["label"]  # the test split has no labels
                valid = texts[0] and [type(t) for t in texts] == [str] * 5 and label in range(4)
            except (ValueError, KeyError, TypeError):
                valid = False
            if not valid:
                raise ValueError(f"{path}, line {number}: not a HellaSwag example; replace the file")
            yield example


def encode_texts(example, encode):
    """Return token ids of context and endings. GPT-2's tokens include the space before a word."""
    return list(encode(example["ctx"])), [list(encode(" " + e)) for e in example["endings"]]


def render_example(example, encode=None):
    """Return data, tokens (4, N), mask (4, N) and label as in the lecture. encode: text -> ids."""
    if encode is None:
        import tiktoken
        encode = tiktoken.get_encoding("gpt2").encode_ordinary
    context, endings = encode_texts(example, encode)
    tokens = pad_sequence([torch.tensor(context + e).long() for e in endings], batch_first=True)
    mask = pad_sequence([torch.tensor([0] * len(context) + [1] * len(e)) for e in endings],
                        batch_first=True)
    data = {"label": example.get("label"), "ctx_tokens": context, "ending_tokens": endings}
    return data, tokens, mask, data["label"]


# A packed example. tokens, segment, position: (T,). target: (T, 4), -1 = none. T may exceed the
# model's block size, the positions do not. cropped: truncated to fit it.
Example = namedtuple("Example", "tokens segment position target label cropped")


def pack(context, endings, label, cropped=False):
    """Pack an example into one sequence, so that the context is computed once for four endings.

    The last token of an ending is only a target, so it is left out. Context A B with endings C D,
    E, F G H and I J (T = 6):

        tokens    A  B  C  F  G  I       The last context token predicts the first token of each
        segment   0  0  1  3  3  4       ending, and C predicts the next token of its own ending.
        position  0  1  2  2  3  2       F attends to A, B and itself, but not to C, which belongs
        target    .  C  D  .  .  .       to another ending at the same position 2.
                  .  E  .  .  .  .
                  .  F  .  G  H  .
                  .  I  .  .  .  J
    """
    assert context and all(endings), "the first prediction needs a token before it"
    n, endings = len(context), [tuple(e) for e in endings]
    # Equal endings share a segment, so their losses are bit-equal: an exact tie.
    distinct = list(dict.fromkeys(endings))
    lengths = [n] + [len(e) - 1 for e in distinct]
    segment = np.repeat(np.arange(len(lengths), dtype=np.int8), lengths)
    position = np.concatenate([np.arange(n)] + [np.arange(n, n + m) for m in lengths[1:]])
    target = np.full((len(segment), 4), -1, dtype=np.int32)
    for k, ending in enumerate(endings):
        target[n - 1, k] = ending[0]
        target[segment == 1 + distinct.index(ending), k] = ending[1:]
    tokens = np.array([*context, *(i for e in distinct for i in e[:-1])], dtype=np.int32)
    return Example(tokens, segment, position, target, label, cropped)


def load_examples(path, n, block_size, encode):
    """Load, encode and pack the first n examples (None = all), truncated to block_size tokens."""
    examples = []
    for example in itertools.islice(iterate_examples("val", path), n):
        context, endings = encode_texts(example, encode)
        # Truncate on the left: first the context, down to one token, then the endings.
        short_endings = [e[1 - block_size :] for e in endings]
        short_context = context[max(map(len, short_endings)) - block_size :]
        cropped = (short_context, short_endings) != (context, endings)
        examples.append(pack(short_context, short_endings, example["label"], cropped))
    if not examples:
        raise ValueError(f"{path} contains no examples; use another file")
    return examples


BATCH_TOKENS = {"cpu": 1024, "cuda": 32768}  # per forward pass, padding included; mps uses cuda's
# Counts on one rank. correct: by the sum of token losses (acc), correct_norm: by the mean.
Result = namedtuple("Result", "correct correct_norm total cropped")


# Not inference_mode: tensors that a model caches during evaluation must remain usable in training.
@torch.no_grad()
def score_batch(model, examples, device):
    """Return sum and mean of each ending's token losses in nats: two (B, 4) float64 CPU tensors."""
    # Pad on the right to (B, T), target to (B, T, 4). Padding is a segment of its own.
    padding = {"tokens": 0, "segment": 5, "position": 0, "target": -1}
    fields = {name: [torch.from_numpy(getattr(e, name)) for e in examples] for name in padding}
    tokens, segment, position, target = (
        pad_sequence(fields[name], batch_first=True, padding_value=value).long().to(device)
        for name, value in padding.items())

    # A token attends to the context and to its own ending, never to another ending or to a later
    # token (tril). Every ending sees the same tokens as in a sequence of its own, so its loss is
    # the same, but the context is computed only once.
    key, query = segment[:, None, None, :], segment[:, None, :, None]
    mask = ((key == 0) | (key == query)).tril()  # (B, 1, T, T), True = may attend
    hidden_states = model.hidden_states(tokens, position, mask)  # (B, T, C)

    # Compute logits only at the P of B * T positions that have a target.
    counts = (target >= 0).sum(dim=1).cpu()  # (B, 4)
    sequence, t = (target >= 0).any(dim=-1).nonzero(as_tuple=True)
    hidden_states, target = hidden_states[sequence, t], target[sequence, t]  # (P, C), (P, 4)
    size = 128 if hidden_states.device.type == "cpu" else 1024  # logits take 200 KB per position
    losses = []
    for h, ids in zip(hidden_states.split(size), target.split(size), strict=True):
        log_p = F.log_softmax(model.logits(h).float(), dim=-1)
        losses.append(-log_p.gather(1, ids.clamp(min=0)))
    # Sum in float64: endings of different lengths with equal token losses then tie exactly.
    loss = torch.cat(losses).cpu().double().masked_fill(target.cpu() < 0, 0.0)
    sums = torch.zeros(len(tokens), 4, dtype=torch.float64).index_add_(0, sequence.cpu(), loss)
    return sums, sums / counts


def rank_batches(examples, rank, world_size, batch_tokens):
    """Yield this rank's batches (lists of examples): equally many on all ranks, some may be empty."""
    # Sort by length for little padding, longest first so that an out-of-memory error comes at once.
    examples = sorted(examples, key=lambda e: -len(e.tokens))
    start = 0
    while start < len(examples):
        stop = start + world_size * max(1, batch_tokens // len(examples[start].tokens))
        yield examples[start:stop][rank::world_size]
        start = stop


def evaluate(model, examples, device, rank=0, world_size=1, on_batch_end=None, progress=False):
    """Score this rank's part of `examples`, the same list on all ranks. Returns a Result.

    on_batch_end() is called equally often on all ranks, so it may be a collective.
    """
    counts = np.zeros(4, dtype=np.int64)
    size = BATCH_TOKENS.get(torch.device(device).type, BATCH_TOKENS["cuda"])
    batches = list(rank_batches(examples, rank, world_size, size))
    was_training = model.training
    model.eval()
    try:
        for batch in tqdm(batches, disable=None if progress else True):
            if batch:
                losses = score_batch(model, batch, device)
                label = torch.tensor([e.label for e in batch])
                correct = [int((x.argmin(dim=1) == label).sum()) for x in losses]
                counts += [*correct, len(batch), sum(e.cropped for e in batch)]
            if on_batch_end is not None:
                on_batch_end()
    finally:
        model.train(was_training)
    return Result(*counts.tolist())


def show_examples(model, examples, device, decode, n=4):
    """Print the first n examples with the mean loss of each ending. decode: ids -> text."""
    print("mean loss per token of each ending, in nats (= correct, > chosen)")
    for number, example in enumerate(examples[:n], 1):
        means = score_batch(model, [example], device)[1][0]
        print(f"example {number}: {decode(example.tokens[example.segment == 0].tolist())}")
        for k, (loss, ids) in enumerate(zip(means, example.target.T, strict=True)):
            marks = ("=" if k == example.label else " ") + (">" if k == means.argmin() else " ")
            print(f"  {marks} {loss:7.4f} {decode(ids[ids >= 0].tolist())}")


def score_lines(correct, correct_norm, total):
    """Return two lines such as 'acc: 2871/10042=0.2859 +- 0.0045', with the standard error."""
    return [f"{name}: {n}/{total}={n / total:.4f} +- {(n * (total - n) / total**3) ** 0.5:.4f}"
            for name, n in (("acc", correct), ("acc_norm", correct_norm))]


def main(argv=None):
    """Evaluate a model on HellaSwag with the script that trained it. Returns the exit status."""
    import train_gpt2
    def fail(message):
        raise train_gpt2.UserError(message)

    parser = argparse.ArgumentParser(description="Score a model on HellaSwag.", allow_abbrev=False)
    parser.error = fail
    add = parser.add_argument
    add("-m", "--model_type", default="gpt2", help="gpt2[-medium|-large|-xl] or a checkpoint (default: gpt2)")
    add("-d", "--device", default="auto", help="cuda, cuda:i, mps or cpu (default: auto)")
    add("--limit", type=int, default=10042, metavar="N", help="first N examples (default: all)")
    add("--data_file", metavar="FILE", help=".jsonl file (default: downloaded once, 12 MB)")
    args = parser.parse_args(argv)
    if args.limit < 1:
        fail(f"--limit {args.limit}: must be at least 1")
    checkpoint = {}
    with contextlib.suppress(Exception):  # train_gpt2.main reports what is wrong with the file
        checkpoint = torch.load(args.model_type, map_location="meta", mmap=True, weights_only=True)
    if checkpoint.get("tokenizer") == "bytes":
        fail(f"{args.model_type} was trained on byte tokens; HellaSwag needs GPT-2's tokens")
    arch = checkpoint.get("arch") or "gpt2"
    module = "train_gpt2" if arch == "gpt2" else str(arch)
    if not module.isidentifier() or not os.path.isfile(os.path.join(HERE, f"{module}.py")):
        fail(f"{args.model_type} needs {module}.py, which is not in {HERE}; copy it there")
    if args.data_file:
        os.environ["HELLASWAG_FILE"] = args.data_file  # the trainer calls data_file()
    flags = "--preset gpt2 --eval_only --val_tokens 0 --num_samples 0 --dtype float32".split()
    return importlib.import_module(module).main([
        "--init", args.model_type, "--device", args.device, "--hellaswag", str(args.limit), *flags])


if __name__ == "__main__":
    if not os.path.isfile(os.path.join(HERE, "train_gpt2.py")):
        print(f"hellaswag.py: error: train_gpt2.py is not in {HERE}; copy it there", file=sys.stderr)
        sys.exit(2)
    import train_gpt2
    train_gpt2.run_script("hellaswag.py", main)
