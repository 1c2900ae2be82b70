"""What a party makes and keeps of its own identity: its key, its signing request, its pki folder.

A key never leaves the machine it was made on: the request goes out, the certificate comes back. Never
signs anything (`runtime.identity` does).
"""

import os
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

from nahtlos.model.ids import HostId
from nahtlos.wire.tls import CA_FILE, CERTIFICATE_FILE, KEY_FILE, host_party, party_uri

RSA_BITS = 2048
"""RSA, because GnuTLS as QEMU uses it wants key encipherment in the certificate."""

QEMU_CA_FILES = ("ca-cert.pem",)
QEMU_CERTIFICATE_FILES = ("server-cert.pem", "client-cert.pem")
QEMU_KEY_FILES = ("server-key.pem", "client-key.pem")
"""The names QEMU's `tls-creds-x509` object reads from its `dir`."""
QEMU_DH_FILE = "dh-params.pem"
DH_PARAMETERS = b"""\
-----BEGIN DH PARAMETERS-----
MIIBCAKCAQEA//////////+t+FRYortKmq/cViAnPTzx2LnFg84tNpWp4TZBFGQz
+8yTnc4kmz75fS/jY2MMddj2gbICrsRhetPfHtXV/WVhJDP1H18GbtCFY2VVPe0a
87VXE15/V8k1mE8McODmi3fipona8+/och3xWKE2rec1MKzKT0g6eXq8CrGCsyT7
YdEIqUuyyOP7uWrat2DX9GgdT0Kj3jlN9K5W7edjcrsZCwenyO4KbXCeAvzhzffi
7MA0BM0oNC9hkXL+nOmFg/+OTxIy7vKBg8P+OxtMb61zO7X8vC7CIAXFjvGDfRaD
ssbzSibBsu/6iGtCOGEoXJf//////////wIBAg==
-----END DH PARAMETERS-----
"""
"""Of RFC 7919 (ffdhe2048). Up to 10.0 a QEMU that finds none in its `dir` looks for primes of its own
whenever it starts, which takes up to seconds."""


def new_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=RSA_BITS)


def key_pem(key: rsa.RSAPrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def host_key_and_csr(host: HostId) -> tuple[bytes, str]:
    """A new private key (PEM) and the request for a certificate that names `host` (PEM)."""
    key = new_key()
    party = host_party(host)
    request = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, party)]))
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(party_uri(party))]), critical=False
        )
        .sign(key, hashes.SHA256())
    )
    return key_pem(key), request.public_bytes(serialization.Encoding.PEM).decode()


def write_pki_dir(folder: Path, ca_pem: bytes | str, certificate_pem: bytes | str, key: bytes | str) -> None:
    """Fill `folder` (mode 0700) under our names and QEMU's, keys with mode 0600. Each file is replaced
    whole, the certificate last, so that a folder that has one is complete."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    for name in (CA_FILE, *QEMU_CA_FILES):
        write_file(folder / name, _bytes(ca_pem), mode=0o644)
    for name in (KEY_FILE, *QEMU_KEY_FILES):
        write_file(folder / name, _bytes(key), mode=0o600)
    write_file(folder / QEMU_DH_FILE, DH_PARAMETERS, mode=0o644)
    for name in (*QEMU_CERTIFICATE_FILES, CERTIFICATE_FILE):
        write_file(folder / name, _bytes(certificate_pem), mode=0o644)


def write_file(path: Path, content: bytes, *, mode: int) -> None:
    """Replace `path` in one step. It never exists with more rights than `mode`, nor half written."""
    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    new.unlink(missing_ok=True)
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(file.fileno(), mode)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def _bytes(value: bytes | str) -> bytes:
    return value.encode() if isinstance(value, str) else value
