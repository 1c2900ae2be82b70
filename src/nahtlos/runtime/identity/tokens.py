"""Secrets that are shown once and kept as digests: join tokens and operators' bearer tokens.

Pure but for the randomness of `new_token`. A token has 256 bits of chance, so a plain sha256 needs no salt.
"""

import hashlib
import hmac
import secrets

TOKEN_BYTES = 32


def new_token() -> str:
    return secrets.token_urlsafe(TOKEN_BYTES)


def token_digest(token: str) -> str:
    """What is stored of `token`: its sha256 in hex."""
    return hashlib.sha256(token.encode()).hexdigest()


def matches(token: str, digest: str) -> bool:
    """Whether `digest` is that of `token`; takes the same time whatever the answer."""
    return hmac.compare_digest(token_digest(token), digest)
