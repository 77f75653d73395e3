"""The Hugging Face hub: whether it can be asked at all, what its cache on this disk holds, and uploads to it."""

from __future__ import annotations

import os
import socket
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Literal

from fastconv.errors import ModelError

#: Seconds after which a message is written without the hub's answer.
HEAD_TIMEOUT_S = 5.0


def cache_home() -> Path:
    """fastconv's folder under the user's cache home (FASTCONV_CACHE, else XDG_CACHE_HOME, else ~/.cache)."""
    if folder := os.environ.get("FASTCONV_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastconv"


def is_unreachable() -> bool:
    """True in offline mode, or when the hub's host name does not resolve and no proxy is set: use the cache alone.

    Checked here because the hub's own client retries for half a minute before it fails.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return True
    try:
        endpoint = urllib.parse.urlsplit(constants.ENDPOINT)
        if endpoint.scheme in urllib.request.getproxies():
            return False
        socket.getaddrinfo(endpoint.hostname, endpoint.port or 443)
    except (OSError, ValueError):  # HF_ENDPOINT may be no address
        return True
    return False


def head_revision(repo: str) -> str:
    """The commit sha at the head of a hub model; "" if the hub cannot be asked or does not tell. For messages alone."""
    if is_unreachable():
        return ""
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return HfApi().model_info(repo, timeout=HEAD_TIMEOUT_S).sha or ""
    except (HfHubHTTPError, httpx.HTTPError, OSError, ValueError):  # a name that is none is a ValueError
        return ""


def push_folder(folder: Path, repo: str, *, private: bool) -> str:
    """Upload a folder as a hub model with the user's token, making the repository if there is none; returns its address.

    Raises ModelError if the hub cannot be reached or refuses.
    """
    import httpx
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    if is_unreachable():
        raise ModelError(
            "the hub cannot be reached", where=repo, fix=f"the export lies in {folder}; push it once you are online"
        )
    try:
        HfApi().create_repo(repo, private=private, exist_ok=True)
        HfApi().upload_folder(repo_id=repo, folder_path=folder, commit_message="fastconv export")
    except (HfHubHTTPError, httpx.HTTPError, OSError, ValueError) as error:
        fix = f"`hf auth login` with a token that may write there; the export lies in {folder}"
        raise ModelError(
            f"the hub did not take it: {next(iter(str(error).splitlines()), type(error).__name__)}", where=repo, fix=fix
        ) from None
    return f"{constants.ENDPOINT}/{repo}"


def cached_file(repo: str, name: str, revision: str, repo_type: Literal["model", "dataset"] = "model") -> Path | None:
    """A file of a hub repository as the hub's cache on this disk has it, or None; nothing is fetched."""
    from huggingface_hub import constants

    try:
        if not (Path(constants.HF_HUB_CACHE) / f"{repo_type}s--{repo.replace('/', '--')}").is_dir():
            return None  # nothing of it was ever fetched; the import below is slow, because it brings an HTTP client
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(repo, name, revision=revision, repo_type=repo_type)
    except (OSError, ValueError):  # no name that a repository can have
        return None
    return Path(path) if isinstance(path, str) else None
