"""A Hub on this machine for tests: the HTTP protocol that the unmodified `huggingface_hub` client speaks.

Users and tokens, repositories with atomic commits, branches, tags and pull requests, large files by the LFS protocol
(in one part and in several), private and gated repositories, downloads with ranges, and the error headers that the
client turns into its exceptions. Every request is recorded, so that a test can say what left the machine, and faults
can be planted: an answer of one's choice, an upload or a download cut in the middle, an answer that takes too long, a
request that is served but never answered.

The client reads `HF_ENDPOINT` and its like when it is imported, so a test either starts a process with
`hub.environment(...)` or gives `endpoint=hub.url` to `HfApi`.
"""

import base64
import binascii
import fnmatch
import hashlib
import json
import os
import random
import re
import socket
import string
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import yaml

GITATTRIBUTES = b"*.bin filter=lfs diff=lfs merge=lfs -text\n*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
LARGE_FILE_BYTES = 10 * 1024 * 1024
SHA = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class User:
    """Somebody with a token. `role` is what the token may do: "write" or "read"."""

    name: str
    token: str
    role: str = "write"
    organizations: tuple[str, ...] = ()

    def owns(self, repo_id: str) -> bool:
        return repo_id.split("/")[0] in (self.name, *self.organizations)


@dataclass(frozen=True)
class Entry:
    """One file of a commit: its git blob id, and for a large file the sha256 under which its bytes are kept."""

    oid: str
    size: int
    sha256: str | None = None


@dataclass(frozen=True)
class Commit:
    sha: str
    parent: str | None
    title: str
    description: str
    author: str
    date: str
    tree: dict[str, Entry]


@dataclass
class PullRequest:
    number: int
    title: str
    author: str
    date: str
    sha: str
    status: str = "open"


@dataclass
class Repository:
    repo_type: str
    repo_id: str
    private: bool = False
    gated: str | bool = False
    readers: set[str] = field(default_factory=set)
    blobs: dict[str, bytes] = field(default_factory=dict)
    large_files: dict[str, bytes] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pull_requests: dict[int, PullRequest] = field(default_factory=dict)

    def resolve(self, revision: str) -> Commit:
        """The commit that a branch, a tag, `refs/pr/N`, `refs/heads/...` or a full commit id stands for."""
        name = revision.removeprefix("refs/heads/").removeprefix("refs/tags/")
        pull = re.fullmatch(r"refs/pr/(\d+)", revision)
        if pull and int(pull[1]) in self.pull_requests:
            return self.commits[self.pull_requests[int(pull[1])].sha]
        sha = self.branches.get(name) or self.tags.get(name) or revision
        if sha not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", code="RevisionNotFound")
        return self.commits[sha]

    def content(self, entry: Entry) -> bytes:
        return self.large_files[entry.sha256] if entry.sha256 else self.blobs[entry.oid]

    def add_commit(self, parent: Commit | None, title: str, description: str, author: str, date: str, tree) -> Commit:
        parent_sha = parent.sha if parent else None
        identity = json.dumps(
            [parent_sha, title, description, author, date, sorted((p, e.oid) for p, e in tree.items())]
        )
        commit = Commit(
            hashlib.sha1(identity.encode()).hexdigest(), parent_sha, title, description, author, date, dict(tree)
        )
        self.commits[commit.sha] = commit
        return commit

    def history(self, revision: str) -> list[Commit]:
        """The commits that lead to a revision, newest first."""
        commits, commit = [], self.resolve(revision)
        while True:
            commits.append(commit)
            if commit.parent is None:
                return commits
            commit = self.commits[commit.parent]


