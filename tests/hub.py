"""As much of the Hugging Face hub's HTTP API as pushing a release takes, on loopback: repositories, commits, tags, LFS.

It speaks LFS, not Xet (HF_HUB_DISABLE_XET)."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)
    tags: dict[str, dict[str, bytes]] = field(default_factory=dict)


class Hub(ThreadingHTTPServer):
    """`repositories` by name, `objects` of LFS by sha256; only `token` may write."""

    token = "hf_tests"

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def environment(self) -> dict[str, str]:
        """Of a process whose hub this is: the client reads its endpoint when it is imported."""
        own = {"HF_ENDPOINT": self.url, "HF_TOKEN": self.token, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        return os.environ | own


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, value: Any, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def repository(self) -> tuple[Repository, list[str]]:
        """Of `/api/models/<owner>/<name>/…`, with the rest of the path."""
        _, _, _, owner, name, *rest = urlsplit(self.path).path.split("/")
        return self.server.repositories[f"{owner}/{name}"], rest

    def do_HEAD(self) -> None:
        self.do_GET()

    def file(self, content: bytes | None) -> None:
        if content is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
        else:
            self.send_response(200)
            self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content or b"")

    def do_GET(self) -> None:
        if "/resolve/" in self.path:
            _, owner, name, _, revision, path = unquote(urlsplit(self.path).path).split("/", 5)
            return self.file(self.server.repositories[f"{owner}/{name}"].tags[revision].get(path))
        if self.path == "/api/whoami-v2":
            known = self.headers.get("Authorization") == f"Bearer {self.server.token}"
            user = {"name": "me", "orgs": [{"name": "ours"}], "auth": {"accessToken": {"role": "write"}}}
            return self.answer(user if known else {"error": "Invalid credentials"}, 200 if known else 401)
        name = "/".join(urlsplit(self.path).path.removeprefix("/api/models/").split("/")[:2])
        if name not in self.server.repositories:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        repo, rest = self.repository()
        if rest[0] == "auth-check":
            allowed = self.headers.get("Authorization") == f"Bearer {self.server.token}"
            self.answer({} if allowed else {"error": "not yours"}, 200 if allowed else 403)
        elif rest == ["refs"]:
            tags = [{"name": t, "ref": f"refs/tags/{t}", "targetCommit": "0" * 40} for t in repo.tags]
            self.answer({"branches": [], "converts": [], "tags": tags})
        elif rest[0] == "tree":
            oids = {name: hashlib.sha1(content).hexdigest() for name, content in repo.files.items()}
            self.answer([{"type": "file", "path": n, "size": len(repo.files[n]), "oid": o} for n, o in oids.items()])
        else:
            self.answer({"error": self.path}, 404)

    def do_PUT(self) -> None:
        content = self.body()
        if hashlib.sha256(content).hexdigest() != self.path.rsplit("/", 1)[1]:
            return self.answer({"error": "not what was announced"}, 400)
        self.server.objects[self.path.rsplit("/", 1)[1]] = content
        self.answer({})

    def do_POST(self) -> None:
        text = self.body()
        if self.headers.get("Authorization") != f"Bearer {self.server.token}":
            return self.answer({"error": "Invalid credentials"}, 401)
        path = urlsplit(self.path).path
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            asked = json.loads(text)
            name = f"{asked['organization']}/{asked['name']}"
            known = name in self.server.repositories
            self.server.repositories.setdefault(name, Repository())
            return self.answer({"url": f"{self.server.url}/{name}"}, 409 if known else 200)
        if path.endswith("/info/lfs/objects/batch"):
            asked = json.loads(text)["objects"]
            upload = [{**o, "actions": {"upload": {"href": f"{self.server.url}/lfs/{o['oid']}"}}} for o in asked]
            return self.answer({"transfer": "basic", "objects": upload})
        repo, rest = self.repository()
        if rest[0] == "preupload":
            modes = {
                f["path"]: "lfs" if f["path"].endswith(".safetensors") else "regular" for f in json.loads(text)["files"]
            }
            files = [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in modes.items()]
            return self.answer({"files": files})
        if rest[0] == "tag":
            repo.tags[json.loads(text)["tag"]] = dict(repo.files)
            return self.answer({})
        assert rest[0] == "commit"
        lines = [json.loads(line) for line in text.splitlines()]
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                repo.commits.append(value["summary"])
            elif line["key"] == "file":
                repo.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repo.files[value["path"]] = self.server.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del repo.files[value["path"]]
        place = f"{self.server.url}/{'/'.join(urlsplit(self.path).path.split('/')[3:5])}"
        self.answer({"commitUrl": f"{place}/commit/{'0' * 40}", "commitOid": "0" * 40, "success": True})
