"""
HellaSwag: which of four endings goes on from a context? Zellers et al. 2019, arXiv 1905.07830.

    python hellaswag.py                            # GPT-2 (124M) on all 10,042 validation examples
    python hellaswag.py -m gpt2-xl -d cuda         # or gpt2-medium, gpt2-large
    python hellaswag.py -m log/last.pt --limit 500 # a checkpoint of train_gpt2.py

The data is a .jsonl file, one example a line, of which these keys are read:

    {"ctx": "A man is sitting on a roof. he", "label": 3, "endings": ["is using wrap ...", ...]}

The model picks the ending whose tokens it finds likeliest after the context: `acc` goes by the sum
of their losses, which favours short endings, and `acc_norm`, the usual number, by the mean. Chance
is 0.25. OpenAI's weights reach acc 0.2859, acc_norm 0.2955 (gpt2) and 0.3842, 0.4893 (gpt2-xl).
"""

import contextlib
import hashlib
import itertools
import json
import math
import os
import sqlite3
import sys
import time
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from common import Parser, UserError, not_empty
from machine import choose_device
from tokens import get_tokenizer

# -----------------------------------------------------------------------------
# The file: checked when it arrives, and fetched by one process while the others wait for it

DATA_URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_{}.jsonl"
KNOWN_FILES = {  # split: (bytes, sha256)
    "val": (12_246_618, "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588")
}
ANSWER_S = 10.0  # longest silence of the server, seconds
DOWNLOAD_S = 300.0  # longest download in all, seconds


def download(split, path=None, url=None):
    """
    The path of the file of a split ('train', 'val' or 'test'), fetched first where it is missing
    or broken. `path` defaults to hellaswag/hellaswag_{split}.jsonl beside this script, `url` to the
    environment variable HELLASWAG_URL and then to the authors' repository. Any number of processes
    may call it at once: one fetches, the others wait. Raises UserError.
    """
    if split not in ("train", "val", "test"):
        raise UserError(f"HellaSwag has no split {split!r}; there are train, val and test")
    here = os.path.dirname(os.path.abspath(__file__))
    path = os.fspath(path or os.path.join(here, "hellaswag", f"hellaswag_{split}.jsonl"))
    url = url or os.environ.get("HELLASWAG_URL") or DATA_URL.format(split)
    fault = "unreadable"
    try:
        fault = fault_of(path, split)
        if fault is not None:
            os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
            with locked(path + ".lock"):
                if fault_of(path, split) is not None:
                    fetch(url, path, split)
    except (OSError, ImportError) as e:
        why = " ".join(str(getattr(e, "strerror", None) or e).split())
        raise UserError(f"HellaSwag is not at {path} ({fault}) and could not be fetched from {url} "
                        f"({why}); fetch it elsewhere and put it there") from e  # fmt: skip
    return path


def fault_of(path, split):
    """What is wrong with a file of a split, None where nothing is."""
    if not os.path.isfile(path):
        return "no such file"
    size, (right_size, right_hash) = os.path.getsize(path), KNOWN_FILES.get(split, (None, None))
    if size == 0 or right_size not in (None, size):
        return f"{size:,} bytes" + (f", not {right_size:,}" if right_size else "")
    if right_hash:
        with open(path, "rb") as f:
            if hashlib.sha256(f.read()).hexdigest() != right_hash:
                return "the sha256 is another one"
    return None


@contextlib.contextmanager
def locked(path):
    """
    Hold a lock, waiting for whoever has it: that of a small SQLite database, which works on every
    system and ends with its process, however that ends. An OSError of the holder is noted there and
    raised by those who were waiting: eight processes must not wait out one dead server in turn.
    """
    started = time.time()
    try:
        database = sqlite3.connect(path, timeout=2 * DOWNLOAD_S, isolation_level=None)
        with contextlib.closing(database) as db:
            db.execute("BEGIN EXCLUSIVE")
            db.execute("CREATE TABLE IF NOT EXISTS failures (at REAL, why TEXT)")
            for (why,) in db.execute("SELECT why FROM failures WHERE at > ?", [started]):
                raise OSError(why)
            try:
                yield
            except OSError as e:
                failure = time.time(), str(e.strerror or e)
                db.execute("INSERT INTO failures VALUES (?, ?)", failure)
                raise
            finally:
                db.execute("COMMIT")
    except sqlite3.Error as e:
        raise OSError(f"{path}: {e}") from e


