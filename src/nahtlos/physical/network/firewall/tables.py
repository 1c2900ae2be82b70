"""Packet-filter tables as data: what they should be, what the kernel says they are, and the way from one to
the other.

Pure. A chain is compared by what the kernel held right after it was last written (see `nft_chains`), because
it holds rules differently from how they are written; elements of sets and maps are compared one by one. So
adding a port is adding elements, a changed rule rewrites its one chain, and what is right is not touched.
Never knows what the rules mean.
"""

import hashlib
import socket
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import msgspec

from nahtlos.physical.network.firewall.rules import canonical

TABLE = "nahtlos-firewall"
BRIDGE, INET = "bridge", "inet"


class Chain(msgspec.Struct, frozen=True):
    rules: tuple[str, ...]
    base: str = ""
    """`type ... hook ... priority ...; policy ...;` of one that packets enter by."""

    @property
    def text(self) -> str:
        return "\n".join((self.base, *self.rules))


class Elements(msgspec.Struct, frozen=True):
    """A set, or a map if `values`. `declaration` is its type and flags."""

    declaration: str
    items: Mapping[str, str]
    """Key to value; values are empty in a set."""
    values: bool = False


class Table(msgspec.Struct, frozen=True):
    family: str
    chains: Mapping[str, Chain]
    sets: Mapping[str, Elements]


class ObservedTable(msgspec.Struct):
    """`chains` by a fingerprint of what the kernel holds, `sets` with their elements."""

    chains: dict[str, str] = {}
    sets: dict[str, dict[str, str]] = {}
    maps: set[str] = set()
    """Which of `sets` are maps."""


Observed = dict[str, ObservedTable]
"""By family; a family without the table is not in it."""


class Written(msgspec.Struct):
    """A chain as it was last written, and what the kernel held then (empty: not known yet)."""

    digest: str
    listed: str = ""


class Changes(msgspec.Struct, frozen=True):
    text: str
    words: tuple[str, ...]
    """What was different without having been asked for."""
    chains: Mapping[str, str]
    """Chains that are written, as `family/name`, and the digest of what."""


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def chain_key(family: str, name: str) -> str:
    return f"{family}/{name}"


# --- reading -----------------------------------------------------------------------------------------


def decode(listing: bytes) -> Observed:
    """Sets and maps, from one or several `nft -j list ruleset ...`, one document a line."""
    observed: Observed = {}
    for line in listing.splitlines():
        if not line.strip():
            continue
        document = cast("dict[str, list[dict[str, dict[str, Any]]]]", msgspec.json.decode(line))
        for entry in document.get("nftables", []):
            for kind, value in entry.items():
                _take(kind, value, observed)
    return observed


def _take(kind: str, value: dict[str, Any], observed: Observed) -> None:
    family, name = str(value.get("family")), str(value.get("name", ""))
    if kind == "table" and name == TABLE:
        observed[family] = ObservedTable({}, {}, set())
    elif kind in ("set", "map") and value.get("table") == TABLE:
        observed[family].sets[name] = dict(_elements(value))
        if kind == "map":
            observed[family].maps.add(name)


