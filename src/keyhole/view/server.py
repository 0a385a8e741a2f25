"""Serve a collection until Ctrl-C, and say where."""

from __future__ import annotations

import errno
import os
import secrets
import socket
import sys
import webbrowser
from contextlib import suppress
from dataclasses import dataclass

import uvicorn

from keyhole.errors import ConfigError
from keyhole.view.app import Viewer
from keyhole.view.collection import Collection
from keyhole.view.guard import LOOPBACK, Guard, known_hosts

PORT, PORTS = 8765, 20
"""First port that is tried where none is given, and how many follow it."""
MAX_CONNECTIONS = 512


@dataclass(frozen=True)
class Place:
    """Where to serve.

    Attributes:
        address: Of this machine; other than loopback, every request needs a token.
        port: None for the first that is free from `PORT` on, 0 for any.
        token: Ask for a token on loopback too.
    """

    address: str = "127.0.0.1"
    port: int | None = None
    token: bool = False


def bound(place: Place) -> socket.socket:
    """Return a socket that listens.

    Raises:
        ConfigError: The port is in use, or the address is not of this machine.
    """
    ports = range(PORT, PORT + PORTS) if place.port is None else [place.port]
    family = socket.AF_INET6 if ":" in place.address else socket.AF_INET
    for port in ports:
        # asyncio sends small packets at once (TCP_NODELAY) only where the protocol is named; else a tile waits 40 ms
        found = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        try:
            if os.name == "posix":
                found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind((place.address, port))
            found.listen(128)
            return found
        except OSError as error:
            found.close()
            if error.errno == errno.EADDRINUSE and port != ports[-1]:
                continue
            if error.errno == errno.EADDRINUSE:
                raise ConfigError(f"--port {port}: in use. Give another, or 0 for any that is free.") from error
            if error.errno == errno.EACCES:
                raise ConfigError(f"--port {port}: not allowed. Give one above 1023.") from error
            what = error.strerror or error
            raise ConfigError(f"--address {place.address}: not an address of this machine ({what}).") from error
    raise AssertionError("unreachable")


def serve(collection: Collection, place: Place, bits: int | None = None, browse: bool = True) -> None:
    """Serve until Ctrl-C."""
    listening = bound(place)
    port = listening.getsockname()[1]
    token = secrets.token_urlsafe(24) if place.token or place.address not in LOOPBACK else ""
    guarded = Guard(Viewer(collection, bits).app(), known_hosts(place.address), token)
    host = "localhost" if place.address in (*LOOPBACK, "0.0.0.0", "::") else place.address
    link = f"http://{f'[{host}]' if ':' in host else host}:{port}/{f'?token={token}' if token else ''}"
    print(f"{collection.title}: {len(collection.entries):,} images\n\n  {link}\n")
    if place.address in LOOPBACK:
        print(
            f"From another computer: ssh -L {port}:localhost:{port} {socket.gethostname()}, then open the same address."
        )
    else:
        print(f"From another computer: http://{socket.gethostname()}:{port}/?token={token}")
    print("Ctrl-C ends it.", flush=True)
    if browse and has_browser():
        webbrowser.open(link)
    config = uvicorn.Config(
        guarded,
        log_level="warning",
        access_log=False,
        server_header=False,
        http="h11",
        ws="none",
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=1,
    )
    with suppress(KeyboardInterrupt):  # the usual end
        uvicorn.Server(config).run(sockets=[listening])


def has_browser() -> bool:
    """Return whether a browser would open where the user sits: there is a screen, and it is not that of a server."""
    if sys.platform in ("win32", "darwin"):
        return "SSH_CONNECTION" not in os.environ
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")) and "SSH_CONNECTION" not in os.environ
