"""The viewer is safe to leave running: nothing is let in that should not be, and nobody can hold up the others."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from PIL import Image
from starlette.types import Message, Scope
from viewing import Served, viewing

from keyhole.view.app import Viewer
from keyhole.view.collection import open_collection
from keyhole.view.decoders import Decoders
from keyhole.view.guard import Guard, known_hosts

SECRET = "not for browsers"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images, and beside their folder a file that no request may reach."""
    outside = tmp_path_factory.mktemp("safety")
    (outside / "secret.txt").write_text(SECRET)
    (outside / "images").mkdir()
    for name, color in (("a.png", (200, 0, 0)), ("b.png", (0, 0, 200))):
        Image.new("RGB", (600, 300), color).save(outside / "images" / name)
    return outside / "images"


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Served]:
    with viewing(folder) as server:
        yield server


# --- who is let in ---------------------------------------------------------------------------------------------------


def test_another_name_or_origin_is_not_let_in(served: Served) -> None:
    here = f"127.0.0.1:{served.port}"
    assert served.get("/api/images").status == 200
    assert served.get("/api/images", Host="localhost:9000").status == 200, "the other end of ssh -L"
    assert served.get("/api/images", Host="[::1]:9000").status == 200
    for host in (
        "evil.example",
        f"localhost.evil.example:{served.port}",
        "127.0.0.1.evil.example",
        "localhost:80x",
        "",
    ):
        assert served.get("/api/images", Host=host).status == 421, host
    assert served.get("/api/images", Origin=f"http://{here}").status == 200
    for origin in (f"http://{here}.evil.example", f"https://{here}", "http://127.0.0.1", "null", "http://evil.example"):
        assert served.get("/api/images", Origin=origin).status == 403, origin
    assert served.get("/tiles/0/0/0/0", **{"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}).status == 403
    assert served.get("/", **{"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}).status == 200


def test_nothing_can_be_written_and_every_answer_is_fenced(served: Served) -> None:
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "shutdown"):
        assert served.get("/api/images", method).status == 405, method
    for path in ("/", "/static/app.js", "/api/images", "/tiles/0/0/0/0", "/nothing"):
        headers = served.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "//" not in policy
        assert "access-control-allow-origin" not in headers


def test_no_page_names_another_host_or_has_a_script_in_it(served: Served) -> None:
    page = served.get("/").body.decode()
    assert not re.search(r"https?://|<script[^>]*>[^<]|\son\w+=|style=", page)
    names = re.findall(r'(?:src|href)="static/([\w.]+)"', page)
    own = [name for name in names if not name.startswith("leaflet")]
    for name in [*own, "dom.js", "list.js", "panel.js", "stage.js"]:
        text = served.get(f"/static/{name}").body.decode().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|innerHTML|eval\(", text), name
    assert all(served.get(f"/static/{name}").status == 200 for name in names)


def test_an_address_that_others_reach_needs_the_token(folder: Path) -> None:
    with viewing(folder, "--address", "0.0.0.0") as server:
        token = server.link.rpartition("token=")[2]
        assert len(token) >= 32
        assert [server.get(path).status for path in ("/", "/api/images", "/tiles/0/0/0/0")] == [403] * 3
        assert server.get(f"/?token={token[:-1]}").status == 403
        let_in = server.get(f"/?token={token}")
        assert (let_in.status, let_in.headers["location"]) == (303, "/")
        cookie = let_in.headers["set-cookie"]
        assert "httponly" in cookie.lower()
        assert "samesite=strict" in cookie.lower()
        assert server.get("/api/images", Cookie=cookie.partition(";")[0]).status == 200
        assert server.get("/api/images", Cookie=cookie.partition(";")[0], Host="evil.example").status == 421


# --- hostile requests ------------------------------------------------------------------------------------------------

PARTS = (
    *("..", "../..", "..%2f..", "..%5c..", "%2e%2e", "%252e%252e", "..%c0%af", "....//", "\\..\\..", "/etc/passwd"),
    *(
        "secret.txt",
        "%00",
        "a.png",
        "file:///etc/passwd",
        "http://evil.example/a.png",
        "C:%5cwindows",
        "~",
        "",
        " ",
        ".",
    ),
    *(
        "-1",
        "+1",
        "1e3",
        "0x1",
        "01",
        "1.0",
        "٣",
        "²",
        "9" * 9,
        "9" * 5000,
        "1" * 20,
        "NaN",
        "null",
        "true",
        "%",
        "%zz",
    ),
    *("0", "1", "2", "<script>", "';--", "${jndi:x}", "\u202e", "%f0%9f%94%91", "A" * 3000),
)
STEMS = (
    "tiles",
    "thumbnails",
    "maps",
    "scores",
    "patches",
    "api/images",
    "api",
    "static",
    "pages",
    "",
    "src/keyhole/view",
    "api/../static",
)


VALID = ("/", "/api/images", "/api/images/0", "/thumbnails/1", "/tiles/0/0/0/0", "/static/app.js")
HOSTS = (
    b"evil.example",
    b"localhost.evil.example:8765",
    b"evil.localhost",
    b"localhost:8765@evil.example",
    b"127.0.0.1.nip.io",
)


def hostile_paths(count: int, secret: Path) -> Iterator[str]:
    """Yields paths as a request may write them, different each time, and some that are right for hostile headers."""
    draw = random.Random(0)
    for _ in range(count):
        stem, kind = draw.choice(STEMS), draw.random()
        if kind < 0.1:
            yield draw.choice(VALID)
        elif kind < 0.4:  # a way up to a file that is there
            up, between = draw.choice(["..", "%2e%2e", ".%2e"]), draw.choice(["/", "%2f", "%252f", "%5c", "//"])
            file = draw.choice([Path("/etc/passwd"), secret, secret.relative_to(secret.parent)])
            yield f"/{stem}/" + between.join([*[up] * draw.randint(0, 12), *str(file).strip("/").split("/")])
        else:
            yield f"/{stem}/" + "/".join(draw.choice(PARTS) for _ in range(draw.randint(0, 6)))


async def status_of(app: Any, path: str, headers: list[tuple[bytes, bytes]], method: str) -> tuple[int, bytes]:
    """The answer of an application to a request, as a server hands it over."""
    raw, _, query = path.partition("?")
    scope: Scope = {
        **{"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http"},
        **{"path": unquote(raw), "raw_path": raw.encode(), "query_string": query.encode(), "root_path": ""},
        **{"headers": headers, "server": ("127.0.0.1", 8765), "client": ("127.0.0.1", 1)},
    }
    said: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        said.append(message)

    await app(scope, receive, send)
    return said[0]["status"], b"".join(message.get("body", b"") for message in said[1:])


def test_ten_thousand_hostile_requests_get_no_file_and_no_fault(folder: Path) -> None:
    count = 10_000

    async def run(token: str) -> list[tuple[int, str]]:
        viewer = Viewer(open_collection([folder]))
        app = Guard(viewer.app(), known_hosts("127.0.0.1"), token)
        draw, found = random.Random(1), []
        for number, path in enumerate(hostile_paths(count // 2, folder.parent / "secret.txt")):
            headers = [(b"host", b"localhost:8765")]
            if number % 5 == 0:
                odd = draw.choice([bytes(draw.choices(range(256), k=draw.randint(0, 60))), draw.choice(HOSTS)])
                name = draw.choice([b"host", b"origin", b"cookie", b"sec-fetch-site", b"range", b"content-length"])
                headers = [each for each in headers if each[0] != name] + [(name, odd)] * draw.randint(1, 2)
            query = draw.choice(
                ["", "", "?token=%ff%00", f"?{'a=b&' * 300}", "?token=" + "9" * 300, "?path=/etc/passwd"]
            )
            status, body = await status_of(app, path + query, headers, draw.choice(["GET", "GET", "HEAD", "POST"]))
            assert SECRET.encode() not in body
            assert b"root:" not in body
            if status == 200:
                assert [value for name, value in headers if name == b"host"] == [b"localhost:8765"], path
            found.append((status, path))
        await viewer.decoders.close()
        return found

    found = [*asyncio.run(run("")), *asyncio.run(run("a token"))]
    assert len(found) == count
    assert [each for each in found if each[0] >= 500] == []
    right = re.compile(r"/(api/images(/[01])?|thumbnails/[01]|tiles/[01](/\d+){3})|/static/?|/")
    assert all(
        re.fullmatch(right, path.replace("//", "/")) for status, path in found if status == 200 and "static" not in path
    )


def test_bytes_that_are_no_request_leave_the_server_up(served: Served) -> None:
    draw = random.Random(2)
    answers = []
    for number in range(60):
        start = draw.choice([b"", b"GET ", b"GET / HTTP/1.1\r\n", b"GET /tiles/0/0/0/0 HTTP/9.9\r\n", b"\x16\x03\x01"])
        data = start + bytes(draw.choices(range(256), k=draw.choice([0, 5, 300, 70_000]))) + b"\r\n\r\n"
        with socket.create_connection(("127.0.0.1", served.port), 10) as connection:
            try:
                connection.sendall(data)
                if number % 2:
                    connection.shutdown(socket.SHUT_WR)
                    answers.append(connection.recv(12))
            except OSError:  # the server has closed the connection
                pass
    assert all(answer[9:10] != b"5" for answer in answers)
    assert served.get("/api/images").status == 200


# --- the others go on ------------------------------------------------------------------------------------------------


def test_links_out_of_a_folder_of_predictions_are_not_followed(folder: Path, tmp_path: Path) -> None:
    image = folder / "a.png"
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "scores.npz").write_bytes(b"of somebody else")
    answers = tmp_path / "answers"
    (answers / "linked").mkdir(parents=True)
    (answers / "linked" / "scores.npz").symlink_to(tmp_path / "outside" / "scores.npz")
    (answers / "own").mkdir()
    (answers / "own" / "scores.npz").write_bytes(b"of this one")
    rows = [f"{name},{image},{name}\n" for name in ("linked", "../outside", str(tmp_path / "outside"), "own")]
    (answers / "predictions.csv").write_text("image,path,folder\n" + "".join(rows))
    assert [entry.scores is not None for entry in open_collection([answers]).entries] == [False, False, False, True]


async def here() -> bool:
    return False


async def wait_for(condition: Any) -> None:
    for _ in range(3000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it does not happen")


def test_an_image_that_stalls_holds_up_no_other_and_is_given_up(folder: Path) -> None:
    async def run() -> None:
        decoders = Decoders(patience=0.5, most=3)
        message = {"do": "tile", "bits": None, "zoom": 0, "column": 0, "row": 0}
        stalled, sound = ({**message, "path": str(folder / name)} for name in ("a.png", "b.png"))
        assert (await decoders.ask(0, stalled, True, here)).status == 200
        (pid,) = decoders.pids
        os.kill(pid, signal.SIGSTOP)  # as in a read from a share that does not answer
        waiting = [asyncio.ensure_future(decoders.ask(0, {**stalled, "row": row}, True, here)) for row in range(5)]
        await asyncio.sleep(0)
        assert (await decoders.ask(1, sound, True, here)).status == 200
        silent = await waiting[0]
        assert silent.status == 422
        assert b"no data" in silent.body
        began = time.monotonic()
        again = await decoders.ask(0, {**stalled, "row": 9}, True, here)
        assert b"tried again in" in again.body
        assert time.monotonic() - began < 0.4, "at once"
        assert (await decoders.ask(1, {**sound, "row": 7}, True, here)).status == 404
        await asyncio.gather(*waiting)
        await decoders.close()
        assert decoders.pids == []

    asyncio.run(run())


def test_a_process_that_is_killed_is_replaced(folder: Path) -> None:
    async def run() -> None:
        decoders = Decoders()
        message = {"do": "describe", "bits": None, "path": str(folder / "a.png")}
        assert (await decoders.ask(0, message, True, here)).status == 200
        (pid,) = decoders.pids
        os.kill(pid, signal.SIGSEGV)
        died = await decoders.ask(0, message, True, here)
        assert (died.status, b"signal 11" in died.body) == (422, True)
        assert (await decoders.ask(0, message, True, here)).status == 200
        await decoders.close()

    asyncio.run(run())


def test_slow_clients_and_those_that_leave_do_not_hold_up_others(served: Served) -> None:
    slow = [socket.create_connection(("127.0.0.1", served.port), 10) for _ in range(40)]
    try:
        for number, connection in enumerate(slow):
            whole = b"GET /static/leaflet.js HTTP/1.1\r\nHost: localhost\r\n\r\n"
            connection.sendall(whole[:20] if number % 2 else whole)  # half of a request, or an answer that is not read
        with socket.create_connection(("127.0.0.1", served.port), 10) as leaving:
            leaving.sendall(b"GET /tiles/1/1/0/0 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert served.get("/tiles/1/1/1/0").status == 200
        assert served.process.poll() is None
    finally:
        for connection in slow:
            connection.close()
