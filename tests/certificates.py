"""Certificates for tests of TLS, made by openssl. Plain functions for any test."""

from __future__ import annotations

import subprocess
from pathlib import Path


def make_certificate(folder: Path, name: str, issuer: str = "") -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 and its key, signed by another of the folder or by itself."""
    key, cert, request = (folder / f"{name}.{kind}" for kind in ("key", "pem", "csr"))
    common = f"-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout {key} -subj /CN={name}"
    if not issuer:
        _openssl(f"req -x509 {common} -out {cert} -days 2 -addext subjectAltName=IP:127.0.0.1")
        return cert, key
    _openssl(f"req {common} -out {request}")
    signer = folder / issuer
    _openssl(f"x509 -req -in {request} -CA {signer}.pem -CAkey {signer}.key -CAcreateserial -out {cert} -days 2")
    return cert, key


def _openssl(arguments: str) -> None:
    subprocess.run(["openssl", *arguments.split()], check=True, capture_output=True)
