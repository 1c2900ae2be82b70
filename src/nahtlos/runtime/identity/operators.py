"""Operators and how they prove themselves.

Three ways: being root on the orchestrator's machine (the unix socket), a client certificate of the cloud's
CA that names an operator, or a bearer token. Tokens are kept as sha256 digests in a JSON file of mode 0600
(`operators.json`); a certificate counts only while its operator is listed there, so both can be withdrawn.
Nobody can be listed as `root`, which is who comes over the unix socket.
Never decides what an operator may do.
"""

from pathlib import Path

import msgspec

from nahtlos.model.errors import NotFound, Refused
from nahtlos.model.ids import checked_name
from nahtlos.model.operators import Listed
from nahtlos.runtime.identity.tokens import matches, new_token, token_digest
from nahtlos.wire.credentials import write_file
from nahtlos.wire.tls import operator_of

ROOT = "root"


class Presented(msgspec.Struct, frozen=True, kw_only=True):
    """What a caller showed, as the listener found it out; nothing in here is the caller's mere word."""

    peer_uid: int | None = None
    """User id at the other end of the unix socket; None over TLS."""
    party: str | None = None
    """The party its verified client certificate names."""
    bearer: str | None = None

    def __repr__(self) -> str:
        bearer = "shown" if self.bearer else None
        return f"Presented(peer_uid={self.peer_uid}, party={self.party}, bearer={bearer})"


class _Operator(msgspec.Struct, frozen=True, kw_only=True):
    token_digests: tuple[str, ...] = ()


class Operators:
    """The list of operators, kept in `file`; read anew for every use, so other processes may change it."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def add(self, name: str) -> None:
        """List an operator, who can then use a certificate. Repeatable."""
        _checked(name)
        listed = self._read()
        self._write({name: _Operator(), **listed})

    def add_token(self, name: str) -> str:
        """A further token for `name`, who is listed if new. Shown here and never again."""
        _checked(name)
        token = new_token()
        listed = self._read()
        digests = listed.get(name, _Operator()).token_digests
        self._write({**listed, name: _Operator(token_digests=(*digests, token_digest(token)))})
        return token

    def remove(self, name: str) -> None:
        """Withdraw all that `name` could prove itself with."""
        listed = self._read()
        if name not in listed:
            names = ", ".join(sorted(listed)) or "none"
            raise NotFound(f"no operator '{name}'", field="operator", remedy=f"operators: {names}")
        self._write({n: o for n, o in listed.items() if n != name})

    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._read()))

    def listed(self) -> tuple[Listed, ...]:
        return tuple(Listed(name=n, tokens=len(o.token_digests)) for n, o in sorted(self._read().items()))

    async def authenticate(self, presented: Presented) -> str | None:
        """The operator's name, or None if nothing that was shown proves one."""
        if presented.peer_uid is not None:
            return ROOT if presented.peer_uid == 0 else None
        listed = self._read()
        if presented.bearer is not None:
            return _bearer(presented.bearer, listed)
        name = operator_of(presented.party or "")
        return name if name in listed else None

    def _read(self) -> dict[str, _Operator]:
        try:
            return msgspec.json.decode(self._file.read_bytes(), type=dict[str, _Operator])
        except FileNotFoundError:
            return {}
        except msgspec.DecodeError as error:
            raise Refused(f"{self._file} is damaged: {error}", field="operators") from error

    def _write(self, listed: dict[str, _Operator]) -> None:
        self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_file(self._file, msgspec.json.encode(listed), mode=0o600)


def _checked(name: str) -> None:
    checked_name(name, "operator")
    if name == ROOT:
        raise Refused(
            f"'{ROOT}' is who comes over the unix socket", field="operator", remedy="choose another name"
        )


def _bearer(token: str, listed: dict[str, _Operator]) -> str | None:
    """Every digest is compared, whether or not one matched before."""
    found = None
    for name, operator in listed.items():
        for digest in operator.token_digests:
            if matches(token, digest):
                found = name
    return found
