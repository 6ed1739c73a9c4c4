"""A Hugging Face Hub on loopback, as far as huggingface_hub's client needs it to publish and to load.

Writing needs the token `TOKEN`. As on the Hub, large files are uploaded separately, each once, and become visible with
the commit that names them; small files are part of the commit. A request whose path is in
`broken` loses its connection in the middle.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


TOKEN = "hf_loopback"
LARGE = 100_000  # bytes; a larger file is uploaded separately

Files = dict[str, bytes]


@dataclass
class Repository:
    """Commits by id, and the names that point to them."""

    private: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, files: Files) -> str:
        commit_id = hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits[commit_id] = files
        self.branches["main"] = commit_id
        return commit_id

    def resolve(self, revision: str) -> str | None:
        known = self.branches | self.tags
        return known.get(revision) or (revision if revision in self.commits else None)

    def files(self, revision: str = "main") -> Files:
        return self.commits[self.resolve(revision) or revision]


class MiniHub(ThreadingHTTPServer):
    """A context manager; `url` is the endpoint, `repositories` its content."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # large files, by the hash of their content
        self.broken: set[str] = set()
        self.requests: list[str] = []
        self.lock = threading.Lock()

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *args):
        self.shutdown()
        self.server_close()

    def create(self, repo_id: str, private: bool = False) -> Repository:
        repository = self.repositories[repo_id] = Repository(private)
        repository.commit({})
        return repository


class Failure(Exception):
    """An answer with a status other than 200."""

    def __init__(self, status: int, code: str = "", **body):
        super().__init__(status)
        self.status, self.body = status, {"error": code} | body
        self.headers = {"X-Error-Code": code, "X-Error-Message": code} if code else {}


