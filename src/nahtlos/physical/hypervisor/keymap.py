"""Which key of a US keyboard a viewer means by a symbol, in the form that QEMU reads (`-k FILE`). Pure.

QEMU shows no display without one, and its bundles carry none. Viewers that say which key it was (QEMU's
extended key events) do not need it.
"""

from collections.abc import Iterator

_ROWS = (
    (0x02, "1234567890-=", "!@#$%^&*()_+"),
    (0x10, "qwertyuiop[]", "QWERTYUIOP{}"),
    (0x1E, "asdfghjkl;'`", 'ASDFGHJKL:"~'),
    (0x2B, "\\zxcvbnm,./", "|ZXCVBNM<>?"),
)
"""Number of the first key, the keys' characters, those with Shift."""
_NAMED = {
    "Escape": 0x01,
    "BackSpace": 0x0E,
    "Tab": 0x0F,
    "Return": 0x1C,
    "Control_L": 0x1D,
    "Shift_L": 0x2A,
    "Shift_R": 0x36,
    "KP_Multiply": 0x37,
    "Alt_L": 0x38,
    "space": 0x39,
    "Caps_Lock": 0x3A,
    **{f"F{number}": 0x3A + number for number in range(1, 11)},
    "Num_Lock": 0x45,
    "Scroll_Lock": 0x46,
    "KP_Subtract": 0x4A,
    "KP_Add": 0x4E,
    "F11": 0x57,
    "F12": 0x58,
    "KP_Enter": 0x9C,
    "Control_R": 0x9D,
    "KP_Divide": 0xB5,
    "Print": 0xB7,
    "Alt_R": 0xB8,
    "Home": 0xC7,
    "Up": 0xC8,
    "Page_Up": 0xC9,
    "Left": 0xCB,
    "Right": 0xCD,
    "End": 0xCF,
    "Down": 0xD0,
    "Page_Down": 0xD1,
    "Insert": 0xD2,
    "Delete": 0xD3,
}
"""From 0x80 on: keys that come after a prefix."""


def keymap() -> str:
    return "".join(f"{line}\n" for line in _lines())


def _lines() -> Iterator[str]:
    for first, plain, shifted in _ROWS:
        for place, (low, high) in enumerate(zip(plain, shifted, strict=True)):
            yield f"U{ord(low):04x} {first + place:#04x}"
            yield f"U{ord(high):04x} {first + place:#04x} shift"
    for name, number in _NAMED.items():
        yield f"{name} {number:#04x}"
