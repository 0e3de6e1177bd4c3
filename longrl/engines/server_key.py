"""The key of a rollout server: from the environment, or made for one server and left in a file of its user alone.

It is never on a command line, where everyone on the machine could read it, and never in a log.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

KEY_VARIABLE = "LONGRL_SERVER_KEY"
"""Environment variable of the key, read by server and trainer; without it vLLM's own `VLLM_API_KEY`."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""Addresses that only this machine reaches."""
MIN_KEY_CHARACTERS = 16
"""Of a key that guards a server which other machines reach."""


def environment_key() -> str | None:
    """The key in the environment, None without one.

    Raises:
        ValueError: it cannot stand in a header.
    """
    for name in (KEY_VARIABLE, "VLLM_API_KEY"):
        key = os.environ.get(name, "").strip()
        if key and not (key.isascii() and key.isprintable()):
            raise ValueError(f"{name} must be of printable ASCII characters; set it to `openssl rand -hex 32`, say")
        if key:
            return key
    return None


def key_file(port: int) -> Path:
    """Where the server at a port of this machine leaves the key that it made."""
    return Path.home() / ".cache" / "longrl" / f"server-{socket.gethostname()}-{port}.key"


@contextlib.contextmanager
def server_key(port: int) -> Iterator[str]:
    """The key of a server: that of the environment, else a new one, in `key_file` as long as the server runs.

    Raises:
        ValueError: the file cannot be written.
    """
    known = environment_key()
    if known is not None:
        yield known
        return
    key, path = secrets.token_hex(32), key_file(port)
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(key)
        partial.replace(path)
    except OSError as error:
        raise ValueError(
            f"the server's key cannot be written to {path} ({error}); set {KEY_VARIABLE} instead"
        ) from error
    try:
        yield key
    finally:
        with contextlib.suppress(OSError):
            if path.read_text() == key:  # not that of a server which took the port over
                path.unlink()


def client_key(url: str) -> str | None:
    """The key that a request to `url` brings: that of the environment, else of this machine's server at the port.

    Raises:
        ValueError: others can read the file.
    """
    known = environment_key()
    address = urlsplit(url)
    if known is not None or address.hostname not in (*LOOPBACK, socket.gethostname()):
        return known
    path = key_file(address.port or 80)
    try:
        mode, key = path.stat().st_mode, path.read_text().strip()
    except OSError:  # no server has made one yet
        return None
    if mode & 0o077:
        raise ValueError(f"the key in {path} can be read by others; start the server again, which writes a new one")
    return key