def fetch(url, path, split):
    """Put what a URL sends at `path` once it is complete and right. Raises OSError, a few words."""
    import requests
    from urllib3.exceptions import HTTPError, TimeoutError

    end, temp = time.monotonic() + DOWNLOAD_S, path + ".tmp"
    options = {"stream": True, "timeout": ANSWER_S, "headers": {"Accept-Encoding": "identity"}}
    try:
        with requests.get(url, **options) as answer, open(temp, "wb") as f:
            if answer.status_code != 200:
                raise OSError(f"the server says {answer.status_code} {answer.reason}")
            answer.raw.enforce_content_length = True
            # read1 returns what has come, so that a server that drips meets the limit too.
            read = getattr(answer.raw, "read1", answer.raw.read)
            while piece := read(1 << 16):
                f.write(piece)
                if time.monotonic() > end:
                    raise OSError(f"not complete after {DOWNLOAD_S:g} s")
        if fault := fault_of(temp, split):
            raise OSError(f"it sent a wrong file: {fault}")
        os.replace(temp, path)
    except (requests.Timeout, TimeoutError) as e:
        raise OSError(f"no answer within {ANSWER_S:g} s") from e
    except requests.RequestException as e:
        raise OSError(f"no connection: {type(e).__name__}") from e
    except HTTPError as e:
        raise OSError("the connection broke before the end") from e
    finally:
        with contextlib.suppress(OSError):
            os.remove(temp)


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
    """(context ids, four lists of ending ids). An ending goes on in mid-text: ' ' is put first."""
    endings = [encode(" " + ending) for ending in example["endings"]]
    return [int(i) for i in encode(example["ctx"])], [[int(i) for i in e] for e in endings]


