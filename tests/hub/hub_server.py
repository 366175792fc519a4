# Copyright 2026 The trl_diffusion authors
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""
A small Hub in this process: what `huggingface_hub` calls to log in, create a repository, push to it and read from it.

It keeps every commit, refuses wrong tokens and content whose hash is wrong, checks the metadata of cards by the Hub's
published rules, and can break a chosen step of a push.
"""

import asyncio
import base64
import contextlib
import hashlib
import json
import socket
import threading
from dataclasses import dataclass, field

import uvicorn
import yaml
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route


# Endings that the Hub's own `.gitattributes` sends to LFS, of those that a training writes.
LFS_ENDINGS = (".safetensors", ".bin", ".pt", ".pth")
# Some of the licences that the Hub knows; "other" needs a name and a link.
LICENSES = ("apache-2.0", "mit", "openrail++", "cc-by-nc-4.0", "other")


@dataclass
class Repository:
    """
    `commits` holds message and all files after it; `faults` the steps that break, each once, in order: step of a push,
    and how ("drop" breaks the connection, "pass" lets it go on, a number is an HTTP status).
    """

    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)
    faults: list[tuple[str, str]] = field(default_factory=list)
    upload_seconds: float = 0.0
    uploads: list[str] = field(default_factory=list)

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1][1] if self.commits else {}

    @property
    def messages(self) -> list[str]:
        return [message for message, _ in self.commits]


class Dropped(Response):
    """An answer that breaks off: the server closes the connection before the body that it has promised."""

    async def __call__(self, scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"100")]})


def refused(status: int, message: str) -> Response:
    return JSONResponse({"error": message}, status_code=status, headers={"X-Error-Message": message})


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def card_errors(content: str) -> list[str]:
    """What the Hub's rules for the metadata of a model card say about a card."""
    if not content.startswith("---\n") or "\n---\n" not in content[4:]:
        return ["there is no metadata"]
    try:
        data = yaml.safe_load(content[4:].partition("\n---\n")[0])
    except yaml.YAMLError as error:
        return [f"the metadata is no YAML: {error}"]
    errors = []
    for name in ("library_name", "base_model", "base_model_relation", "pipeline_tag", "license", "license_name"):
        if name in data and not isinstance(data[name], str):
            errors.append(f"{name} must be a string")
    if data.get("base_model_relation", "adapter") not in ("adapter", "finetune", "merge", "quantized"):
        errors.append("base_model_relation is not known")
    if not all(isinstance(tag, str) for tag in data.get("tags", [])):
        errors.append("tags must be strings")
    if data.get("license", "mit") not in LICENSES:
        errors.append("license is not known")
    if ("license_name" in data or "license_link" in data) and data.get("license") != "other":
        errors.append("license_name and license_link need license: other")
    for example in data.get("widget", []):
        if not isinstance(example.get("text"), str) or not isinstance(example.get("output", {}).get("url"), str):
            errors.append("a widget's example needs text and output.url")
    return errors


