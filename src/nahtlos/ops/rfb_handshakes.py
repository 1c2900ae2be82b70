"""The two beginnings of RFB: with a VMM, as its viewer, and with a viewer, as its server. Pure: bytes in,
bytes out.

    VMM     version -> security (None) -> result -> ServerInit
    viewer  version -> security (None, or a password) -> result -> ClientInit
"""

import hmac
import warnings
from collections.abc import Callable

from nahtlos.model.errors import Refused
from nahtlos.ops.rfb import NONE, VERSION, VNC_AUTHENTICATION, Init, init_of

CHALLENGE_BYTES = 16
PASSWORD_BYTES = 8
"""More are not looked at: so it is in the protocol."""
Step = Callable[[], bytes | None]


class _Handshake:
    """Bytes are fed in as they come, one step after the other takes what it needs of them. A step returns
    None as long as that has not come."""

    def __init__(self, *steps: Step) -> None:
        self._held = bytearray()
        self._steps = list(steps)

    @property
    def rest(self) -> bytes:
        """What came after the last step."""
        return bytes(self._held)

    def feed(self, data: bytes) -> bytes:
        """Returns what is to be answered."""
        self._held += data
        answers = b""
        while self._steps and (answer := self._steps[0]()) is not None:
            self._steps.pop(0)
            answers += answer
        return answers

    def _take(self, count: int) -> bytes | None:
        if len(self._held) < count:
            return None
        taken = bytes(self._held[:count])
        del self._held[:count]
        return taken


class WithServer(_Handshake):
    """`init` is set once all of it is done."""

    def __init__(self) -> None:
        super().__init__(self._version, self._security, self._result, self._init)
        self.init: Init | None = None

    def _version(self) -> bytes | None:
        said = self._take(12)
        if said is not None and (not said.startswith(b"RFB 003.") or said < VERSION):
            raise Refused(f"the display speaks {said!r}", field="display")
        return None if said is None else VERSION

    def _security(self) -> bytes | None:
        if not self._held or len(self._held) < 1 + self._held[0]:
            return None
        kinds = self._take(1 + self._held[0]) or b""
        if NONE not in kinds[1:]:
            raise Refused("the display asks for a password of its own", field="display")
        return bytes((NONE,))

    def _result(self) -> bytes | None:
        result = self._take(4)
        if result is not None and any(result):
            raise Refused("the display lets nobody in", field="display")
        return None if result is None else b"\x01"  # shared with whoever looks, too

    def _init(self) -> bytes | None:
        found = init_of(self._held)
        if found is None:
            return None
        self.init, length = found
        self._take(length)
        return b""


class WithViewer(_Handshake):
    """`begin` is said first. `done` once the viewer waits for ServerInit; `refused` once it was told that its
    password is wrong."""

    begin = VERSION

    def __init__(self, password: str | None, challenge: bytes) -> None:
        assert len(challenge) == CHALLENGE_BYTES
        super().__init__(self._version, self._init)
        self._password = password
        self._challenge = challenge
        self._minor = 8
        self.refused = False

    @property
    def done(self) -> bool:
        return not self._steps and not self.refused

    def _version(self) -> bytes | None:
        said = self._take(12)
        if said is None:
            return None
        if not said.startswith(b"RFB 003.") or not said[8:11].isdigit():
            raise Refused(f"the viewer speaks {said!r}", field="viewer", remedy="use one that speaks RFB 3.8")
        self._minor = {3: 3, 7: 7}.get(int(said[8:11]), 8 if int(said[8:11]) > 7 else 3)
        kind = NONE if self._password is None else VNC_AUTHENTICATION
        proof = [self._proof] if kind == VNC_AUTHENTICATION else []
        if self._minor == 3:
            self._steps[1:1] = proof
            return kind.to_bytes(4, "big") + (self._challenge if proof else b"")
        self._steps[1:1] = [self._chosen, *proof]
        return bytes((1, kind))

    def _chosen(self) -> bytes | None:
        chosen = self._take(1)
        if chosen is None:
            return None
        if self._password is not None:
            return self._challenge
        return b"\0\0\0\0" if self._minor == 8 else b""

    def _proof(self) -> bytes | None:
        assert self._password is not None
        proof = self._take(CHALLENGE_BYTES)
        if proof is None:
            return None
        if hmac.compare_digest(proof, proof_of(self._password, self._challenge)):
            return b"\0\0\0\0"
        self.refused = True
        del self._steps[1:]
        why = b"wrong password"
        return b"\0\0\0\1" + (len(why).to_bytes(4, "big") + why if self._minor == 8 else b"")

    def _init(self) -> bytes | None:
        return None if self._take(1) is None else b""


def proof_of(password: str, challenge: bytes) -> bytes:
    """What a viewer that knows the password answers: DES, by a key whose bytes are turned round."""
    from cryptography.hazmat.primitives.ciphers import Cipher, modes

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from cryptography.hazmat.decrepit.ciphers.algorithms import TripleDES

        key = password.encode("latin-1")[:PASSWORD_BYTES].ljust(PASSWORD_BYTES, b"\0")
        turned = bytes(int(f"{byte:08b}"[::-1], 2) for byte in key)
        cipher = Cipher(TripleDES(turned * 3), modes.ECB())
        return cipher.encryptor().update(challenge)
