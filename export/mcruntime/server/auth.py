"""API keys: one file, one key a line; compared by their hashes, in one place, before anything is routed."""

from __future__ import annotations

import hashlib
from pathlib import Path

from mcruntime.errors import InputError

MIN_LENGTH = 16  # characters; shorter ones can be guessed


class Keys:
    """The keys that open a server.

    Args:
        path: a text file; empty lines and lines that start with # do not count.

    Raises:
        InputError: no such file, no key in it, or one that is too short or not printable ASCII.
    """

    def __init__(self, path: Path) -> None:
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
        self._digests = frozenset(hashlib.sha256(key.encode()).digest() for key in keys)

    def allow(self, headers: dict[bytes, bytes]) -> bool:
        """Whether headers (or gRPC metadata) carry a key: ``Authorization: Bearer KEY`` or ``X-API-Key: KEY``.

        One that opens is enough, whatever the other header holds: it may be meant for a proxy on the way.
        """
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        given = [headers.get(b"x-api-key"), token if scheme.lower() == b"bearer" else None]
        # Comparing hashes tells an attacker's clock nothing about the key.
        return any(hashlib.sha256(token.strip()).digest() in self._digests for token in given if token is not None)
