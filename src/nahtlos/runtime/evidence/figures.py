"""How figures are written for people: the same in the terminal, on the page and in messages. Pure."""

from datetime import UTC, datetime

NONE = "–"


def number(value: int) -> str:
    return f"{value:,}"


def milliseconds(value: float | None) -> str:
    if value is None:
        return NONE
    return f"{value / 1e3:,.2f} s" if value >= 10_000 else f"{value:,.1f} ms"


def share(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}"


def signed(value: float | None) -> str:
    """An error as a share: `+12 %`, `−7 %`"""
    return NONE if value is None else f"{round(value * 100):+d} %".replace("-", "−")


def within(value: float | None) -> str:
    """Nine in ten errors are no larger: `within 12 %`"""
    return NONE if value is None else f"within {value:.0%}".replace("%", " %")


def duration(seconds: float) -> str:
    """`41 s`, `3 min 41 s`, `2 h 05 min`"""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def clock(seconds: float) -> str:
    """Time since a beginning: `3:41`"""
    whole = round(seconds)
    return f"{whole // 60}:{whole % 60:02d}"


def moment(wall_clock: float) -> str:
    return datetime.fromtimestamp(wall_clock, UTC).strftime("%-d %B %Y, %H:%M UTC")


def release(identifier: str) -> str:
    """A release without its digest: `qemu-11.1.3-0f3a1b2c3d4e` is `QEMU 11.1.3`."""
    if not identifier:
        return NONE
    component, _, rest = identifier.partition("-")
    version = rest.rsplit("-", 1)[0] if "-" in rest else rest
    return f"{component.upper() if component == 'qemu' else component} {version}".strip()


def count_of(amount: int, one: str, many: str | None = None) -> str:
    return f"{amount:,} {one if amount == 1 else many or one + 's'}"
