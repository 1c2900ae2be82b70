"""What proves an identity, and what does not."""

import ssl
import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID, NameOID

from nahtlos.model.errors import NotFound, Refused
from nahtlos.model.ids import HostId
from nahtlos.runtime.identity import (
    CertificateAuthority,
    Operators,
    Presented,
    matches,
    new_token,
    token_digest,
)
from nahtlos.wire.credentials import host_key_and_csr, write_pki_dir
from nahtlos.wire.tls import client_context, host_of, operator_of, party_of, party_uri, server_context

HOST = HostId("host-1")


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> CertificateAuthority:
    return CertificateAuthority.open(tmp_path_factory.mktemp("ca"))


# --- tokens ------------------------------------------------------------------------------------------


def test_a_token_matches_its_digest_alone() -> None:
    token, other = new_token(), new_token()
    assert token != other
    assert matches(token, token_digest(token))
    assert not matches(other, token_digest(token))
    assert not matches("", token_digest(token))
    assert token not in token_digest(token)


def test_a_token_has_256_bits() -> None:
    assert len(new_token()) == 43  # 32 bytes in base64 without padding


# --- the authority -----------------------------------------------------------------------------------


def test_an_authority_is_created_once_and_then_loaded(tmp_path: Path) -> None:
    first = CertificateAuthority.open(tmp_path / "ca")
    again = CertificateAuthority.open(tmp_path / "ca")
    assert first.certificate_pem == again.certificate_pem
    assert stat.S_IMODE((tmp_path / "ca").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "ca" / "ca-key.pem").stat().st_mode) == 0o600


def test_a_folder_without_an_authority_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused) as caught:
        CertificateAuthority.load(tmp_path)
    assert caught.value.field == "ca_dir"


def test_a_host_certificate_is_what_qemu_and_we_need(authority: CertificateAuthority) -> None:
    key, csr = host_key_and_csr(HOST)
    certificate = x509.load_pem_x509_certificate(authority.sign_host_csr(csr, HOST, "10.99.0.11").encode())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == ["nahtlos:host/host-1"]
    assert names.get_values_for_type(x509.DNSName) == ["host-1"]
    assert [str(ip) for ip in names.get_values_for_type(x509.IPAddress)] == ["10.99.0.11"]
    usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
    assert usage.digital_signature
    assert usage.key_encipherment
    assert not usage.key_cert_sign
    extended = certificate.extensions.get_extension_for_oid(ExtensionOID.EXTENDED_KEY_USAGE).value
    assert set(extended) == {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}  # type: ignore[call-overload]
    private = serialization.load_pem_private_key(key, password=None)
    assert isinstance(private, rsa.RSAPrivateKey)
    assert certificate.public_key() == private.public_key()
    certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(authority.certificate_pem.encode()))


def test_the_authority_chooses_the_name_not_the_request(authority: CertificateAuthority) -> None:
    _, csr = host_key_and_csr(HostId("host-2"))
    certificate = x509.load_pem_x509_certificate(authority.sign_host_csr(csr, HOST, "10.99.0.11").encode())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == ["nahtlos:host/host-1"]
    assert "host-2" not in certificate.subject.rfc4514_string()


@pytest.mark.parametrize(
    ("host", "address", "field"),
    [
        ("Host 1", "10.99.0.11", "host"),
        ("host-1/../x", "10.99.0.11", "host"),
        ("orchestrator", "10.99.0.11", "host"),
        ("host-1", "somewhere", "address"),
    ],
)
def test_unfit_names_and_addresses_are_refused(
    authority: CertificateAuthority, host: str, address: str, field: str
) -> None:
    _, csr = host_key_and_csr(HOST)
    with pytest.raises(Refused) as caught:
        authority.sign_host_csr(csr, HostId(host), address)
    assert caught.value.field == field


def _csr(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey) -> str:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "x")])
    request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM).decode()


def test_unfit_requests_are_refused(authority: CertificateAuthority) -> None:
    small = rsa.generate_private_key(public_exponent=65537, key_size=1024)
    curve = ec.generate_private_key(ec.SECP256R1())
    for csr in ("", "nonsense", authority.certificate_pem, _csr(small), _csr(curve)):
        with pytest.raises(Refused) as caught:
            authority.sign_host_csr(csr, HOST, "10.99.0.11")
        assert caught.value.field == "csr_pem"


def test_a_request_signed_by_another_key_is_refused(authority: CertificateAuthority) -> None:
    _, csr = host_key_and_csr(HOST)
    der = bytearray(x509.load_pem_x509_csr(csr.encode()).public_bytes(serialization.Encoding.DER))
    der[-1] ^= 1
    forged = ssl.DER_cert_to_PEM_cert(bytes(der)).replace("CERTIFICATE", "CERTIFICATE REQUEST")
    with pytest.raises(Refused, match="own key"):
        authority.sign_host_csr(forged, HOST, "10.99.0.11")


