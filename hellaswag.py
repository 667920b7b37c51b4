"""
HellaSwag: which of four endings goes on from a context? Zellers et al. 2019, arXiv 1905.07830.

    python hellaswag.py -m gpt2 -d cuda             # or gpt2-medium, gpt2-large, gpt2-xl
    python hellaswag.py -m log/last.pt --limit 500  # a checkpoint of train_gpt2.py or modern.py
    torchrun --standalone --nproc_per_node=8 hellaswag.py -m gpt2-xl

The data is a .jsonl file, one example a line, of which these keys are read:

    {"ctx": "A man is sitting on a roof. he", "label": 3, "endings": ["is using wrap ...", ...]}

The model picks the ending whose tokens it finds likeliest after the context: `acc` goes by the sum
of their losses, which favours short endings, and `acc_norm`, the usual number, by the mean. Of the
10,042 examples OpenAI's weights get 0.2859 and 0.2955 (gpt2), 0.3842 and 0.4893 (gpt2-xl) right.
"""

import contextlib
import hashlib
import itertools
import json
import os
import subprocess
import sys
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from plumbing.checkpoint import peek
from plumbing.errors import UserError, one_line, rank, run_main
from plumbing.files import HERE, atomic_write
from plumbing.flags import Parser, not_empty
from plumbing.tokens import get_tokenizer

# -----------------------------------------------------------------------------
# The file

DATA_URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_{}.jsonl"
KNOWN_FILES = {  # split: (bytes, sha256)
    "val": (12_246_618, "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588")
}
ANSWER_S = 10.0  # longest silence of the server, seconds


def data_file(split="val"):
    """Where the file of a split ('train', 'val' or 'test') is, or will be once it is fetched."""
    own = os.environ.get("HELLASWAG_FILE")  # the user's, to be used as it is
    return own or os.path.join(HERE, "hellaswag", f"hellaswag_{split}.jsonl")


def download(split="val", path=None, url=None):
    """The path of a split's file, fetched first where it is missing or broken: from `url`, else
    HELLASWAG_URL in the environment, else the authors' repository. Raises UserError. It is for one
    process of a machine, while the others wait."""
    if path is None and os.environ.get("HELLASWAG_FILE"):
        return data_file(split)
    path = path or data_file(split)
    url = url or os.environ.get("HELLASWAG_URL") or DATA_URL.format(split)
    try:
        if os.path.exists(path):
            with open(path, "rb") as f:
                if is_right(f.read(), split):
                    return path
        import requests
        answer = requests.get(url, timeout=ANSWER_S)
        answer.raise_for_status()
        if not is_right(answer.content, split):
            raise OSError(f"it sent another file, {len(answer.content):,} bytes")
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        # Nodes that share a disk may fetch at once, so each writes under a name of its own.
        fetched = f"{path}.{os.urandom(4).hex()}"
        with atomic_write(fetched) as f:
            f.write(answer.content)
        os.replace(fetched, path)
        return path
    except OSError as e:  # what requests raises is an OSError too
        raise UserError(f"HellaSwag's file {path} is missing or damaged and could not be fetched "
                        f"from {url} ({one_line(e)}); fetch it elsewhere and put it there") from e


def is_right(content, split):
    """Whether these bytes are the file of a split, as far as it is known."""
    found = len(content), hashlib.sha256(content).hexdigest()
    return bool(content) and found == KNOWN_FILES.get(split, found)


def iterate_examples(split, path=None):
    """The examples of a split as dicts, in the file's order. Raises UserError naming the line."""
    path = path or download(split)
    try:
        with open(path, "rb") as f:
            for number, line in enumerate(f, 1):
                if line.strip():
                    yield parse_line(line, f"{path}, line {number}", split)
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror or e}") from e


