"""The part of the Hub's HTTP interface that pushing, loading and inspecting a model use, on a loopback port.

Everything is in memory. A plain socket server, because tests cut connections in the middle of a request.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import nullcontext
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from huggingface_hub import ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import validate_repo_id

LARGE = (".safetensors", ".png", ".bin")


class HubError(Exception):
    def __init__(self, status, message, code=None):
        super().__init__(message)
        self.status, self.code = status, code


@dataclass(frozen=True)
class Blob:
    data: bytes
    large: bool

    @property
    def oid(self):
        """What the Hub names a file by: git's hash, or the content's SHA-256 for large files."""
        if self.large:
            return hashlib.sha256(self.data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()

    def describe(self, path):
        entry = {"type": "file", "path": path, "oid": self.oid, "size": len(self.data)}
        if self.large:
            entry["lfs"] = {"oid": self.oid, "size": len(self.data), "pointerSize": 134}
        return entry


@dataclass
class Commit:
    oid: str
    parent: str | None
    title: str
    files: dict[str, Blob]


@dataclass
class Repo:
    id: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    @property
    def owner(self):
        return self.id.partition("/")[0]

    def add(self, branch, title, files):
        parent = self.branches.get(branch)
        oid = hashlib.sha1(f"{parent}{title}{len(self.commits)}".encode()).hexdigest()
        self.commits[oid] = Commit(oid, parent, title, files)
        self.branches[branch] = oid
        return oid

    def at(self, revision):
        oid = self.branches.get(revision, revision)
        if oid not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[oid]

    def history(self, branch="main"):
        """Commits of a branch, newest first."""
        commits, oid = [], self.branches[branch]
        while oid is not None:
            commits.append(self.commits[oid])
            oid = commits[-1].parent
        return commits


class Hub:
    """The server, and what tests look at and arrange.

    Attributes:
        tokens: User of each valid token.
        requests: Method and path of every request so far.
        sent: Bytes of file content sent for each path of `resolve`.
        cuts: Pattern of `METHOD path` and number of times to cut such a request in the middle of its body.
        barriers: One is taken by each commit, which waits there: for commits that happen at once.
    """

    def __init__(self, tokens):
        self.tokens = tokens
        self.repos = {}
        self.large = {}
        self.expected = {}
        self.requests = []
        self.sent = {}
        self.cuts = {}
        self.barriers = []
        self.lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self._server.shutdown()
        self._server.server_close()

    def cuts_now(self, request):
        with self.lock:
            for pattern, left in self.cuts.items():
                if left and re.search(pattern, request):
                    self.cuts[pattern] -= 1
                    return True
        return False


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    ROUTES = (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("POST", r"/api/repos/create", "create_repo"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)(/revision/(?P<revision>[^/]+))?", "info"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/refs", "refs"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)", "tree"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/branch/(?P<branch>[^/]+)", "create_branch"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)", "commit"),
        ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_put"),
        ("GET|HEAD", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    )

    def handle_request(self):
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.hub.requests.append((self.command, url.path))
        length = int(self.headers.get("Content-Length", 0))
        if self.hub.cuts_now(f"{self.command} {url.path}"):
            self.rfile.read(length // 2)
            self.close_connection = True
            self.connection.close()
            return
        self.body = self.rfile.read(length)
        try:
            for method, pattern, name in self.ROUTES:
                match = re.fullmatch(pattern, url.path)
                if match and re.fullmatch(method, self.command):
                    values = {k: unquote(v) for k, v in match.groupdict().items() if v is not None}
                    with nullcontext() if name == "commit" else self.hub.lock:
                        reply = getattr(self, name)(**values)
                    self.reply(*reply)
                    return
            raise HubError(404, f"There is no {self.command} {url.path}")
        except HubError as error:
            headers = {"X-Error-Message": str(error)}
            if error.code:
                headers["X-Error-Code"] = error.code
            self.reply(error.status, {"error": str(error)}, headers)

    do_GET = do_POST = do_PUT = do_HEAD = handle_request  # noqa: N815

    def log_message(self, *args):
        pass

    def reply(self, status, content, headers=None):
        if not isinstance(content, bytes):
            content, headers = json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})}
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    @property
    def user(self):
        """Who asks: None without a token; a wrong token is refused whatever it asks for."""
        header = self.headers.get("Authorization")
        if header is None:
            return None
        user = self.hub.tokens.get(header.removeprefix("Bearer "))
        if user is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        return user

    def readable(self, repo):
        """The repository; one that may not be read looks like one that does not exist."""
        user, found = self.user, self.hub.repos.get(repo)
        if found is None or (found.private and user != found.owner):
            raise HubError(404 if user else 401, "Repository not found", "RepoNotFound")
        return found

    def writable(self, repo):
        found = self.readable(repo)
        if self.user is None:
            raise HubError(401, "Invalid username or password.")
        if self.user != found.owner:
            raise HubError(403, "You don't have the rights to write to this repository")
        return found

    def whoami(self):
        if self.user is None:
            raise HubError(401, "Invalid username or password.")
        return 200, {"type": "user", "name": self.user, "orgs": []}

    def validate_yaml(self):
        try:
            block = REGEX_YAML_BLOCK.search(json.loads(self.body)["content"])
            data = yaml.safe_load(block.group(2)) if block else {}
            ModelCardData(**data)
            for name in [data["base_model"]] if "base_model" in data else []:
                validate_repo_id(name)
            if not all(isinstance(tag, str) and tag for tag in data.get("tags", [])):
                raise ValueError("tags must be texts")
            if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", data.get("license", "mit")):
                raise ValueError("license must be an identifier")
        except (ValueError, TypeError, KeyError, yaml.YAMLError) as error:
            return 400, {"errors": [{"message": str(error)}], "warnings": []}
        return 200, {"errors": [], "warnings": []}

    def create_repo(self):
        asked, user = json.loads(self.body), self.user
        if user is None:
            raise HubError(401, "Invalid username or password.")
        owner = asked.get("organization") or user
        name = f"{owner}/{asked['name']}"
        if owner != user:
            raise HubError(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        reply = {"url": f"{self.hub.url}/{name}", "name": name}
        if name in self.hub.repos:
            return 409, {**reply, "error": "You already created this model repo"}
        repo = self.hub.repos[name] = Repo(name, asked.get("visibility") == "private")
        repo.add("main", "initial commit", {".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)})
        return 200, reply

    def info(self, repo, revision="main"):
        found = self.readable(repo)
        commit = found.at(revision)
        siblings = [{"rfilename": path} for path in commit.files]
        return 200, {"id": repo, "sha": commit.oid, "private": found.private, "siblings": siblings, "tags": []}

    def refs(self, repo):
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid}
            for name, oid in self.readable(repo).branches.items()
        ]
        return 200, {"branches": branches, "tags": [], "converts": []}

    def tree(self, repo, revision):
        return 200, [blob.describe(path) for path, blob in self.readable(repo).at(revision).files.items()]

    def create_branch(self, repo, branch):
        found = self.writable(repo)
        if branch in found.branches:
            raise HubError(409, "Reference already exists")
        found.branches[branch] = found.at(json.loads(self.body).get("startingPoint", "main")).oid
        return 200, {}

    def preupload(self, repo, revision):
        files = self.writable(repo).at(revision).files
        return 200, {
            "files": [
                {
                    "path": entry["path"],
                    "uploadMode": "lfs" if entry["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                    "oid": files[entry["path"]].oid if entry["path"] in files else None,
                }
                for entry in json.loads(self.body)["files"]
            ]
        }

    def commit(self, repo, revision):
        if self.hub.barriers:
            self.hub.barriers.pop().wait(60)
        with self.hub.lock:
            found = self.writable(repo)
            head = found.at(revision)
            if revision not in found.branches:
                raise HubError(400, f"{revision} is no branch")
            files = dict(head.files)
            header, *items = map(json.loads, self.body.splitlines())
            if header["value"].get("parentCommit", head.oid) != head.oid:
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            for item in items:
                value = item["value"]
                if item["key"] == "file":
                    files[value["path"]] = Blob(base64.b64decode(value["content"], validate=True), False)
                elif item["key"] == "lfsFile":
                    data = self.hub.large.get(value["oid"])
                    if data is None or len(data) != value["size"]:
                        raise HubError(400, f"LFS object {value['oid']} of {value['path']} was not uploaded")
                    files[value["path"]] = Blob(data, True)
                elif item["key"] == "deletedFile":
                    if files.pop(value["path"], None) is None:
                        raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
                else:
                    raise HubError(400, f"unknown operation {item['key']}")
            oid = found.add(revision, header["value"]["summary"], files)
        return 200, {"commitUrl": f"{self.hub.url}/{repo}/commit/{oid}", "commitOid": oid, "hookOutput": ""}

    def lfs_batch(self, repo):
        self.writable(repo)
        objects = []
        for entry in json.loads(self.body)["objects"]:
            known = entry["oid"] in self.hub.large
            self.hub.expected[entry["oid"]] = entry["size"]
            upload = {"upload": {"href": f"{self.hub.url}/lfs/{entry['oid']}"}}
            objects.append({**entry, **({} if known else {"actions": upload})})
        return 200, {"transfer": "basic", "objects": objects}

    def lfs_put(self, oid):
        if len(self.body) != self.hub.expected.get(oid) or hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, "The content does not have the promised size and SHA-256")
        self.hub.large[oid] = self.body
        return 200, {}

    def resolve(self, repo, revision, path):
        commit = self.readable(repo).at(revision)
        blob = commit.files.get(path)
        if blob is None:
            raise HubError(404, "Entry not found", "EntryNotFound")
        headers = {"ETag": f'"{blob.oid}"', "X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        if blob.large:
            headers |= {"X-Linked-Etag": f'"{blob.oid}"', "X-Linked-Size": str(len(blob.data))}
        status, data = 200, blob.data
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked:
            first, last = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
            if first > last:
                raise HubError(416, f"The file has {len(data)} bytes")
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            status, data = 206, data[first : last + 1]
        if self.command == "GET":
            self.hub.sent[path] = self.hub.sent.get(path, 0) + len(data)
        return status, data, headers