def render_example(example, encode=None):
    """
    An example as four rows, context and ending, padded with id 0 on the right to the longest, N:
    (data, tokens (4, N) int64, mask (4, N) int64 with 1 on ending tokens, label). data is a dict of
    label, ctx_tokens and ending_tokens. `encode`, text to ids, defaults to GPT-2's tokenizer.
    """
    context, endings = encode_texts(example, encode or get_tokenizer("gpt2").encode)
    label = example.get("label")
    tokens = torch.zeros(4, len(context) + max(len(e) for e in endings), dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for k, ending in enumerate(endings):
        tokens[k, : len(context) + len(ending)] = torch.tensor(context + ending)
        mask[k, len(context) : len(context) + len(ending)] = 1
    data = {"label": label, "ctx_tokens": context, "ending_tokens": endings}
    return data, tokens, mask, label


def pack(context, endings, label, cropped=False):
    """
    Lay an example out in one row, so that the four endings share the work on their context. The
    last token of an ending is predicted and predicts nothing, so it has no place. Context A B with
    endings C D, E, F G H and I J (T = 6):

        tokens    A  B  C  F  G  I       The last context token predicts how each ending starts;
        segment   0  0  1  3  3  4       C, what follows it in its own ending. F may attend to
        position  0  1  2  2  3  2       A, B and itself, and not to C, which another ending says
        target    .  C  D  .  .  .       at the same position 2.
                  .  E  .  .  .  .
                  .  F  .  G  H  .
                  .  I  .  .  .  J

    Endings with equal tokens share a segment: their losses are equal to the last bit, and a tie.
    """
    assert context and all(endings), "the model must have read a token before it predicts one"
    n, endings = len(context), [tuple(e) for e in endings]
    distinct = list(dict.fromkeys(endings))
    lengths = [n] + [len(e) - 1 for e in distinct]
    segment = np.repeat(np.arange(len(lengths), dtype=np.int8), lengths)
    starts = [range(n)] + [range(n, n + length) for length in lengths[1:]]
    target = np.full((len(segment), 4), -1, dtype=np.int32)
    for k, ending in enumerate(endings):
        target[n - 1, k] = ending[0]
        target[segment == 1 + distinct.index(ending), k] = ending[1:]
    tokens = np.array([*context, *(i for e in distinct for i in e[:-1])], dtype=np.int32)
    position = np.array([p for start in starts for p in start], dtype=np.int32)
    return Example(tokens, segment, position, target, label, cropped)


def prepare(example, block_size, encode):
    """
    An Example from a dict of iterate_examples. Where context and ending are longer than block_size
    tokens they are cut on the left: the context, the same for all four endings, and only where one
    token of it is all that is left, an ending too.
    """
    assert block_size >= 2, block_size
    context, endings = encode_texts(example, encode)
    cut = [e[-(block_size - 1) :] for e in endings]
    cut_context = context[-(block_size - max(len(e) for e in cut)) :]
    cropped = (cut_context, cut) != (context, endings)
    return pack(cut_context, cut, example["label"], cropped)


def load_examples(path, n, block_size, encode):
    """The first n examples of a file (all of them where n is None) as a list of Example."""
    examples = itertools.islice(iterate_examples("val", path), n)
    return [prepare(e, block_size, encode) for e in examples]


# -----------------------------------------------------------------------------
# Scoring

# By kind of device; mps goes with cuda.
BATCH_TOKENS = {"cpu": 1024, "cuda": 32768}  # padded tokens in one forward pass
HEAD_ROWS = {"cpu": 128, "cuda": 1024}  # rows of logits alive at once: 200 KB each in float32


class Result(NamedTuple):
    """Exact counts over the examples of one rank; add them up over the ranks for the scores."""

    correct: int  # by the smallest sum of losses: acc
    correct_norm: int  # by the smallest mean loss per ending token: acc_norm
    total: int
    cropped: int


def collate(examples, device):
    """
    Examples side by side, padded on the right: tokens, segment (5 in the padding), position, each
    (B, T), and target (B, T, 4), int64 on the device.
    """
    batch = []
    for field, padding in (("tokens", 0), ("segment", 5), ("position", 0), ("target", -1)):
        rows = [torch.from_numpy(getattr(e, field)) for e in examples]
        batch.append(pad_sequence(rows, True, padding).long().to(device))
    return batch


@torch.no_grad()  # not inference_mode, whose tensors must not get into a training graph
def score_batch(model, batch):
    """
    (sum, mean) of the cross-entropy of each ending's tokens, in nats: two (B, 4) float64 tensors on
    the CPU. Rows may be longer than the model's block size, though no position is.
    """
    tokens, segment, position, target = batch
    key, query = segment[:, None, None, :], segment[:, None, :, None]
    # A token sees, up to itself, the context and its own segment: (B, 1, T, T).
    mask = ((key == 0) | (key == query)).tril()
    hidden = model.hidden(tokens, position, mask)  # (B, T, C)
    counts = (target >= 0).sum(dim=1).cpu()  # (B, 4)
    row, column = (target >= 0).any(dim=-1).nonzero(as_tuple=True)  # the P places that predict
    hidden, target = hidden[row, column], target[row, column]  # (P, C), (P, 4)
    size = HEAD_ROWS.get(hidden.device.type, HEAD_ROWS["cuda"])
    losses = []
    for h, ids in zip(hidden.split(size), target.split(size), strict=True):
        log_p = F.log_softmax(model.lm_head(h).float(), dim=-1)
        losses.append(-log_p.gather(1, ids.clamp(min=0)))
    # Added up in float64: where each token costs the same, endings of any length tie exactly.
    loss = torch.cat(losses).cpu().double().masked_fill(target.cpu() < 0, 0.0)
    sums = torch.zeros(len(tokens), 4, dtype=torch.float64).index_add_(0, row.cpu(), loss)
    return sums, sums / counts


def shares(examples, rank, world_size, batch_tokens):
    """
    Yield this rank's list of examples for one batch after another, of similar length (little
    padding) and the longest first (too little memory shows at once). All ranks cut the same sorted
    list into rounds and take every world_size-th example of each, so they make equally many
    batches, the last one possibly empty, and each example belongs to one rank.
    """
    examples = sorted(examples, key=lambda e: -len(e.tokens))
    start = 0
    while start < len(examples):
        stop = start + world_size * max(1, batch_tokens // len(examples[start].tokens))
        yield examples[start:stop][rank::world_size]
        start = stop


def evaluate(model, examples, device, rank=0, world_size=1, between=None, progress=False):
    """
    Score this rank's share of `examples`, of which all ranks hold the same list: a Result.

    `between()` is called after each batch, equally often on all ranks, so it may be a collective;
    where it returns True (on all of them), the evaluation is given up and None returned. `progress`
    shows a bar on a terminal.
    The model is in eval mode meanwhile, and then in the mode it was in before.
    """
    from tqdm import tqdm

    result = np.zeros(4, dtype=np.int64)
    size = BATCH_TOKENS.get(torch.device(device).type, BATCH_TOKENS["cuda"])
    was_training = model.training
    model.eval()
    try:
        with tqdm(total=len(examples[rank::world_size]), disable=None if progress else True) as bar:
            for share in shares(examples, rank, world_size, size):
                if share:
                    losses = score_batch(model, collate(share, device))
                    label = torch.tensor([e.label for e in share])
                    right = [int((x.argmin(dim=1) == label).sum()) for x in losses]
                    result += [*right, len(share), sum(e.cropped for e in share)]
                    bar.update(len(share))
                if between is not None and between():
                    return None
    finally:
        model.train(was_training)
    return Result(*result.tolist())


# -----------------------------------------------------------------------------
# The command

SHOWN = 4  # examples printed with their losses


def parse_args(argv=None):
    """The command line as a namespace. Raises UserError."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = "gpt2, gpt2-medium, gpt2-large, gpt2-xl (Hugging Face's), or a checkpoint's path"
    file = "a .jsonl file like HellaSwag's (default: hellaswag/hellaswag_val.jsonl beside this"
    parser = Parser("Score a GPT-2 on HellaSwag: how often it prefers the right one of 4 endings.")
    add = parser.add_argument
    add("-m", "--model_type", type=not_empty, default="gpt2", metavar="MODEL",
        help=f"{model} (default: gpt2)")  # fmt: skip
    add("-d", "--device", default=device, help=f"cuda, cuda:1, mps, cpu (default here: {device})")
    add("--limit", type=int, metavar="N", help="score the first N examples (default: all)")
    add("--data_file", type=not_empty, metavar="FILE", help=f"{file} script, 12 MB, fetched once)")
    args = parser.parse_args(argv)
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit {args.limit}: must be at least 1")
    return args


def show(number, example, means, decode):
    """Print an example and the mean loss (nats per token) of each ending."""
    print(f"example {number}: {decode(example.tokens[example.segment == 0])}")
    for k, (loss, ids) in enumerate(zip(means, example.target.T, strict=True)):
        marks = ("=" if k == example.label else " ") + (">" if k == means.argmin() else " ")
        print(f"  {marks} {loss:7.4f} {decode(ids[ids >= 0])}")


def score_line(name, correct, total):
    """'acc: 2871/10042=0.2859 +- 0.0045', with the standard error of a share of `total`."""
    share = correct / total
    return f"{name}: {correct}/{total}={share:.4f} +- {math.sqrt(share * (1 - share) / total):.4f}"


def score(args):
    """What the command does. What can be wrong is looked at before the model is loaded."""
    args.device = choose_device(args.device, 0, 1)
    path = args.data_file or download("val")
    raw = list(itertools.islice(iterate_examples("val", path), args.limit))
    if not raw:
        raise UserError(f"{path} holds no examples; name another file")
    tokenizer = get_tokenizer("gpt2")
    from train_gpt2 import load_weights

    model, trained_on, *_ = load_weights(args.model_type, args.device)
    if trained_on != "gpt2":
        raise UserError(f"{args.model_type} knows {trained_on} and not GPT-2's vocabulary, which "
                        "HellaSwag is scored on; train one with it")  # fmt: skip
    if torch.device(args.device).type == "cuda":
        torch.set_float32_matmul_precision("high")
    model.eval()
    examples = [prepare(e, model.config.block_size, tokenizer.encode) for e in raw]
    print("mean loss of each ending in nats per token; = the right one, > the model's choice")
    for number, example in enumerate(examples[:SHOWN], 1):
        means = score_batch(model, collate([example], args.device))[1]
        show(number, example, means[0], tokenizer.decode)
    result = evaluate(model, examples, args.device, progress=True)
    if result.cropped:
        print(f"{result.cropped} cut on the left to {model.config.block_size} tokens")
    print(score_line("acc", result.correct, result.total))
    print(score_line("acc_norm", result.correct_norm, result.total))


def main(argv=None):
    try:
        score(parse_args(argv))
    except UserError as e:
        print(f"hellaswag.py: error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
