"""Who may ask: API keys, compared by their hashes in one place before anything is routed; and the names of the server.

Keys are one file, one key a line. Names matter where no key is asked for: see ``Hosts``.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Iterable
from pathlib import Path

from mcruntime.errors import InputError

MIN_LENGTH = 16  # characters; shorter ones can be guessed
MOST_SEEN = 256  # values of headers that are remembered
Given = tuple[bytes | None, bytes | None]
Rule = tuple[frozenset[bytes], set[Given]]  # the keys' hashes, and headers that were found to hold one of the keys
WRONG_HOST = "this server does not go by that name; ask it by its address, or start it with --allowed-host NAME"


class Keys:
    """The keys that open a server.

    Args:
        path: a text file; empty lines and lines that start with # do not count.

    Raises:
        InputError: no such file, no key in it, or one that is too short or not printable ASCII.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rule: Rule = (_read(path), set())

    def read_again(self) -> None:
        """Take the keys that the file holds now, and no others. Blocks.

        Raises:
            InputError: as at first; the keys from before still hold.
        """
        self._rule = (_read(self._path), set())

    def allow(self, headers: dict[bytes, bytes]) -> bool:
        """Whether headers (or gRPC metadata) carry a key: ``Authorization: Bearer KEY`` or ``X-API-Key: KEY``.

        One that opens is enough, whatever the other header holds: it may be meant for a proxy on the way.
        """
        digests, opened = self._rule  # once: read_again puts another in its place
        given = headers.get(b"authorization"), headers.get(b"x-api-key")
        if given in opened:
            return True
        scheme, _, token = (given[0] or b"").partition(b" ")
        # Comparing hashes tells an attacker's clock nothing about the key; so does looking for them in a set.
        tokens = [given[1], token if scheme.lower() == b"bearer" else None]
        if not any(hashlib.sha256(token.strip()).digest() in digests for token in tokens if token is not None):
            return False
        if len(opened) < MOST_SEEN:
            opened.add(given)
        return True


class Hosts:
    """The names a server may be asked by, so that no page of a browser reaches it under a name of its own.

    A server on this machine only, without keys, trusts whoever can connect. So can a page from elsewhere, once its
    maker lets its own name point to 127.0.0.1 (DNS rebinding); but the browser then sends that name as ``Host``.
    Addresses cannot be made to point elsewhere, and who sends no ``Host`` is no browser: both pass.

    Args:
        names: that are allowed beside ``localhost``, without ports.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._names = frozenset(name.lower().removesuffix(".") for name in ("localhost", *names))
        self._seen: set[bytes] = set()  # that were found to be right; the few that a server's clients send

    def allow(self, host: bytes | None) -> bool:
        """Whether a request with this ``Host`` may be answered."""
        return not host or host in self._seen or self._look(host)

    def _look(self, host: bytes) -> bool:
        name, port = host.decode("latin-1").strip().lower(), ""
        if name.startswith("["):
            name, _, port = name[1:].partition("]")
        elif ":" in name:
            name, _, port = name.rpartition(":")
            port = f":{port}"
        is_port = not port or (port[0] == ":" and (port[1:].isdecimal() or port == ":"))
        if not is_port or not (name.removesuffix(".") in self._names or _is_address(name)):
            return False
        if len(self._seen) < MOST_SEEN:
            self._seen.add(host)
        return True


def hosts_of(listens_on: str, names: Iterable[str], *, has_keys: bool) -> Hosts | None:
    """Which names are allowed; None: any, since the server is not on this machine only, or asks for a key.

    Args:
        listens_on: the address.
        names: that the user gave; if there are any, they hold for every server.
    """
    names = list(names)
    return Hosts(names) if names or (is_loopback(listens_on) and not has_keys) else None


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches an IP address."""
    found = ipaddress.ip_address(address.partition("%")[0])
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return (mapped or found).is_loopback


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _read(path: Path) -> frozenset[bytes]:
    """The hashes of a file's keys."""
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not plain ASCII text"
        raise InputError(f"{path}: cannot be read ({reason}); write one API key a line into it") from None
    keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not keys:
        raise InputError(f"{path}: holds no key; write one API key a line into it")
    for number, key in enumerate(keys, 1):
        if len(key) < MIN_LENGTH or not key.isprintable() or " " in key:
            raise InputError(
                f"{path}: key {number} is not {MIN_LENGTH} or more printable characters without spaces; "
                "make one with: openssl rand -hex 32"
            )
    return frozenset(hashlib.sha256(key.encode()).digest() for key in keys)
