"""Who sealed a bundle: a detached ed25519 signature over the bytes of its manifest.

The manifest holds the hash of every other file, so these bytes stand for the whole bundle. ``manifest.sig`` is JSON:

    {"algorithm": "ed25519", "key": "<sha256 of the raw public key>", "signature": "<base64>"}

A signature says that the holder of a key signed exactly this manifest. It does not say that the holder is who they
claim to be: how the public key came to the machine that checks it is for you to decide.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcruntime.bundle import MANIFEST, SIGNATURE, load_bundle, split_key
from mcruntime.errors import BundleError, InputError, MissingExtraError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

PASSPHRASE = "MCDEPLOY_KEY_PASSPHRASE"  # of an encrypted private key
MAX_SIGNATURE_BYTES = 4096
MAX_MANIFEST_BYTES = 64 << 20


def keygen(path: Path | str) -> tuple[Path, str]:
    """Make a key pair: ``path`` (private, PEM, only its owner may read it) and ``path`` + ``.pub``.

    The private key is encrypted when the environment variable MCDEPLOY_KEY_PASSPHRASE holds a passphrase.

    Returns:
        Where the public key is, and its fingerprint.

    Raises:
        InputError: one of the two files exists, or cannot be written.
        MissingExtraError: the package ``cryptography`` is not installed.
    """
    _need_cryptography("making a key")
    from cryptography.hazmat.primitives import serialization as pem
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    private, public = Path(path), Path(f"{path}.pub")
    for file in (private, public):
        if file.exists():
            raise InputError(f"{file}: exists, and a key that is overwritten is lost; give another name")
    passphrase = os.environ.get(PASSPHRASE, "").encode()
    lock = pem.BestAvailableEncryption(passphrase) if passphrase else pem.NoEncryption()
    key = Ed25519PrivateKey.generate()
    secret = key.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.PKCS8, lock)
    shown = key.public_key().public_bytes(pem.Encoding.PEM, pem.PublicFormat.SubjectPublicKeyInfo)
    try:
        for file, data, mode in ((private, secret, 0o600), (public, shown, 0o644)):
            with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as stream:
                stream.write(data)
    except OSError as error:
        raise InputError(f"{file}: cannot be written ({error.strerror}); give another name") from None
    return public, fingerprint(key.public_key())


def check_private_key(path: Path | str) -> None:
    """Hold a file against what ``sign_bundle`` will need, before the work that ends in it.

    Raises:
        InputError: the key cannot be read, is no ed25519 private key, or its passphrase is wrong.
        MissingExtraError: the package ``cryptography`` is not installed.
    """
    _private_key(Path(path))


def sign_bundle(folder: Path | str, key_path: Path | str) -> str:
    """Check a sealed bundle and write its ``manifest.sig``; an older one is replaced.

    Returns:
        The fingerprint of the key.

    Raises:
        BundleError: the bundle is incomplete or changed, so it is not signed.
        InputError: the key cannot be read, is no ed25519 private key, or its passphrase is wrong.
        MissingExtraError: the package ``cryptography`` is not installed.
    """
    folder, key = split_key(folder)[0], _private_key(Path(key_path))
    signature, part = folder / SIGNATURE, folder / f".{SIGNATURE}.part"
    part.unlink(missing_ok=True)
    load_bundle(folder)
    owner = fingerprint(key.public_key())
    text = base64.b64encode(key.sign((folder / MANIFEST).read_bytes())).decode()
    part.write_text(json.dumps({"algorithm": "ed25519", "key": owner, "signature": text}, indent=2) + "\n")
    os.replace(part, signature)
    return owner


def verify_signature(folder: Path | str, public_key_path: Path | str) -> str:
    """Check that the holder of a key signed this manifest. ``load_bundle`` checks the other files against it.

    Returns:
        The fingerprint of the key.

    Raises:
        BundleError: no signature, one that cannot be read, one of another key, or a manifest changed since.
        InputError: the public key cannot be read or is no ed25519 public key.
        MissingExtraError: the package ``cryptography`` is not installed.
    """
    folder, key = split_key(folder)[0], _public_key(Path(public_key_path))
    from cryptography.exceptions import InvalidSignature

    signer, signature = _read_signature(folder)
    wanted = fingerprint(key)
    if signer != wanted:
        raise BundleError(
            f"{folder}: signed with the key {signer[:16]}, not with {wanted[:16]} of {public_key_path}; "
            "get the bundle from the holder of that key, or require the other one"
        )
    try:
        key.verify(signature, _read_small(folder / MANIFEST, MAX_MANIFEST_BYTES, folder))
    except InvalidSignature:
        raise BundleError(
            f"{folder}: {MANIFEST} is not the one that was signed, or its signature was changed; copy the bundle again"
        ) from None
    return wanted


def fingerprint(key: Ed25519PublicKey) -> str:
    """sha256 of the raw public key, in hexadecimal."""
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()


def _read_signature(folder: Path) -> tuple[str, bytes]:
    path = folder / SIGNATURE
    if not folder.is_dir():
        raise BundleError(f"{folder}: no such bundle folder; 'mcdeploy prune-export' makes one")
    if not path.exists() and not path.is_symlink():
        raise BundleError(
            f"{folder}: is not signed (it has no {SIGNATURE}); sign it with 'mcdeploy prune-export --sign KEY'"
        )
    try:
        tree: Any = json.loads(_read_small(path, MAX_SIGNATURE_BYTES, folder))
        algorithm, signer, text = tree["algorithm"], tree["key"], tree["signature"]
        if algorithm != "ed25519" or not isinstance(signer, str) or not isinstance(text, str):
            raise ValueError(algorithm)
        return signer, base64.b64decode(text, validate=True)
    except (ValueError, KeyError, TypeError, RecursionError, binascii.Error):
        raise BundleError(f"{folder}: {SIGNATURE} is not an ed25519 signature; sign the bundle again") from None


def _read_small(path: Path, most: int, folder: Path) -> bytes:
    if path.is_symlink() or not path.is_file():
        raise BundleError(f"{folder}: {path.name} is not a plain file; copy the bundle again")
    if path.stat().st_size > most:
        raise BundleError(f"{folder}: {path.name} has more than {most} bytes; copy the bundle again")
    return path.read_bytes()


def _private_key(path: Path) -> Ed25519PrivateKey:
    _need_cryptography("signing a bundle")
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    data, passphrase = _read_key(path), os.environ.get(PASSPHRASE, "").encode()
    is_encrypted = b"ENCRYPTED" in data
    if is_encrypted and not passphrase:
        raise InputError(f"{path}: is an encrypted key; put its passphrase into the environment variable {PASSPHRASE}")
    try:
        key = serialization.load_pem_private_key(data, passphrase if is_encrypted else None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        if is_encrypted:
            raise InputError(f"{path}: the passphrase in {PASSPHRASE} does not open this key; correct it") from None
        raise _not_a_key(path, "private", "the file without .pub") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise _not_a_key(path, "private", "another key")
    return key


def _public_key(path: Path) -> Ed25519PublicKey:
    _need_cryptography("checking a signature")
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    data = _read_key(path)
    if b"PRIVATE KEY" in data:
        raise InputError(f"{path}: is a private key, which has no place on a server; give the .pub file beside it")
    try:
        key = serialization.load_pem_public_key(data)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise _not_a_key(path, "public", "the .pub file") from None
    if not isinstance(key, Ed25519PublicKey):
        raise _not_a_key(path, "public", "another key")
    return key


def _read_key(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot read the key ({error.strerror}); 'mcdeploy keygen FILE' makes one") from None


def _not_a_key(path: Path, kind: str, instead: str) -> InputError:
    return InputError(f"{path}: is no ed25519 {kind} key; give {instead}, or make one with 'mcdeploy keygen FILE'")


def _need_cryptography(command: str) -> None:
    try:
        import cryptography.hazmat.primitives.asymmetric.ed25519  # noqa: F401
    except ImportError:
        raise MissingExtraError(command, "cryptography", "sign") from None
