"""A small Hugging Face Hub on loopback: tests publish and load models and datasets over real HTTP.

It speaks as much of the Hub's protocol as the unmodified `huggingface_hub`, `transformers` and `datasets` use. It keeps
everything in memory and needs the standard library only.

    with HubServer(tokens={"hf_good": "org-user"}) as hub:
        ...  # hub.url, hub.environment

A token belongs to one user, who may write in the namespace of that name only.

The clients read HF_* when they are imported, so there are two ways to use it:

- In a child process: `subprocess.run(command, env=os.environ | hub.environment)`. Nothing else is needed. The children of
  one server share one cache, `hub.environment["HF_HOME"]`, which goes away with the server.
- In the test's own process: call `patch_client(monkeypatch, hub, tmp_path)` first. It points what is already imported at
  the server and at an empty cache. After it `HfApi()`, `from_pretrained`, `push_to_hub` and `load_dataset` need no
  argument more. `HfApi(endpoint=hub.url, token=...)` without it is not enough: the client would upload large files with
  Xet, which this server does not have, and `from_pretrained` takes no endpoint at all.

Uploads of large files raise a DeprecationWarning in the client's own code ("Use 'content=<...>' to upload raw bytes").
A test module that uploads such files must ignore it where warnings are errors. `RepoCard.validate` and
`RepoCard.push_to_hub` of huggingface_hub 1 go to huggingface.co whatever the endpoint, so tests cannot use them.
"""

import base64
import contextlib
import hashlib
import json
import os
import re
import secrets
import socket
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.message import Message
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".png", ".jpg", ".parquet", ".bin", ".pt", ".onnx", ".npz", ".zip", ".gz")
GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()
MAX_BODY = 256 * 2**20
_ID = r"(?P<id>(?:[\w.-]+/)?[\w.-]+)"
_PAGE = rf"/(?P<kind>datasets/)?{_ID}"
_API = rf"/api/(?P<kind>models|datasets)/{_ID}"
_REV = r"(?P<rev>[^/]+)"
_ROUTES: list[tuple[str, re.Pattern, str, Callable]] = []


@dataclass
class Request:
    method: str
    query: dict[str, list[str]]
    headers: Message
    body: bytes
    user: str | None = None

    def json(self) -> dict:
        return json.loads(self.body or b"{}")

    def asks(self, option: str) -> bool:
        return self.query.get(option, [""])[0].lower() in ("1", "true")


@dataclass
class Reply:
    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


