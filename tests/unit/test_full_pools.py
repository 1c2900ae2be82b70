"""What is asked for where there is no room for it: refused beforehand, with what there is."""

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from test_server_requests import Stage
from volume_world import host

from nahtlos.model.errors import Conflict
from nahtlos.model.ids import VolumeId
from nahtlos.model.inventory import Inventory, PoolStatus
from nahtlos.runtime.controllers.volume_requests import changed_volume, new_volume, relocation
from nahtlos.runtime.controllers.volumes import RelocationRequest, VolumeChange, VolumeRequest

MIB = 1 << 20


class Pools:
    """Two hosts with 100 and 300 MiB free. `web-disk` is on the first one."""

    def __init__(self) -> None:
        self.stage = Stage()
        self.state = self.stage.state()
        seen = self.stage.inventory()
        pools = {
            host(1): PoolStatus(total=1000 * MIB, free=100 * MIB),
            host(2): PoolStatus(total=1000 * MIB, free=300 * MIB),
        }
        hosts = {
            name: msgspec.structs.replace(each, pool=pools.get(name)) for name, each in seen.hosts.items()
        }
        self.seen: Inventory = msgspec.structs.replace(seen, hosts=hosts)

    def new(self, size_mib: int, **asked: Any) -> Any:
        return new_volume(
            self.state, self.seen, VolumeRequest(name="new", size_mib=size_mib, **asked), {}, None
        )

    def grown(self, size_mib: int) -> Any:
        return changed_volume(self.state, self.seen, VolumeId("web-disk"), VolumeChange(size_mib=size_mib))


def refused(call: Callable[[], object], field: str, *words: str) -> None:
    with pytest.raises(Conflict) as caught:
        call()
    error = caught.value
    assert error.field == field and error.remedy, error
    assert all(word in error.message for word in words), error.message


def test_a_volume_is_made_only_where_there_is_room_for_it() -> None:
    pools = Pools()
    assert pools.new(300).host == host(2)
    refused(lambda: pools.new(301), "host", "no host has room for 301 MiB", f"{host(2)}: 300 MiB")
    refused(lambda: pools.new(101, host=host(1)), "host", f"{host(1)} has 100 MiB free")
    refused(lambda: pools.new(101, copies=2), "copies", "1 could have one")
    assert {copy.host for copy in pools.new(100, copies=2).copies} == {host(1), host(2)}


def test_a_volume_grows_by_no_more_than_its_pool_has() -> None:
    pools = Pools()
    size = pools.state.volumes[VolumeId("web-disk")].spec.size_mib
    assert pools.grown(size + 100).size_mib == size + 100
    refused(lambda: pools.grown(size + 101), "size_mib", f"{host(1)} has 100 MiB free, 101 more")


def test_a_volume_goes_to_no_pool_that_cannot_take_it() -> None:
    pools = Pools()
    size = pools.state.volumes[VolumeId("web-disk")].spec.size_mib
    hosts = dict(pools.seen.hosts)
    little = PoolStatus(total=1000 * MIB, free=(size - 1) * MIB)
    hosts[host(2)] = msgspec.structs.replace(hosts[host(2)], pool=little)
    pools.seen = msgspec.structs.replace(pools.seen, hosts=hosts)
    asked = RelocationRequest(to=host(2))
    refused(lambda: relocation(pools.state, pools.seen, VolumeId("web-disk"), asked), "to", "MiB free")
