"""
Helpers of test_fineweb.py that other processes import too: a Hugging Face hub on 127.0.0.1, and
fineweb.py as a process of its own, with a tokenizer that needs no vocabulary, that stops where a
test wants it to. The hub serves one data set from a folder, with as much of the protocol as
`datasets` and `huggingface_hub` use.
"""

import contextlib
import hashlib
import http.server
import io
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
import urllib.parse

import numpy as np
from processes import at, kill  # noqa: F401  for PATCH

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import fineweb  # noqa: E402
from plumbing.tokens import Tokenizer  # noqa: E402

COMMIT = "c0ffee" * 6 + "c0ff"


class Hub:
    """
    with Hub(folder, "owner/name") as hub: ... hub.env (for a command that is to use it),
    hub.requests (paths asked for), hub.lost (part of the names of files that the hub has no more),
    hub.silent (part of the names of files whose requests are left waiting until it is None again),
    hub.broken (part of the names of files that break off in the middle), hub.replaced ({file: bytes
    that are sent in its place}), hub.commit (that of main), hub.commits (all that there are).
    """

    def __init__(self, folder, repo):
        self.folder, self.repo, self.requests = str(folder), repo, []
        self.lost = self.silent = self.broken = None
        self.replaced, self.commit, self.commits = {}, COMMIT, [COMMIT]
        handler = type("Handler", (Handler,), {"hub": self})
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None  # a client that was killed has hung up
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
        """The files and folders under a folder, as the hub lists them."""
        top = os.path.join(self.folder, under)
        for base, folders, files in os.walk(top):
            for name in sorted(folders):
                path = os.path.relpath(os.path.join(base, name), self.folder).replace(os.sep, "/")
                yield {"type": "directory", "path": path, "oid": "0", "size": 0}
            for name in sorted(files):
                path = os.path.join(base, name)
                name = os.path.relpath(path, self.folder).replace(os.sep, "/")
                oid = hashlib.sha1(name.encode()).hexdigest()
                yield {"type": "file", "path": name, "oid": oid, "size": os.path.getsize(path)}
            if not recursive:
                return


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
        asked = json.loads(query) if query[:1] == "{" else urllib.parse.parse_qs(query)
        wanted = asked["paths"]
        self.reply(200, [e for e in self.hub.entries() if e["path"] in wanted])

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        query = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
        self.hub.requests.append(path)
        api, files = f"/api/datasets/{self.hub.repo}", f"/datasets/{self.hub.repo}/resolve/"
        if path.startswith(files):
            return self.send_file(path[len(files) :].split("/", 1)[1])
        rest = path[len(api) :].strip("/").split("/") if path.startswith(api) else None
        revisions = ("main", *self.hub.commits)
        if rest == [""] or (rest and rest[0] == "revision" and rest[1] in revisions):
            files = [e for e in self.hub.entries() if e["type"] == "file"]
            names = [self.sibling(e, "blobs" in query) for e in files]
            asked = rest[1] if rest[1:] and rest[1] != "main" else self.hub.commit
            info = {"id": self.hub.repo, "sha": asked, "siblings": names, "tags": []}
            return self.reply(200, {**info, "private": False, "gated": False, "disabled": False})
        if rest and rest[0] == "tree" and rest[1] in revisions:
            under = "/".join(rest[2:])
            if os.path.isdir(os.path.join(self.hub.folder, under)):
                deep = query.get("recursive", ["false"])[0].lower() in ("true", "1")
                return self.reply(200, list(self.hub.entries(under, deep)))
        code = "EntryNotFound" if rest else "RepoNotFound"
        if rest and rest[0] == "revision":
            code = "RevisionNotFound"
        self.reply(404, {"error": "not found"}, {"X-Error-Code": code})

    def sibling(self, entry, with_size):
        """A file as the hub lists it in what it says about a data set."""
        if not with_size:
            return {"rfilename": entry["path"]}
        with open(os.path.join(self.hub.folder, entry["path"]), "rb") as f:
            sha256 = hashlib.file_digest(f, "sha256").hexdigest()
        lfs = {"size": entry["size"], "sha256": sha256, "pointerSize": 130}
        return {"rfilename": entry["path"], "size": entry["size"], "blobId": "0", "lfs": lfs}

    def send_file(self, name):
        path = os.path.join(self.hub.folder, name)
        while self.hub.silent and self.hub.silent in name:
            time.sleep(0.05)
        if not os.path.isfile(path) or (self.hub.lost and self.hub.lost in name):
            return self.reply(404, headers={"X-Error-Code": "EntryNotFound"})
        with open(path, "rb") as f:
            data = self.hub.replaced.get(name) or f.read()
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "Accept-Ranges": "bytes",
                   "Content-Type": "application/octet-stream"}  # fmt: skip
        if self.hub.broken and self.hub.broken in name and self.command == "GET":
            self.close_connection = True
            return self.reply(200, data[: len(data) // 2], {**headers, "Content-Length": len(data)})
        if "Range" not in self.headers:
            return self.reply(200, data, headers)
        first, last = self.headers["Range"].removeprefix("bytes=").split("-")
        first, last = int(first), min(int(last or len(data)), len(data) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        self.reply(206, data[first : last + 1], headers)


# -----------------------------------------------------------------------------
# The command in a test


def start(env, tokenizer, *argv, patch=""):
    """The command as a process of its own, the first of its group. `patch`: see the end."""
    command = [sys.executable, __file__, tokenizer, *map(str, argv)]
    if tokenizer == "real":
        command = [sys.executable, fineweb.__file__, *map(str, argv)]
    return subprocess.Popen(
        command, env={**os.environ, **env, "PATCH": patch}, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process, status=0):
    try:
        out, err = process.communicate(timeout=200)
    finally:
        with contextlib.suppress(ProcessLookupError):  # whoever is left
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == status, err
    return out, err


def killed(env, *argv, patch):
    """The command, which kills itself at a point that `patch` names; it takes its workers along."""
    process = start(env, "Bytes", *argv, patch=patch)
    process.wait(200)
    assert process.returncode == -signal.SIGKILL, process.communicate()[1]
    end = time.monotonic() + 60  # whoever is there then has been left behind
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < end:
            os.killpg(process.pid, 0)
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError("a worker lives on")
    process.communicate()


def shards_of(folder, kind="npy"):
    return {p.name: p.read_bytes() for p in sorted(pathlib.Path(folder).glob(f"*.{kind}"))}


def times_of(folder):
    """{file: time of its last change} of all shards."""
    paths = [*pathlib.Path(folder).glob("*.npy"), *pathlib.Path(folder).glob("*.bin")]
    return {p.name: p.stat().st_mtime_ns for p in paths}


# -----------------------------------------------------------------------------
# In the command's process


class DeadlyBytes(Tokenizer):
    """Ends its process, as the system does to one that takes too much memory."""

    def encode(self, text):
        if "deadly" in text:
            os._exit(9)
        return super().encode(text)


def torn_shard(nth):
    """Of the nth shard half is written, and then this process is killed."""
    save, calls = np.save, itertools.count(1)

    def torn(f, tokens):
        if next(calls) < nth:
            return save(f, tokens)
        whole = io.BytesIO()
        save(whole, tokens)
        f.write(whole.getvalue()[: whole.tell() // 2])
        f.flush()
        kill()

    np.save = torn


def stay():
    """Wait here, and say so, until something ends this process."""
    print("here", flush=True)
    signal.pause()


# fineweb.py with one of these tokenizers and many small jobs. PATCH is Python code that is executed
# first, with the names of this module: 'at("os.replace", kill, nth=7)'; IN_WORKERS is for workers.
if __name__ == "__mp_main__":
    exec(os.environ.get("IN_WORKERS", ""))
if __name__ == "__main__":
    fineweb.JOB_TOKENS = 500
    exec(os.environ.get("PATCH", ""))
    kinds = {"Bytes": Tokenizer, "DeadlyBytes": DeadlyBytes}
    fineweb.main(sys.argv[2:], kinds[sys.argv[1]]())
