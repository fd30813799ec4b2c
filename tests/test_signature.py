"""A signature says who sealed a bundle; every planted fault is refused by a sentence, before a model is loaded."""

from __future__ import annotations

import base64
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from mcruntime.bundle import SIGNATURE, load_bundle, seal
from mcruntime.errors import BundleError, InputError, MissingExtraError
from mcruntime.signature import PASSPHRASE, keygen, sign_bundle, verify_signature
from tiny_onnx import tiny_manifest, write_bundle

from mcdeploy import cli

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """Two key pairs, ours and another's: paths of the private keys; ``.pub`` is beside each."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("ours", "theirs"):
        keygen(folder / name)
    return folder / "ours", folder / "theirs"


@pytest.fixture
def signed(tmp_path, keys):
    folder = write_bundle(tmp_path / "bundle")
    sign_bundle(folder, keys[0])
    return folder


def public(key):
    return Path(f"{key}.pub")


def refusal(folder, key, kind=BundleError):
    with pytest.raises(kind) as caught:
        verify_signature(folder, key)
    message = str(caught.value)
    assert message.startswith((str(folder), str(key)))
    assert "\n" not in message
    assert ";" in message
    return message


def test_a_signed_bundle_verifies_loads_and_names_its_key(signed, keys):
    fingerprint = verify_signature(signed, public(keys[0]))
    assert len(fingerprint) == 64
    assert json.loads((signed / SIGNATURE).read_text())["key"] == fingerprint
    assert SIGNATURE not in load_bundle(signed).manifest.files


def test_a_bundle_can_be_signed_again_by_another_key(signed, keys):
    theirs = sign_bundle(signed, keys[1])
    assert verify_signature(signed, public(keys[1])) == theirs
    assert "signed with the key" in refusal(signed, public(keys[0]))


def test_an_unsigned_bundle_is_refused(tmp_path, keys):
    folder = write_bundle(tmp_path / "bundle")
    assert "is not signed" in refusal(folder, public(keys[0]))
    assert "no such bundle folder" in refusal(tmp_path / "nowhere", public(keys[0]))


def test_a_bundle_signed_by_another_key_is_refused_with_both_fingerprints(signed, keys):
    message = refusal(signed, public(keys[1]))
    for key in keys:
        other = write_bundle(signed.parent / key.name)
        assert sign_bundle(other, key)[:16] in message


def test_a_signature_that_claims_our_key_without_having_it_is_refused(signed, keys):
    ours = json.loads((signed / SIGNATURE).read_text())["key"]
    sign_bundle(signed, keys[1])
    forged = json.loads((signed / SIGNATURE).read_text()) | {"key": ours}
    (signed / SIGNATURE).write_text(json.dumps(forged))
    assert "not the one that was signed" in refusal(signed, public(keys[0]))


def test_one_changed_byte_of_the_manifest_or_the_signature_is_refused(signed, keys):
    manifest = signed / "manifest.json"
    whole = manifest.read_bytes()
    for place in (0, len(whole) // 2, len(whole) - 1):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        manifest.write_bytes(damaged)
        assert "not the one that was signed" in refusal(signed, public(keys[0]))
    manifest.write_bytes(whole)
    tree = json.loads((signed / SIGNATURE).read_text())
    raw = bytearray(base64.b64decode(tree["signature"]))
    raw[7] ^= 1
    (signed / SIGNATURE).write_text(json.dumps(tree | {"signature": base64.b64encode(raw).decode()}))
    assert "not the one that was signed" in refusal(signed, public(keys[0]))


def test_a_bundle_sealed_anew_with_fitting_hashes_is_refused(signed, keys):
    """What hashes alone cannot see: everything was replaced and sealed again."""
    old = (signed / SIGNATURE).read_bytes()
    (signed / "reports" / "parity.md").write_text("# all is well\n")
    seal(signed, tiny_manifest())
    (signed / SIGNATURE).write_bytes(old)
    load_bundle(signed)
    assert "not the one that was signed" in refusal(signed, public(keys[0]))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"algorithm": "ed25519", "key": 1, "signature": ""}', "[" * 4000,
             '{"algorithm": "none", "key": "0", "signature": ""}', '{"algorithm":"ed25519","key":"0","signature":"?"}'],
)  # fmt: skip
def test_what_is_no_signature_is_refused(signed, keys, text):
    (signed / SIGNATURE).write_text(text)
    assert "is not an ed25519 signature" in refusal(signed, public(keys[0]))


def test_an_endless_or_linked_signature_is_refused_unread(signed, keys):
    (signed / SIGNATURE).write_text("x" * 5000)
    assert "more than 4096 bytes" in refusal(signed, public(keys[0]))
    (signed / SIGNATURE).rename(signed.parent / "elsewhere")
    (signed / SIGNATURE).symlink_to(signed.parent / "elsewhere")
    assert "not a plain file" in refusal(signed, public(keys[0]))


def test_a_damaged_bundle_is_not_signed(tmp_path, keys):
    folder = write_bundle(tmp_path / "bundle")
    (folder / "reports" / "parity.md").write_text("# pority\n")
    with pytest.raises(BundleError, match="was changed after it was sealed"):
        sign_bundle(folder, keys[0])
    assert not (folder / SIGNATURE).exists()


def test_a_private_key_is_for_its_owner_only_and_never_overwritten(tmp_path):
    path, fingerprint = keygen(tmp_path / "key")
    assert path == tmp_path / "key.pub"
    assert len(fingerprint) == 64
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
    before = (tmp_path / "key").read_bytes()
    with pytest.raises(InputError, match="exists"):
        keygen(tmp_path / "key")
    (tmp_path / "other.pub").write_text("mine")
    with pytest.raises(InputError, match=r"other\.pub: exists"):
        keygen(tmp_path / "other")
    assert not (tmp_path / "other").exists()
    assert (tmp_path / "key").read_bytes() == before
    with pytest.raises(InputError, match="cannot be written"):
        keygen(tmp_path / "nowhere" / "key")


def test_an_encrypted_key_asks_for_its_passphrase(tmp_path, monkeypatch):
    folder = write_bundle(tmp_path / "bundle")
    monkeypatch.setenv(PASSPHRASE, "correct horse")
    path, _ = keygen(tmp_path / "key")
    assert "ENCRYPTED" in (tmp_path / "key").read_text()
    sign_bundle(folder, tmp_path / "key")
    verify_signature(folder, path)
    monkeypatch.setenv(PASSPHRASE, "wrong")
    with pytest.raises(InputError, match="does not open this key"):
        sign_bundle(folder, tmp_path / "key")
    monkeypatch.delenv(PASSPHRASE)
    with pytest.raises(InputError, match=f"environment variable {PASSPHRASE}"):
        sign_bundle(folder, tmp_path / "key")


def test_a_passphrase_in_the_environment_does_not_hurt_a_plain_key(signed, keys, monkeypatch):
    monkeypatch.setenv(PASSPHRASE, "anything")
    assert sign_bundle(signed, keys[0]) == verify_signature(signed, public(keys[0]))


def test_the_two_halves_of_a_pair_are_told_apart(signed, keys, tmp_path):
    assert "is a private key" in refusal(signed, keys[0], InputError)
    with pytest.raises(InputError, match="is no ed25519 private key"):
        sign_bundle(signed, public(keys[0]))
    (tmp_path / "noise.pub").write_text("noise")
    assert "is no ed25519 public key" in refusal(signed, tmp_path / "noise.pub", InputError)
    assert "cannot read the key" in refusal(signed, tmp_path / "nowhere.pub", InputError)


def test_a_key_of_another_kind_is_refused(signed, tmp_path):
    from cryptography.hazmat.primitives import serialization as pem
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    secret = key.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.PKCS8, pem.NoEncryption())
    shown = key.public_key().public_bytes(pem.Encoding.PEM, pem.PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "ec").write_bytes(secret)
    (tmp_path / "ec.pub").write_bytes(shown)
    with pytest.raises(InputError, match="is no ed25519 private key"):
        sign_bundle(signed, tmp_path / "ec")
    assert "is no ed25519 public key" in refusal(signed, tmp_path / "ec.pub", InputError)


def test_without_cryptography_the_extra_is_named(signed, keys, monkeypatch):
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.asymmetric.ed25519", None)
    for call in (lambda: verify_signature(signed, public(keys[0])), lambda: sign_bundle(signed, keys[0])):
        with pytest.raises(MissingExtraError, match=r"mcdeploy\[sign\]"):
            call()


def serve(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "export"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "mcruntime.server", *map(str, arguments), "--port", "0"],
        env=environment, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


@pytest.mark.parametrize("fault", ["unsigned", "other key", "changed manifest"])
def test_a_server_that_requires_a_signature_refuses_before_it_looks_at_the_model(signed, keys, fault):
    """The model is no model at all here: whoever opened it would say so instead."""
    key = keys[1] if fault == "other key" else keys[0]
    if fault == "changed manifest":
        (signed / "manifest.json").write_text((signed / "manifest.json").read_text() + "\n")
    elif fault == "unsigned":
        (signed / SIGNATURE).unlink()
    (signed / "model.onnx").write_bytes(b"no model")
    done = serve(signed, "--require-signature", public(key))
    said = {"unsigned": "is not signed", "other key": "signed with the key", "changed manifest": "not the one that"}
    assert done.returncode == 2, done.stderr
    assert said[fault] in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_a_signature_does_not_excuse_a_damaged_file(signed, keys):
    (signed / "model.onnx").write_bytes(b"no model")
    done = serve(signed, "--require-signature", public(keys[0]))
    assert done.returncode == 2
    assert "model.onnx has 8 bytes" in done.stderr


def test_of_two_bundles_both_must_be_signed(signed, keys, tmp_path):
    second = write_bundle(tmp_path / "second", name="second")
    done = serve(signed, second, "--require-signature", public(keys[0]))
    assert done.returncode == 2
    assert f"{second}: is not signed" in done.stderr


def test_a_signed_bundle_is_served(signed, keys):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "export"), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "mcruntime.server", str(signed), "--port", "0"]
    with subprocess.Popen(
        [*command, "--require-signature", str(public(keys[0]))], env=environment, stdout=subprocess.PIPE, text=True
    ) as server:
        said = [server.stdout.readline(), server.stdout.readline()]
        server.terminate()
        assert server.wait(30) == 0
    assert said[0].startswith("tiny: bundle ")
    assert said[1].startswith("listening on http://127.0.0.1:")


def mcdeploy(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["mcdeploy", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as left:
        return left.code or 0
    return 0


def test_the_commands_make_a_key_and_require_it(tmp_path, monkeypatch, capsys):
    assert mcdeploy(monkeypatch, "keygen", tmp_path / "key") == 0
    assert str(tmp_path / "key.pub") in capsys.readouterr().out
    folder = write_bundle(tmp_path / "bundle")
    assert mcdeploy(monkeypatch, "serve", folder, "--port", 0, "--require-signature", tmp_path / "key.pub") == 2
    assert "is not signed" in capsys.readouterr().err
    assert mcdeploy(monkeypatch, "keygen", tmp_path / "key") == 2
    assert "exists" in capsys.readouterr().err
