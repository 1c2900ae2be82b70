"""A server that is not of the cloud: an authority of its own, and a certificate that names its address."""

import ipaddress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _signed(
    subject: str,
    issuer: str,
    own: ec.EllipticCurvePrivateKey,
    by: ec.EllipticCurvePrivateKey,
    extensions: tuple[x509.ExtensionType, ...],
) -> x509.Certificate:
    now = datetime.now(UTC)
    made = x509.CertificateBuilder(issuer_name=_name(issuer), subject_name=_name(subject))
    made = made.public_key(own.public_key()).serial_number(x509.random_serial_number())
    made = made.not_valid_before(now - timedelta(hours=1)).not_valid_after(now + timedelta(days=1))
    for extension in extensions:
        made = made.add_extension(extension, critical=isinstance(extension, x509.BasicConstraints))
    return made.sign(by, hashes.SHA256())


def credentials(folder: Path, address: str, clients: Path) -> Path:
    """A folder as QEMU's `tls-creds-x509` reads it, of a server at `address` that takes clients with a
    certificate by the authority in the file `clients`. Returns the file of its own authority."""
    folder.mkdir()
    above, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    named = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))])
    authority = _signed("vaults", "vaults", above, above, (x509.BasicConstraints(ca=True, path_length=0),))
    server = _signed(
        "vault", "vaults", key, above, (x509.BasicConstraints(ca=False, path_length=None), named)
    )
    (folder / "server-cert.pem").write_bytes(server.public_bytes(Encoding.PEM))
    text = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (folder / "server-key.pem").write_bytes(text)
    own = folder / "authority.pem"
    own.write_bytes(authority.public_bytes(Encoding.PEM))
    (folder / "ca-cert.pem").write_bytes(clients.read_bytes() + own.read_bytes())  # QEMU looks for both there
    return own
