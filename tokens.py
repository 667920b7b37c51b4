from dataclasses import dataclass  # noqa: I001
import os
import sys

from common import AgreedError, UserError, say, warn
from fineweb import Tokenizer, TokenStream, get_tokenizer, open_shards, open_text


@dataclass
class Data:
    """What a run reads: its two splits (None where there is no data) and its tokenizer."""

    train: TokenStream | None
    val: TokenStream | None
    identity: dict  # what a resume must find again, whatever the path
    tokenizer: Tokenizer | None  # None: its vocabulary cannot be had
    tokenizer_name: str


def open_tokenizer(is_text, wanted, dist):
    """(tokenizer or None, its name): what the checkpoint names, else what can be had.

    The main process decides and the others follow. Shards hold GPT-2's BPE tokens, so nothing
    else will do there; without the vocabulary such a run goes on, but shows no samples.
    """
    if not is_text and wanted == "bytes":
        raise AgreedError("the checkpoint's tokens are the byte fallback's, those of the shards "
                          "are GPT-2's: give the text file that it was trained on with --data")
    tokenizer = name = error = None
    if dist.is_main:
        try:
            tokenizer = get_tokenizer(wanted if is_text else "gpt2")
            name = tokenizer.name
        except UserError as e:
            error = str(e)
    name, error = dist.broadcast((name, error))
    if error and is_text:
        raise AgreedError(error)
    if error:
        warn(f"no samples and no HellaSwag: {error}")
        return None, "gpt2"
    if name == "bytes" and not wanted:
        say("GPT-2's vocabulary cannot be had: the text is read as single bytes, GPT-2's tokens "
            f"0 to 255 ({dist.is_main and tokenizer.why})")
    return dist.together(lambda: tokenizer or get_tokenizer(name)), name


def open_data(path, wanted, dist, optional=False):
    """Open a folder of shards or a text file on every process; wanted: a tokenizer's name or None.

    optional: go on without data where there is nothing at `path`.
    """
    is_text = os.path.isfile(path)
    missing = optional and not any(dist.gather(os.path.exists(path)))
    tokenizer, name = open_tokenizer(is_text or missing, wanted, dist)
    if missing:
        say(f"no data at {path}: no validation")
        return Data(None, None, {}, tokenizer, name)

    def open_streams():
        if is_text:
            train, val, digest = open_text(path, tokenizer.encode)
            kind = f"text {digest}"
        else:
            train, val = open_shards(path, "train"), open_shards(path, "val")
            kind = f"{len(train.names)} shards"
        shards = [] if is_text else list(zip(train.names, train.counts, strict=True))
        return train, val, {"kind": kind, "tokens": len(train), "shards": [list(s) for s in shards]}

    return Data(*dist.together(open_streams), tokenizer, name)


def encode_prompt(cfg, tokenizer):
    """Token ids of cfg.prompt (- = stdin); empty where samples are off."""
    if not cfg.num_samples or tokenizer is None:
        return []
    ids = tokenizer.encode(sys.stdin.read() if cfg.prompt == "-" else cfg.prompt).tolist()
    if not ids:
        raise UserError("--prompt is empty: give it at least one character")
    for limit, name in ((cfg.block_size, "block_size"), (cfg.sample_length - 1, "sample_length")):
        if len(ids) > limit:
            raise UserError(f"--prompt has {len(ids)} tokens, too many for --{name} "
                            f"{getattr(cfg, name)}")
    return ids


def open_hellaswag(n, block_size, tokenizer, dist):
    """The first n prepared examples; where they cannot be had, one warning and none."""
    if not n or tokenizer is None:
        return []
    import hellaswag

    path = error = None
    if dist.is_main:
        try:
            path = hellaswag.download("val")
        except (UserError, OSError) as e:
            error = str(e)
    path, error = dist.broadcast((path, error))
    if error:
        warn(f"HellaSwag is off: {error}")
        return []
    return dist.together(hellaswag.load_examples, path, n, block_size, tokenizer.encode)


def scan_vocabulary(loader):
    """Look at up to 100M tokens, the head of every shard, before training begins."""
    start, counts = 0, loader.tokens.counts
    for count in counts:
        for pos in range(start, start + min(count, 10**8 // len(counts)), 2**16):
            ids = loader.tokens.read(pos, min(2**16, start + count - pos))
            loader.check_vocabulary(ids, pos)
        start += count


def inspect_step(loader, tokenizer, step):
    """Print which tokens a step reads, row by row, with their text."""
    names, rows, documents = loader.tokens.names, list(loader.where(step)), {}
    for *_, shard, offset in sorted(rows, key=lambda row: row[3:]):  # one pass over each shard
        documents[shard, offset] = loader.tokens.documents_before(shard, offset)
    for row, epoch, window, shard, offset in rows:
        print(f"step {step} row {row % loader.rows_per_step}: epoch {epoch} window {window} "
              f"{names[shard]} offset {offset} document {documents[shard, offset]}")
        if tokenizer:
            print(tokenizer.decode(loader.tokens.read(window * loader.T, loader.T)))