def parse_line(line, place, split):
    """One line of the file (bytes) as a checked dict; the test split has no labels."""
    try:
        example = json.loads(line)
        texts = [example["ctx"], *example["endings"]]
        label = 0 if split == "test" else example["label"]
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{place} is damaged or no HellaSwag example; replace the file") from e
    if not texts[0] or [type(t) for t in texts] != [str] * 5 or label not in range(4):
        raise UserError(f"{place} must have a context, four endings and a label from 0 to 3")
    return example


# -----------------------------------------------------------------------------
# From text to tokens, and the four endings into one row


class Example(NamedTuple):
    """One example as `pack` lays it out, in a row of T tokens."""

    tokens: np.ndarray  # (T,) ids
    segment: np.ndarray  # (T,) 0 in the context, 1..4 in an ending
    position: np.ndarray  # (T,) what the model is told: each ending starts behind the context
    target: np.ndarray  # (T, 4) the id that ending k has next, -1 where it has none here
    label: int
    cropped: bool  # something was cut off to fit the model's block size


def encode_texts(example, encode):
    """(context ids, four lists of ending ids)."""
    # GPT-2's tokens hold the space before a word, and an ending goes on in mid-sentence: without
    # the space its first word would be another token, one that begins a text.
    endings = [encode(" " + ending) for ending in example["endings"]]
    return [int(i) for i in encode(example["ctx"])], [[int(i) for i in e] for e in endings]


def render_example(example, encode=None):
    """An example as four rows, context and ending, padded with id 0 on the right, N long: (data,
    tokens (4, N) int64, mask (4, N) int64 with 1 on ending tokens, label). data is a dict of label,
    ctx_tokens and ending_tokens. `encode`, text to ids, defaults to GPT-2's."""
    context, endings = encode_texts(example, encode or get_tokenizer("gpt2").encode)
    tokens = pad_sequence([torch.tensor(context + e) for e in endings], True)
    mask = pad_sequence([torch.tensor([0] * len(context) + [1] * len(e)) for e in endings], True)
    data = {"label": example.get("label"), "ctx_tokens": context, "ending_tokens": endings}
    return data, tokens, mask, data["label"]


def pack(context, endings, label, cropped=False):
    """Lay an example out in one row, so that the four endings share the work on their context. The
    last token of an ending is predicted and predicts nothing, so it has no place. Context A B with
    endings C D, E, F G H and I J (T = 6):

        tokens    A  B  C  F  G  I       The last context token predicts how each ending starts;
        segment   0  0  1  3  3  4       C, what follows it in its own ending. F may attend to
        position  0  1  2  2  3  2       A, B and itself, and not to C, which another ending says
        target    .  C  D  .  .  .       at the same position 2.
                  .  E  .  .  .  .
                  .  F  .  G  H  .
                  .  I  .  .  .  J
    """
    assert context and all(endings), "the model must have read a token before it predicts one"
    n, endings = len(context), [tuple(e) for e in endings]
    # Endings with equal tokens share a segment: their losses are equal to the last bit, and a tie.
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


def prepare(example, block_size, encode):
    """An Example from a dict of iterate_examples, cut on the left to fit block_size tokens."""
    context, endings = encode_texts(example, encode)
    # What stands next to the choice matters most, so the end of the context stays, the same for all
    # four endings. Only where one token of it is all that is left, an ending is cut too.
    cut = [e[-(block_size - 1) :] for e in endings]
    cut_context = context[-(block_size - max(len(e) for e in cut)) :]
    return pack(cut_context, cut, example["label"], (cut_context, cut) != (context, endings))


def load_examples(path, n, block_size, encode):
    """The first n examples of a file (all of them where n is None) as a list of Example."""
    examples = itertools.islice(iterate_examples("val", path), n)
    examples = [prepare(e, block_size, encode) for e in examples]
    if not examples:
        raise UserError(f"{path} holds no examples; name another file")
    return examples


# -----------------------------------------------------------------------------
# Scoring

BATCH_TOKENS = {"cpu": 1024, "cuda": 32768}  # padded, in a forward pass; mps goes with cuda
HEAD_ROWS = {"cpu": 128, "cuda": 1024}  # rows of logits alive at once: 200 KB each in float32


