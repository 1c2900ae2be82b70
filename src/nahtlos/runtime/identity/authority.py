"""The certificate authority of one cloud: a key and a certificate in a folder of mode 0700.

It decides the names in a certificate; of a request it takes the public key alone, so a host cannot ask for
another's name. Certificates serve QEMU and its GnuTLS as well: RSA, digital signature and key encipherment,
host id and address as DNS and IP names.
"""

import datetime
import ipaddress
from pathlib import Path

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from nahtlos.model.errors import Refused
from nahtlos.model.ids import HostId, checked_name
from nahtlos.wire.credentials import RSA_BITS, key_pem, new_key, write_file, write_pki_dir
from nahtlos.wire.tls import ORCHESTRATOR, host_party, operator_party, party_uri

CA_KEY_FILE = "ca-key.pem"
CA_CERTIFICATE_FILE = "ca.pem"
CA_VALID = datetime.timedelta(days=3650)
VALID = datetime.timedelta(days=825)
CLOCKS_APART = datetime.timedelta(hours=1)
"""Certificates are valid from this long before they are issued: hosts' clocks differ."""


class Issued(msgspec.Struct, frozen=True, kw_only=True):
    """A certificate with its key, made here because the party runs here."""

    ca_pem: str
    certificate_pem: str
    key_pem: str

    def write(self, folder: Path) -> None:
        write_pki_dir(folder, self.ca_pem, self.certificate_pem, self.key_pem)


class CertificateAuthority:
    def __init__(self, key: rsa.RSAPrivateKey, certificate: x509.Certificate) -> None:
        self._key = key
        self._certificate = certificate

    @classmethod
    def open(cls, folder: Path, name: str = "nahtlos") -> "CertificateAuthority":
        """The authority kept in `folder`; created if there is none yet."""
        if not (folder / CA_CERTIFICATE_FILE).exists():
            return cls._created(folder, name)
        return cls.load(folder)

    @classmethod
    def load(cls, folder: Path) -> "CertificateAuthority":
        """Refused if there is none in `folder`."""
        try:
            key = serialization.load_pem_private_key((folder / CA_KEY_FILE).read_bytes(), password=None)
            certificate = x509.load_pem_x509_certificate((folder / CA_CERTIFICATE_FILE).read_bytes())
        except (OSError, ValueError) as error:
            raise Refused(f"no certificate authority in {folder}: {error}", field="ca_dir") from error
        if not isinstance(key, rsa.RSAPrivateKey):
            raise Refused(f"{folder / CA_KEY_FILE} holds no RSA key", field="ca_dir")
        return cls(key, certificate)

    @classmethod
    def _created(cls, folder: Path, name: str) -> "CertificateAuthority":
        key = new_key()
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{name} CA")])
        now = datetime.datetime.now(datetime.UTC)
        certificate = (
            _builder(subject, subject, key.public_key(), now, CA_VALID)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(authority=True), critical=True)
            .sign(key, hashes.SHA256())
        )
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        # The certificate last: a folder that has one is complete.
        write_file(folder / CA_KEY_FILE, key_pem(key), mode=0o600)
        write_file(
            folder / CA_CERTIFICATE_FILE, certificate.public_bytes(serialization.Encoding.PEM), mode=0o644
        )
        return cls(key, certificate)

    @property
    def certificate_pem(self) -> str:
        return _pem(self._certificate)

    def sign_host_csr(self, csr_pem: str, host: HostId, address: str) -> str:
        """A certificate for `host` over the key in the request. The request's own names are ignored.
        Refused for what is no request, is not signed by its own key, or has an unfit key."""
        checked_name(host, "host")
        if host == ORCHESTRATOR:
            raise Refused(f"no host may be called {ORCHESTRATOR}", field="host", remedy="choose another name")
        try:
            ip = ipaddress.ip_address(address)
        except ValueError as error:
            raise Refused(f"'{address}' is no IP address", field="address") from error
        names: list[x509.GeneralName] = [x509.DNSName(host), x509.IPAddress(ip)]
        return self._issue(host_party(host), _requested_key(csr_pem), names)

    def issue_orchestrator(self, *addresses: str) -> Issued:
        names: list[x509.GeneralName] = [x509.DNSName(ORCHESTRATOR)]
        names += [x509.IPAddress(ipaddress.ip_address(a)) for a in addresses]
        return self._issue_with_key(ORCHESTRATOR, names)

    def issue_host(self, host: HostId, address: str) -> Issued:
        """Key included: for a host that runs in this process (tests, simulations)."""
        ip = ipaddress.ip_address(address)
        return self._issue_with_key(host_party(host), [x509.DNSName(host), x509.IPAddress(ip)])

    def issue_operator(self, name: str) -> Issued:
        return self._issue_with_key(operator_party(checked_name(name, "operator")), [])

    def _issue_with_key(self, party: str, names: list[x509.GeneralName]) -> Issued:
        key = new_key()
        return Issued(
            ca_pem=self.certificate_pem,
            certificate_pem=self._issue(party, key.public_key(), names),
            key_pem=key_pem(key).decode(),
        )

    def _issue(self, party: str, key: rsa.RSAPublicKey, names: list[x509.GeneralName]) -> str:
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, party)])
        now = datetime.datetime.now(datetime.UTC)
        usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        certificate = (
            _builder(subject, self._certificate.subject, key, now, VALID)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(authority=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(
                x509.SubjectAlternativeName([x509.UniformResourceIdentifier(party_uri(party)), *names]),
                critical=False,
            )
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False
            )
            .sign(self._key, hashes.SHA256())
        )
        return _pem(certificate)


def _requested_key(csr_pem: str) -> rsa.RSAPublicKey:
    try:
        request = x509.load_pem_x509_csr(csr_pem.encode())
        signed = request.is_signature_valid
        key = request.public_key()
    except (ValueError, UnsupportedAlgorithm, InvalidSignature) as error:
        raise Refused("not a certificate signing request", field="csr_pem") from error
    if not signed:
        raise Refused("the request is not signed with its own key", field="csr_pem")
    if not isinstance(key, rsa.RSAPublicKey) or key.key_size < RSA_BITS:
        raise Refused(f"an RSA key of at least {RSA_BITS} bits is needed", field="csr_pem")
    return key


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: rsa.RSAPublicKey,
    now: datetime.datetime,
    valid: datetime.timedelta,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCKS_APART)
        .not_valid_after(now + valid)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _key_usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_encipherment=not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()
