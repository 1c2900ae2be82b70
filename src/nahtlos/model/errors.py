"""Errors, grouped by what the caller can do.

Error
 |- Refused      the request is wrong: change it (HTTP 422, 404 or 409; exit code 2)
 |   |- NotFound     names something that does not exist
 |   `- Conflict     right in itself, but not now: what is in the way is named
 |- Unavailable  nothing wrong with the request: try later (HTTP 503; exit code 3)
 `- Stale        a race was lost: look again, then plan again (HTTP 409; exit code 4)

Bugs are assertions. "Not yet" is data (`model.blueprint.Waiting`), never an error.
"""

import msgspec


class Error(Exception):
    """Base of all errors that are part of the contract."""

    kind = "error"

    def __init__(self, message: str, *, field: str = "", remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.remedy = remedy

    def __str__(self) -> str:
        where = f"{self.field}: " if self.field else ""
        then = f" ({self.remedy})" if self.remedy else ""
        return f"{where}{self.message}{then}"


class Refused(Error):
    """The request is wrong and stays wrong until it is changed."""

    kind = "refused"


class NotFound(Refused):
    """It names something that does not exist."""

    kind = "not-found"


class Conflict(Refused):
    """Right in itself, but something that exists now is in its way."""

    kind = "conflict"


class Unavailable(Error):
    """The request may be right; who should answer it could not be reached, or not in time."""

    kind = "unavailable"


class Stale(Error):
    """The caller acted on something older than what is there now."""

    kind = "stale"


class ErrorRecord(msgspec.Struct, frozen=True, kw_only=True):
    """An error as data: on the wire, in a journal, in an API answer."""

    kind: str
    message: str
    field: str = ""
    remedy: str = ""

    @classmethod
    def of(cls, error: BaseException) -> "ErrorRecord":
        if isinstance(error, Error):
            return cls(kind=error.kind, message=error.message, field=error.field, remedy=error.remedy)
        return cls(kind="bug", message=f"{type(error).__name__}: {error}")

    def raised(self) -> Error:
        """The error this is the record of; an unknown kind becomes a plain `Error`."""
        kinds: dict[str, type[Error]] = {k.kind: k for k in (Refused, NotFound, Conflict, Unavailable, Stale)}
        return kinds.get(self.kind, Error)(self.message, field=self.field, remedy=self.remedy)
