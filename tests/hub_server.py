"""A small Hub on the loopback interface: the HTTP requests that huggingface_hub makes, and failures on demand.

The server runs in a process of its own (`python hub_server.py` prints its address). Repositories live in its memory:
commits, branches, tags, pull requests, large files by digest. Accounts: token `hf_alice` may write to `alice/…` and
`lab/…`, `hf_bob` to `bob/…`, `hf_reader` only reads. Tests control it through `Hub`.
"""

import base64
import contextlib
import hashlib
import json
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKENS = {"hf_alice": ("alice", "lab"), "hf_bob": ("bob",), "hf_reader": ()}
LARGE = (".safetensors", ".bin", ".pth", ".png")  # stored as large files, as the Hub's .gitattributes says

# -- the server -----------------------------------------------------------------------------------------------------


class Reply(Exception):
    def __init__(self, status, data=b"", headers=None, code=None, message=None):
        self.status = status
        self.body = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.headers = {"Content-Type": "application/json", **(headers or {})}
        if code:
            self.headers["X-Error-Code"] = code
        if message:
            self.headers["X-Error-Message"] = message


class Repo:
    def __init__(self, name, private):
        self.name, self.private = name, private
        self.commits, self.branches, self.tags = {}, {}, {}
        self.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")

    def commit(self, branch, files, title, parent=None):
        sha = hashlib.sha1(f"{self.name} {branch} {title} {len(self.commits)} {time.time_ns()}".encode()).hexdigest()
        self.commits[sha] = {"files": files, "title": title, "parent": parent}
        self.branches[branch] = sha
        return sha

    def resolve(self, revision):
        for known in (self.branches, self.tags):
            if revision in known:
                return known[revision]
        if revision in self.commits:
            return revision
        raise Reply(404, {"error": "Invalid rev id"}, code="RevisionNotFound", message=f"Invalid rev id: {revision}")


class State:
    def __init__(self):
        self.lock = threading.RLock()
        self.repos, self.large, self.rules, self.log = {}, {}, [], []


