"""What a cloud begins with, taken from settings into the store. Repeatable at every start."""

from nahtlos.runtime.settings import CloudSettings
from nahtlos.runtime.store import intent, networking
from nahtlos.runtime.store.store import Store


async def bootstrap(store: Store, cloud: CloudSettings) -> None:
    """Networks and uplinks as the settings say; promises and parallel moves only if nobody has set them."""
    async with store.writing() as tx:
        for network in cloud.networks:
            await networking.put_network(tx, network)
        await intent.set_setting(tx, networking.UPLINKS, dict(cloud.uplinks))
        await intent.set_setting(tx, networking.EXTERNAL, dict(cloud.external))
        for name, value in (
            (intent.PROMISED, cloud.promised),
            (intent.PARALLEL_MOVES, cloud.parallel_moves),
            (intent.PARALLEL_MOVES_PER_HOST, cloud.parallel_moves_per_host),
        ):
            if await intent.setting_of(tx, name, type(value)) is None:
                await intent.set_setting(tx, name, value)
