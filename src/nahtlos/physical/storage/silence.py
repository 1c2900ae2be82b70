"""How long a storage daemon that runs has answered nothing. Only decides; who ends it is `serving`."""

SILENT_SECONDS = 30.0
"""Found silent again and again for so long it is given up: nothing it does takes as long."""


class Silence:
    """Of whichever process runs. Only silence in a row counts, and only of the same process."""

    def __init__(self) -> None:
        self._pid: int | None = None
        self._since = 0.0

    def lasts(self, pid: int | None, now: float) -> float:
        """Seconds since the process was first found silent; `now`: when it was once more. 0 if none runs."""
        if pid is None or pid != self._pid:
            self._pid, self._since = pid, now
        return now - self._since

    def broken(self) -> None:
        """It has answered, or was ended."""
        self._pid = None
