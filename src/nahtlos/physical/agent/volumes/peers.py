"""What an agent answers the coordinators of volumes' operations on other hosts."""

from nahtlos.model.errors import Refused
from nahtlos.physical.agent.context import Context
from nahtlos.wire.messages import Done, Message
from nahtlos.wire.volumes import VolumeAttach, VolumeReceive

ForVolume = VolumeReceive | VolumeAttach


async def answer_volume(context: Context, body: ForVolume, peer: str) -> Message:
    """Refused for who is no host of this cloud."""
    config = context.ledger.config()
    if config is None or peer not in {f"host/{host.id}" for host in config.hosts}:
        raise Refused(f"{peer} is no host of this cloud", field="peer")
    match body:
        case VolumeReceive():
            await context.drivers.storage.receive(body.volume)
            return Done()
        case VolumeAttach():
            raise Refused(f"{type(body).__name__} is not answered yet", field="message")
