"""A stand-in for the Hugging Face hub: the parts of its protocol that downloads use."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

API_PATH = r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """What the server holds and how it misbehaves."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.repo = "owner/repo"
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, Range
        self.break_after: dict[str, list[int]] = {}  # file -> bytes to send, per GET, then hang up
        self.declared_bytes: dict[str, int] = {}  # file -> a wrong size in the headers of HEAD
        self.status: int | None = None  # answer everything with this
        self.error_code: str | None = None  # X-Error-Code beside it
        self.url = ""
        self.sent_bytes = 0  # of files

    def gets(self, file: str) -> list[str | None]:
        """The Range of each GET of a file."""
        return [r for m, p, r in self.requests if m == "GET" and p.endswith(f"/{file}")]


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            if "Content_Length" not in headers:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def refuse(self, status: int, code: str) -> None:
            self.answer(status, b"{}", X_Error_Code=code, X_Error_Message=code)

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append((self.command, path, self.headers.get("Range")))
            if hub.status is not None:
                headers = {"X_Error_Code": hub.error_code} if hub.error_code else {}
                self.answer(hub.status, b"{}", **headers)
            elif match := re.fullmatch(
                r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path
            ):
                self.api(*match.groups())
            elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                self.file(*match.groups())
            else:
                self.refuse(404, "EntryNotFound")

        def known(self, repo: str, revision: str | None) -> bool:
            if repo != hub.repo:
                self.refuse(401, "RepoNotFound")  # as the hub answers without a token
            elif revision not in (None, "main", COMMIT):
                self.refuse(404, "RevisionNotFound")
            else:
                return True
            return False

        def api(self, repo: str, what: str | None, revision: str | None) -> None:
            if not self.known(repo, revision):
                return
            if what == "tree":
                found: object = [
                    {"type": "file", "path": name, "size": len(data), "oid": etag(data)[:40]}
                    for name, data in hub.files.items()
                ]
            else:
                siblings = [{"rfilename": name} for name in hub.files]
                found = {"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings}
            self.answer(200, json.dumps(found).encode(), Content_Type="application/json")

        def file(self, repo: str, revision: str, name: str) -> None:
            if not self.known(repo, revision):
                return
            if name not in hub.files:
                self.refuse(404, "EntryNotFound")
                return
            data = hub.files[name]
            headers = {
                "ETag": f'"{etag(data)}"',
                "X_Repo_Commit": COMMIT,
                "X_Linked_ETag": f'"{etag(data)}"',
                "X_Linked_Size": str(hub.declared_bytes.get(name, len(data))),
                "Accept_Ranges": "bytes",
            }
            status, first = 200, 0
            end = len(data)
            if ranged := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                status, first = 206, int(ranged[1])
                end = min(end, int(ranged[2]) + 1) if ranged[2] else end
                headers["Content_Range"] = f"bytes {first}-{end - 1}/{len(data)}"
            body = data[first:end]
            headers["Content_Length"] = str(len(body))
            breaks = hub.break_after.get(name, [])
            if self.command == "GET" and breaks:
                body = body[: breaks.pop(0)]
                self.close_connection = True
            if self.command == "GET":
                hub.sent_bytes += len(body)
            self.answer(status, body, **headers)

    return Handler


def etag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub on a free port of this machine, stopped at the end."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