class Hub:
    """
    The server's state and its answers.

    Args:
        base_models (`dict[str, dict]`): id -> metadata of the card, of models that exist beside the pushed ones.
    """

    # token -> may write; all belong to alice.
    TOKENS = {"hf_writing": True, "hf_reading": False}

    def __init__(self, base_models: dict[str, dict]):
        self.base_models = base_models
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.url = ""

    def expect(self, name: str, **settings) -> None:
        """Set the faults of a repository that does not exist yet."""
        self.repositories[name] = Repository(**settings)

    def app(self) -> Starlette:
        repo = "/{owner}/{name}"
        return Starlette(
            routes=[
                Route("/api/whoami-v2", self.whoami),
                Route("/api/repos/create", self.create, methods=["POST"]),
                Route("/api/validate-yaml", self.validate, methods=["POST"]),
                Route("/api/models" + repo, self.info),
                Route("/api/models" + repo + "/revision/{revision}", self.info),
                Route("/api/models" + repo + "/preupload/{revision}", self.preupload, methods=["POST"]),
                Route("/api/models" + repo + "/commit/{revision}", self.commit, methods=["POST"]),
                Route(repo + ".git/info/lfs/objects/batch", self.batch, methods=["POST"]),
                Route("/lfs" + repo + "/{oid}", self.upload, methods=["PUT"]),
                Route("/lfs" + repo + "/verify", self.verify, methods=["POST"]),
                Route(repo + "/resolve/{revision}/{path:path}", self.resolve, methods=["GET", "HEAD"]),
            ]
        )

    def refusal(self, request: Request, step: str) -> Response | None:
        """What stands in the way of a call that writes: the token, or a fault that is due."""
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in self.TOKENS:
            return refused(401, "Invalid credentials in Authorization header")
        if not self.TOKENS[token]:
            return refused(403, "Forbidden: you must use a write token")
        return self.fault(request, step)

    def fault(self, request: Request, step: str) -> Response | None:
        faults = self.repositories[self.id(request)].faults
        if not faults or faults[0][0] != step:
            return None
        kind = faults.pop(0)[1]
        if kind == "pass":
            return None
        return Dropped() if kind == "drop" else refused(int(kind), "broken on purpose")

    @staticmethod
    def id(request: Request) -> str:
        return f"{request.path_params['owner']}/{request.path_params['name']}"

    async def whoami(self, request: Request) -> Response:
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in self.TOKENS:
            return refused(401, "Invalid credentials in Authorization header")
        return JSONResponse({"type": "user", "name": "alice", "orgs": []})

    async def create(self, request: Request) -> Response:
        body = await request.json()
        name = f"{body['organization'] or 'alice'}/{body['name']}"
        created = name not in self.repositories
        request.path_params.update(owner=name.split("/")[0], name=name.split("/")[1])
        repository = self.repositories.setdefault(name, Repository())
        refusal = self.refusal(request, "create")
        if refusal is None and not name.startswith("alice/"):
            refusal = refused(403, "You don't have the rights to create a model under this namespace")
        if refusal is not None:
            if created:
                del self.repositories[name]
            return refusal
        exists = not created and repository.commits
        return JSONResponse({"url": f"{self.url}/{name}"}, status_code=409 if exists else 200)

    async def validate(self, request: Request) -> Response:
        errors = card_errors((await request.json())["content"])
        body = {"errors": [{"message": error} for error in errors], "warnings": []}
        return JSONResponse(body, status_code=400 if errors else 200)

    async def info(self, request: Request) -> Response:
        name = self.id(request)
        if name in self.base_models:
            return JSONResponse({"id": name, "sha": "0" * 40, "cardData": self.base_models[name]})
        if name not in self.repositories or not self.repositories[name].commits:
            return JSONResponse({"error": "not found"}, status_code=404, headers={"X-Error-Code": "RepoNotFound"})
        repository = self.repositories[name]
        files = [{"rfilename": path} for path in repository.files]
        return JSONResponse({"id": name, "sha": f"{len(repository.commits):040x}", "siblings": files})

    async def preupload(self, request: Request) -> Response:
        if (refusal := self.refusal(request, "preupload")) is not None:
            return refusal
        present = self.repositories[self.id(request)].files
        answers = []
        for file in (await request.json())["files"]:
            path, is_lfs = file["path"], file["path"].endswith(LFS_ENDINGS)
            oid = None
            if path in present:
                oid = hashlib.sha256(present[path]).hexdigest() if is_lfs else git_hash(present[path])
            mode = "lfs" if is_lfs else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return JSONResponse({"files": answers})

    async def batch(self, request: Request) -> Response:
        if (refusal := self.refusal(request, "batch")) is not None:
            return refusal
        answers = []
        for wanted in (await request.json())["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.objects:
                folder = f"{self.url}/lfs/{self.id(request)}"
                answer["actions"] = {
                    "upload": {"href": f"{folder}/{wanted['oid']}"},
                    "verify": {"href": f"{folder}/verify"},
                }
            answers.append(answer)
        return JSONResponse({"objects": answers, "transfer": "basic"})

    async def upload(self, request: Request) -> Response:
        # An address that is signed: it needs no token.
        if (broken := self.fault(request, "upload")) is not None:
            return broken
        repository = self.repositories[self.id(request)]
        await asyncio.sleep(repository.upload_seconds)
        content = await request.body()
        if hashlib.sha256(content).hexdigest() != request.path_params["oid"]:
            return refused(400, "the content has another hash")
        self.objects[request.path_params["oid"]] = content
        repository.uploads.append(request.path_params["oid"])
        return Response()

    async def verify(self, request: Request) -> Response:
        body = await request.json()
        known = len(self.objects.get(body["oid"], b"")) == body["size"]
        return Response(status_code=200 if known else 404)

    async def commit(self, request: Request) -> Response:
        if (refusal := self.refusal(request, "commit")) is not None:
            return refusal
        repository = self.repositories[self.id(request)]
        files = dict(repository.files)
        message = None
        for line in (await request.body()).splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                message = value["summary"]
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile" and value["oid"] in self.objects:
                files[value["path"]] = self.objects[value["oid"]]
            else:
                return refused(400, f"cannot commit {item}")
        repository.commits.append((message, files))
        oid = f"{len(repository.commits):040x}"
        return JSONResponse({"commitUrl": f"{self.url}/{self.id(request)}/commit/{oid}", "commitOid": oid})

    async def resolve(self, request: Request) -> Response:
        repository = self.repositories.get(self.id(request), Repository())
        content = repository.files.get(request.path_params["path"])
        if content is None:
            return Response(status_code=404, headers={"X-Error-Code": "EntryNotFound"})
        headers = {"ETag": f'"{git_hash(content)}"', "X-Repo-Commit": f"{len(repository.commits):040x}"}
        return Response(content, headers=headers, media_type="application/octet-stream")


@contextlib.contextmanager
def serving(hub: Hub):
    """Serve a hub from a thread; sets and gives its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        hub.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        server = uvicorn.Server(uvicorn.Config(hub.app(), log_level="critical"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield hub.url
        finally:
            server.should_exit = True
            thread.join()