def digest_of(name, data):
    if name.endswith(LARGE):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def check_card(content):
    """What the Hub asks of a card's metadata, as far as a model's goes."""
    match = re.match(r"^---\r?\n(.*?)\r?\n---\r?\n", content, re.S)
    if not match:
        return ["no metadata"]
    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError as e:
        return [f"not YAML: {e}"]
    found = []
    for key, kind in (
        ("tags", list),
        ("license", str),
        ("library_name", str),
        ("pipeline_tag", str),
        ("metrics", list),
    ):
        if key in data and not isinstance(data[key], kind):
            found.append(f'"{key}" must be a {kind.__name__}')
    for model in data.get("model-index", []):
        if not isinstance(model.get("name"), str):
            found.append('"model-index[0].name" is required')
        for result in model.get("results", []):
            for group, keys in (("task", ["type"]), ("dataset", ["type", "name"])):
                for key in keys:
                    if not isinstance(result.get(group, {}).get(key), str):
                        found.append(f'"model-index[0].results[0].{group}.{key}" is required')
            for metric in result.get("metrics", []):
                if not isinstance(metric.get("type"), str) or "value" not in metric:
                    found.append('"model-index[0].results[0].metrics[0]" needs type and value')
            source = result.get("source")
            if source is not None and not str(source.get("url", "")).startswith("http"):
                found.append('"model-index[0].results[0].source.url" must be a link')
    return found


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: State

    def log_message(self, *args):
        pass

    # -- one request

    def handle_any(self):
        self.fault = None
        path = urlsplit(self.path).path
        control = path.startswith("/_test/")
        state = self.state
        if not control:
            with state.lock:
                state.log.append(f"{self.command} {unquote(path)}")
                for rule in state.rules:
                    if rule["times"] > 0 and re.search(rule["match"], f"{self.command} {unquote(path)}"):
                        rule["times"] -= 1
                        self.fault = rule
                        break
        kind = self.fault and self.fault["kind"]
        if kind == "slow":
            time.sleep(self.fault["seconds"])
        if kind == "reset":
            self.rfile.read(min(64, int(self.headers.get("Content-Length") or 0)))
            return self.cut()
        body = self.read_body()
        try:
            if kind == "status":
                raise Reply(self.fault["status"], {"error": "injected"}, self.fault.get("headers"))
            if kind == "answer":
                raise Reply(200, self.fault["text"].encode())
            self.dispatch(path, body)
            raise Reply(500, {"error": "no reply"})
        except Reply as reply:
            if kind == "reset_after":
                return self.cut()
            self.send(reply)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    def read_body(self):
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline().strip() or b"0", 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def cut(self):
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def send(self, reply):
        if self.fault and self.fault["kind"] in ("flood", "drip") and self.command == "GET":
            return self.pour(reply)
        self.send_response(reply.status)
        for key, value in reply.headers.items():
            self.send_header(key, value)
        if "Content-Length" not in reply.headers:
            self.send_header("Content-Length", str(len(reply.body)))
        self.end_headers()
        if self.command != "HEAD":
            body = reply.body
            if self.fault and self.fault["kind"] == "truncate":
                body = body[: len(body) // 2]
                self.close_connection = True
            self.wfile.write(body)

    def pour(self, reply):
        """An answer of another length than promised, in chunks: a flood at once, a drip slowly."""
        self.close_connection = True
        self.send_response(200)
        for key, value in reply.headers.items():
            if key not in ("Content-Length", "Content-Range"):
                self.send_header(key, value)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        flood = self.fault["kind"] == "flood"
        chunk = b"x" * (1 << 20 if flood else 1)
        with contextlib.suppress(OSError):  # the client has heard enough
            for _ in range(self.fault["chunks"]):
                self.wfile.write(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n")
                if not flood:
                    time.sleep(0.02)
            self.wfile.write(b"0\r\n\r\n")

    # -- who asks for what

    @property
    def spaces(self):
        """Namespaces that the caller may write to; None without a token."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if not token:
            return None
        if token not in TOKENS:
            raise Reply(401, {"error": "Invalid credentials"}, message="Invalid user token.")
        return TOKENS[token]

    def repo(self, name, write=False):
        repo = self.state.repos.get(name)
        spaces = self.spaces
        mine = name.split("/")[0] in (spaces or ())
        if repo is None or repo.private and not mine:
            status = 401 if spaces is None else 404  # the Hub does not tell which
            raise Reply(status, {"error": "Repository not found"}, code="RepoNotFound", message="Repository not found")
        if write and spaces is None:
            raise Reply(401, {"error": "Unauthorized"}, message="Invalid username or password.")
        if write and not mine:
            raise Reply(403, {"error": "Forbidden"}, message="You don't have the rights to write here")
        return repo

    def dispatch(self, path, body):
        path = unquote(path)
        query = {k: v[0] for k, v in parse_qs(urlsplit(self.path).query).items()}
        with self.state.lock:
            if path.startswith("/_test/"):
                self.control(path, json.loads(body or b"{}"))
            for method, pattern, function in ROUTES:
                if self.command in method and (match := re.fullmatch(pattern, path)):
                    function(self, *match.groups(), body=body, query=query)
        raise Reply(404, {"error": f"no such route: {self.command} {path}"})

    def control(self, path, data):
        state = self.state
        if path == "/_test/reset":
            state.__init__()
        elif path == "/_test/fail":
            state.rules.append(data)
        elif path == "/_test/mend":
            state.rules.clear()
        elif path == "/_test/log":
            raise Reply(200, state.log)
        elif path == "/_test/unused":
            raise Reply(200, [r for r in state.rules if r["times"]])
        elif path == "/_test/put":
            repo = state.repos.setdefault(data["repo"], Repo(data["repo"], data.get("private", False)))
            head = repo.branches["main"]
            files = {**repo.commits[head]["files"]}
            files.update({k: base64.b64decode(v) for k, v in data["files"].items()})
            repo.commit("main", files, "put", head)
        elif path == "/_test/repo":
            repo = state.repos.get(data["repo"])
            raise Reply(
                200,
                repo
                and {
                    "private": repo.private,
                    "branches": repo.branches,
                    "tags": repo.tags,
                    "commits": {k: {**c, "files": sorted(c["files"])} for k, c in repo.commits.items()},
                },
            )
        raise Reply(200, {})

    # -- the API

    def create(self, body, query):
        data = json.loads(body)
        spaces = self.spaces
        if spaces is None:
            raise Reply(401, {"error": "Unauthorized"}, message="Invalid username or password.")
        owner = data.get("organization") or (spaces or ("",))[0]
        name = f"{owner}/{data['name']}"
        if owner not in spaces:
            raise Reply(
                403, {"error": "Forbidden"}, message=f"You don't have the rights to create a model under {owner}"
            )
        if name in self.state.repos:
            raise Reply(
                409, {"error": "exists", "url": f"{self.root}/{name}"}, message="You already created this model"
            )
        private = data.get("private", False) or data.get("visibility") == "private"
        self.state.repos[name] = Repo(name, private)
        raise Reply(200, {"url": f"{self.root}/{name}", "name": name, "id": name})

    @property
    def root(self):
        return f"http://{self.headers['Host']}"

    def validate(self, body, query):
        found = check_card(json.loads(body)["content"])
        reply = {"errors": [{"message": m} for m in found], "warnings": []}
        raise Reply(400 if found else 200, reply)

    def preupload(self, name, revision, body, query):
        repo = self.repo(name, write="create_pr" not in query)
        files = repo.commits[repo.resolve(revision)]["files"]
        rows = []
        for file in json.loads(body)["files"]:
            path = file["path"]
            known = digest_of(path, files[path]) if path in files else None
            mode = "lfs" if path.endswith(LARGE) else "regular"
            rows.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": known})
        raise Reply(200, {"files": rows})

    def batch(self, name, body, query):
        self.repo(name)
        rows = []
        for item in json.loads(body)["objects"]:
            row = dict(item)
            if item["oid"] not in self.state.large:
                row["actions"] = {"upload": {"href": f"{self.root}/_large/{item['oid']}"}}
            rows.append(row)
        raise Reply(200, {"transfer": "basic", "objects": rows})

    def put_large(self, oid, body, query):
        if hashlib.sha256(body).hexdigest() != oid:
            raise Reply(400, {"error": "digest differs"})
        self.state.large[oid] = body
        raise Reply(200)

    def commit(self, name, revision, body, query):
        repo = self.repo(name, write="create_pr" not in query)
        head = repo.resolve(revision)
        files = dict(repo.commits[head]["files"])
        title = ""
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                title = value["summary"]
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.state.large:
                    raise Reply(400, {"error": f"{value['path']} was not uploaded"}, message="LFS object missing")
                files[value["path"]] = self.state.large[value["oid"]]
            elif item["key"] == "deletedFile":
                if value["path"] not in files:
                    text = "A file with this name doesn't exist"
                    raise Reply(404, {"error": text}, code="EntryNotFound", message=text)
                del files[value["path"]]
        branch = revision
        if "create_pr" in query:
            branch = f"refs/pr/{1 + sum(b.startswith('refs/pr/') for b in repo.branches)}"
        sha = repo.commit(branch, files, title, head)
        url = f"{self.root}/{name}"
        reply = {"success": True, "commitOid": sha, "commitUrl": f"{url}/commit/{sha}"}
        if "create_pr" in query:
            reply["pullRequestUrl"] = f"{url}/discussions/{branch.rsplit('/', 1)[1]}"
        raise Reply(200, reply)

    def info(self, name, revision, body, query):
        repo = self.repo(name)
        sha = repo.resolve(revision or "main")
        rows = []
        for path, data in sorted(repo.commits[sha]["files"].items()):
            row = {"rfilename": path}
            if "blobs" in query:
                row.update(size=len(data), blobId=digest_of(path, data))
            rows.append(row)
        reply = {"_id": "1", "id": name, "modelId": name, "sha": sha, "private": repo.private, "siblings": rows}
        raise Reply(200, {**reply, "tags": [], "downloads": 0, "likes": 0})

    def commits(self, name, revision, body, query):
        repo = self.repo(name)
        sha, rows = repo.resolve(revision), []
        while sha:
            date = "2024-01-01T00:00:00.000Z"
            rows.append({"id": sha, "authors": [], "date": date, "title": repo.commits[sha]["title"], "message": ""})
            sha = repo.commits[sha]["parent"]
        raise Reply(200, rows)

    def branch(self, name, branch, body, query):
        repo = self.repo(name, write=True)
        if branch in repo.branches:
            raise Reply(409, {"error": "Reference already exists"}, message="Reference already exists")
        repo.branches[branch] = repo.resolve(json.loads(body or b"{}").get("startingPoint", "main"))
        raise Reply(200, {})

    def tag(self, name, revision, body, query):
        repo = self.repo(name, write=True)
        tag = json.loads(body)["tag"]
        if tag in repo.tags:
            raise Reply(409, {"error": "Tag already exists"}, message="Tag reference exists already")
        repo.tags[tag] = repo.resolve(revision)
        raise Reply(200, {})

    def resolve(self, name, revision, path, body, query):
        repo = self.repo(name)
        sha = repo.resolve(revision)
        headers = {"X-Repo-Commit": sha}
        data = repo.commits[sha]["files"].get(path)
        if data is None:
            raise Reply(404, b"Entry not found", headers, code="EntryNotFound", message="Entry not found")
        headers.update({"ETag": f'"{digest_of(path, data)}"', "Accept-Ranges": "bytes"})
        headers["Content-Type"] = "application/octet-stream"
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(match[1]), int(match[2] or len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            raise Reply(206, data[start : end + 1], headers)
        if self.command == "HEAD":
            headers["Content-Length"] = str(len(data))
        raise Reply(200, data, headers)


_NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    (("POST",), r"/api/repos/create", Handler.create),
    (("POST",), r"/api/validate-yaml", Handler.validate),
    (("POST",), rf"/api/models/{_NAME}/preupload/(.+)", Handler.preupload),
    (("POST",), rf"/{_NAME}\.git/info/lfs/objects/batch", Handler.batch),
    (("PUT",), r"/_large/(\w+)", Handler.put_large),
    (("POST",), rf"/api/models/{_NAME}/commit/(.+)", Handler.commit),
    (("GET",), rf"/api/models/{_NAME}(?:/revision/(.+))?", Handler.info),
    (("GET",), rf"/api/models/{_NAME}/commits/(.+)", Handler.commits),
    (("POST",), rf"/api/models/{_NAME}/branch/(.+)", Handler.branch),
    (("POST",), rf"/api/models/{_NAME}/tag/(.+)", Handler.tag),
    (("GET", "HEAD"), rf"/{_NAME}/resolve/(refs/pr/\d+|[^/]+)/(.+)", Handler.resolve),
]


def serve():
    Handler.state = State()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)
    threading.Thread(target=lambda: (sys.stdin.read(), server.shutdown()), daemon=True).start()  # ends with its parent
    server.serve_forever()


# -- what tests use -----------------------------------------------------------------------------------------------


class Hub:
    """The server, as a test sees it."""

    def __init__(self, url):
        self.url = url

    def _ask(self, path, **data):
        with urllib.request.urlopen(f"{self.url}/_test/{path}", json.dumps(data).encode(), timeout=30) as reply:
            return json.loads(reply.read())

    def reset(self):
        self._ask("reset")

    def fail(self, match, kind="status", times=1, **more):
        """Let the next ``times`` requests that match 'METHOD /path' fail.

        Kinds: status, reset (before it is done), reset_after (done, but no answer), truncate (the answer), slow,
        answer (with ``text``), flood and drip (``chunks`` of a file, without end or slowly).
        """
        self._ask("fail", match=match, kind=kind, times=times, **more)

    def mend(self):
        """No more failures."""
        self._ask("mend")

    def unused(self):
        """Failures that were asked for and did not come."""
        return self._ask("unused")

    def log(self, match=""):
        return [line for line in self._ask("log") if re.search(match, line)]

    def put(self, repo, files, private=False):
        """Put files into a repository, whatever they are."""
        encoded = {k: base64.b64encode(v).decode() for k, v in files.items()}
        self._ask("put", repo=repo, files=encoded, private=private)

    def repo(self, name):
        """Branches, tags and commits; None where there is no such repository."""
        return self._ask("repo", repo=name)

    def files(self, name, branch="main"):
        """Names of a branch's files, without the first commit's."""
        repo = self.repo(name)
        return [f for f in repo["commits"][repo["branches"][branch]]["files"] if f != ".gitattributes"]

    def env(self, folder):
        """Variables of a process that has this Hub, an empty cache in ``folder`` and no token."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(folder),
            "HF_HUB_DISABLE_XET": "1",  # its protocol is not spoken here
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "OMP_NUM_THREADS": "1",
        }


def ask_for_no_agents(monkeypatch):
    """Newer clients ask the Hub once a day which programs it calls agents; these tests count requests."""
    try:
        from huggingface_hub.utils import _detect_agent
    except ImportError:
        return
    monkeypatch.setattr(_detect_agent, "_registry", {"standardEnvVars": [], "harnesses": {}}, raising=False)


@contextlib.contextmanager
def running():
    """A server in a process of its own."""
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).resolve())], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield Hub(process.stdout.readline().strip())
    finally:
        process.terminate()
        process.wait()
        process.stdin.close()
        process.stdout.close()


if __name__ == "__main__":
    serve()