def _elements(value: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for element in cast("list[Any]", value.get("elem", [])):
        if "map" in value:
            yield key_text(element[0]), _value_text(element[1])
        else:
            yield key_text(element), ""


def key_text(key: Any) -> str:
    """One spelling for an element, whatever the kernel's."""
    if isinstance(key, int):
        return hex(key)
    if isinstance(key, str):
        return _word(key)
    inner = cast("dict[str, Any]", key)
    if "elem" in inner:
        return key_text(inner["elem"]["val"])
    if "concat" in inner:
        return " . ".join(key_text(part) for part in inner["concat"])
    if "prefix" in inner:
        return f"{key_text(inner['prefix']['addr'])}/{inner['prefix']['len']}"
    if "range" in inner:
        return "-".join(key_text(part) for part in inner["range"])
    return str(inner)


def _word(word: str) -> str:
    if word.startswith("0x"):
        return hex(int(word, 16))
    if word.count(":") == 5 and "::" not in word and len(word) == 17:
        return word  # a MAC
    if ":" in word:
        return canonical(word)
    return word if word[:1].isdigit() else f'"{word}"'


def _value_text(value: Any) -> str:
    if isinstance(value, dict):
        verb, target = next(iter(cast("dict[str, Any]", value).items()))
        return f"{verb} {target['target']}" if isinstance(target, dict) else verb
    return str(value)


# --- keys as they are written ------------------------------------------------------------------------


def key(*parts: str) -> str:
    return " . ".join(parts)


def name_part(name: str) -> str:
    return f'"{name}"'


def mac_number(mac: str) -> str:
    """A MAC as raw payload compares it."""
    return hex(int(mac.replace(":", ""), 16))


def address_number(address: str) -> str:
    """An IPv6 address as raw payload compares it."""
    return hex(int.from_bytes(socket.inet_pton(socket.AF_INET6, address), "big"))


# --- comparing ---------------------------------------------------------------------------------------


class Comparison:
    """From `observed` to `desired`.

    `written` tells of each chain how it was left, `trusted` whether any difference in sets is drift. `kept`
    are parts of keys whose elements stay though they are not desired. `additive`: nothing is removed."""

    def __init__(
        self,
        desired: Iterable[Table],
        observed: Observed,
        written: Mapping[str, Written],
        *,
        trusted: bool = False,
        additive: bool = False,
        kept: frozenset[str] = frozenset(),
    ) -> None:
        self._desired = {table.family: table for table in desired}
        self._observed = observed
        self._written = written
        self._trusted = trusted
        self._additive = additive
        self._kept = kept
        self._words: list[str] = []
        self._chains: dict[str, str] = {}

    def changes(self) -> Changes:
        lines: list[str] = []
        for family in (BRIDGE, INET):
            table, there = self._desired.get(family), self._observed.get(family)
            if table is not None:
                lines += self._table(table, there)
            elif there is not None and not self._additive:
                lines.append(f"delete table {family} {TABLE}")
        text = "\n".join(lines) + "\n" if lines else ""
        return Changes(text, tuple(self._words), self._chains)

    def _table(self, table: Table, there: ObservedTable | None) -> list[str]:
        where = f"{table.family} {TABLE}"
        if there is None:
            if any(k.startswith(f"{table.family}/") for k in self._written):
                self._words.append(f"packet filter table {where} was missing: put right")
            there, first, quiet = ObservedTable({}, {}, set()), [f"add table {where}"], True
        else:
            first, quiet = [], False
        before = len(self._words)
        lines = [
            *self._declarations(table, there),
            *self._surplus(table, there),
            *self._rules(table, there),
            *self._missing(table, there),
            *self._leftovers(table, there),
        ]
        if quiet:
            del self._words[before:]
        return first + lines

    def _declarations(self, table: Table, there: ObservedTable) -> Iterator[str]:
        for name, chain in table.chains.items():
            if name not in there.chains:
                base = f" {{ {chain.base} }}" if chain.base else ""
                yield f"add chain {table.family} {TABLE} {name}{base}"
        for name, elements in table.sets.items():
            if name not in there.sets:
                kind = "map" if elements.values else "set"
                yield f"add {kind} {table.family} {TABLE} {name} {{ {elements.declaration} }}"

    def _surplus(self, table: Table, there: ObservedTable) -> Iterator[str]:
        for name, elements in table.sets.items():
            held = there.sets.get(name, {})
            gone = [
                k for k, v in held.items() if elements.items.get(k, None) != v and self._goes(k, elements)
            ]
            if gone:
                self._tell(table, name, gone, "not asked for or different")
                yield f"delete element {table.family} {TABLE} {name} {{ {', '.join(gone)} }}"

    def _goes(self, key_: str, elements: Elements) -> bool:
        if key_ in elements.items:
            return True  # another value
        return not self._additive and not _is_kept(key_, self._kept)

    def _missing(self, table: Table, there: ObservedTable) -> Iterator[str]:
        for name, elements in table.sets.items():
            held = there.sets.get(name, {})
            new = {k: v for k, v in elements.items.items() if held.get(k, None) != v}
            if new:
                self._tell(table, name, [k for k in new if k not in held], "missing")
                items = (f"{k} : {v}" if v else k for k, v in new.items())
                yield f"add element {table.family} {TABLE} {name} {{ {', '.join(items)} }}"

    def _tell(self, table: Table, name: str, keys: list[str], what: str) -> None:
        if self._trusted and keys:
            shown = ", ".join(keys[:3]).replace('"', "") + (", ..." if len(keys) > 3 else "")
            self._words.append(
                f"packet filter: {len(keys)} of {name} in table {table.family} {TABLE} ({shown}) "
                f"were {what}: put right"
            )

    def _rules(self, table: Table, there: ObservedTable) -> Iterator[str]:
        for name, chain in table.chains.items():
            written = self._written.get(chain_key(table.family, name))
            wanted = digest(chain.text)
            present = there.chains.get(name)
            if written is not None and (present, wanted) == (written.listed, written.digest):
                continue
            if written is not None and written.digest == wanted and written.listed:
                self._words.append(
                    f"packet filter: chain {name} in table {table.family} {TABLE} was "
                    f"{'missing' if present is None else 'different'}: put right"
                )
            self._chains[chain_key(table.family, name)] = wanted
            if present is not None:
                yield f"flush chain {table.family} {TABLE} {name}"
            for rule in chain.rules:
                yield f"add rule {table.family} {TABLE} {name} {rule}"

    def _leftovers(self, table: Table, there: ObservedTable) -> Iterator[str]:
        """What nothing refers to any more. Elements that are kept may refer to anything."""
        if self._additive or self._keeps(table, there):
            return
        chains = [name for name in there.chains if name not in table.chains]
        yield from (f"flush chain {table.family} {TABLE} {name}" for name in chains)
        for name in there.sets:
            if name not in table.sets:
                yield f"delete {'map' if name in there.maps else 'set'} {table.family} {TABLE} {name}"
        yield from (f"delete chain {table.family} {TABLE} {name}" for name in chains)

    def _keeps(self, table: Table, there: ObservedTable) -> bool:
        return any(
            k not in elements.items and not self._goes(k, elements)
            for name, elements in table.sets.items()
            for k in there.sets.get(name, {})
        )


def applied(
    desired: Iterable[Table],
    observed: Observed,
    *,
    additive: bool = False,
    kept: frozenset[str] = frozenset(),
) -> None:
    """Brings the sets in `observed` to where `Changes` have led the kernel."""
    wanted = {table.family: table for table in desired}
    for family in set(observed) - set(wanted):
        if not additive:
            del observed[family]
    for family, table in wanted.items():
        there = observed.setdefault(family, ObservedTable({}, {}, set()))
        for name, elements in table.sets.items():
            held = there.sets.get(name, {})
            stays = held if additive else {k: v for k, v in held.items() if _is_kept(k, kept)}
            there.sets[name] = {**stays, **elements.items}
            if elements.values:
                there.maps.add(name)
        if not additive and not kept:
            there.sets = {name: there.sets[name] for name in table.sets}


def _is_kept(key_: str, kept: frozenset[str]) -> bool:
    return bool(kept) and any(part in kept for part in key_.split(" . "))
