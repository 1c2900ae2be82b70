"""Who is who: the cloud's own certificate authority, operators' credentials, join tokens, volumes'
keys.

Owns what proves an identity, never what an identity may do. Private keys of hosts are made by the hosts
(`wire.credentials`); secrets are stored as digests only.
"""

from nahtlos.runtime.identity.authority import CertificateAuthority, Issued
from nahtlos.runtime.identity.keyring import Keyring
from nahtlos.runtime.identity.operators import Operators, Presented
from nahtlos.runtime.identity.tokens import matches, new_token, token_digest

__all__ = [
    "CertificateAuthority",
    "Issued",
    "Keyring",
    "Operators",
    "Presented",
    "matches",
    "new_token",
    "token_digest",
]
