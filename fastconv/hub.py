"""Whether the Hugging Face hub can be asked at all."""

from __future__ import annotations

import socket
import urllib.parse
import urllib.request


def is_out_of_reach() -> bool:
    """True where the hub's name means nothing here and no proxy would look it up: then its cache is all there is.

    The hub's own client would find out by retrying for half a minute.
    """
    from huggingface_hub import constants

    host = urllib.parse.urlsplit(constants.ENDPOINT)
    if constants.HF_HUB_OFFLINE:
        return True
    if host.scheme in urllib.request.getproxies():
        return False
    try:
        socket.getaddrinfo(host.hostname, host.port or 443)
    except OSError:
        return True
    return False