class Refused(Exception):
    """An answer that is an error; `code` is what the client turns into an exception of its own."""

    def __init__(self, status: int, message: str, code: str = "", **headers: str):
        super().__init__(message)
        headers |= {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.reply = Reply(status, json.dumps({"error": message}).encode(), headers)


@dataclass(frozen=True)
class Blob:
    """The content of a file, and whether git would hold it or only a pointer to it."""

    data: bytes
    lfs: bool

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        version = "https://git-lfs.github.com/spec/v1"
        return f"version {version}\noid sha256:{self.sha256}\nsize {len(self.data)}\n".encode()

    @cached_property
    def oid(self) -> str:
        stored = self.pointer if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()

    def info(self, sha256_key: str) -> dict:
        """The sizes and hashes; two endpoints differ in how they call the hash of a large file."""
        lfs = {sha256_key: self.sha256, "size": len(self.data), "pointerSize": len(self.pointer)}
        return {"size": len(self.data), **({"lfs": lfs} if self.lfs else {})}


@dataclass(frozen=True)
class Commit:
    """A whole tree, never changed once made: readers of a commit cannot see half of another."""

    sha: str
    parent: str | None
    author: str
    title: str
    message: str
    tree: dict[str, Blob]
    date: str = field(default_factory=lambda: datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"))


class Repo:
    """`refs` are full names, such as refs/heads/main; `lfs` are the large files sent, committed or not."""

    def __init__(self, kind: str, repo_id: str, private: bool):
        self.id, self.private, self.namespace = repo_id, private, repo_id.partition("/")[0]
        self.page = f"/{'datasets/' if kind == 'datasets' else ''}{repo_id}"
        self.commits: dict[str, Commit] = {}
        self.refs: dict[str, str] = {}
        self.lfs: dict[str, bytes] = {}
        tree = {".gitattributes": Blob(GITATTRIBUTES, False)}
        self.commit("refs/heads/main", None, self.namespace, "initial commit", "", tree)

    def commit(self, ref: str, parent: str | None, author: str, title: str, message: str, tree: dict) -> Commit:
        tree = dict(sorted(tree.items()))
        oids = {path: blob.oid for path, blob in tree.items()}
        described = json.dumps([self.page, len(self.commits), parent, author, title, message, oids])
        commit = Commit(hashlib.sha1(described.encode()).hexdigest(), parent, author, title, message, tree)
        self.commits[commit.sha] = commit
        self.refs[ref] = commit.sha
        return commit

    def resolve(self, revision: str) -> Commit:
        """The commit of a branch, a tag, a full ref or a full sha."""
        names = (f"refs/heads/{revision}", f"refs/tags/{revision}", revision)
        sha = next((self.refs[name] for name in names if name in self.refs), revision)
        if sha not in self.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[sha]

    def history(self, commit: Commit) -> Iterator[Commit]:
        yield commit
        while commit.parent:
            commit = self.commits[commit.parent]
            yield commit

    def listing(self, commit: Commit, expand: bool) -> dict[str, dict]:
        """What the client is told about each file and folder of a commit."""
        entries: dict[str, dict] = {}
        for path, blob in commit.tree.items():
            for folder in (path[: slash.start()] for slash in re.finditer("/", path)):
                oid = hashlib.sha1(f"{commit.sha}/{folder}".encode()).hexdigest()
                entries.setdefault(folder, {"type": "directory", "path": folder, "oid": oid, "size": 0})
            entries[path] = {"type": "file", "path": path, "oid": blob.oid, **blob.info("oid")}
            if expand:
                touched = commit
                for older in self.history(commit):
                    if older.tree.get(path) != blob:
                        break
                    touched = older
                entries[path]["lastCommit"] = {"id": touched.sha, "title": touched.title, "date": touched.date}
        return entries


def route(methods: str, pattern: str, need: str = "read") -> Callable:
    """Declare what a method of the server answers, and what one may need in order to ask; see `HubServer._repo`."""

    def register(handler: Callable) -> Callable:
        _ROUTES.extend((method, re.compile(pattern), need, handler) for method in methods.split())
        return handler

    return register


def answer(data: object, status: int = 200) -> Reply:
    return Reply(status, json.dumps(data).encode(), {"Content-Type": "application/json; charset=utf-8"})


def content(request: Request, data: bytes, etag: str, headers: dict[str, str]) -> Reply:
    """The bytes of a file, or the range of them that was asked for."""
    headers = {"ETag": f'"{etag}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"} | headers
    wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("Range", ""))
    if not wanted or not any(wanted.groups()):
        return Reply(200, data, headers)
    first, last = wanted.groups()
    start = int(first) if first else max(len(data) - int(last), 0)
    stop = min(int(last) + 1, len(data)) if first and last else len(data)
    if start >= stop:
        raise Refused(416, "The range is outside of the file", **{"Content-Range": f"bytes */{len(data)}"})
    return Reply(206, data[start:stop], headers | {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"})


class HubServer:
    """The server. It listens from `with` on, on a free port of 127.0.0.1.

    Args:
        tokens: the valid tokens and the user that each belongs to. The first is the one that `environment` hands out.

    Attributes:
        url: what HF_ENDPOINT would be.
        requests: the method and the target (percent-encoded, with its query) of every request, in the order of arrival.
        fail: called with the method and the target of each request, outside of the server's lock, so it may also wait.
            None lets the request pass. An int is the status to answer with, and nothing is done. "drop" cuts the
            connection in the middle of the request's body, and nothing is done either; for a request without a body it
            cuts the answer's. Clients see a reset or a hang-up, and huggingface_hub 1 tries again after a reset only.
        lfs_threshold: files of more bytes are large files. So are those with one of LFS_SUFFIXES and binary ones.
        errors: exceptions of the server itself. Leaving `with` raises the first.
    """

    def __init__(self, tokens: Mapping[str, str]):
        self.tokens = dict(tokens)
        self.requests: list[tuple[str, str]] = []
        self.fail: Callable[[str, str], int | str | None] | None = None
        self.lfs_threshold = 10 * 2**20
        self.errors: list[BaseException] = []
        self._repos: dict[tuple[str, str], Repo] = {}
        self._lock = threading.Lock()
        self._secret = secrets.token_hex(16)  # stands for the signature of the storage's links

    def __enter__(self) -> "HubServer":
        self._home = tempfile.TemporaryDirectory()
        self._server = _Server(self)
        self.url, self._storage = (f"http://{host}:{self._server.server_port}" for host in ("127.0.0.1", "localhost"))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, exception_type: type | None, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        self._home.cleanup()
        if self.errors and exception_type is None:
            raise self.errors[0]

    @property
    def environment(self) -> dict[str, str]:
        """The variables that make a child process use this server and a cache of its own."""
        home = self._home.name
        caches = {"HF_HOME": home, "HF_HUB_CACHE": f"{home}/hub", "HF_DATASETS_CACHE": f"{home}/datasets"}
        online = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"), "0")
        without = {f"HF_HUB_DISABLE_{name}": "1" for name in ("XET", "TELEMETRY", "PROGRESS_BARS")}
        user = {"HF_ENDPOINT": self.url, "HF_TOKEN": next(iter(self.tokens), ""), "NO_PROXY": "127.0.0.1,localhost"}
        return user | caches | online | without

    def files(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> dict[str, bytes]:
        """The files of a revision, with the .gitattributes that every repository is made with."""
        with self._lock:
            tree = self._repos[f"{repo_type}s", repo_id].resolve(revision).tree
        return {path: blob.data for path, blob in tree.items()}

    def commits(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> list[tuple[str, str]]:
        """The sha and the title of each commit, the newest first and the one that made the repository last."""
        with self._lock:
            repo = self._repos[f"{repo_type}s", repo_id]
            return [(commit.sha, commit.title) for commit in repo.history(repo.resolve(revision))]

    def _answer(self, method: str, target: str, headers: Message, body: bytes) -> Reply:
        url = urlsplit(target)
        request = Request(method, parse_qs(url.query), headers, body)
        try:
            for known, pattern, need, handler in _ROUTES:
                if known == method and (match := pattern.fullmatch(url.path)):
                    parts: dict = {key: unquote(value or "") for key, value in match.groupdict().items()}
                    with self._lock:  # one request at a time: a commit happens at once
                        if need != "signature":
                            request.user = self._user(headers)
                        if "id" in parts:
                            parts["repo"] = self._repo(request, parts.pop("kind"), parts.pop("id"), need)
                        return handler(self, request, **parts)
            raise Refused(404, f"Sorry, we can't find the page you are looking for: {method} {url.path}")
        except Refused as refused:
            return refused.reply
        except Exception as error:
            self.errors.append(error)
            return Refused(400, f"{type(error).__name__}: {error}").reply

    def _user(self, headers: Message) -> str | None:
        token = headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.tokens:
            raise Refused(401, "Invalid credentials in Authorization header")
        return self.tokens.get(token)

    def _repo(self, request: Request, kind: str, repo_id: str, need: str) -> Repo:
        """Find a repository for one who needs to "read" it, to "write" to it, to be a known "user" who reads it, to make
        a "proposal", which is a write or a pull request of a user, or who shows the "signature" of a link."""
        repo = self._repos.get((kind.strip("/") or "models", repo_id))
        if repo is None or (repo.private and need != "signature" and request.user != repo.namespace):
            raise Refused(404 if request.user else 401, "Repository not found", "RepoNotFound")
        if need == "proposal":
            need = "user" if request.asks("create_pr") else "write"
        if need in ("user", "write"):
            self._check_user(request, repo.namespace if need == "write" else None)
        return repo

    def _check_user(self, request: Request, namespace: str | None = None) -> None:
        if request.user is None:
            raise Refused(401, "Invalid username or password.")
        if namespace and request.user != namespace:
            raise Refused(403, f"You don't have the rights to write in the namespace {namespace!r}")

    @route("GET", "/api/whoami-v2")
    def _whoami(self, request: Request) -> Reply:
        self._check_user(request)
        token = {"displayName": "test", "role": "write"}
        return answer({"type": "user", "name": request.user, "orgs": [], "auth": {"accessToken": token}})

    @route("POST", "/api/validate-yaml")
    def _validate_yaml(self, request: Request) -> Reply:
        empty = not request.json()["content"].startswith("---\n")
        warnings = [{"message": "empty or missing yaml metadata in repo card"}] if empty else []
        return answer({"errors": [], "warnings": warnings})

    @route("POST DELETE", "/api/repos/(?P<action>create|delete)")
    def _create_or_delete(self, request: Request, action: str) -> Reply:
        asked = request.json()
        kind = f"{asked.get('type') or 'model'}s"
        namespace = asked.get("organization") or request.user
        repo_id = f"{namespace}/{asked['name']}"
        if action == "delete":
            self._repo(request, kind, repo_id, "write")
            del self._repos[kind, repo_id]
            return answer({})
        self._check_user(request, namespace)
        if kind not in ("models", "datasets"):
            raise Refused(400, f"This server has models and datasets only, not {kind}")
        exists = (kind, repo_id) in self._repos
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        repo = self._repos.setdefault((kind, repo_id), Repo(kind, repo_id, private))
        error = {"error": "You already created this repo"} if exists else {}
        return answer({"url": self.url + repo.page, "name": repo_id, **error}, 409 if exists else 200)

    @route("GET", rf"{_API}(?:/revision/{_REV})?")
    def _info(self, request: Request, repo: Repo, rev: str) -> Reply:
        commit = repo.resolve(rev or "main")
        more = {path: {"blobId": blob.oid, **blob.info("sha256")} for path, blob in commit.tree.items()}
        siblings = [{"rfilename": path, **(more[path] if request.asks("blobs") else {})} for path in commit.tree]
        about = {"_id": "0" * 24, "id": repo.id, "author": repo.namespace, "sha": commit.sha, "private": repo.private}
        fixed = {"gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": []}
        dates = {"createdAt": next(iter(repo.commits.values())).date, "lastModified": commit.date}
        return answer(about | fixed | dates | {"siblings": siblings})

    @route("GET", rf"{_API}/tree/{_REV}(?:/(?P<path>.+))?")
    def _tree(self, request: Request, repo: Repo, rev: str, path: str) -> Reply:
        commit = repo.resolve(rev)
        prefix = f"{path.strip('/')}/" if path else ""
        inside = {
            key: entry for key, entry in repo.listing(commit, request.asks("expand")).items() if key.startswith(prefix)
        }
        if not inside and prefix:
            raise Refused(404, f"{path} does not exist on {rev!r}", "EntryNotFound", **{"X-Repo-Commit": commit.sha})
        recursive = request.asks("recursive")
        return answer([entry for key, entry in inside.items() if recursive or "/" not in key[len(prefix) :]])

    @route("POST", rf"{_API}/paths-info/{_REV}")
    def _paths_info(self, request: Request, repo: Repo, rev: str) -> Reply:
        form = parse_qs(request.body.decode())
        listing = repo.listing(repo.resolve(rev), form.get("expand", [""])[0].lower() == "true")
        return answer([listing[path] for path in form.get("paths", []) if path in listing])

    @route("GET", f"{_API}/refs")
    def _refs(self, request: Request, repo: Repo) -> Reply:
        groups: dict[str, list] = {"heads": [], "convert": [], "tags": [], "pr": []}
        for ref, sha in repo.refs.items():
            _, group, name = ref.split("/", 2)
            groups[group].append({"name": name, "ref": ref, "targetCommit": sha})
        return answer(dict(zip(("branches", "converts", "tags", "pullRequests"), groups.values(), strict=True)))

    @route("GET", f"{_API}/commits/{_REV}")
    def _commits(self, request: Request, repo: Repo, rev: str) -> Reply:
        history = repo.history(repo.resolve(rev))
        told = [{"id": made.sha, "authors": [{"user": made.author}], **vars(made)} for made in history]
        return answer([{key: commit[key] for key in ("id", "authors", "title", "message", "date")} for commit in told])

    @route("POST DELETE", rf"{_API}/(?P<what>branch|tag)/{_REV}", need="write")
    def _branch_or_tag(self, request: Request, repo: Repo, what: str, rev: str) -> Reply:
        # A new branch is named in the path and starts at a point of the body; for a tag it is the other way round.
        asked = request.json()
        name, start = (asked["tag"], rev) if "tag" in asked else (rev, asked.get("startingPoint", "main"))
        ref = f"refs/{'heads' if what == 'branch' else 'tags'}/{name}"
        if request.method == "POST":
            if ref in repo.refs:
                raise Refused(409, f"Reference already exists: {ref}")
            repo.refs[ref] = repo.resolve(start).sha
        elif ref == "refs/heads/main":
            raise Refused(403, "The branch main cannot be deleted")
        elif repo.refs.pop(ref, None) is None:
            raise Refused(404, f"Invalid rev id: {name}", "RevisionNotFound")
        return answer({})

    @route("POST", f"{_API}/preupload/{_REV}", need="proposal")
    def _preupload(self, request: Request, repo: Repo, rev: str) -> Reply:
        """Tell which files are large, and the hash of what the revision holds under their names."""
        tree, files = repo.resolve(rev).tree, []
        for file in request.json()["files"]:
            path, held = file["path"], tree.get(file["path"])
            binary = b"\0" in base64.b64decode(file["sample"])
            large = binary or file["size"] > self.lfs_threshold or path.endswith(LFS_SUFFIXES)
            oid = held and (held.sha256 if held.lfs else held.oid)
            files.append({"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid})
        return answer({"files": files})

    def _link(self, repo: Repo, oid: str) -> str:
        return f"{self._storage}/storage/{self._secret}{repo.page}/{oid}"

    @route("POST", rf"{_PAGE}\.git/info/lfs/objects/batch", need="user")
    def _lfs_batch(self, request: Request, repo: Repo) -> Reply:
        objects = request.json()["objects"]
        for file in objects:
            if file["oid"] not in repo.lfs:  # what is there already is not sent again
                verify = {"href": f"{self.url}{repo.page}.git/info/lfs/objects/verify"}
                file["actions"] = {"upload": {"href": self._link(repo, file["oid"])}, "verify": verify}
        return answer({"transfer": "basic", "objects": objects})

    @route("POST", rf"{_PAGE}\.git/info/lfs/objects/verify", need="user")
    def _lfs_verify(self, request: Request, repo: Repo) -> Reply:
        asked = request.json()
        if len(repo.lfs.get(asked["oid"], b"")) != asked["size"]:
            raise Refused(404, f"The object {asked['oid']} was not uploaded")
        return answer({})

    @route("PUT GET HEAD", rf"/storage/(?P<secret>\w+){_PAGE}/(?P<oid>[0-9a-f]{{64}})", need="signature")
    def _stored(self, request: Request, repo: Repo, secret: str, oid: str) -> Reply:
        """The storage of large files: another host, which must never be shown a token."""
        if "Authorization" in request.headers:
            raise Refused(400, "Only one auth mechanism allowed")
        if secret != self._secret:
            raise Refused(403, "The signature of the link is wrong")
        if request.method == "PUT":
            if hashlib.sha256(request.body).hexdigest() != oid:
                raise Refused(400, "The sha256 of the content is not the one announced")
            repo.lfs[oid] = request.body
            return Reply(200)
        if oid not in repo.lfs:
            raise Refused(404, "No such object")
        return content(request, repo.lfs[oid], oid, {})

    @route("POST", f"{_API}/commit/{_REV}", need="proposal")
    def _commit(self, request: Request, repo: Repo, rev: str) -> Reply:
        base = repo.resolve(rev)
        header, tree = {}, dict(base.tree)
        for item in map(json.loads, request.body.splitlines()):
            value = item["value"]
            path = value.get("path", "")
            match item["key"]:
                case "header":
                    header = value
                case "file":
                    tree[path] = Blob(base64.b64decode(value["content"], validate=True), False)
                case "lfsFile":
                    if value["oid"] not in repo.lfs:
                        raise Refused(400, f"{path} points to a large file that was not uploaded: {value['oid']}")
                    tree[path] = Blob(repo.lfs[value["oid"]], True)
                case "deletedFile" | "deletedFolder" as key:
                    folder = f"{path.strip('/')}/"
                    gone = [
                        name for name in tree if (name == path if key == "deletedFile" else name.startswith(folder))
                    ]
                    if not gone:
                        raise Refused(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
                    for name in gone:
                        del tree[name]
                case key:
                    raise Refused(400, f"Unknown operation {key!r}")
        if header.get("parentCommit", base.sha) != base.sha:
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        number = 1 + sum(ref.startswith("refs/pr/") for ref in repo.refs)
        ref = rev if rev.startswith("refs/pr/") else f"refs/heads/{rev}"
        if request.asks("create_pr"):
            ref = f"refs/pr/{number}"
        elif ref not in repo.refs:
            raise Refused(400, f"Only a branch or a pull request can be committed to, not {rev!r}")
        made = repo.commit(ref, base.sha, str(request.user), header["summary"], header.get("description", ""), tree)
        urls = {"commitUrl": f"{self.url}{repo.page}/commit/{made.sha}"}
        if request.asks("create_pr"):
            urls["pullRequestUrl"] = f"{self.url}{repo.page}/discussions/{number}"
        return answer({"success": True, "commitOid": made.sha, **urls})

    @route("GET HEAD", rf"{_PAGE}/resolve/{_REV}/(?P<path>.+)")
    def _resolve(self, request: Request, repo: Repo, rev: str, path: str) -> Reply:
        commit = repo.resolve(rev)
        headers = {"X-Repo-Commit": commit.sha}
        if (blob := commit.tree.get(path)) is None:
            raise Refused(404, "Entry not found", "EntryNotFound", **headers)
        if not blob.lfs:
            return content(request, blob.data, blob.oid, headers)
        linked = {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.data))}
        return Reply(302, b"", headers | linked | {"Location": self._link(repo, blob.sha256)})


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer waits 40 ms between its headers and its body
    timeout = 30  # no connection keeps its thread for longer than this without a byte
    server: "_Server"

    def log_message(self, *_: object) -> None:
        pass

    def _serve(self) -> None:
        hub, self.close_connection = self.server.hub, True  # unless all goes well
        hub.requests.append((self.command, self.path))
        fault = hub.fail(self.command, self.path) if hub.fail else None
        length = int(self.headers.get("Content-Length") or 0)
        if "Transfer-Encoding" in self.headers or length > MAX_BODY:
            return self._send(Refused(413, "The body has no length, or one that is too much").reply)
        body = self.rfile.read(length // 2 if fault == "drop" else length)
        if len(body) < length:
            return None  # cut, by the test or by the client: half a request does nothing
        self.close_connection = fault == "drop"
        if isinstance(fault, int):
            return self._send(Refused(fault, "The test asked for this error").reply)
        return self._send(hub._answer(self.command, self.path, self.headers, body), cut=fault == "drop")

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _send(self, reply: Reply, cut: bool = False) -> None:
        if cut and (self.command == "HEAD" or not reply.body):
            return
        self.send_response(reply.status)
        for name, value in (reply.headers | {"Content-Length": str(len(reply.body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body[: len(reply.body) // 2] if cut else reply.body)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, hub: HubServer):
        super().__init__(("127.0.0.1", 0), _Handler)  # loopback only
        self.hub = hub
        self.open: set[socket.socket] = set()

    def process_request(self, request, client_address) -> None:
        self.open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request) -> None:
        self.open.discard(request)
        super().shutdown_request(request)

    def server_close(self) -> None:
        """Also hang up on the connections that clients keep for later, which would hold threads."""
        super().server_close()
        for connection in list(self.open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request, client_address) -> None:
        error = sys.exception()
        if error and not isinstance(error, (ConnectionError, TimeoutError)):  # clients may go away when they like
            self.hub.errors.append(error)


def patch_client(monkeypatch, hub: HubServer, home, token: str | None = "") -> None:
    """Point the imported `huggingface_hub`, `transformers` and `datasets` at `hub` and at empty caches below `home`.

    `token` is the one that calls without a token send: by default the first of the server's, with None none at all. The
    client also no longer waits before it tries again. The environment of child processes stays as it is, except for the
    token: they need `hub.environment`.
    """
    import datasets
    import huggingface_hub
    import transformers.utils.hub
    from huggingface_hub import constants, file_download, hf_api
    from huggingface_hub.utils import _cache_manager, _http

    environment = hub.environment
    token = environment["HF_TOKEN"] if token == "" else token
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setenv("HF_TOKEN", token or "")  # this one the client reads at each call
    monkeypatch.setenv("NO_PROXY", environment["NO_PROXY"])

    values = {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": os.path.join(home, "hub"),
        "HF_TOKEN_PATH": os.path.join(home, "token"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
    }
    for name, value in values.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(_cache_manager, "HF_HUB_CACHE", values["HF_HUB_CACHE"])

    # Objects that took the endpoint when they were made, and what they remember of another server.
    monkeypatch.setattr(hf_api.api, "endpoint", hub.url)
    monkeypatch.setattr(hf_api.api, "_whoami_cache", {})
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
    monkeypatch.setattr(huggingface_hub.HfFileSystem, "_cache", {})

    caches = os.path.join(home, "datasets")
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
    monkeypatch.setattr(datasets.config, "HUB_DATASETS_URL", hub.url + "/datasets/{repo_id}/resolve/{revision}/{path}")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", caches)
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", os.path.join(caches, "downloads"))
    monkeypatch.setattr(datasets.config, "EXTRACTED_DATASETS_PATH", os.path.join(caches, "downloads", "extracted"))

    impatient = types.SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
    for module in (_http, file_download):
        monkeypatch.setattr(module, "time", impatient)