class Result(NamedTuple):
    """Exact counts over the examples of one rank; add them up over the ranks for the scores."""

    correct: int  # by the smallest sum of losses: acc
    correct_norm: int  # by the smallest mean loss per ending token: acc_norm
    total: int
    cropped: int


@torch.no_grad()  # not inference_mode, whose tensors must not get into a training graph
def score_batch(model, examples, device):
    """(sum, mean) of the cross-entropy of each ending's tokens, in nats: two (B, 4) float64 tensors
    on the CPU. Rows may be longer than the model's block size, though no position is."""
    # Side by side, padded on the right (there with a segment of its own): (B, T), target (B, T, 4).
    padding = {"tokens": 0, "segment": 5, "position": 0, "target": -1}
    rows = {field: [torch.from_numpy(getattr(e, field)) for e in examples] for field in padding}
    tokens, segment, position, target = (
        pad_sequence(rows[f], True, p).long().to(device) for f, p in padding.items())

    # The mask keeps the endings apart that stand side by side in one row. Each token may attend to
    # the context, as every ending follows it, and to its own ending; never to another ending, and
    # as in training never to what comes later (tril). So each ending meets exactly what it would
    # meet alone, and its loss is the same.
    key, query = segment[:, None, None, :], segment[:, None, :, None]
    mask = ((key == 0) | (key == query)).tril()  # (B, 1, T, T), True = may attend
    hidden = model.hidden(tokens, position, mask)  # (B, T, C)

    # Only where an ending's token comes next are logits needed: at P places of the B * T.
    counts = (target >= 0).sum(dim=1).cpu()  # (B, 4)
    row, column = (target >= 0).any(dim=-1).nonzero(as_tuple=True)
    hidden, target = hidden[row, column], target[row, column]  # (P, C), (P, 4)
    size = HEAD_ROWS.get(hidden.device.type, HEAD_ROWS["cuda"])
    losses = []
    for h, ids in zip(hidden.split(size), target.split(size), strict=True):
        log_p = F.log_softmax(model.logits(h).float(), dim=-1)
        losses.append(-log_p.gather(1, ids.clamp(min=0)))
    # Added up in float64: where each token costs the same, endings of any length tie exactly.
    loss = torch.cat(losses).cpu().double().masked_fill(target.cpu() < 0, 0.0)
    sums = torch.zeros(len(tokens), 4, dtype=torch.float64).index_add_(0, row.cpu(), loss)
    return sums, sums / counts


