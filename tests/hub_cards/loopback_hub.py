"""A Hub on this machine's loopback address: enough of its HTTP API for the real clients, contents kept in memory.

Run by itself (``python loopback_hub.py``) it prints its address and serves until its standard input is closed.
"""

import base64
import hashlib
import json
import re
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS_ENDINGS = (".safetensors", ".parquet", ".png", ".bin", ".arrow", ".npz")
TYPES = {"model": "", "dataset": "datasets/", "space": "spaces/"}


def git_hash(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Blob:
    """One file of a commit."""

    content: bytes
    lfs: bool

    @property
    def etag(self):
        return hashlib.sha256(self.content).hexdigest() if self.lfs else git_hash(self.content)


@dataclass
class Repo:
    """A repository: a line of commits, and names that point at them."""

    commits: dict = field(default_factory=dict)  # sha -> {path: Blob}, in order
    messages: list = field(default_factory=list)
    tags: dict = field(default_factory=dict)

    def __post_init__(self):
        self.commit({".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)}, "initial commit")

    @property
    def head(self):
        return list(self.commits)[-1]

    def commit(self, files, message):
        state = "\n".join(f"{path} {blob.etag}" for path, blob in sorted(files.items()))
        sha = hashlib.sha1(f"{len(self.commits)}{message}{state}".encode()).hexdigest()
        self.commits[sha] = files
        self.messages.append(message)
        return sha

    def resolve(self, revision):
        if revision in ("main", "refs/heads/main", None):
            return self.head
        revision = self.tags.get(revision.removeprefix("refs/tags/"), revision)
        return revision if revision in self.commits else None


class LoopbackHub(ThreadingHTTPServer):
    """The server. Uploads of the large files in ``broken`` (their SHA-256) are cut off in the middle, every time."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos, self.large, self.requests = {}, {}, []
        self.broken = set()
        self.lock = threading.RLock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def start(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def repo(self, name, kind="model"):
        return self.repos[kind, name]

    def files(self, name, kind="model", revision="main"):
        repo = self.repo(name, kind)
        return {path: blob.content for path, blob in repo.commits[repo.resolve(revision)].items()}

    def handle_error(self, request, client_address):
        pass  # a client that was cut off is part of the tests


class Handler(BaseHTTPRequestHandler):
    """Routes by regular expression."""

    protocol_version = "HTTP/1.1"
    REPO = r"/api/(?P<kind>model|dataset|space)s/(?P<name>[^/]+/[^/]+)"
    FILE = r"/(?P<kind>datasets/|spaces/)?(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)"
    ROUTES = (
        ("POST", r"/api/repos/create", "create_repo"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("GET", r"/api/whoami-v2", "who_am_i"),
        ("POST", REPO + r"/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", REPO + r"/commit/(?P<revision>[^/]+)", "commit"),
        ("POST", REPO + r"/tag/(?P<revision>[^/]+)", "tag"),
        ("POST", REPO + r"/paths-info/(?P<revision>[^/]+)", "paths_info"),
        ("GET", REPO + r"/refs", "refs"),
        ("GET", REPO + r"/tree/(?P<revision>[^/]+)(?:/(?P<path>.*))?", "tree"),
        ("GET", REPO + r"(?:/revision/(?P<revision>[^/]+))?", "info"),
        ("POST", r"/(?P<kind>datasets/|spaces/)?(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_upload"),
        ("GET", FILE, "file"),
        ("HEAD", FILE, "file"),
    )

    def log_message(self, *arguments):
        pass

    def route(self):
        parts = urlsplit(self.path)
        self.query = parse_qs(parts.query)
        self.server.requests.append((self.command, parts.path))
        for method, pattern, name in self.ROUTES:
            match = re.fullmatch(pattern, parts.path)
            if method == self.command and match:
                values = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                return self.answer(name, values)
        self.body()
        return self.error(404, "EntryNotFound", f"no such page: {parts.path}")

    do_GET = do_POST = do_PUT = do_HEAD = route

    def answer(self, name, values):
        if name == "lfs_upload":  # streamed, outside of the lock
            return self.lfs_upload(**values)
        body = self.body()
        with self.server.lock:
            if "name" in values and name not in ("create_repo",):
                kind = values.pop("kind", "model").removesuffix("/").removesuffix("s") or "model"
                repo = self.server.repos.get((kind, values.pop("name")))
                if repo is None:
                    return self.error(404, "RepoNotFound", "Repository not found")
                if "revision" in values:
                    values["sha"] = repo.resolve(values.pop("revision"))
                    if values["sha"] is None:
                        return self.error(404, "RevisionNotFound", "Revision not found")
                return getattr(self, name)(repo=repo, body=body, **values)
            return getattr(self, name)(body=body)

    # Pages

    def create_repo(self, body):
        wanted = json.loads(body)
        name = f"{wanted.get('organization') or 'tester'}/{wanted['name']}"
        kind = wanted.get("type", "model")
        if (kind, name) in self.server.repos:
            return self.json({"error": "exists", "url": f"{self.server.url}/{TYPES[kind]}{name}"}, 409)
        self.server.repos[kind, name] = Repo()
        return self.json({"url": f"{self.server.url}/{TYPES[kind]}{name}", "name": name})

    def validate_yaml(self, body):
        content = json.loads(body)["content"]
        try:
            header = yaml.safe_load(content.split("---")[1]) if content.startswith("---") else {}
        except yaml.YAMLError as error:
            return self.json({"errors": [{"message": str(error)}], "warnings": []}, 400)
        errors = [] if isinstance(header, dict) else [{"message": "the header is no mapping"}]
        return self.json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def who_am_i(self, body):
        return self.json({"type": "user", "name": "tester", "auth": {"accessToken": {"role": "write"}}})

    def preupload(self, repo, body, sha):
        files = []
        for wanted in json.loads(body)["files"]:
            path, large = wanted["path"], wanted["path"].endswith(LFS_ENDINGS)
            present = repo.commits[sha].get(path)
            oid = None if present is None else present.etag
            mode = "lfs" if large else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return self.json({"files": files})

    def lfs_batch(self, repo, body):
        objects = []
        for wanted in json.loads(body)["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.server.large:
                answer["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{wanted['oid']}", "header": {}}}
            objects.append(answer)
        return self.json({"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid):
        received = b""
        for piece in self.pieces():
            received += piece
            if oid in self.server.broken and len(received) > 1000:
                self.close_connection = True
                self.connection.close()
                return None
        if hashlib.sha256(received).hexdigest() != oid:
            return self.error(400, "BadRequest", "the content has another hash")
        with self.server.lock:
            self.server.large[oid] = received
        return self.json({})

    def commit(self, repo, body, sha):
        files = dict(repo.commits[sha])
        summary = ""
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                summary = value["summary"]
            elif entry["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.server.large:
                    return self.error(400, "BadRequest", f"{value['path']} was never uploaded")
                files[value["path"]] = Blob(self.server.large[value["oid"]], True)
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
            else:
                return self.error(400, "BadRequest", f"unknown operation {entry['key']}")
        new = repo.commit(files, summary)
        return self.json(
            {"success": True, "commitOid": new, "commitUrl": f"{self.server.url}/{self.name_of(repo)}/commit/{new}"}
        )

    def tag(self, repo, body, sha):
        name = json.loads(body)["tag"]
        if name in repo.tags:
            return self.error(409, "Conflict", "Tag already exists")
        repo.tags[name] = sha
        return self.json({})

    def refs(self, repo, body):
        tags = [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": sha} for n, sha in repo.tags.items()]
        branches = [{"name": "main", "ref": "refs/heads/main", "targetCommit": repo.head}]
        return self.json({"branches": branches, "tags": tags, "converts": []})

    def tree(self, repo, body, sha, path=""):
        deep = self.query.get("recursive", ["false"])[0].lower() == "true"
        entries, folders = [], set()
        for name, blob in sorted(repo.commits[sha].items()):
            if path and not name.startswith(path.rstrip("/") + "/"):
                continue
            below = name[len(path.rstrip("/")) + 1 if path else 0 :].split("/")
            depths = range(1, len(below)) if deep else range(1, min(2, len(below)))
            prefix = path.rstrip("/") + "/" if path else ""
            folders |= {prefix + "/".join(below[:depth]) for depth in depths}
            if deep or len(below) == 1:
                entries.append(self.entry(name, blob))
        if path and not entries and not folders:
            return self.error(404, "EntryNotFound", "Entry not found")
        entries += [{"type": "directory", "path": name, "oid": "0" * 40, "size": 0} for name in sorted(folders)]
        return self.json(entries)

    def paths_info(self, repo, body, sha):
        if self.headers.get("Content-Type", "").startswith("application/json"):
            wanted = json.loads(body)["paths"]
        else:
            wanted = parse_qs(body.decode()).get("paths", [])
        files = repo.commits[sha]
        folders = {"/".join(name.split("/")[:depth]) for name in files for depth in range(1, name.count("/") + 1)}
        entries = [self.entry(name, files[name]) for name in wanted if name in files]
        entries += [{"type": "directory", "path": n, "oid": "0" * 40, "size": 0} for n in wanted if n in folders]
        return self.json(entries)

    def info(self, repo, body, sha=None):
        sha = sha or repo.head
        name = self.name_of(repo)
        files = [{"rfilename": path} for path in sorted(repo.commits[sha])]
        facts = {"_id": "1", "id": name, "modelId": name, "sha": sha, "private": False, "siblings": files, "tags": []}
        facts |= {"downloads": 0, "lastModified": "2026-01-01T00:00:00.000Z", "disabled": False, "gated": False}
        return self.json(facts)

    def name_of(self, repo):
        return next(name for (_, name), value in self.server.repos.items() if value is repo)

    def file(self, repo, body, sha, path):
        blob = repo.commits[sha].get(path)
        if blob is None:
            return self.error(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": sha})
        content, status = blob.content, 200
        headers = {"ETag": f'"{blob.etag}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if blob.lfs:
            headers |= {"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": str(len(content))}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted:
            start, stop = int(wanted[1]), int(wanted[2] or len(content) - 1) + 1
            headers["Content-Range"] = f"bytes {start}-{min(stop, len(content)) - 1}/{len(content)}"
            content, status = content[start:stop], 206
        return self.send(content, status, "application/octet-stream", headers)

    # Plumbing

    def pieces(self):
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length", 0))
        while left:
            piece = self.rfile.read(min(left, 1 << 16))
            if not piece:
                return
            left -= len(piece)
            yield piece

    def body(self):
        return b"".join(self.pieces())

    @staticmethod
    def entry(name, blob):
        entry = {"type": "file", "path": name, "oid": git_hash(blob.content), "size": len(blob.content)}
        return (
            {**entry, "lfs": {"oid": blob.etag, "size": len(blob.content), "pointerSize": 134}} if blob.lfs else entry
        )

    def json(self, value, status=200):
        return self.send(json.dumps(value).encode(), status, "application/json", {})

    def error(self, status, code, message, headers=None):
        headers = {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})}
        return self.send(json.dumps({"error": message}).encode(), status, "application/json", headers)

    def send(self, content, status, kind, headers):
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


if __name__ == "__main__":
    hub = LoopbackHub().start()
    print(hub.url, flush=True)
    sys.stdin.read()
