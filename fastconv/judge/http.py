"""How a judge is reached: which hosts a key may go to, one HTTP client for each way of asking, and replies made safe.

Everything that a judge sends passes through here: bodies are bounded, text becomes valid Unicode, numbers finite, and
the key is removed from it. A body that is not what was asked for (a network's login page, say) is an `Outage`.
"""

from __future__ import annotations

import datetime
import ipaddress
import json
import math
import os
import time
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any

from fastconv.errors import JudgeError, safe_text, shown

if TYPE_CHECKING:
    import httpx2

CLAUDE_URL, CLAUDE_HOST = "https://api.anthropic.com", "api.anthropic.com"
#: Environment variables that hold the API keys.
CLAUDE_KEY, LOCAL_KEY = "ANTHROPIC_API_KEY", "FASTCONV_LOCAL_KEY"
#: Environment variable with further hosts that may get a key: HOST or HOST:PORT, with commas between them.
HOSTS_VARIABLE = "FASTCONV_JUDGE_HOSTS"
#: Longest wait in seconds that a server's `retry-after` can ask for.
MAX_WAIT_S = 3600.0
#: A whole reply may take this many times `judge.timeout_s`, which bounds the wait for each part of it.
PATIENCE = 3.0
#: Largest body in bytes of a reply, and of the results of a batch, which may hold 10,000 replies.
MAX_BODY_BYTES, MAX_RESULTS_BYTES = 4 * 2**20, 2**30
#: What is asked of a server, which otherwise may send a thousand times what its body holds.
PLAIN = {"accept-encoding": "identity"}
#: Longest text of a reply in characters that is kept, and longest name (of a model, a reason to stop).
MAX_TEXT_CHARS, MAX_NAME_CHARS = 200_000, 200
#: Characters of a server's message that are shown at most.
_SHOWN_CHARS = 200


class ApiKey:
    """An API key from the environment. Its repr hides it, and `scrub` removes it from text that a server sent back."""

    def __init__(self, value: str) -> None:
        self._value = value

    @classmethod
    def from_environment(cls, environ: Mapping[str, str], name: str = CLAUDE_KEY) -> ApiKey:
        """Read the key from a variable. Raises JudgeError if it is not set or contains an impossible character."""
        value = environ.get(name, "").strip()
        if not value:
            raise JudgeError("no API key", where=name, fix=f"set {name} in the environment (never in a recipe)")
        if not value.isascii() or not value.isprintable() or " " in value:
            raise JudgeError("the API key holds a character no key has", where=name, fix="copy the key again")
        return cls(value)

    def reveal(self) -> str:
        """The key itself, for the HTTP client alone."""
        return self._value

    def scrub(self, text: str) -> str:
        """The text with every occurrence of the key replaced."""
        return text.replace(self._value, "[key]")

    def __repr__(self) -> str:
        return "ApiKey(hidden)"


class Outage(Exception):
    """The judge cannot be reached now; unfinished judgements stay pending.

    `wait_s`: seconds that the server asked to wait. `taken`: whether it may have taken what was sent, and billed it.
    """

    def __init__(self, problem: str, wait_s: float = 0.0, *, taken: bool = True) -> None:
        if wait_s >= 60:
            until = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=wait_s)
            problem = f"{problem} (it asks for {wait_s / 60:.0f} minutes: until {until:%H:%M} UTC)"
        super().__init__(shown(problem))
        self.wait_s = wait_s
        self.taken = taken


# --- where a key may go ------------------------------------------------------------------------------------


def judge_url(
    base_url: str, *, has_key: bool, environ: Mapping[str, str] = os.environ, own: str = CLAUDE_URL
) -> httpx2.URL:
    """The judge's address, after the rules for keys; an empty `base_url` is the provider's `own` (Claude's).

    A recipe may come from anybody, so it does not decide alone where a key is sent: to the provider, to this machine's
    loopback, or to a host that the user named in `FASTCONV_JUDGE_HOSTS`; outside of the loopback over https alone.
    Raises JudgeError.
    """
    import httpx2

    try:
        url = httpx2.URL(base_url or own)
    except (httpx2.InvalidURL, ValueError):
        url = httpx2.URL("")
    host, scheme = url.host, url.scheme
    if scheme not in ("http", "https") or not host or url.userinfo:
        raise JudgeError(
            "not an address of a server", where="judge.base_url", fix="write https://HOST or http://127.0.0.1:PORT"
        )
    if is_loopback(host) or not has_key:
        return url
    if scheme != "https":
        raise JudgeError(
            f"the API key would go to {host} in clear text", where="judge.base_url", fix="use https, or unset the key"
        )
    named = {name.strip().lower() for name in environ.get(HOSTS_VARIABLE, "").split(",")}
    if host not in {httpx2.URL(own).host, *named} and f"{host}:{url.port or 443}" not in named:
        raise JudgeError(
            f"the recipe would send your API key to {host}",
            where="judge.base_url",
            fix=f"if you mean it, set {HOSTS_VARIABLE}={host} in the environment",
        )
    return url


def is_loopback(host: str) -> bool:
    """Whether a host is this machine by its address (127.0.0.0/8, ::1) or as `localhost`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _require_origin(url: httpx2.URL, base: httpx2.URL) -> None:
    """Refuse a request to another host than the judge's, whoever named that host (a reply can)."""
    origin = (url.scheme, url.host, url.port)
    if origin not in ((base.scheme, base.host, base.port), ("https", CLAUDE_HOST, None)):
        raise JudgeError(
            f"the judge names {url.host} for its replies, which gets no key",
            where=str(base),
            fix="check judge.base_url",
        )


