"""
Helpers of test_fineweb.py that other processes import too: a Hugging Face hub on 127.0.0.1, and
tokenizers that need no vocabulary. The hub serves one data set from a folder, with as much of the
protocol as `datasets` uses; set HF_ENDPOINT to Hub.url and HF_HUB_DISABLE_XET to 1.
"""

import hashlib
import http.server
import json
import os
import sys
import threading
import time
import urllib.parse

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import fineweb  # noqa: E402

COMMIT = "c0ffee" * 6 + "c0ff"


class Hub:
    """with Hub(folder, "owner/name") as hub: ... hub.url, hub.requests (paths asked for), hub.lost
    (part of the names of files that the hub has no more)"""

    def __init__(self, folder, repo):
        self.folder, self.repo, self.requests = str(folder), repo, []
        self.lost = None
        handler = type("Handler", (Handler,), {"hub": self})
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

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
        for key, value in {**headers, "X-Repo-Commit": COMMIT}.items():
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
        if rest in ([""], ["revision", "main"], ["revision", COMMIT]):
            names = [{"rfilename": e["path"]} for e in self.hub.entries() if e["type"] == "file"]
            info = {"id": self.hub.repo, "sha": COMMIT, "siblings": names, "tags": []}
            return self.reply(200, {**info, "private": False, "gated": False, "disabled": False})
        if rest and rest[0] == "tree" and rest[1] in ("main", COMMIT):
            under = "/".join(rest[2:])
            if os.path.isdir(os.path.join(self.hub.folder, under)):
                deep = query.get("recursive", ["false"])[0].lower() in ("true", "1")
                return self.reply(200, list(self.hub.entries(under, deep)))
        code = "EntryNotFound" if rest else "RepoNotFound"
        if rest and rest[0] == "revision":
            code = "RevisionNotFound"
        self.reply(404, {"error": "not found"}, {"X-Error-Code": code})

    def send_file(self, name):
        path = os.path.join(self.hub.folder, name)
        if not os.path.isfile(path) or (self.hub.lost and self.hub.lost in name):
            return self.reply(404, headers={"X-Error-Code": "EntryNotFound"})
        with open(path, "rb") as f:
            data = f.read()
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "Accept-Ranges": "bytes",
                   "Content-Type": "application/octet-stream"}  # fmt: skip
        if "Range" not in self.headers:
            return self.reply(200, data, headers)
        first, last = self.headers["Range"].removeprefix("bytes=").split("-")
        first, last = int(first), min(int(last or len(data)), len(data) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        self.reply(206, data[first : last + 1], headers)


class SlowBytes(fineweb.Tokenizer):
    """Single-byte tokens at a pace that leaves time to be killed."""

    def encode(self, text):
        time.sleep(0.002)
        return super().encode(text)


class DeadlyBytes(fineweb.Tokenizer):
    """Ends its process, as the system does to one that takes too much memory."""

    def encode(self, text):
        if "deadly" in text:
            os._exit(9)
        return super().encode(text)


if __name__ == "__main__":  # fineweb.py with one of these tokenizers, in many small jobs
    fineweb.JOB_TOKENS = 500
    kinds = {"Bytes": fineweb.Tokenizer, "SlowBytes": SlowBytes, "DeadlyBytes": DeadlyBytes}
    sys.exit(fineweb.main(sys.argv[2:], kinds[sys.argv[1]]()))
