"""How much consoles may send: what a guest prints endlessly must not take the line from moves and reports."""


class Pace:
    """A bucket that fills with `rate` bytes a second and holds `burst`. It may be overdrawn: who takes more
    than there is waits until it would have been there, and whoever comes next waits longer."""

    def __init__(self, rate: float, burst: float) -> None:
        self._rate, self._burst = rate, burst
        self._held, self._at = burst, 0.0

    def take(self, count: int, now: float) -> float:
        """Seconds to wait before (or after) sending `count` bytes."""
        self._held = min(self._burst, self._held + (now - self._at) * self._rate)
        self._at = now
        self._held -= count
        return max(0.0, -self._held / self._rate)
