"""Who is who on the network: TLS contexts of a party and the name a certificate proves.

Both sides of every connection prove themselves by a certificate of the cloud's own CA; no other CA is
trusted. A party's name is in its certificate as the URI `nahtlos:<party>` with `<party>` one of
`host/<id>`, `orchestrator`, `operator/<name>`. Never issues certificates (`runtime.identity` does).

A party keeps its certificate in a pki folder: `ca.pem`, `cert.pem`, `key.pem`.
"""

import re
import ssl
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import cast

from nahtlos.model.errors import Refused
from nahtlos.model.ids import HostId

CA_FILE = "ca.pem"
CERTIFICATE_FILE = "cert.pem"
KEY_FILE = "key.pem"
OUTSIDERS_CA_FILE = "outsiders-ca.pem"
"""Beside them, if an operator has put it there."""

URI_SCHEME = "nahtlos:"
ORCHESTRATOR = "orchestrator"

_PARTY = re.compile(r"^(orchestrator|(host|operator)/[a-z]([a-z0-9-]{0,30}[a-z0-9])?)$")


def host_party(host: HostId) -> str:
    return f"host/{host}"


def operator_party(name: str) -> str:
    return f"operator/{name}"


def party_uri(party: str) -> str:
    """The URI that proves `party`. Refused if it names no party there can be."""
    if not _PARTY.match(party):
        raise Refused(f"'{party}' names no party", field="party")
    return URI_SCHEME + party


def host_of(party: str) -> HostId | None:
    """The host behind a party's name; None if it is no host's."""
    kind, _, name = party.partition("/")
    return HostId(name) if kind == "host" and name else None


def operator_of(party: str) -> str | None:
    kind, _, name = party.partition("/")
    return name if kind == "operator" and name else None


def party_of(certificate: Mapping[str, object] | None) -> str | None:
    """The party named by a verified peer certificate, as `SSLObject.getpeercert()` gives it.
    None if there is none, or if it names none or several: such a peer is nobody."""
    if not certificate:
        return None
    names = cast("Iterable[tuple[str, str]]", certificate.get("subjectAltName", ()))
    parties = [
        value.removeprefix(URI_SCHEME)
        for kind, value in names
        if kind == "URI" and value.startswith(URI_SCHEME)
    ]
    if len(parties) != 1 or not _PARTY.match(parties[0]):
        return None
    return parties[0]


def server_context(pki_dir: Path, *, clients: ssl.VerifyMode = ssl.CERT_REQUIRED) -> ssl.SSLContext:
    """For listening. `clients` may be CERT_OPTIONAL where another credential can stand in."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = clients
    return _with_identity(context, pki_dir)


def client_context(pki_dir: Path) -> ssl.SSLContext:
    """For dialling with this party's certificate. The name is checked by the caller, from the URI."""
    return _with_identity(_anonymous_client(), pki_dir)


def client_context_without_certificate(ca_file: Path) -> ssl.SSLContext:
    """For dialling with another credential than a certificate. The name is checked by the caller, from
    the URI, before anything is sent."""
    context = _anonymous_client()
    _trust(context, ca_file)
    return context


def outsider_context(pki_dir: Path) -> ssl.SSLContext:
    """For dialling a server that is not of this cloud. Its certificate has to name the host that is dialled,
    by an authority of `OUTSIDERS_CA_FILE`, or where there is no such file, by one this machine trusts. To a
    server that asks for one this party's own certificate is shown."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if (pki_dir / OUTSIDERS_CA_FILE).is_file():
        _trust(context, pki_dir / OUTSIDERS_CA_FILE)
    else:
        context.load_default_certs()
    if (pki_dir / CERTIFICATE_FILE).is_file():
        context.load_cert_chain(pki_dir / CERTIFICATE_FILE, pki_dir / KEY_FILE)
    return context


def orchestrator_client_context(ca_file: Path, pki_dir: Path | None = None) -> ssl.SSLContext:
    """For HTTP clients of the orchestrator, which show a certificate (`pki_dir`) or another credential.

    A credential must not go to anybody else of this cloud, so the name is checked within the handshake:
    use `ORCHESTRATOR` as the server's name, whatever the address."""
    context = _anonymous_client()
    context.check_hostname = True
    if pki_dir is not None:
        return _with_identity(context, pki_dir)
    _trust(context, ca_file)
    return context


def _trust(context: ssl.SSLContext, ca_file: Path) -> None:
    try:
        context.load_verify_locations(cafile=str(ca_file))
    except OSError as error:  # ssl.SSLError is one, for what is no certificate
        raise Refused(
            f"cannot read {ca_file}: {error}", field="ca_file", remedy="copy the cloud's ca.pem there"
        ) from error


def _anonymous_client() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context


def _with_identity(context: ssl.SSLContext, pki_dir: Path) -> ssl.SSLContext:
    missing = [n for n in (CA_FILE, CERTIFICATE_FILE, KEY_FILE) if not (pki_dir / n).is_file()]
    if missing:
        raise Refused(
            f"{pki_dir} lacks {', '.join(missing)}",
            field="pki_dir",
            remedy="let this party join (again), or issue its certificate",
        )
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(cafile=str(pki_dir / CA_FILE))
    context.load_cert_chain(str(pki_dir / CERTIFICATE_FILE), str(pki_dir / KEY_FILE))
    return context
