"""TLS for the HTTP side: what is asked for is checked before anything listens."""

from __future__ import annotations

import ssl

from mcruntime.errors import InputError
from mcruntime.server.options import ServerOptions


def tls_context(options: ServerOptions) -> ssl.SSLContext | None:
    """TLS 1.2 and 1.3 with the certificate that the options name; None: no TLS is asked for.

    Raises:
        InputError: a file that is not there or holds something else, a key that needs a passphrase or belongs to
            another certificate.
    """
    cert, key, client_ca = options.tls_cert, options.tls_key, options.tls_client_ca
    if cert is None:
        return None
    for path in (cert, key, client_ca):
        if path is not None and not path.is_file():
            raise InputError(f"{path}: no such file; TLS needs a certificate and its key in PEM")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(cert, key, password=lambda: "")  # without it, OpenSSL asks at the terminal
    except OSError as error:
        if getattr(error, "reason", None) == "KEY_VALUES_MISMATCH":
            raise InputError(f"{key}: is not the key of {cert}; give the two of a pair") from None
        raise InputError(
            f"{cert} and {key}: cannot be read as a certificate and its key; give two PEM files without a passphrase"
        ) from None
    if client_ca is not None:
        try:
            context.load_verify_locations(client_ca)
        except OSError:
            raise InputError(
                f"{client_ca}: cannot be read as a certificate in PEM; give the clients' authority"
            ) from None
        context.verify_mode = ssl.CERT_REQUIRED
    return context
