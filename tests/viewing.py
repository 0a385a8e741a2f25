"""A viewer as users start it, in a process of its own, and requests to it."""

from __future__ import annotations

import http.client
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple


class Got(NamedTuple):
    """The answer to a request."""

    status: int
    body: bytes
    headers: dict[str, str]

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Served:
    """A running viewer.

    Attributes:
        link: the address that it printed.
        port: the port in it.
        process: the server.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process, said = process, ""
        assert process.stdout is not None
        for line in process.stdout:
            said += line
            if line.startswith("Ctrl-C"):
                break
        found = re.search(r"http://\S*:(\d+)/\S*", said)
        assert found is not None, said
        self.said, self.link, self.port = said, found[0], int(found[1])

    def get(self, path: str, method: str = "GET", **headers: str) -> Got:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, headers=headers)
            answer = connection.getresponse()
            return Got(answer.status, answer.read(), {name.lower(): value for name, value in answer.getheaders()})
        finally:
            connection.close()


@contextmanager
def viewing(*words: str | Path) -> Iterator[Served]:
    """Runs `keyhole view` with these words, on any free port and without a browser."""
    command = [sys.executable, "-m", "keyhole", "view", *map(str, words), "--port", "0", "--no-browser"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield Served(process)
    finally:
        process.terminate()
        process.wait(20)
        assert process.stdout is not None
        process.stdout.close()
