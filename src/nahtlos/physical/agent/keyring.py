"""`physical.ports.Keyring` as an agent has it: the orchestrator is asked. Keeps nothing."""

from collections.abc import Awaitable, Callable

from nahtlos.model.errors import Refused, Unavailable
from nahtlos.model.ids import KeyId
from nahtlos.wire.messages import Message
from nahtlos.wire.volumes import KeyData, KeyRead

ASK_SECONDS = 5.0


class AskedKeyring:
    """Made before the agent, as drivers need it; `ask` is the agent's once there is one."""

    def __init__(self) -> None:
        self.ask: Callable[[Message, float], Awaitable[Message]] | None = None

    async def key(self, key: KeyId) -> bytes:
        if self.ask is None:
            raise Unavailable("the agent does not run yet", field="key")
        answer = await self.ask(KeyRead(key=key), ASK_SECONDS)
        if not isinstance(answer, KeyData):
            raise Refused(f"the orchestrator answered {type(answer).__name__}", field="key")
        return answer.secret
