"""A small hub on this machine: it keeps repositories of models in memory and speaks the few routes
of the real one by which an adapter is pushed and pulled. What it was asked for is in `asked`."""

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


class Hub(ThreadingHTTPServer):
    """The server; `repositories` has files by path, by the name of the repository."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Routes)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.asked: list[tuple[str, str]] = []
        self.refuses = 0  # a status that everything is answered with

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Routes(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, value: object = None, *, status: int = 200, **headers: str) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _begin(self) -> tuple[list[str], bytes]:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        self.server.asked.append((self.command, path))
        return path.strip("/").split("/"), body

    def do_POST(self) -> None:
        path, body = self._begin()
        if self.server.refuses:
            return self._answer({"error": "refused"}, status=self.server.refuses)
        if path == ["api", "repos", "create"]:
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'someone'}/{asked['name']}"
            self.server.repositories.setdefault(name, {})
            return self._answer({"url": f"{self.server.address}/{name}", "name": name})
        if path == ["api", "validate-yaml"]:
            return self._answer({"errors": [], "warnings": []})
        name, what = "/".join(path[2:4]), path[4]
        if what == "preupload":
            files = json.loads(body)["files"]
            modes = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files
            ]
            return self._answer({"files": modes})
        assert what == "commit", path
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                content = base64.b64decode(line["value"]["content"])
                self.server.repositories[name][line["value"]["path"]] = content
        sha = _sha(self.server.repositories[name])
        url = f"{self.server.address}/{name}/commit/{sha}"
        return self._answer({"success": True, "commitOid": sha, "commitUrl": url})

    def do_GET(self) -> None:
        path, _ = self._begin()
        if self.server.refuses:
            return self._answer({"error": "refused"}, status=self.server.refuses)
        if path[0] == "api":
            name = "/".join(path[2:4])
            files = self.server.repositories.get(name)
            if files is None:
                missing = {"X_Error_Code": "RepoNotFound"}
                return self._answer({"error": "not found"}, status=404, **missing)
            if path[4:5] == ["tree"]:
                entries = [
                    {"type": "file", "path": p, "size": len(c), "oid": sha1(c).hexdigest()}
                    for p, c in files.items()
                ]
                return self._answer(entries)
            siblings = [{"rfilename": file} for file in files]
            about = {"id": name, "modelId": name, "sha": _sha(files), "siblings": siblings}
            return self._answer({**about, "private": False, "tags": [], "downloads": 0, "likes": 0})
        name, file = "/".join(path[:2]), "/".join(path[4:])
        files = self.server.repositories.get(name, {})
        if file not in files:
            return self._answer({"error": "no"}, status=404, X_Error_Code="EntryNotFound")
        content = files[file]
        marks = {"ETag": f'"{sha1(content).hexdigest()}"', "X_Repo_Commit": _sha(files)}
        return self._answer(content, **marks)

    do_HEAD = do_GET


def _sha(files: dict[str, bytes]) -> str:
    hash = sha1()
    for name in sorted(files):
        hash.update(name.encode() + b"\0" + files[name])
    return hash.hexdigest()


@contextmanager
def hub() -> Iterator[Hub]:
    """Serve in a thread until the context ends."""
    server = Hub()
    thread = Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
