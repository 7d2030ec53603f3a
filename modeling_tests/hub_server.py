"""A stand-in for the Hub: as much of its HTTP API as uploading a folder and loading it by its repo id take."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


class Hub(ThreadingHTTPServer):
    """
    `commits` are, for each repository, pairs of a commit's name and its files; what was uploaded by LFS is in `objects`.
    Files end up here only by way of a commit.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.commits: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.objects: dict[str, bytes] = {}
        self.private: dict[str, bool] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def files(self, repo_id: str, revision: str = "main") -> tuple[str, dict[str, bytes]]:
        """Raises `LookupError` without such a repository or commit."""
        history = self.commits[repo_id]
        return history[-1] if revision == "main" else {oid: (oid, files) for oid, files in history}[revision]

    def commit(self, repo_id: str, lines: list[dict[str, Any]]) -> str:
        files = dict(self.files(repo_id)[1])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
            else:
                assert line["key"] == "header", line
        oid = hashlib.sha1(json.dumps([len(self.commits[repo_id]), lines]).encode()).hexdigest()
        self.commits[repo_id].append((oid, files))
        return oid


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, content: Any, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if self.command not in ("GET", "HEAD", "PUT") and self.headers["Authorization"] != "Bearer hf_secret":
            self.answer({"error": "Invalid credentials"}, 401)
            return
        try:
            self.route(path, body)
        except LookupError as error:
            code = "EntryNotFound" if "resolve" in path or "tree" in path else "RepoNotFound"
            self.answer({"error": f"not here: {error}"}, 404, X_Error_Code=code)

    do_GET = do_HEAD = do_POST = do_PUT = do_any  # noqa: N815

    def route(self, path: list[str], body: bytes) -> None:
        hub = self.server
        match path:
            case ["api", "whoami-v2"]:
                self.answer({"name": "someone", "type": "user", "orgs": []})
            case ["api", "validate-yaml"]:
                self.answer({"errors": [], "warnings": []})
            case ["api", "repos", "create"]:
                request = json.loads(body)
                repo_id = "/".join(filter(None, [request.get("organization") or "someone", request["name"]]))
                status = 409 if repo_id in hub.commits else 200
                hub.commits.setdefault(repo_id, [("0" * 40, {})])
                hub.private.setdefault(repo_id, bool(request.get("private")) or request.get("visibility") == "private")
                self.answer({"url": f"{hub.url}/{repo_id}", "name": repo_id}, status)
            case ["api", "models", owner, name, "preupload", _]:
                known = hub.files(f"{owner}/{name}")[1]
                files = [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                        "shouldIgnore": False,
                        "oid": None if file["path"] not in known else git_hash(known[file["path"]]),
                    }
                    for file in json.loads(body)["files"]
                ]
                self.answer({"files": files})
            case [_, _, "info", "lfs", "objects", "batch"]:
                objects = [
                    {**each, "actions": {"upload": {"href": f"{hub.url}/lfs/{each['oid']}"}}}
                    for each in json.loads(body)["objects"]
                ]
                self.answer({"transfer": "basic", "objects": objects})
            case ["lfs", oid]:
                assert hashlib.sha256(body).hexdigest() == oid
                hub.objects[oid] = body
                self.answer({})
            case ["api", "models", owner, name, "commit", _]:
                oid = hub.commit(f"{owner}/{name}", [json.loads(line) for line in body.splitlines()])
                self.answer({"success": True, "commitOid": oid, "commitUrl": f"{hub.url}/{owner}/{name}/commit/{oid}"})
            case ["api", "models", owner, name, *rest] if not rest or rest[0] in ("revision", "tree"):
                oid, files = hub.files(f"{owner}/{name}", rest[1] if rest else "main")
                if rest and rest[0] == "tree":
                    folder = "/".join(rest[2:])
                    if folder:
                        raise LookupError(folder)
                    self.answer(
                        [{"type": "file", "path": n, "size": len(f), "oid": git_hash(f)} for n, f in files.items()]
                    )
                    return
                repo_id = f"{owner}/{name}"
                siblings = [{"rfilename": file} for file in files]
                self.answer(
                    {
                        "id": repo_id,
                        "modelId": repo_id,
                        "sha": oid,
                        "siblings": siblings,
                        "tags": [],
                        "private": hub.private[repo_id],
                    }
                )
            case [owner, name, "resolve", revision, *parts]:
                oid, files = hub.files(f"{owner}/{name}", revision)
                content = files["/".join(parts)]
                self.answer(content, X_Repo_Commit=oid, ETag=f'"{git_hash(content)}"')
            case _:
                raise LookupError(self.path)


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def hub_server() -> Iterator[Hub]:
    """A [`Hub`] on this machine that takes the token `hf_secret`, empty at first."""
    with Hub() as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        yield hub
        hub.shutdown()
