"""A hub on loopback that speaks as much of the Hugging Face hub's interface as its real client library asks for.

``LoopbackHub(directory)`` serves the model ``{org}/{name}`` from ``directory/{org}/{name}`` and the dataset of that name from
``directory/datasets/{org}/{name}``, one commit of each, and writes there what is committed to it. A repository called ``gated``
wants its terms accepted: everybody may see what is in it, nobody may read it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

TOKEN = "hf_loopback"
COMMIT = "0123456789abcdef" * 2 + "01234567"
BRANCHES = {"main", COMMIT}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    root: Path
    requests: list[str]

    def log_message(self, *words: Any) -> None:
        """Nothing on stderr."""

    # -- answers
    def answer(self, status: int, content: Any = b"", **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str) -> None:
        self.answer(status, {"error": code}, X_Error_Code=code, X_Error_Message=code)

    # -- requests
    def do_GET(self) -> None:
        self.requests.append(f"{self.command} {self.path}")
        path, _, query = self.path.partition("?")
        path = unquote(path)
        if match := re.fullmatch(r"/api/(model|dataset)s/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self.repository_info(_name(match[1], match[2]), match[3] or "main")
        elif match := re.fullmatch(r"/api/(model|dataset)s/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", path):
            self.tree(_name(match[1], match[2]), match[3], match[4] or "", "recursive=true" in query.lower())
        elif match := re.fullmatch(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.file(match[1], match[2], match[3])
        elif path == "/api/whoami-v2":
            self.answer(200, {"name": "someone", "type": "user", "auth": {"type": "access_token"}})
        else:
            self.answer(404)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self.requests.append(f"POST {self.path}")
        length = self.headers.get("Content-Length")
        body = self.rfile.read(int(length)) if length else b"".join(self.chunks())
        if match := re.fullmatch(r"/api/(model|dataset)s/([^/]+/[^/]+)/paths-info/([^/]+)", self.path):
            self.paths_info(_name(match[1], match[2]), match[3], parse_qs(body.decode())["paths"])
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.refuse(401, "Unauthorized")
        elif self.path == "/api/repos/create":
            given = json.loads(body)
            name = f"{given.get('organization') or 'someone'}/{given['name']}"
            exists = (self.root / name).is_dir()
            (self.root / name).mkdir(parents=True, exist_ok=True)
            self.answer(409 if exists else 200, {"url": f"http://{self.headers['Host']}/{name}", "name": name})
        elif re.fullmatch(r"/api/models/.+/preupload/.+", self.path):
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            self.answer(200, {"files": files})
        elif match := re.fullmatch(r"/api/models/(.+/.+)/commit/(.+)", self.path):
            self.commit(match[1], match[2], body)
        elif re.fullmatch(r"/api/models/.+/branch/.+", self.path):
            self.answer(200, {})
        else:
            self.answer(200, {})

    def chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    # -- repositories
    def found(self, name: str, revision: str) -> Path | None:
        """The directory of a repository; ``None`` when the request has been refused."""
        if not (self.root / name).is_dir():
            self.refuse(404, "RepoNotFound")
        elif revision not in BRANCHES:
            self.refuse(404, "RevisionNotFound")
        else:
            return self.root / name
        return None

    def repository_info(self, name: str, revision: str) -> None:
        directory = self.found(name, revision)
        if directory is not None:
            files = [{"rfilename": str(p.relative_to(directory))} for p in sorted(directory.rglob("*")) if p.is_file()]
            self.answer(200, {"id": name, "sha": COMMIT, "siblings": files, "private": False})

    def tree(self, name: str, revision: str, inside: str, is_recursive: bool) -> None:
        directory = self.found(name, revision)
        if directory is None:
            return
        if not (directory / inside).is_dir():
            self.refuse(404, "EntryNotFound")
            return
        paths = (directory / inside).rglob("*") if is_recursive else (directory / inside).iterdir()
        self.answer(200, [_entry(directory, path) for path in sorted(paths)])

    def paths_info(self, name: str, revision: str, paths: list[str]) -> None:
        directory = self.found(name, revision)
        if directory is not None:
            self.answer(200, [_entry(directory, directory / path) for path in paths if (directory / path).exists()])

    def file(self, name: str, revision: str, path: str) -> None:
        directory = self.found(name, revision)
        if directory is None:
            return
        if name.endswith("/gated"):
            self.refuse(403, "GatedRepo")
            return
        if not (directory / path).is_file():
            self.refuse(404, "EntryNotFound")
            return
        content = (directory / path).read_bytes()
        headers = {"ETag": f'"{_oid(directory / path)}"', "X_Repo_Commit": COMMIT, "Accept_Ranges": "bytes"}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, stop = int(match[1]), min(int(match[2] or len(content)), len(content) - 1) + 1
            headers["Content_Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
            self.answer(206, content[start:stop], **headers)
        else:
            self.answer(200, content, **headers)

    def commit(self, name: str, branch: str, body: bytes) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        for line in lines:
            if line["key"] == "file":
                target = self.root / name / line["value"]["path"]
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(base64.b64decode(line["value"]["content"]))
        url = f"http://{self.headers['Host']}/{name}/commit/{COMMIT}"
        self.answer(200, {"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": ""})


def _name(kind: str, name: str) -> str:
    """Under which a repository lies, and its files are asked for."""
    return f"datasets/{name}" if kind == "dataset" else name


def _entry(directory: Path, path: Path) -> dict[str, Any]:
    """What the tree of a repository says of a path."""
    name = str(path.relative_to(directory))
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
    return {"type": "file", "path": name, "oid": _oid(path), "size": path.stat().st_size}


def _oid(path: Path) -> str:
    """Of a file in git, which the client compares nothing with."""
    return hashlib.sha1(path.read_bytes()).hexdigest()


@contextmanager
def loopback_hub(root: Path) -> Iterator[tuple[str, list[str]]]:
    """The address of a hub that lives as long as the context, and what it was asked so far."""
    requests: list[str] = []
    handler = type("Handler", (_Handler,), {"root": root, "requests": requests})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()
