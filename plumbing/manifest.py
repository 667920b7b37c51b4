"""
What a folder of shards says about itself: manifest.json, written by fineweb.py.

It holds what was asked for (`settings`), and for each shard its name, tokens, documents and sha256;
of a shard that was made here also where in the source it begins and ends (`start`, `end`). `note`
is how far a stream had been read. A shard that is not listed does not count.
"""

import contextlib
import hashlib
import json
import os
import sys

from plumbing.errors import RunError, UserError
from plumbing.files import atomic_write, lock
from plumbing.tokens import MANIFEST, MANIFEST_FORMAT, load_manifest, open_shard, split_of


@contextlib.contextmanager
def only_writer(folder, kind):
    """Holds a lock on the folder, which is made where it is missing and holds shards of no other
    kind, '.npy' or '.bin', than this."""
    refusal = f"another fineweb.py is writing to {folder}; wait for it"
    try:
        os.makedirs(folder, exist_ok=True)
        held = lock(os.path.join(folder, ".lock"), refusal)
    except OSError as e:
        raise UserError(f"{folder} cannot be written: {e.strerror}; choose another --out") from e
    try:
        others = {name[-4:] for name in os.listdir(folder) if split_of(name)} - {kind}
        if others:
            raise UserError(f"{folder} holds {others.pop()} shards and this makes {kind} ones, "
                            "which do not go together; choose another --out")
        yield
    finally:
        held.release()


def open_manifest(folder, settings):
    """The manifest that a run with these settings goes on from. Raises UserError."""
    manifest = load_manifest(folder)
    if manifest is None and any(split_of(name) for name in os.listdir(folder)):
        raise UserError(f"{folder} holds shards made by something else; choose another --out")
    if manifest is None or not manifest["shards"]:
        empty = {"complete": False, "tokens": 0, "documents": 0, "shards": [], "note": None}
        return {"format": MANIFEST_FORMAT, "settings": settings, **empty}
    old = manifest["settings"]
    differ = [k for k in {**old, **settings} if old.get(k) != settings.get(k)]
    if differ:
        what = ", ".join(f"{k} {old.get(k)!r}, not {settings.get(k)!r}" for k in differ)[:500]
        raise UserError(f"{folder} was made with {what}; choose another --out, or delete it")
    return manifest


def save_manifest(folder, manifest):
    for total in ("tokens", "documents"):
        manifest[total] = sum(shard[total] for shard in manifest["shards"])
    with atomic_write(os.path.join(folder, MANIFEST)) as f:
        f.write(json.dumps(manifest, indent=1).encode())


def complete(folder, manifest, made):
    """Enter shards into the manifest, each when it is on disk; `made` yields (entry, note)."""
    from tqdm import tqdm

    entries = {entry["name"]: entry for entry in manifest["shards"]}
    # There before the first shard: a folder of shards without a manifest is somebody else's.
    save_manifest(folder, manifest)
    for entry, note in made:
        if entries.setdefault(entry["name"], entry) != entry:
            # of the right size, it would be taken for the listed one the next time
            os.remove(os.path.join(folder, entry["name"]))
            raise UserError(f"{entry['name']} came out different: what it is made from has changed;"
                            " make all shards again, into another --out")
        manifest.update(shards=list(entries.values()), note=note or manifest["note"])
        save_manifest(folder, manifest)
        tqdm.write(f"{entry['name']}: {entry['tokens']:,} tokens")  # above a progress bar
    if not entries:
        raise UserError("there are no documents to read; check --files or --dataset")
    manifest.update(complete=True, note=None)
    save_manifest(folder, manifest)


@contextlib.contextmanager
def promise(folder):
    """Says with what stops a run, other than a mistake of the user's, what is safe."""
    try:
        yield
    except (RunError, OSError, KeyboardInterrupt) as e:
        n = len((load_manifest(folder) or {"shards": []})["shards"])
        safe = f"the {n} finished shards in {folder} are safe, and " if n else ""
        safe += "the same command goes on"
        if isinstance(e, KeyboardInterrupt):
            print(f"fineweb.py: stopped; {safe}", file=sys.stderr)
            raise
        raise RunError(f"{e}; {safe}") from e


# -----------------------------------------------------------------------------
# The shards that it lists


def sha256_of(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def entry_of(path):
    """What the manifest says about the file of a shard. Raises UserError where it is none."""
    shard = open_shard(path)
    return {"name": shard.name, "tokens": shard.count, "sha256": sha256_of(path)}


def fault_of(folder, entry):
    """What is wrong with the shard of an entry, by its size; None where nothing is."""
    path = os.path.join(folder, entry["name"])
    if not os.path.isfile(path):
        return "missing"
    with contextlib.suppress(UserError):
        if open_shard(path).count == entry["tokens"]:
            return None
    return "of a wrong size"


def verify(folder):
    """Compare sizes and hashes of all shards with the manifest, and name each bad one."""
    from tqdm import tqdm

    manifest = load_manifest(folder)
    if manifest is None:
        raise UserError(f"no {MANIFEST} in {folder}: nothing to compare with; was it made here?")
    faults = {name: "not in the manifest" for name in os.listdir(folder) if split_of(name)}
    for entry in tqdm(manifest["shards"], unit=" shards", disable=None):
        name, fault = entry["name"], fault_of(folder, entry)
        if not fault and sha256_of(os.path.join(folder, name)) != entry["sha256"]:
            fault = "of a wrong sha256"
        faults[name] = fault
    bad = sorted(name for name in faults if faults[name])
    for name in bad:
        print(f"{os.path.join(folder, name)} is {faults[name]}", file=sys.stderr)
    if bad:
        raise UserError(f"{len(bad)} bad shards in {folder}; delete them and give the command that "
                        "made them again: it makes only what is missing")
    state = "" if manifest["complete"] else "; not finished: the command that made them goes on"
    print(f"{folder}: {len(faults)} shards, {manifest['tokens']:,} tokens, all good{state}")
