"""Whether the Hugging Face hub can be reached from this machine."""

from __future__ import annotations

import socket
import urllib.parse
import urllib.request


def is_unreachable() -> bool:
    """True in offline mode, or when the hub's host name does not resolve and no proxy is set: use the cache alone.

    Checked here because the hub's own client retries for half a minute before it fails.
    """
    from huggingface_hub import constants

    endpoint = urllib.parse.urlsplit(constants.ENDPOINT)
    if constants.HF_HUB_OFFLINE:
        return True
    if endpoint.scheme in urllib.request.getproxies():
        return False
    try:
        socket.getaddrinfo(endpoint.hostname, endpoint.port or 443)
    except OSError:
        return True
    return False
