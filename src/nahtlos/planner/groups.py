"""Server groups: on which hosts members are or will be, and which hosts a rule leaves to a server.

    anti-affinity  a host that has a member, or to which one moves, takes no other
    affinity       members have one home. They leave it together: all that are there, to one host, which must
                   have room for all of them; until the last has come, home and that host both have members

A server that moves counts at both ends, so no step on the way breaks a rule either. Soft rules only rank
hosts. Decides nothing about room, and starts nothing.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping

from nahtlos.model.ids import HostId, ServerGroupId, ServerId
from nahtlos.model.placement import GroupPolicy, ServerGroup

Places = dict[ServerId, set[HostId]]


class Neighbours:
    """Where members of groups are, as far as decided; servers in no group are left out."""

    def __init__(
        self,
        groups: Mapping[ServerGroupId, ServerGroup],
        members: Mapping[ServerId, ServerGroupId],
        serves: Callable[[HostId], bool],
    ) -> None:
        """`serves`: whether a host takes servers, as decided by the time of the question."""
        self._policy = {name: group.policy for name, group in groups.items()}
        self._group = {server: name for server, name in members.items() if name in groups}
        self._serves = serves
        self._places: dict[ServerGroupId, Places] = {}
        self._bound: dict[ServerGroupId, HostId] = {}
        """Where members of it are on their way to."""

    def __bool__(self) -> bool:
        """Whether there is any group to think of."""
        return bool(self._group)

    def copy(self) -> "Neighbours":
        if not self._group:
            return self
        other = Neighbours({}, {}, self._serves)
        other._policy, other._group = self._policy, self._group
        other._places = {
            group: {server: set(hosts) for server, hosts in places.items()}
            for group, places in self._places.items()
        }
        other._bound = dict(self._bound)
        return other

    def group(self, server: ServerId) -> ServerGroupId | None:
        return self._group.get(server)

    def policy(self, server: ServerId) -> GroupPolicy | None:
        group = self._group.get(server)
        return None if group is None else self._policy[group]

    def is_hard(self, server: ServerId) -> bool:
        policy = self.policy(server)
        return policy is not None and policy.is_hard

    def take(self, host: HostId, server: ServerId, *, moving: bool = False) -> None:
        """`moving`: it is on its way there."""
        group = self._group.get(server)
        if group is not None:
            self._places.setdefault(group, {}).setdefault(server, set()).add(host)
            if moving:
                self._bound[group] = host

    def leave(self, host: HostId, server: ServerId) -> None:
        group = self._group.get(server)
        if group is not None:
            self._places.get(group, {}).get(server, set()).discard(host)

    def others(self, server: ServerId) -> Iterator[tuple[ServerId, HostId]]:
        """Members of its group beside it, with each host they are on or move to."""
        group = self._group.get(server)
        places = self._places.get(group, {}) if group is not None else {}
        for other, hosts in sorted(places.items()):
            if other != server:
                yield from ((other, host) for host in sorted(hosts))

    def companions(self, server: ServerId, host: HostId) -> list[ServerId]:
        """Those that must leave `host` with it: members of its affinity group that are there alone."""
        if self.policy(server) is not GroupPolicy.AFFINITY:
            return []
        places = self._places.get(self._group[server], {})
        return sorted(other for other, hosts in places.items() if other != server and hosts == {host})

    def home(self, server: ServerId, leaving: HostId | None) -> HostId | None:
        """The one host an affinity group leaves to `server`, which comes from `leaving`. None: any would do,
        since all others are where it comes from. Where one of it is on its way to, whatever speaks against
        that by now: two would go apart. Else one that takes servers, with most members."""
        if all(host == leaving for _, host in self.others(server)):
            return None
        group = self._group[server]
        if group in self._bound:
            return self._bound[group]
        places = self._places[group].values()
        here = Counter(host for hosts in places for host in hosts)
        return min(here, key=lambda host: (not self._serves(host), -here[host], host))

    def scattered(self) -> Iterator[tuple[HostId, list[ServerId]]]:
        """Of each affinity group that is on more than one host: where it comes together, and its members that
        are neither there nor on their way."""
        for group, places in sorted(self._places.items()):
            hosts = {host for where in places.values() for host in where}
            if self._policy[group] is not GroupPolicy.AFFINITY or len(hosts) < 2:
                continue
            home = self.home(next(iter(sorted(places))), None)
            if home is not None:
                yield home, sorted(server for server, where in places.items() if home not in where)

    def why_not(self, server: ServerId, host: HostId, leaving: HostId | None) -> str:
        """Why its hard rule keeps `server`, which comes from `leaving`, from `host`; empty if none does."""
        policy = self.policy(server)
        if policy is GroupPolicy.ANTI_AFFINITY:
            there = next((other for other, where in self.others(server) if where == host), None)
            return f"{host} has {there} of {self._named(server)}" if there else ""
        if policy is GroupPolicy.AFFINITY:
            home = self.home(server, leaving)
            return f"{self._named(server)} is on {home}" if home not in (None, host) else ""
        return ""

    def dislike(self, server: ServerId, host: HostId) -> int:
        """By how much its soft rule speaks against `host`: 0 is best."""
        policy = self.policy(server)
        if policy is None or policy.is_hard:
            return 0
        beside = sum(where == host for _, where in self.others(server))
        return -beside if policy.is_together else beside

    def _named(self, server: ServerId) -> str:
        return f"{self._group[server]} ({self.policy(server)})"


def broken(policy: GroupPolicy, places: Iterable[HostId]) -> str:
    """How members, on these hosts, are not as the rule says, in words; empty if they are."""
    hosts = list(places)
    if policy.is_together:
        apart = sorted(set(hosts))
        return f"its members are on {', '.join(apart)}" if len(apart) > 1 else ""
    twice = sorted({host for host in hosts if hosts.count(host) > 1})
    return f"{', '.join(twice)} {'has' if len(twice) == 1 else 'have'} more than one of them" if twice else ""