def shares(examples, rank, world_size, batch_tokens):
    """Yield this rank's list of examples for one batch after another."""
    # Of similar length, for little padding; the longest first, for too little memory shows at once.
    examples = sorted(examples, key=lambda e: -len(e.tokens))
    start = 0
    while start < len(examples):
        # All ranks cut the same list into the same rounds and take every world_size-th example of
        # each. So they make equally many batches, the last one possibly empty, and may meet in a
        # collective after each; and every example belongs to one rank.
        stop = start + world_size * max(1, batch_tokens // len(examples[start].tokens))
        yield examples[start:stop][rank::world_size]
        start = stop


def evaluate(model, examples, device, rank=0, world_size=1, between=None, progress=False):
    """Score this rank's share of `examples`, of which all ranks hold the same list: a Result.
    `between()` is called after each batch, equally often on all ranks, so it may be a collective;
    what it raises ends the evaluation. `progress` shows a bar on a terminal."""
    result = np.zeros(4, dtype=np.int64)
    size = BATCH_TOKENS.get(torch.device(device).type, BATCH_TOKENS["cuda"])
    batches = list(shares(examples, rank, world_size, size))
    was_training = model.training
    model.eval()
    try:
        for share in tqdm(batches, disable=None if progress else True):
            if share:
                losses = score_batch(model, share, device)
                label = torch.tensor([e.label for e in share])
                right = [int((x.argmin(dim=1) == label).sum()) for x in losses]
                result += [*right, len(share), sum(e.cropped for e in share)]
            if between is not None:
                between()
    finally:
        model.train(was_training)
    return Result(*result.tolist())


def show_examples(model, examples, device, decode, n=4):
    """Print the first n examples with the mean loss of each ending. decode: ids to text."""
    print("mean loss of each ending in nats per token; = the right one, > the choice", flush=True)
    for number, example in enumerate(examples[:n], 1):
        means = score_batch(model, [example], device)[1][0]
        print(f"example {number}: {decode(example.tokens[example.segment == 0])}", flush=True)
        for k, (loss, ids) in enumerate(zip(means, example.target.T, strict=True)):
            marks = ("=" if k == example.label else " ") + (">" if k == means.argmin() else " ")
            print(f"  {marks} {loss:7.4f} {decode(ids[ids >= 0])}")


def score_lines(correct, correct_norm, total):
    """Two lines such as 'acc: 2871/10042=0.2859 +- 0.0045', with the standard error."""
    return [f"{name}: {n}/{total}={n / total:.4f} +- {(n * (total - n) / total**3) ** 0.5:.4f}"
            for name, n in (("acc", correct), ("acc_norm", correct_norm))]


# -----------------------------------------------------------------------------
# The command: it checks what it can, and the trainer does the rest


def score(argv=None):
    """Score the model that the command line names. Returns the exit status."""
    parser = Parser("Score a GPT-2 on HellaSwag: how often it prefers the right one of 4 endings.")
    add = parser.add_argument
    add("-m", "--model_type", type=not_empty, default="gpt2", metavar="MODEL",
        help="gpt2 (the default), gpt2-medium, gpt2-large, gpt2-xl, or a checkpoint's path")
    add("-d", "--device", default="auto", help="cuda, cuda:1, mps or cpu (default: the best)")
    add("--limit", type=int, metavar="N", default=10042,
        help="score the first N examples (default: 10042, all of HellaSwag)")
    add("--data_file", type=not_empty, metavar="FILE", help="a .jsonl file like HellaSwag's "
        "(default: hellaswag/hellaswag_val.jsonl beside this script, 12 MB, fetched once)")
    args = parser.parse_args(argv)
    if args.limit < 1:
        raise UserError(f"--limit {args.limit}: must be at least 1")
    facts = {"arch": "gpt2", "tokenizer": "gpt2"}
    # No file, a damaged one, one of Hugging Face's or build-nanogpt's: the trainer finds out.
    with contextlib.suppress(Exception):
        facts |= peek(args.model_type)
    if facts["tokenizer"] != "gpt2":
        raise UserError(f"{args.model_type} knows {facts['tokenizer']} and not GPT-2's vocabulary, "
                        "which HellaSwag is scored on; train one with it")
    get_tokenizer("gpt2")
    if args.data_file:
        os.environ["HELLASWAG_FILE"] = args.data_file  # there the trainer finds it
    if rank("LOCAL_RANK") == 0:  # the trainer's other processes wait for this one
        next(iterate_examples("val", download("val")), None)
    script = os.path.join(HERE, f"{facts['arch']}.py")  # modern.py, or one of the reader's own
    if not str(facts["arch"]).isidentifier() or not os.path.isfile(script):
        script = os.path.join(HERE, "train_gpt2.py")  # which names the one that is wanted
    command = [sys.executable, script, "--init", args.model_type]
    command += ["--device", args.device, "--hellaswag", str(args.limit), "--preset", "gpt2"]
    command += ["--eval_only", "--val_tokens", "0", "--num_samples", "0", "--dtype", "float32"]
    # In place of this process, not below it: signals and torchrun then reach the trainer itself.
    if os.name == "posix":
        os.execv(command[0], command)
    return subprocess.call(command)


if __name__ == "__main__":
    run_main("hellaswag.py", score)