@dataclass
class Request:
    """What arrived. `body` is as far as it was read; `status` stays None when no answer was sent."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes = b""
    status: int | None = None

    def __str__(self) -> str:
        return f"{self.method} {self.path} -> {self.status}"


@dataclass
class Fault:
    """What to do with the next `times` requests whose method and path match."""

    method: str
    path: re.Pattern
    times: int
    answer: "Refusal | None" = None
    cut_after: int | None = None
    send_only: int | None = None
    delay: float = 0.0
    lose_answer: bool = False


class Refusal(Exception):
    """An error answer: status, message, and the `X-Error-Code` by which the client chooses its exception."""

    def __init__(self, status: int, message: str = "", *, code: str | None = None, headers: dict | None = None):
        super().__init__(message)
        self.status, self.message = status, message
        self.headers = dict(headers or {})
        if code is not None:
            self.headers["X-Error-Code"] = code
        if message:
            self.headers["X-Error-Message"] = message


class CutConnection(Exception):
    """The connection is to be closed without an answer."""


@dataclass
class Answer:
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    status: int = 200


def git_blob_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def new_token(length: int = 34) -> str:
    """A string that looks like a Hub token. It is made here, so that no such string stands in the source."""
    return "hf_" + "".join(random.choices(string.ascii_letters, k=length))


class HubServer:
    """The server and the handles a test needs: what is stored, what was asked, what shall go wrong.

    Args:
        part_size (`int`): large files above this size (bytes) are uploaded in several parts.
        tree_page_size (`int`): entries per page of a tree listing.

    Attributes:
        url (`str`): the endpoint, `http://127.0.0.1:PORT`.
        user (`User`): owner of the namespace "ada", with a token that may write.
        requests (`list[Request]`): everything that arrived, in order of arrival.
    """

    def __init__(self, part_size: int = 64 * 1024 * 1024, tree_page_size: int = 1000):
        self.part_size, self.tree_page_size = part_size, tree_page_size
        self.users: dict[str, User] = {}
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.parts: dict[str, dict[int, bytes]] = {}
        self.lock = threading.RLock()
        self.closed = threading.Event()
        self.clock = datetime(2026, 1, 1, tzinfo=UTC)
        self.user = self.add_user("ada")
        handler = type("Handler", (_Handler,), {"hub": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop answering. New connections are refused from here on."""
        self.closed.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def add_user(self, name: str, role: str = "write", organizations: tuple[str, ...] = ()) -> User:
        user = User(name, new_token(), role, organizations)
        self.users[user.token] = user
        return user

    def repository(self, repo_id: str, repo_type: str = "model") -> Repository:
        return self.repositories[repo_type, repo_id]

    def create_repository(self, repo_id: str, repo_type: str = "model", private: bool = False) -> Repository:
        repository = Repository(repo_type, repo_id, private)
        oid = git_blob_oid(GITATTRIBUTES)
        repository.blobs[oid] = GITATTRIBUTES
        tree = {".gitattributes": Entry(oid, len(GITATTRIBUTES))}
        first = repository.add_commit(None, "initial commit", "", "system", self.now(), tree)
        repository.branches["main"] = first.sha
        self.repositories[repo_type, repo_id] = repository
        return repository

    def files(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> dict[str, bytes]:
        """The content of every file at a revision."""
        repository = self.repository(repo_id, repo_type)
        return {path: repository.content(entry) for path, entry in repository.resolve(revision).tree.items()}

    def commits(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> list[Commit]:
        """The commits that lead to a revision, newest first; the last one was made with the repository."""
        return self.repository(repo_id, repo_type).history(revision)

    def asked(self, method: str = ".*", path: str = ".*") -> list[Request]:
        """The requests whose method and path match these regular expressions (the path: anywhere in it)."""
        return [r for r in self.requests if re.fullmatch(method, r.method) and re.search(path, r.path)]

    def answer(
        self,
        status: int,
        *,
        method: str = ".*",
        path: str = ".*",
        times: int = 1,
        message: str = "",
        code: str | None = None,
        headers: dict | None = None,
    ) -> None:
        """Answer the next matching requests with this status, and serve them as usual afterwards."""
        refusal = Refusal(status, message, code=code, headers=headers)
        self.faults.append(Fault(method, re.compile(path), times, answer=refusal))

    def cut_upload(self, *, method: str = "PUT", path: str = ".*", times: int = 1, after_bytes: int = 1024) -> None:
        """Read this many bytes of the body of the next matching requests, then drop the connection."""
        self.faults.append(Fault(method, re.compile(path), times, cut_after=after_bytes))

    def cut_download(self, *, method: str = "GET", path: str = ".*", times: int = 1, after_bytes: int = 1024) -> None:
        """Announce the whole answer to the next matching requests, send this many bytes of it, drop the connection."""
        self.faults.append(Fault(method, re.compile(path), times, send_only=after_bytes))

    def stall(self, seconds: float, *, method: str = ".*", path: str = ".*", times: int = 1) -> None:
        """Serve the next matching requests only after this many seconds, or when the server is closed."""
        self.faults.append(Fault(method, re.compile(path), times, delay=seconds))

    def lose_answer(self, *, method: str = ".*", path: str = ".*", times: int = 1) -> None:
        """Serve the next matching requests, changes included, and drop the connection instead of answering."""
        self.faults.append(Fault(method, re.compile(path), times, lose_answer=True))

    def environment(self, home: str | Path, token: str | None = None, **more: str) -> dict[str, str]:
        """The environment of a process whose Hub is this server and whose caches lie empty under `home`."""
        dropped = re.compile(
            r"(HF|HUGGING_?FACE|TRANSFORMERS|DATASETS)_.*|(HTTPS?|ALL|NO)_PROXY|PYTHONPATH", re.IGNORECASE
        )
        environment = {name: value for name, value in os.environ.items() if not dropped.fullmatch(name)}
        environment |= {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
        }
        if token is not None:
            environment["HF_TOKEN"] = token
        return environment | more

    def now(self) -> str:
        """A time later than every one handed out before."""
        self.clock += timedelta(seconds=1)
        return self.clock.strftime("%Y-%m-%dT%H:%M:%S.000Z")

    def take_fault(self, request: Request) -> Fault | None:
        for fault in self.faults:
            if fault.times > 0 and re.fullmatch(fault.method, request.method) and fault.path.search(request.path):
                fault.times -= 1
                return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    """One connection. `hub` is set by the server that makes the class."""

    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format, *args):
        """The record of requests stands in for a log on stderr."""

    def serve(self) -> None:
        parts = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, parts.path, parse_qs(parts.query), headers)
        with self.hub.lock:
            self.hub.requests.append(request)
            fault = self.hub.take_fault(request)
        try:
            request.body = self.read_body(headers, fault.cut_after if fault else None)
            if fault and fault.cut_after is not None:
                raise CutConnection
            if fault and fault.delay:
                self.hub.closed.wait(fault.delay)
            answer = self.refuse(fault.answer) if fault and fault.answer else self.dispatch(request)
            if fault and fault.lose_answer:
                raise CutConnection
            request.status = answer.status
            self.send(answer, fault.send_only if fault else None)
        except (CutConnection, ConnectionError):
            self.close_connection = True
            with suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve

    def read_body(self, headers: dict[str, str], limit: int | None) -> bytes:
        if "chunked" in headers.get("transfer-encoding", ""):
            body = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
                if limit is not None and len(body) >= limit:
                    return body[:limit]
            self.rfile.readline()
            return body
        length = int(headers.get("content-length", 0))
        return self.rfile.read(length if limit is None else min(length, limit))

    def send(self, answer: Answer, limit: int | None = None) -> None:
        headers = dict(answer.headers)
        if isinstance(answer.body, bytes):
            body = answer.body
            headers.setdefault("Content-Type", "application/octet-stream")
        else:
            body = b"" if answer.body is None else json.dumps(answer.body).encode()
            headers.setdefault("Content-Type", "application/json")
        headers.setdefault("Content-Length", str(len(body)))
        self.send_response(answer.status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:limit])
        if limit is not None:
            raise CutConnection

    def refuse(self, refusal: Refusal) -> Answer:
        return Answer({"error": refusal.message} if refusal.message else {}, refusal.headers, refusal.status)

    def dispatch(self, request: Request) -> Answer:
        with self.hub.lock:
            try:
                for method, pattern, action in ROUTES:
                    match = re.fullmatch(pattern, request.path)
                    if match and request.method in method.split("|"):
                        arguments = {name: unquote(value or "") for name, value in match.groupdict().items()}
                        return action(Call(self.hub, request), **arguments)
                raise Refusal(404, f"Sorry, we can't find {request.method} {request.path}")
            except Refusal as refusal:
                return self.refuse(refusal)


