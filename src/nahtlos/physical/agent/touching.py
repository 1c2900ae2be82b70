"""How fast servers touch their memory, measured beforehand: by it is predicted whether a move would end.

Owns one task: it looks at one server of this host after another, now and then, and leaves alone those that an
operation carries elsewhere. Never decides anything.
"""

import asyncio

from nahtlos.model.errors import Error
from nahtlos.model.ids import ServerId
from nahtlos.model.inventory import RunState
from nahtlos.physical.agent.context import Context
from nahtlos.physical.agent.ledger import Hold
from nahtlos.physical.ports import VmmId

EVERY_SECONDS = 15.0


class TouchRates:
    def __init__(self, context: Context) -> None:
        self._context = context

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(EVERY_SECONDS)
            try:
                await self._measure_all()
            except Error:
                continue  # whoever does not answer is asked again; convergence tells of it

    async def _measure_all(self) -> None:
        """One after another: each costs some of the host's processors."""
        ledger, rates = self._context.ledger, self._context.dirty_rates
        vmms = await self._context.drivers.hypervisor.observe()
        running = {vmm.id for vmm in vmms if vmm.state is RunState.RUNNING}
        for server, held in ledger.ownership().items():
            vmm = VmmId(server, held.epoch)
            if held.hold is not Hold.OWNED or vmm not in running:
                rates.pop(server, None)
            elif ledger.running(server) is None:
                await self._context.calm()
                await self._measure(server, vmm)

    async def _measure(self, server: ServerId, vmm: VmmId) -> None:
        try:
            rate = await self._context.drivers.hypervisor.dirty_rate(vmm)
        except Error:
            return
        if rate is not None:
            self._context.dirty_rates[server] = rate
