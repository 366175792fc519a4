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

"""People as the reward: a page with the images of a generation, and a click on those that are liked."""

import errno
import hashlib
import hmac
import http
import json
import os
import secrets
import socket
import sys
import threading
import webbrowser
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from PIL import Image
from transformers.utils import logging

from .ballot import IMAGES_FOLDER, VOTES_FILE, Ballot, png, save_pairs, write_whole
from .base import BlackBoxReward


logger = logging.get_logger(__name__)

LONGEST_REQUEST = 10_000  # bytes
PAGE = {"": ("vote.html", "text/html; charset=utf-8"), "vote.js": ("vote.js", "text/javascript; charset=utf-8")}
HEADERS = {
    # Nothing of another origin, and the address with its token goes nowhere.
    "Content-Security-Policy": "default-src 'none'; img-src 'self' data:; script-src 'self'; style-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class VoteReward(BlackBoxReward):
    """
    Scores are votes: 0 for a picture, 1 for one that is liked, 2 for one that is loved, None for a group that is skipped.

    It serves a page and waits until every group of a generation is done, however long that takes. [`open`] comes first, which
    the trainer of [`ChunkGRPOTrainer`] calls.
    """

    name = "vote"
    scores_generations = True

    def __init__(self):
        self.ballot: Ballot | None = None
        self._server: VoteServer | None = None
        self._meanwhile: Callable[[], None] = lambda: None

    def open(
        self,
        folder: str | os.PathLike,
        host: str = "127.0.0.1",
        port: int = 0,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> str:
        """
        Serve the page.

        Args:
            folder (`str` or `Path`): where votes, pictures and the token are kept.
            host (`str`, *optional*, defaults to `"127.0.0.1"`): address to listen on.
            port (`int`, *optional*): its port; by default, and where that is in use, a free one.
            meanwhile (`Callable`, *optional*): called twice a second while votes are waited for; may raise, to stop that.

        Returns:
            `str`: address of the page, with a token that the folder keeps, so that a resumed run has the same.
        """
        self.ballot = Ballot(folder)
        self._meanwhile = meanwhile
        self._server = VoteServer(self.ballot, host, port, _token(Path(folder)))
        address = self.address
        print(f"Vote at {address}", flush=True)  # noqa: T201 - whatever the level of logging: the run waits for it
        if sys.stdout.isatty() and (sys.platform in ("darwin", "win32") or os.environ.get("DISPLAY")):
            webbrowser.open(address)
        return address

    @property
    def address(self) -> str:
        """Of the page, once it is open."""
        return self._server.address

    def show(
        self, message: str, progress: float | None = None, strip: Sequence[tuple[str, Image.Image, Image.Image]] = ()
    ) -> None:
        """
        Say on the page what the trainer is at.

        Args:
            message (`str`): in words.
            progress (`float`, *optional*): share of the run that is over.
            strip (`Sequence`, *optional*): prompts with their picture before the training and now. None: as it was.
        """
        self._server.show(message, progress, strip)

    def pictures_before(self, prompts: Sequence[str]) -> list[Image.Image] | None:
        """Those of [`keep_pictures_before`], of this run or one that it goes on with; `None` where one is missing."""
        paths = [self._path_before(prompt) for prompt in prompts]
        if not all(path.exists() for path in paths):
            return None
        return [Image.open(path).convert("RGB") for path in paths]

    def keep_pictures_before(self, prompts: Sequence[str], pictures: Sequence[Image.Image]) -> None:
        """Keep what the model made of some prompts before the training."""
        for prompt, picture in zip(prompts, pictures, strict=True):
            write_whole(self._path_before(prompt), png(picture))

    def _path_before(self, prompt: str) -> Path:
        return self.ballot.folder / IMAGES_FOLDER / f"before-{hashlib.sha256(prompt.encode()).hexdigest()[:24]}.png"

    def __call__(
        self, images: list[Image.Image], prompts: list[str], condition_image: list[Image.Image] | None = None
    ) -> list[float | None]:
        if self.ballot is None:
            raise ValueError("People vote during a training of ChunkGRPOTrainer alone, with reward_funcs='vote'.")
        self.ballot.ask(images, prompts, condition_image)
        while not self.ballot.wait(0.5):
            self._meanwhile()
        return self.ballot.scores()

    def close(self) -> None:
        """Serve the page no more, and write the pairs."""
        if self._server is None:
            return
        folder = self.ballot.folder
        self._server.close()
        self._server = self.ballot = None
        try:
            save_pairs(folder)
        except OSError as error:  # a training is not lost for that, nor what ended it
            logger.warning(
                f"The pairs of votes could not be written: {error}. The votes are in {folder / VOTES_FILE}; "
                "trl_diffusion.rewards.ballot.save_pairs(folder) writes the pairs once that is mended."
            )


def check_votes(folder: str | os.PathLike, host: str, port: int) -> None:
    """
    Refuse what [`VoteReward.open`] would refuse, for instance before weights are loaded.

    Raises:
        `ValueError`: the address cannot be listened on, or the folder has another file in place of the votes.
    """
    if (Path(folder) / VOTES_FILE).exists():
        Ballot(folder)
    _listening(host, port, BaseHTTPRequestHandler).server_close()


class VoteServer:
    """
    The page of a ballot over HTTP. Every address begins with the token; others are answered with 403.

    Args:
        ballot ([`Ballot`]): what is voted on.
        host, port: see [`VoteReward.open`].
        token (`str`): what an address must begin with.
    """

    def __init__(self, ballot: Ballot, host: str, port: int, token: str):
        self.ballot, self.token = ballot, token
        self._status: dict[str, Any] = {"message": "", "progress": None}
        self._strip: list[dict[str, str]] = []
        self._shown: dict[str, bytes] = {}
        self._version, self._run = 0, secrets.token_hex(8)
        self.is_closed = False
        self._http = _listening(host, port, type("Handler", (_Handler,), {"site": self}))
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        host, port = self._http.server_address[:2]
        if host in ("0.0.0.0", "::"):
            host = socket.gethostname()
        return f"http://[{host}]:{port}/{self.token}/" if ":" in host else f"http://{host}:{port}/{self.token}/"

    def show(
        self, message: str, progress: float | None, strip: Sequence[tuple[str, Image.Image, Image.Image]]
    ) -> None:
        """See [`VoteReward.show`]."""
        self._status = {"message": message, "progress": progress}
        if strip:
            shown, rows = {}, []
            for i, (prompt, before, now) in enumerate(strip):
                for kind, picture in (("before", before), ("now", now)):
                    shown[f"{kind}-{i}"] = png(picture)
                rows.append({"prompt": prompt, "before": f"before-{i}", "now": f"now-{i}"})
            self._shown, self._strip = shown, rows
        self._version += 1

    def state(self) -> dict[str, Any]:
        """What the page shows, as JSON."""
        found = self.ballot.snapshot()
        # Both numbers grow: a page does not go back to an answer that it gets late.
        version = [found["version"], self._version]
        return {**found, **self._status, "strip": self._strip, "run": self._run, "version": version}

    def picture(self, name: str) -> bytes | None:
        """A picture that is voted on by its key, or one of the strip."""
        if name in self._shown:
            return self._shown[name]
        asked = {key for group in list(self.ballot.groups) for key in (group.source, *group.keys)}
        return self.ballot.picture_path(name).read_bytes() if name in asked else None

    def act(self, name: str, request: dict[str, Any]) -> None:
        """An act of the page. Raises `KeyError`, `TypeError` or `ValueError` of what is wrong or over."""
        if name == "vote":
            self.ballot.vote(request["group"], request["image"], request["score"])
        elif name in ("done", "skip"):
            self.ballot.close(request["group"], skip=name == "skip")
        elif name == "undo":
            self.ballot.undo()
        else:
            raise ValueError(f"There is no act {name!r}.")

    def close(self) -> None:
        self.is_closed = True  # for connections that are kept alive
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    site: VoteServer
    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds that a connection may be silent
    disable_nagle_algorithm = True  # head and body of an answer are two writes, of which the second would wait

    def parse_request(self) -> bool:
        is_good = super().parse_request()
        self.close_connection = self.close_connection or self.site.is_closed
        return is_good and not self.site.is_closed

    def do_GET(self) -> None:
        name = self._name()
        if name is None:
            self._answer(http.HTTPStatus.FORBIDDEN, b"The address is wrong: it has a token, which the run printed.")
        elif name in PAGE:
            file, kind = PAGE[name]
            self._answer(http.HTTPStatus.OK, Path(__file__).with_name(file).read_bytes(), kind)
        elif name == "state":
            self._answer(http.HTTPStatus.OK, json.dumps(self.site.state()).encode(), "application/json")
        else:
            content = self.site.picture(name.removeprefix("pictures/")) if name.startswith("pictures/") else None
            if content is None:
                self._answer(http.HTTPStatus.NOT_FOUND, b"There is nothing here.")
            else:
                self._answer(http.HTTPStatus.OK, content, "image/png")

    def do_POST(self) -> None:
        name, length = self._name(), self.headers.get("Content-Length", "")
        if name is None:
            self.close_connection = True
            self._answer(http.HTTPStatus.FORBIDDEN, b"The address is wrong: it has a token, which the run printed.")
            return
        if not length.isdecimal() or int(length) > LONGEST_REQUEST:
            self.close_connection = True
            self._answer(http.HTTPStatus.REQUEST_ENTITY_TOO_LARGE, b"A vote is a short JSON object.")
            return
        try:
            self.site.act(name, json.loads(self.rfile.read(int(length))))
        except KeyError as error:  # a page that is behind: its next look tells it
            self._answer(http.HTTPStatus.CONFLICT, str(error).encode())
        except (ValueError, TypeError) as error:
            self._answer(http.HTTPStatus.BAD_REQUEST, str(error).encode())
        else:
            self._answer(http.HTTPStatus.OK, json.dumps(self.site.state()).encode(), "application/json")

    def _name(self) -> str | None:
        """What is asked for, if the address has the token."""
        token, _, name = self.path.partition("?")[0].removeprefix("/").partition("/")
        return name if hmac.compare_digest(token.encode(), self.site.token.encode()) else None

    def _answer(self, status: http.HTTPStatus, content: bytes, kind: str = "text/plain; charset=utf-8") -> None:
        self.send_response(status)
        for header, value in {
            **HEADERS, "Content-Type": kind, "Content-Length": str(len(content)), "Cache-Control": "no-store",
        }.items():  # fmt: skip
            self.send_header(header, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        """Nothing: the address has the token in it."""


def _listening(host: str, port: int, handler: type[BaseHTTPRequestHandler]) -> ThreadingHTTPServer:
    """A server at an address, on a free port where that one is in use."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        server_class = type("Server", (ThreadingHTTPServer,), {"address_family": family})
        try:
            return server_class((host, port), handler)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            return server_class((host, 0), handler)
    except OSError as error:
        raise ValueError(
            f"The page of votes cannot be served at vote_host={host!r}, vote_port={port}: {error.strerror}. Leave them unset "
            "for this machine alone, or give an address of it."
        ) from error


def _token(folder: Path) -> str:
    """The token of a folder, made once, for its owner to read alone."""
    path = folder / "token"
    if not path.exists():
        write_whole(path, b"")
        path.chmod(0o600)
        path.write_text(secrets.token_urlsafe(16))
    return path.read_text()
