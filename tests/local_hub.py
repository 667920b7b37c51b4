"""
Helpers for the tests of fineweb.py: a Hugging Face hub on 127.0.0.1, and fineweb.py as a subprocess with an
encoder that needs no vocabulary and a patch that stops it at a given point. The hub serves one dataset from a
directory, with the part of the protocol that `datasets` and `huggingface_hub` use.
"""

import contextlib
import hashlib
import http.server
import itertools
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import threading
import urllib.parse

import numpy as np
import pytest
from processes import at, kill  # noqa: F401  used by PATCH

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import fineweb  # noqa: E402

COMMIT = "c0ffee" * 6 + "c0ff"


class Hub:
    """
    with Hub(folder, "owner/name") as hub: ... hub.env is the environment for a command.

    requests: the paths requested so far. replaced: {file: bytes sent instead of its own, None for a missing
    file}. commit: that of main. commits: all that exist.
    """

    def __init__(self, folder, repo):
        self.folder, self.repo, self.requests, self.replaced = str(folder), repo, [], {}
        self.commit, self.commits = COMMIT, [COMMIT]
        handler = type("Handler", (Handler,), {"hub": self})
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None  # connections of killed clients
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.env = {
            "HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0",
            "HF_DATASETS_OFFLINE": "0", "NO_PROXY": "127.0.0.1",
        }  # fmt: skip

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def entries(self, under="", recursive=True):
        """Files and directories below `under`, in the format of the hub."""
        for path in sorted(pathlib.Path(self.folder, under).glob("**/*" if recursive else "*")):
            name = path.relative_to(self.folder).as_posix()
            if path.is_dir():
                yield {"type": "directory", "path": name, "oid": "0", "size": 0}
            else:
                oid = hashlib.sha1(name.encode()).hexdigest()
                yield {"type": "file", "path": name, "oid": oid, "size": path.stat().st_size}


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def reply(self, status, body=b"", headers=()):
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": len(body), **dict(headers)}
        for key, value in {**headers, "X-Repo-Commit": self.hub.commit}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        query = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        self.hub.requests.append(self.path)
        if "/paths-info/" not in self.path:
            return self.reply(404)
        wanted = (json.loads(query) if query[:1] == "{" else urllib.parse.parse_qs(query))["paths"]
        self.reply(200, [e for e in self.hub.entries() if e["path"] in wanted])

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        self.hub.requests.append(path)
        api, files = f"/api/datasets/{self.hub.repo}", f"/datasets/{self.hub.repo}/resolve/"
        if path.startswith(files):
            return self.send_file(path[len(files) :].split("/", 1)[1])
        if not path.startswith(api):
            return self.reply(404, {"error": "not found"}, {"X-Error-Code": "RepoNotFound"})
        kind, revision, *under = [*path[len(api) :].strip("/").split("/"), "main"]
        if kind in ("", "revision") and revision in ("main", *self.hub.commits):
            names = [self.sibling(e) for e in self.hub.entries() if e["type"] == "file"]
            sha = self.hub.commit if revision == "main" else revision
            return self.reply(200, {"id": self.hub.repo, "sha": sha, "siblings": names, "tags": [],
                                    "private": False, "gated": False, "disabled": False})  # fmt: skip
        folder = "/".join(under[:-1])
        if kind == "tree" and os.path.isdir(os.path.join(self.hub.folder, folder)):
            return self.reply(200, list(self.hub.entries(folder, "recursive=true" in self.path.lower())))
        code = "RevisionNotFound" if kind == "revision" else "EntryNotFound"
        self.reply(404, {"error": "not found"}, {"X-Error-Code": code})

    def sibling(self, entry):
        """A file in the format of the hub's dataset info."""
        sha256 = fineweb.sha256_of(os.path.join(self.hub.folder, entry["path"]))
        lfs = {"size": entry["size"], "sha256": sha256, "pointerSize": 130}
        return {"rfilename": entry["path"], "size": entry["size"], "blobId": "0", "lfs": lfs}

    def send_file(self, name):
        path = pathlib.Path(self.hub.folder, name)
        data = self.hub.replaced.get(name, path.read_bytes() if path.is_file() else None)
        if data is None:
            return self.reply(404, headers={"X-Error-Code": "EntryNotFound"})
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "Accept-Ranges": "bytes",
                   "Content-Type": "application/octet-stream"}  # fmt: skip
        if "Range" not in self.headers:
            return self.reply(200, data, headers)
        first, last = self.headers["Range"].removeprefix("bytes=").split("-")
        first, last = int(first), min(int(last or len(data)), len(data) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        self.reply(206, data[first : last + 1], headers)


# -----------------------------------------------------------------------------
# fineweb.py as a subprocess


def start(env, *argv, patch=""):
    """Start fineweb.py, with encode_bytes, in a process group of its own. patch: see the end of this file."""
    return subprocess.Popen([sys.executable, __file__, *map(str, argv)], text=True, start_new_session=True,
                            env={**os.environ, **env, "PATCH": patch}, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)  # fmt: skip


def finish(process, status=0):
    """Wait for the process and return (stdout, stderr)."""
    try:
        out, err = process.communicate(timeout=200)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == status, err
    return out, err


def killed(env, *argv, patch):
    """Run fineweb.py until `patch` kills it, and check that no process of its own is left."""
    process = start(env, *argv, patch=patch)
    _, err = process.communicate(timeout=200)
    assert process.returncode == -signal.SIGKILL, err
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def shards_of(folder, kind="npy"):
    """{file name: bytes} of all shards."""
    return {p.name: p.read_bytes() for p in sorted(pathlib.Path(folder).glob(f"*.{kind}"))}


def times_of(folder):
    """{file name: modification time} of all shards."""
    return {p.name: p.stat().st_mtime_ns for p in pathlib.Path(folder).glob("*_*.*")}


# -----------------------------------------------------------------------------
# Documents and their tokens


def encode_bytes(text):
    """UTF-8 bytes as tokens."""
    return np.frombuffer(text.encode("utf-8", "replace"), np.uint8).astype(np.uint16)


def oracle(texts, encode=encode_bytes):
    """The tokens of all documents, one after the other."""
    parts = [np.append([fineweb.EOT], encode(text)) for text in texts if text is not None]
    return np.concatenate([[], *parts]).astype(np.uint16)


def tokens_of(folder):
    paths = sorted(pathlib.Path(folder).glob("*.npy"), key=lambda p: p.name[-10:])
    return np.concatenate([np.load(p) for p in paths])


def texts_of(n, seed=0, size=400):
    rng = random.Random(seed)
    return ["".join(rng.choices("abc de\n\u00e9\u4e16", k=rng.randrange(size))) for _ in range(n)]


def write_jsonl(path, texts, opener=open, encoding="utf-8"):
    with opener(path, "wt", encoding=encoding) as f:
        f.writelines(json.dumps({"text": t, "n": i}) + "\n" for i, t in enumerate(texts))
    return str(path)


def write_parquet(path, texts, rows=50):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"id": list(range(len(texts))), "text": pa.array(texts, pa.string())})
    pq.write_table(table, path, row_group_size=rows)
    return str(path)


# -----------------------------------------------------------------------------
# In the subprocess


def torn_shard(nth):
    """Kill this process after half of the nth shard is written."""
    save, calls = np.save, itertools.count(1)

    def torn(f, tokens):
        save(f, tokens)
        if next(calls) == nth:
            f.truncate(f.tell() // 2)
            kill()

    np.save = torn


def stay():
    """Print "here" and wait for a signal."""
    print("here", flush=True)
    signal.pause()


# Runs fineweb.py with many small batches. PATCH is Python code that runs first and may use the names
# of this module, for example 'at("os.replace", kill, nth=7)'.
if __name__ == "__main__":
    fineweb.JOB_DOCUMENTS = 3
    fineweb.load_encode = lambda: encode_bytes
    exec(os.environ.get("PATCH", ""))
    fineweb.main()