# --- the pki folder ----------------------------------------------------------------------------------


def test_a_pki_folder_serves_us_and_qemu(authority: CertificateAuthority, tmp_path: Path) -> None:
    key, csr = host_key_and_csr(HOST)
    folder = tmp_path / "state" / "pki"
    for _ in range(2):  # a renewal writes over what is there
        write_pki_dir(
            folder, authority.certificate_pem, authority.sign_host_csr(csr, HOST, "10.99.0.11"), key
        )
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert modes == {
        "ca.pem": 0o644,
        "cert.pem": 0o644,
        "key.pem": 0o600,
        "ca-cert.pem": 0o644,
        "server-cert.pem": 0o644,
        "server-key.pem": 0o600,
        "client-cert.pem": 0o644,
        "client-key.pem": 0o600,
        "dh-params.pem": 0o644,
    }
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert server_context(folder).verify_mode is ssl.CERT_REQUIRED
    assert client_context(folder).minimum_version is ssl.TLSVersion.TLSv1_3


def test_a_folder_that_lacks_something_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"lacks ca\.pem, cert\.pem, key\.pem"):
        server_context(tmp_path)


# --- names -------------------------------------------------------------------------------------------


def test_parties() -> None:
    assert host_of("host/host-1") == "host-1"
    assert host_of("orchestrator") is None
    assert host_of("operator/host") is None
    assert operator_of("operator/alice") == "alice"
    assert operator_of("host/alice") is None
    for nobody in ("", "host/", "host/a/b", "host/A", "root", "operator/x y", "orchestrator/x"):
        with pytest.raises(Refused):
            party_uri(nobody)


@pytest.mark.parametrize(
    ("names", "party"),
    [
        ((("URI", "nahtlos:host/a"),), "host/a"),
        ((("DNS", "a"), ("URI", "nahtlos:orchestrator"), ("URI", "https://else/")), "orchestrator"),
        ((("DNS", "nahtlos:host/a"),), None),
        ((("URI", "nahtlos:host/a"), ("URI", "nahtlos:host/b")), None),
        ((("URI", "nahtlos:host/a/../b"),), None),
        ((("URI", "other:host/a"),), None),
        ((), None),
    ],
)
def test_a_certificate_proves_one_party_or_none(names: object, party: str | None) -> None:
    assert party_of({"subjectAltName": names}) == party
    assert party_of(None) is None


# --- operators ---------------------------------------------------------------------------------------


async def test_operators_prove_themselves_in_three_ways(tmp_path: Path) -> None:
    operators = Operators(tmp_path / "sub" / "operators.json")
    token = operators.add_token("bob")
    operators.add("alice")
    operators.add("alice")
    assert operators.names() == ("alice", "bob")
    ask = operators.authenticate
    assert await ask(Presented(peer_uid=0)) == "root"
    assert await ask(Presented(bearer=token)) == "bob"
    assert await ask(Presented(party="operator/alice")) == "alice"


async def test_nothing_else_proves_an_operator(tmp_path: Path) -> None:
    operators = Operators(tmp_path / "operators.json")
    assert await operators.authenticate(Presented(bearer="x")) is None  # nobody is listed yet
    token = operators.add_token("bob")
    for presented in (
        Presented(),
        Presented(peer_uid=1000),
        Presented(peer_uid=1000, bearer=token),
        Presented(bearer=""),
        Presented(bearer=token[:-1]),
        Presented(bearer=token_digest(token)),
        Presented(party="operator/mallory"),
        Presented(party="host/bob"),
        Presented(party="orchestrator"),
        Presented(party="operator/bob", bearer="wrong"),
    ):
        assert await operators.authenticate(presented) is None, presented


async def test_withdrawing_an_operator_takes_effect_at_once(tmp_path: Path) -> None:
    operators = Operators(tmp_path / "operators.json")
    first, second = operators.add_token("bob"), operators.add_token("bob")
    assert await operators.authenticate(Presented(bearer=first)) == "bob"
    assert await operators.authenticate(Presented(bearer=second)) == "bob"
    Operators(tmp_path / "operators.json").remove("bob")
    for token in (first, second):
        assert await operators.authenticate(Presented(bearer=token)) is None
    assert await operators.authenticate(Presented(party="operator/bob")) is None
    with pytest.raises(NotFound):
        operators.remove("bob")


def test_tokens_are_neither_stored_nor_shown(tmp_path: Path) -> None:
    file = tmp_path / "operators.json"
    token = Operators(file).add_token("bob")
    assert token not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert token not in repr(Presented(bearer=token))


def test_a_damaged_list_is_refused_and_kept(tmp_path: Path) -> None:
    file = tmp_path / "operators.json"
    file.write_text("{")
    with pytest.raises(Refused, match="damaged"):
        Operators(file).add("bob")
    assert file.read_text() == "{"