def object_id(content: bytes) -> str:
    """The hash of a file for git, or for the storage of large files."""
    if len(content) >= LARGE:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """One request; `ROUTES` below names the method for each path."""

    server: MiniHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format, *args):
        pass

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_request(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.server.requests.append(f"{self.command} {url.path}")
        if url.path in self.server.broken:
            self.close_connection = True
            return
        self.body = self.read_body()
        try:
            with self.server.lock:
                body, headers = self.route(unquote(url.path))
        except Failure as failure:
            self.answer(failure.status, json.dumps(failure.body).encode(), failure.headers)
        else:
            body = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.answer(200, body, {"Content-Type": "application/json"} | headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def route(self, path: str):
        for pattern, method, writes in ROUTES:
            match = re.fullmatch(pattern, path)
            if match:
                if writes and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    raise Failure(401, error="Invalid username or password.")
                found = method(self, **match.groupdict())
                return found if isinstance(found, tuple) else (found, {})
        raise Failure(404, "EntryNotFound")

    def repository(self, repo_id: str) -> Repository:
        if repo_id not in self.server.repositories:
            raise Failure(404, "RepoNotFound")
        return self.server.repositories[repo_id]

    def revision(self, repo_id: str, revision: str | None) -> tuple[str, Files]:
        repository = self.repository(repo_id)
        commit_id = repository.resolve(revision or "main")
        if commit_id is None:
            raise Failure(404, "RevisionNotFound")
        return commit_id, repository.commits[commit_id]

    def create_repo(self):
        asked = json.loads(self.body)
        repo_id = f"{asked.get('organization') or 'tester'}/{asked['name']}"
        answer = {"url": f"{self.server.url}/{repo_id}", "name": repo_id, "id": repo_id}
        if repo_id in self.server.repositories:
            raise Failure(409, "exists", **answer)
        self.server.create(repo_id, asked.get("visibility") == "private" or bool(asked.get("private")))
        return answer

    def validate_yaml(self):
        return {"errors": [], "warnings": []}

    def info(self, repo_id: str, revision: str | None = None):
        commit_id, files = self.revision(repo_id, revision)
        siblings = [{"rfilename": name} for name in sorted(files)]
        return {
            "id": repo_id,
            "modelId": repo_id,
            "sha": commit_id,
            "private": self.repository(repo_id).private,
            "tags": [],
            "siblings": siblings,
        }

    def refs(self, repo_id: str):
        repository = self.repository(repo_id)
        kinds = {"branches": ("heads", repository.branches), "tags": ("tags", repository.tags)}
        return {"converts": []} | {
            kind: [
                {"name": name, "ref": f"refs/{word}/{name}", "targetCommit": commit} for name, commit in refs.items()
            ]
            for kind, (word, refs) in kinds.items()
        }

    def tree(self, repo_id: str, revision: str, folder: str | None = None):
        _, files = self.revision(repo_id, revision)
        prefix = f"{folder}/" if folder else ""
        below = {name: content for name, content in files.items() if name.startswith(prefix)}
        if prefix and not below:
            raise Failure(404, "EntryNotFound")
        if self.query.get("recursive", [""])[0].lower() in ("1", "true"):
            names = set(below)
        else:
            names = {prefix + name[len(prefix) :].partition("/")[0] for name in below}
        return [
            {"type": "file", "path": name, "size": len(below[name]), "oid": object_id(below[name])}
            if name in below
            else {"type": "directory", "path": name, "size": 0, "oid": "0" * 40}
            for name in sorted(names)
        ]

    def preupload(self, repo_id: str, revision: str):
        _, files = self.revision(repo_id, revision)
        return {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["size"] >= LARGE else "regular",
                    "shouldIgnore": False,
                    "oid": object_id(files[file["path"]]) if file["path"] in files else None,
                }
                for file in json.loads(self.body)["files"]
            ]
        }

    def batch(self, repo_id: str):
        """Say where to send the large files that are not here yet."""
        asked = [{"oid": file["oid"], "size": file["size"]} for file in json.loads(self.body)["objects"]]
        for file in asked:
            if file["oid"] not in self.server.objects:
                file["actions"] = {"upload": {"href": f"{self.server.url}/objects/{file['oid']}"}}
        return {"transfer": "basic", "objects": asked}

    def store(self, oid: str):
        if object_id(self.body) != oid:
            raise Failure(400, "not what was announced")
        self.server.objects[oid] = self.body
        return {}

    def commit(self, repo_id: str, revision: str):
        files = dict(self.revision(repo_id, revision)[1])
        for line in self.body.splitlines():
            operation = json.loads(line)
            if operation["key"] == "file":
                files[operation["value"]["path"]] = base64.b64decode(operation["value"]["content"])
            elif operation["key"] == "lfsFile":
                files[operation["value"]["path"]] = self.server.objects[operation["value"]["oid"]]
            elif operation["key"] == "deletedFile":
                del files[operation["value"]["path"]]
        commit_id = self.repository(repo_id).commit(files)
        url = f"{self.server.url}/{repo_id}/commit/{commit_id}"
        return {"success": True, "commitOid": commit_id, "commitUrl": url, "hookOutput": ""}

    def tag(self, repo_id: str, revision: str):
        self.repository(repo_id).tags[json.loads(self.body)["tag"]] = self.revision(repo_id, revision)[0]
        return {}

    def file(self, repo_id: str, revision: str, name: str):
        commit_id, files = self.revision(repo_id, revision)
        if name not in files:
            raise Failure(404, "EntryNotFound")
        headers = {"ETag": f'"{object_id(files[name])}"', "X-Repo-Commit": commit_id}
        return files[name], headers | {"Content-Type": "application/octet-stream"}


MODEL = r"/api/models/(?P<repo_id>[^/]+/[^/]+)"

# Pattern of the path, method, and whether it needs the token.
ROUTES = (
    (r"/api/repos/create", Handler.create_repo, True),
    (r"/api/validate-yaml", Handler.validate_yaml, False),
    (MODEL + r"(/revision/(?P<revision>.+))?", Handler.info, False),
    (MODEL + r"/refs", Handler.refs, False),
    (MODEL + r"/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", Handler.tree, False),
    (MODEL + r"/preupload/(?P<revision>[^/]+)", Handler.preupload, True),
    (r"/(?P<repo_id>[^/]+/[^/]+)\.git/info/lfs/objects/batch", Handler.batch, True),
    (r"/objects/(?P<oid>[0-9a-f]+)", Handler.store, False),  # whoever has the address may write
    (MODEL + r"/commit/(?P<revision>[^/]+)", Handler.commit, True),
    (MODEL + r"/tag/(?P<revision>[^/]+)", Handler.tag, True),
    (r"/(?P<repo_id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)", Handler.file, False),
)
