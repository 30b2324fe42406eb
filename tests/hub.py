"""As much of the hub as giving models away and taking them needs, on this machine."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any, ClassVar

TOKEN = "hf_" + "t" * 34
SETTINGS = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


class Hub(BaseHTTPRequestHandler):
    """The repositories of models: of each whether it is private, and its commits, the last of which is what it has.
    Only who has TOKEN may write."""

    protocol_version = "HTTP/1.1"
    private: ClassVar[dict[str, bool]] = {}
    commits: ClassVar[dict[str, list[dict[str, bytes]]]] = {}
    large: ClassVar[dict[str, bytes]] = {}  # by SHA-256

    def log_message(self, *arguments: object) -> None:
        pass

    def answer(self, body: Any, status: int = 200, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content_Length": str(len(data)), "Content_Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].strip("/")
        repo = "/".join(path.removeprefix("api/models/").split("/")[:2])
        if repo not in self.commits:
            self.answer({}, 404, X_Error_Code="RepoNotFound")
            return
        files, sha = self.commits[repo][-1], f"{len(self.commits[repo]):040x}"
        if "/tree/" in path:
            self.answer([{"type": "file", "path": name, "size": len(d), "oid": "0" * 40} for name, d in files.items()])
        elif path.startswith("api/models/"):
            self.answer({"id": repo, "sha": sha, "siblings": [{"rfilename": name} for name in files]})
        else:
            data = files[path.split("/", 4)[4]]
            self.answer(data, ETag=f'"{hashlib.sha256(data).hexdigest()}"', X_Repo_Commit=sha)

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        self.large[self.path.rpartition("/")[2]] = self.body()
        self.answer({})

    def do_POST(self) -> None:
        path, body = self.path.partition("?")[0], self.body()
        if path == "/api/validate-yaml":
            self.answer({"warnings": [], "errors": []})
            return
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer({"error": "Invalid username or password."}, 401)
        elif path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            known = repo in self.commits
            self.commits.setdefault(repo, [{".gitattributes": b""}])
            self.private.setdefault(repo, asked.get("visibility") == "private")
            self.answer({"url": f"http://{self.headers['Host']}/{repo}"}, 409 if known else 200)
        elif "/preupload/" in path:
            modes = {True: "lfs", False: "regular"}
            files = [file["path"] for file in json.loads(body)["files"]]
            kinds = [{"path": f, "uploadMode": modes[f.endswith(".safetensors")], "shouldIgnore": False} for f in files]
            self.answer({"files": kinds})
        elif path.endswith("/objects/batch"):
            at = f"http://{self.headers['Host']}/large"
            objects = [{**o, "actions": {"upload": {"href": f"{at}/{o['oid']}"}}} for o in json.loads(body)["objects"]]
            self.answer({"transfer": "basic", "objects": objects})
        else:
            self.commit("/".join(path.split("/")[3:5]), [json.loads(line) for line in body.splitlines()])

    def commit(self, repo: str, lines: list[dict[str, Any]]) -> None:
        files = dict(self.commits[repo][-1])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        self.commits[repo].append(files)
        url = f"http://{self.headers['Host']}/{repo}/commit/{len(self.commits[repo]):040x}"
        self.answer({"commitUrl": url, "commitOid": f"{len(self.commits[repo]):040x}"})


@contextmanager
def served(handler: type[BaseHTTPRequestHandler] = Hub) -> Iterator[str]:
    """Where `handler` answers."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
