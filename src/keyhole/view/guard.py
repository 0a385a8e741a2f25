"""Which requests are let in, and the headers of every answer.

A page of another site must not read images through the browser of a user, also if its name is made to lead to this
machine (DNS rebinding). So the name in `Host` must be one of this server's, and `Origin`, where a browser states it,
must be exactly that host. Reading is all that can be asked.
"""

from __future__ import annotations

import hmac
import ipaddress
import socket
from collections.abc import Collection, Mapping
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs, urlencode

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK = ("localhost", "127.0.0.1", "::1")
HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
}


class Guard:
    """Wraps the application.

    Args:
        app: What answers the requests that are let in.
        hosts: Names that `Host` may have, without a port: `ssh -L` gives the server another.
        token: What every request must carry, in its address or as a cookie; "" lets everybody in.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str], token: str = "") -> None:
        self.app, self.hosts, self.token = app, frozenset(hosts), token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        refusal = self.refusal(scope)
        await (refusal or self.app)(scope, receive, send_with_headers)

    def refusal(self, scope: Scope) -> Response | None:
        """Return the answer to a request that is not let in; None if it is."""
        headers = Headers(scope=scope)
        hosts, origins = headers.getlist("host"), headers.getlist("origin")
        if scope["method"] not in ("GET", "HEAD"):
            return PlainTextResponse("only reading is possible here", 405, {"Allow": "GET, HEAD"})
        if len(hosts) != 1 or not self._knows(hosts[0]):
            return PlainTextResponse("this server is not known by that name; use the address that it printed", 421)
        if origins and origins != [f"{scope['scheme']}://{hosts[0]}"]:
            return PlainTextResponse("asked for by a page of another site", 403)
        if headers.get("sec-fetch-site") in ("cross-site", "same-site") and headers.get("sec-fetch-mode") != "navigate":
            return PlainTextResponse("asked for by a page of another site", 403)
        return self._without_token(scope, headers) if self.token else None

    def _knows(self, host: str) -> bool:
        name, _, port = host.rpartition(":") if not host.endswith("]") and ":" in host else (host, "", "")
        name = name.removeprefix("[").removesuffix("]").lower()
        if port and not (port.isascii() and port.isdigit() and len(port) <= 5):
            return False
        return name in self.hosts or (bool(self.token) and _is_address(name))  # no name leads a browser to an address

    def _without_token(self, scope: Scope, headers: Headers) -> Response | None:
        """Let in who has the token; who has it in the address gets it as a cookie, and an address without it."""
        cookie = f"keyhole-{scope['server'][1] if scope.get('server') else ''}"
        query = parse_qs(scope["query_string"].decode("latin-1"), max_num_fields=20) if _few(scope) else {}
        given = query.pop("token", [""])[0]
        if given and hmac.compare_digest(given.encode(), self.token.encode()):
            rest = urlencode(query, doseq=True)
            answer = RedirectResponse("/" + (f"?{rest}" if rest else ""), 303)
            answer.set_cookie(cookie, self.token, httponly=True, samesite="strict")
            return answer
        if hmac.compare_digest(_cookie(headers, cookie).encode(), self.token.encode()):
            return None
        return PlainTextResponse("open the address with the token that `keyhole view` printed", 403)


def known_hosts(address: str) -> set[str]:
    """Return the names under which a server at an address is reached."""
    if address in LOOPBACK:
        return set(LOOPBACK)
    return {*LOOPBACK, address.lower(), socket.gethostname().lower(), socket.getfqdn().lower()}


def _few(scope: Scope) -> bool:
    return len(scope["query_string"]) < 2000 and scope["query_string"].count(b"&") < 20


def _cookie(headers: Headers, name: str) -> str:
    try:
        found = SimpleCookie(headers.get("cookie", "")).get(name)
    except CookieError:
        return ""
    return "" if found is None else found.value


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