class Call:
    """One request on its way to an answer: who asks, for which repository, and whether that is allowed."""

    def __init__(self, hub: HubServer, request: Request):
        self.hub, self.request = hub, request

    @property
    def json(self) -> dict:
        return json.loads(self.request.body or b"{}")

    def flag(self, name: str) -> bool:
        return self.request.query.get(name, ["false"])[0].lower() in ("1", "true")

    def who(self) -> User | None:
        """The user whose token came along; None without a token."""
        header = self.request.headers.get("authorization")
        if header is None:
            return None
        user = self.hub.users.get(header.removeprefix("Bearer "))
        if user is None:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return user

    def writer(self) -> User:
        user = self.who()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        if user.role != "write":
            raise Refusal(403, "Forbidden: you must use a write token to upload to a repository.")
        return user

    def repository(self, repo_type: str, repo_id: str, *, write: bool = False) -> Repository:
        """The repository, if the user may see it and, with `write`, may change it."""
        user = self.writer() if write else self.who()
        repository = self.hub.repositories.get((repo_type, repo_id))
        seen = repository is not None and (
            not repository.private or (user is not None and (user.owns(repo_id) or user.name in repository.readers))
        )
        if repository is None or not seen:
            raise Refusal(404 if user else 401, "Repository not found", code="RepoNotFound")
        if write and not user.owns(repo_id):
            raise Refusal(403, f"You don't have the rights to write to {repo_id}")
        return repository

    def check_gate(self, repository: Repository) -> None:
        user = self.who()
        if repository.gated and not (user and (user.owns(repository.repo_id) or user.name in repository.readers)):
            message = f"Access to model {repository.repo_id} is restricted and you are not in the authorized list."
            raise Refusal(403 if user else 401, message, code="GatedRepo")

    def whoami(self) -> Answer:
        user = self.who()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        access = {"displayName": "test", "role": user.role}
        return Answer(
            {
                "type": "user",
                "name": user.name,
                "fullname": user.name.title(),
                "orgs": [{"name": name} for name in user.organizations],
                "auth": {"type": "access_token", "accessToken": access},
            }
        )

    def create_repository(self) -> Answer:
        user, wanted = self.writer(), self.json
        repo_type, owner = wanted.get("type") or "model", wanted.get("organization") or user.name
        repo_id = f"{owner}/{wanted['name']}"
        if not user.owns(repo_id):
            raise Refusal(403, f'You don\'t have the rights to create a {repo_type} under the namespace "{owner}"')
        url = f"{self.hub.url}/{_prefix(repo_type)}{repo_id}"
        if (repo_type, repo_id) in self.hub.repositories:
            body = {"error": f"You already created this {repo_type} repo", "url": url, "name": repo_id}
            return Answer(body, status=409)
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        self.hub.create_repository(repo_id, repo_type, private)
        return Answer({"url": url, "name": repo_id, "id": repo_id})

    def delete_repository(self) -> Answer:
        user, wanted = self.writer(), self.json
        repo_type, owner = wanted.get("type") or "model", wanted.get("organization") or user.name
        self.repository(repo_type, f"{owner}/{wanted['name']}", write=True)
        del self.hub.repositories[repo_type, f"{owner}/{wanted['name']}"]
        return Answer({})

    def settings(self, kind: str, repo_id: str) -> Answer:
        repository, wanted = self.repository(kind, repo_id, write=True), self.json
        if "visibility" in wanted or "private" in wanted:
            repository.private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        repository.gated = wanted.get("gated", repository.gated)
        return Answer({})

    def validate_yaml(self) -> Answer:
        content = self.json["content"]
        match = re.match(r"\s*---\r?\n(.*?)\r?\n---\r?\n", content, re.DOTALL)
        if match is None:
            return Answer({"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]})
        try:
            metadata = yaml.safe_load(match[1])
        except yaml.YAMLError as error:
            return Answer({"errors": [{"message": f"YAML: {error}"}], "warnings": []}, status=400)
        errors = []
        for index in (metadata or {}).get("model-index") or []:
            for position, result in enumerate(index.get("results") or []):
                if "task" not in result or "metrics" not in result:
                    errors.append({"message": f'"model-index[0].results[{position}]" needs "task" and "metrics"'})
        return Answer({"errors": errors, "warnings": []}, status=400 if errors else 200)

    def preupload(self, kind: str, repo_id: str, revision: str) -> Answer:
        pull_request = self.flag("create_pr")
        repository = self.repository(kind, repo_id, write=not pull_request)
        tree = repository.resolve(revision).tree
        ignored = self.json.get("gitIgnore")
        if ignored is None and ".gitignore" in tree:
            ignored = repository.content(tree[".gitignore"]).decode()
        ignore_patterns = [line.strip() for line in (ignored or "").splitlines() if line.strip()]
        attributes = repository.content(tree[".gitattributes"]).decode() if ".gitattributes" in tree else ""
        large_patterns = [line.split()[0] for line in attributes.splitlines() if "filter=lfs" in line]
        files = []
        for file in self.json["files"]:
            path, name = file["path"], file["path"].split("/")[-1]
            large = (
                file["size"] > LARGE_FILE_BYTES
                or any(fnmatch.fnmatch(name, pattern) for pattern in large_patterns)
                or b"\0" in base64.b64decode(file["sample"])
            )
            ignore = any(fnmatch.fnmatch(path, p) or fnmatch.fnmatch(name, p) for p in ignore_patterns)
            answer = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": ignore}
            if path in tree:
                answer["oid"] = tree[path].sha256 or tree[path].oid
            files.append(answer)
        return Answer({"files": files})

    def large_file_batch(self, kind: str, repo_id: str) -> Answer:
        # The reference is left out when the upload is for a pull request, which readers may open too.
        repository = self.repository(kind, repo_id, write="ref" in self.json)
        self.writer()
        objects = []
        for wanted in self.json["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            answer: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in repository.large_files:
                address = f"{self.hub.url}/lfs/{kind}/{repo_id}/{oid}"
                upload: dict[str, Any] = {"href": f"{address}?signature=once"}
                if size > self.hub.part_size:
                    count = -(-size // self.hub.part_size)
                    upload["href"] = f"{address}/complete"
                    upload["header"] = {str(n): f"{address}/part/{n}?signature=once" for n in range(1, count + 1)}
                    upload["header"]["chunk_size"] = str(self.hub.part_size)
                answer["actions"] = {"upload": upload, "verify": {"href": f"{address}/verify"}}
            objects.append(answer)
        return Answer({"transfer": "basic", "objects": objects})

    def store(self, kind: str, repo_id: str, oid: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refusal(400, "The content does not have the announced sha256")
        self.hub.repository(repo_id, kind).large_files[oid] = content

    def check_signed(self) -> None:
        if "authorization" in self.request.headers:
            raise Refusal(400, "Only one auth mechanism allowed")

    def put_large_file(self, kind: str, repo_id: str, oid: str) -> Answer:
        self.check_signed()
        self.store(kind, repo_id, oid, self.request.body)
        return Answer()

    def put_part(self, kind: str, repo_id: str, oid: str, number: str) -> Answer:
        self.check_signed()
        self.hub.parts.setdefault(oid, {})[int(number)] = self.request.body
        return Answer(headers={"ETag": f'"{hashlib.md5(self.request.body).hexdigest()}"'})

    def complete_large_file(self, kind: str, repo_id: str, oid: str) -> Answer:
        parts = self.hub.parts[oid]
        for part in self.json["parts"]:
            if part["etag"].strip('"') != hashlib.md5(parts[part["partNumber"]]).hexdigest():
                raise Refusal(400, f"Part {part['partNumber']} has another ETag")
        self.store(kind, repo_id, oid, b"".join(content for _, content in sorted(parts.items())))
        return Answer({})

    def verify_large_file(self, kind: str, repo_id: str, oid: str) -> Answer:
        repository, wanted = self.repository(kind, repo_id), self.json
        self.writer()
        if wanted["oid"] != oid or len(repository.large_files.get(oid, b"")) != wanted["size"]:
            raise Refusal(404, "The object was not uploaded")
        return Answer({})

    def commit(self, kind: str, repo_id: str, revision: str) -> Answer:
        pull_request = self.flag("create_pr")
        repository = self.repository(kind, repo_id, write=not pull_request)
        user = self.writer()
        parent = repository.resolve(revision)
        lines = [json.loads(line) for line in self.request.body.splitlines() if line.strip()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        expected = header.get("parentCommit")
        if expected and not pull_request and not parent.sha.startswith(expected):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        tree, blobs = self.changed_tree(repository, parent, lines)
        existing = re.fullmatch(r"refs/pr/(\d+)", revision)
        if not pull_request and not existing and revision not in repository.branches:
            raise Refusal(404, f"{revision} is not a branch", code="RevisionNotFound")
        # Nothing has been stored up to here: a refused commit leaves no trace.
        repository.blobs |= blobs
        date = self.hub.now()
        commit = repository.add_commit(parent, header["summary"], header.get("description", ""), user.name, date, tree)
        url = f"{self.hub.url}/{_prefix(kind)}{repo_id}"
        answer = {"success": True, "commitOid": commit.sha, "commitUrl": f"{url}/commit/{commit.sha}"}
        if pull_request:
            number = len(repository.pull_requests) + 1
            pull = PullRequest(number, header["summary"], user.name, date, commit.sha)
            repository.pull_requests[number] = pull
            answer["pullRequestUrl"] = f"{url}/discussions/{number}"
        elif existing:
            repository.pull_requests[int(existing[1])].sha = commit.sha
        else:
            repository.branches[revision] = commit.sha
        return Answer(answer)

    def changed_tree(self, repository: Repository, parent: Commit, lines: list[dict]):
        """The files after a commit, and the contents it brings along."""
        tree, blobs = dict(parent.tree), {}
        for line in lines:
            value, path = line["value"], line["value"].get("path")
            match line["key"]:
                case "file":
                    try:
                        content = base64.b64decode(value["content"], validate=True)
                    except binascii.Error as error:
                        raise Refusal(400, f"{path}: {error}") from error
                    oid = git_blob_oid(content)
                    blobs[oid] = content
                    tree[path] = Entry(oid, len(content))
                case "lfsFile":
                    content = repository.large_files.get(value["oid"])
                    if content is None:
                        raise Refusal(400, f"{path}: the large file {value['oid']} was not uploaded")
                    pointer = _pointer(value["oid"], len(content))
                    tree[path] = Entry(git_blob_oid(pointer), len(content), value["oid"])
                case "deletedFile":
                    if path not in tree:
                        raise Refusal(404, "A file with this name doesn't exist", code="EntryNotFound")
                    del tree[path]
                case "deletedFolder":
                    tree = {p: entry for p, entry in tree.items() if not p.startswith(path.rstrip("/") + "/")}
        return tree, blobs

    def info(self, kind: str, repo_id: str, revision: str = "") -> Answer:
        repository = self.repository(kind, repo_id)
        commit = repository.resolve(revision or "main")
        siblings = [{"rfilename": path} for path in sorted(commit.tree)]
        if self.flag("blobs"):
            siblings = [
                {"rfilename": path, "size": entry.size, "blobId": entry.oid} | _large_info(entry, "sha256")
                for path, entry in sorted(commit.tree.items())
            ]
        return Answer(
            {
                "_id": hashlib.md5(repo_id.encode()).hexdigest()[:24],
                "id": repo_id,
                "modelId": repo_id,
                "author": repo_id.split("/")[0],
                "private": repository.private,
                "gated": repository.gated,
                "disabled": False,
                "sha": commit.sha,
                "lastModified": commit.date,
                "createdAt": repository.history("main")[-1].date,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "siblings": siblings,
            }
        )

    def tree(self, kind: str, repo_id: str, revision: str, path: str = "") -> Answer:
        commit = self.repository(kind, repo_id).resolve(revision)
        start, inside = path.strip("/"), [p for p in commit.tree if not path or p.startswith(path.strip("/") + "/")]
        if path and not inside:
            raise Refusal(404, f"{start} does not exist on {revision}", code="EntryNotFound")
        entries = _entries(commit, start, inside, recursive=self.flag("recursive"))
        first = int(self.request.query.get("cursor", ["0"])[0])
        last, headers = first + self.hub.tree_page_size, {}
        if last < len(entries):
            address = f"{self.hub.url}{self.request.path}?recursive={self.flag('recursive')}&cursor={last}"
            headers["Link"] = f'<{address}>; rel="next"'
        return Answer(entries[first:last], headers)

    def paths_info(self, kind: str, repo_id: str, revision: str) -> Answer:
        commit = self.repository(kind, repo_id).resolve(revision)
        paths = parse_qs(self.request.body.decode()).get("paths", [])
        entries = {entry["path"]: entry for entry in _entries(commit, "", list(commit.tree), recursive=True)}
        return Answer([entries[path] for path in paths if path in entries])

    def refs(self, kind: str, repo_id: str) -> Answer:
        repository = self.repository(kind, repo_id)
        answer = {
            "branches": [_ref(name, f"refs/heads/{name}", sha) for name, sha in repository.branches.items()],
            "tags": [_ref(name, f"refs/tags/{name}", sha) for name, sha in repository.tags.items()],
            "converts": [],
        }
        if self.flag("include_prs"):
            pulls = repository.pull_requests.values()
            answer["pullRequests"] = [_ref(f"{p.number}", f"refs/pr/{p.number}", p.sha) for p in pulls]
        return Answer(answer)

    def commit_list(self, kind: str, repo_id: str, revision: str) -> Answer:
        return Answer(
            [
                {
                    "id": commit.sha,
                    "title": commit.title,
                    "message": commit.description,
                    "date": commit.date,
                    "authors": [{"user": commit.author}],
                }
                for commit in self.repository(kind, repo_id).history(revision)
            ]
        )

    def create_branch(self, kind: str, repo_id: str, name: str) -> Answer:
        repository = self.repository(kind, repo_id, write=True)
        if name.startswith("refs/"):
            raise Refusal(400, f"Invalid reference for a branch: {name}")
        if name in repository.branches:
            raise Refusal(409, f"Reference already exists: {name}")
        repository.branches[name] = repository.resolve(self.json.get("startingPoint") or "main").sha
        return Answer({})

    def delete_branch(self, kind: str, repo_id: str, name: str) -> Answer:
        repository = self.repository(kind, repo_id, write=True)
        if name == "main":
            raise Refusal(403, "The main branch is protected")
        if repository.branches.pop(name, None) is None:
            raise Refusal(404, f"Invalid rev id: {name}", code="RevisionNotFound")
        return Answer({})

    def create_tag(self, kind: str, repo_id: str, revision: str) -> Answer:
        repository, name = self.repository(kind, repo_id, write=True), self.json["tag"]
        if name in repository.tags:
            raise Refusal(409, f"Tag reference exists already: {name}")
        repository.tags[name] = repository.resolve(revision).sha
        return Answer({})

    def delete_tag(self, kind: str, repo_id: str, name: str) -> Answer:
        if self.repository(kind, repo_id, write=True).tags.pop(name, None) is None:
            raise Refusal(404, f"Invalid rev id: {name}", code="RevisionNotFound")
        return Answer({})

    def discussions(self, kind: str, repo_id: str) -> Answer:
        repository, query = self.repository(kind, repo_id), self.request.query
        wanted = [
            pull
            for pull in sorted(repository.pull_requests.values(), key=lambda pull: -pull.number)
            if query.get("status", ["all"])[0] in ("all", pull.status)
            and query.get("author", [pull.author])[0] == pull.author
            and query.get("type", ["all"])[0] in ("all", "pull_request")
        ]
        return Answer(
            {
                "count": len(wanted),
                "start": 0,
                "discussions": [
                    {
                        "num": pull.number,
                        "title": pull.title,
                        "author": {"name": pull.author},
                        "createdAt": pull.date,
                        "status": pull.status,
                        "isPullRequest": True,
                        "repo": {"name": repo_id, "type": kind},
                    }
                    for pull in wanted
                ],
            }
        )

    def download(self, prefix: str, repo_id: str, revision: str, path: str) -> Answer:
        repository = self.repository(prefix.removesuffix("s/") or "model", repo_id)
        self.check_gate(repository)
        commit = repository.resolve(revision)
        headers = {"X-Repo-Commit": commit.sha}
        entry = commit.tree.get(path)
        if entry is None:
            raise Refusal(404, "Entry not found", code="EntryNotFound", headers=headers)
        content = repository.content(entry)
        headers |= {"ETag": f'"{entry.sha256 or entry.oid}"', "Accept-Ranges": "bytes"}
        if entry.sha256:
            headers |= {"X-Linked-ETag": f'"{entry.sha256}"', "X-Linked-Size": str(entry.size)}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.request.headers.get("range", ""))
        if wanted is None:
            return Answer(content, headers)
        first, last = int(wanted[1]), min(int(wanted[2] or len(content) - 1), len(content) - 1)
        if first > last:
            raise Refusal(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{len(content)}"})
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        return Answer(content[first : last + 1], headers, 206)


def _prefix(repo_type: str) -> str:
    return "" if repo_type == "model" else f"{repo_type}s/"


def _pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def _large_info(entry: Entry, name: str) -> dict:
    if entry.sha256 is None:
        return {}
    return {"lfs": {name: entry.sha256, "size": entry.size, "pointerSize": len(_pointer(entry.sha256, entry.size))}}


def _ref(name: str, ref: str, sha: str) -> dict:
    return {"name": name, "ref": ref, "targetCommit": sha}


def _entries(commit: Commit, start: str, paths: list[str], *, recursive: bool) -> list[dict]:
    """The files and folders of a listing, as the Hub writes them, sorted by path."""
    entries: dict[str, dict] = {}
    for path in sorted(paths):
        steps = path[len(start) :].lstrip("/").split("/")
        for depth in range(1, len(steps) if recursive else min(len(steps), 2)):
            folder = "/".join([*filter(None, [start]), *steps[:depth]])
            oid = hashlib.sha1(f"{commit.sha}/{folder}".encode()).hexdigest()
            entries.setdefault(folder, {"type": "directory", "path": folder, "oid": oid, "size": 0})
        if recursive or len(steps) == 1:
            entry = commit.tree[path]
            entries[path] = {"type": "file", "path": path, "size": entry.size, "oid": entry.oid}
            entries[path] |= _large_info(entry, "oid")
    return [entries[path] for path in sorted(entries)]


_API = r"/api/(?P<kind>model|dataset|space)s/(?P<repo_id>[^/]+/[^/]+)"
_REV = r"(?P<revision>[^/]+)"
_NAME = r"(?P<name>[^/]+)"
_LARGE = r"/lfs/(?P<kind>model|dataset|space)/(?P<repo_id>[^/]+/[^/]+)/(?P<oid>[0-9a-f]{64})"
ROUTES = (
    ("GET", r"/api/whoami-v2", Call.whoami),
    ("POST", r"/api/repos/create", Call.create_repository),
    ("DELETE", r"/api/repos/delete", Call.delete_repository),
    ("POST", r"/api/validate-yaml", Call.validate_yaml),
    ("PUT", rf"{_API}/settings", Call.settings),
    ("POST", rf"{_API}/preupload/{_REV}", Call.preupload),
    ("POST", rf"{_API}/commit/{_REV}", Call.commit),
    ("GET", rf"{_API}/tree/{_REV}(?P<path>/.+)?", Call.tree),
    ("POST", rf"{_API}/paths-info/{_REV}", Call.paths_info),
    ("GET", rf"{_API}/refs", Call.refs),
    ("GET", rf"{_API}/commits/{_REV}", Call.commit_list),
    ("POST", rf"{_API}/branch/{_NAME}", Call.create_branch),
    ("DELETE", rf"{_API}/branch/{_NAME}", Call.delete_branch),
    ("POST", rf"{_API}/tag/{_REV}", Call.create_tag),
    ("DELETE", rf"{_API}/tag/{_NAME}", Call.delete_tag),
    ("GET", rf"{_API}/discussions", Call.discussions),
    ("GET", rf"{_API}(?:/revision/{_REV})?", Call.info),
    (
        "POST",
        r"/(?P<prefix>(?:dataset|space)s/)?(?P<repo_id>[^/]+/[^/]+)\.git/info/lfs/objects/batch",
        lambda call, prefix, repo_id: call.large_file_batch(prefix.removesuffix("s/") or "model", repo_id),
    ),
    ("PUT", _LARGE, Call.put_large_file),
    ("PUT", rf"{_LARGE}/part/(?P<number>\d+)", Call.put_part),
    ("POST", rf"{_LARGE}/complete", Call.complete_large_file),
    ("POST", rf"{_LARGE}/verify", Call.verify_large_file),
    (
        "GET|HEAD",
        rf"/(?P<prefix>(?:dataset|space)s/)?(?P<repo_id>[^/]+/[^/]+)/resolve/{_REV}/(?P<path>.+)",
        Call.download,
    ),
)


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """A Hub with one user, "ada", and no repository."""
    server = HubServer()
    yield server
    server.close()