def _require_plain(response: httpx2.Response) -> None:
    """Refuse a body that is packed although none was asked for: its length says nothing of what it unpacks to."""
    import httpx2

    if response.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        raise httpx2.ReadError("the reply is packed, which nobody asked for")


# --- clients -----------------------------------------------------------------------------------------------


def sync_client(base: httpx2.URL, timeout_s: float) -> httpx2.Client:
    """A client that follows no redirect, asks the loopback without a proxy, and sends to `base`'s host alone."""
    import httpx2

    def on_request(request: httpx2.Request) -> None:
        _require_origin(request.url, base)

    direct = is_loopback(base.host)
    hooks = {"request": [on_request], "response": [_require_plain]}
    return httpx2.Client(
        timeout=timeout_s, follow_redirects=False, trust_env=not direct, headers=PLAIN, event_hooks=hooks
    )


def async_client(base: httpx2.URL, timeout_s: float, n_connections: int) -> httpx2.AsyncClient:
    """The same for one event loop, with bodies bounded; for the SDK, which brings path, key and headers."""
    import httpx2

    class Bounded(httpx2.AsyncByteStream):
        def __init__(self, stream: httpx2.AsyncByteStream, max_bytes: int) -> None:
            self._stream = stream
            self._left = max_bytes

        async def __aiter__(self) -> AsyncIterator[bytes]:
            async for part in self._stream:
                self._left -= len(part)
                if self._left < 0:
                    raise httpx2.ReadError("the reply has no end")
                yield part

        async def aclose(self) -> None:
            await self._stream.aclose()

    async def on_request(request: httpx2.Request) -> None:
        _require_origin(request.url, base)

    async def on_response(response: httpx2.Response) -> None:
        _require_plain(response)
        limit = MAX_RESULTS_BYTES if response.request.url.path.endswith("/results") else MAX_BODY_BYTES
        if isinstance(response.stream, httpx2.AsyncByteStream):
            response.stream = Bounded(response.stream, limit)

    return httpx2.AsyncClient(
        base_url=base, timeout=timeout_s, follow_redirects=False, trust_env=not is_loopback(base.host),
        limits=httpx2.Limits(max_connections=max(100, n_connections), max_keepalive_connections=max(20, n_connections)),
        headers=PLAIN, event_hooks={"request": [on_request], "response": [on_response]},
    )  # fmt: skip


def ask(
    client: httpx2.Client, method: str, url: str, headers: Mapping[str, str], *,
    within_s: float, key: ApiKey | None = None, body: Any = None,
) -> tuple[int, dict[str, Any] | None, float]:  # fmt: skip
    """Send one request: (status, JSON object of the body made safe or None, seconds that `retry-after` asks for).

    `within_s` bounds the whole exchange. Raises Outage if there is no whole reply, or one with status 200 that is no
    JSON object.
    """
    import httpx2

    where, deadline_s = url, time.monotonic() + within_s
    data, content = bytearray(), None if body is None else json.dumps(body).encode()
    try:
        with client.stream(method, url, headers=dict(headers), content=content) as response:
            for part in response.iter_bytes():
                data += part
                if len(data) > MAX_BODY_BYTES:
                    raise Outage(f"{where} sent a reply without end")
                if time.monotonic() > deadline_s:
                    raise Outage(f"no answer within {within_s:g} s from {where}")
    except httpx2.TimeoutException:
        raise Outage(f"no answer within {within_s:g} s from {where}") from None
    except httpx2.RemoteProtocolError:
        raise Outage(f"{where} sent something that is no answer") from None
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
        raise Outage(f"{where} cannot be reached: {error}") from None
    found = json_object(bytes(data), key)
    if found is None and response.is_success:
        raise Outage(f"{where} sent something that is no answer")
    return response.status_code, found, retry_after_s(response.headers)


def retry_after_s(headers: Mapping[str, str]) -> float:
    """Seconds of the `retry-after` header, 0 without one. The API does not use its date form."""
    try:
        wait_s = float(headers.get("retry-after", 0.0))
    except ValueError:
        return 0.0
    return min(wait_s, MAX_WAIT_S) if wait_s > 0 else 0.0


# --- replies -----------------------------------------------------------------------------------------------


def json_object(body: bytes | str, key: ApiKey | None) -> dict[str, Any] | None:
    """A body as a JSON object whose values are safe and hold no key; None if it is none."""
    try:
        text = body if isinstance(body, str) else body.decode()
        value = json.loads(text)
        return safe_value(value, key) if isinstance(value, dict) else None
    except (ValueError, RecursionError):
        return None


def safe_value(value: Any, key: ApiKey | None = None) -> Any:
    """A parsed JSON value as it may be stored: texts valid and bounded and without the key, numbers finite.

    A number that is not finite or that no 64 bits hold becomes None. Scrubbed after parsing, because in the raw text the
    key may have been hidden by escapes.
    """
    if isinstance(value, str):
        return safe_text(value if key is None else key.scrub(value), MAX_TEXT_CHARS)
    if isinstance(value, list):
        return [safe_value(item, key) for item in value]
    if isinstance(value, dict):
        return {safe_value(name, key): safe_value(item, key) for name, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, int) and abs(value) >= 2**63:
        return None
    return value


def safe_name(value: object) -> str:
    """A short text of a reply (a model's name, a reason to stop) as one printable line."""
    return shown(value, MAX_NAME_CHARS) if isinstance(value, str) else ""


def error_text(body: object, key: ApiKey | None) -> str:
    """The message of an error's body, as it may be shown; empty without one."""
    error = body.get("error") if isinstance(body, dict) else None
    message = error.get("message", "") if isinstance(error, dict) else ""
    if not isinstance(message, str):
        return ""
    return shown(message if key is None else key.scrub(message), _SHOWN_CHARS)
