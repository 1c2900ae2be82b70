"""What a VMM looks like: (server, where its things are) -> QEMU's command line. Pure.

The guest's hardware must be the same on every host and under every release that can run its machine type:
versioned machine, named CPU, fixed PCI addresses, no defaults. A change here that a running guest can see
is a change of its hardware and needs a new machine type. vCPUs and memory that can be plugged are there only
where the server was made with places for them, the channel to the guest's agent likewise; a VMM that waits
for a server is started with the vCPUs that server has at that moment.

    pcie.0   01.0 display, if it has one   03.0 disk   04.0.. NICs   0c.0 plugged memory
             0d.0 agent's channel   10.0 to 10.7 root ports for data disks   1f.* (the machine's own)
"""

import uuid
from collections.abc import Mapping
from pathlib import Path

import msgspec

from nahtlos.model.config import PortConfig, ServerConfig
from nahtlos.model.errors import Refused
from nahtlos.model.networking import PortSpec
from nahtlos.model.nouns import DATA_PLACES, MOST_DATA_PLACES, ServerSpec
from nahtlos.physical.hypervisor.disks import QUEUE_SIZE, TLS_CLIENT, disk_arguments

DISPLAY_ADDRESS = 0x1
DISPLAY_MIB = 8
FIRST_NIC_ADDRESS = 0x4
NICS = 8
ROOT_PORTS_ADDRESS = 0x10
"""Of the ports below which data disks are plugged. Each costs 1 to 3 ms of every move under emulation, used
or not: its windows are mapped anew when it arrives. A SCSI controller would be one more device to carry."""
WITHOUT = "sata=off,smbus=off,vmport=off"
"""Devices of the machine that no guest of ours uses and every move would carry."""
WITHOUT_VAPIC = "apic-common.vapic=off"
"""Speeds up 32-bit Windows without a virtual APIC, and costs every move of others 3 ms under emulation."""
SERVERS = uuid.UUID("5b0c1a52-6f0e-4a53-9f7e-6e6168746c6f")
"""Namespace of the UUIDs that guests read from their firmware."""

PROBE_NIC = "nic"
RAM = "ram0"
"""Part of the migration stream: the name of the memory's block."""
PLUGGED_RAM = "plug0"
"""Likewise, of memory that is plugged."""
PLUGGED_MEMORY = "mem0"
PLUGGED_MEMORY_ADDRESS = 0xC
PLUGGED_STEP_MIB = 4
"""Guests take and give back whole steps of this. The device counts in blocks of half of it."""
AGENT_BUS = "serial0"
AGENT_ADDRESS = 0xD
AGENT_CHARDEV = "agent"
AGENT_PORT = "org.qemu.guest_agent.0"
"""By this name agents find it."""
MOST_VCPUS = 240
"""Beyond it a machine needs an interrupt controller that not every guest knows."""
TLS_SERVER = "tls-server"
HOSTS_ONLY = "hosts-only"
"""Ids of objects every VMM has for its moves and its volume."""
TLS_FILES = ("ca-cert.pem", "server-cert.pem", "server-key.pem", "client-cert.pem", "client-key.pem")


class VmmPaths(msgspec.Struct, frozen=True, kw_only=True):
    """Everything on the file system that belongs to one VMM."""

    qmp: Path
    qmp_emergency: Path
    stream: Path
    """Where it receives a server of its own host."""
    console: Path
    console_log: Path
    log: Path
    ram: Path
    record: Path

    @property
    def display(self) -> Path:
        """Where it speaks RFB, if the server has a display."""
        return self.console.with_suffix(".vnc")

    @property
    def keymap(self) -> Path:
        """Of its display."""
        return self.console.with_suffix(".keys")

    @property
    def agent(self) -> Path:
        """Where the guest's agent is spoken to."""
        return self.qmp.with_suffix(".agent")

    @property
    def plugged_ram(self) -> Path:
        return self.ram.with_suffix(".plug")


class VmmShape(msgspec.Struct, frozen=True, kw_only=True):
    server: ServerConfig
    paths: VmmPaths
    pki_dir: Path
    accelerator: str
    version: tuple[int, ...]
    """Of QEMU."""
    incoming: bool
    in_place: bool = False


def tap_fds(port: PortSpec | PortConfig, *, in_place: bool = False) -> tuple[str, ...]:
    """The names under which the supervisor holds the descriptors of a port, one per queue: those of its tap,
    or those for a VMM that takes the server over in place."""
    first = f"{'spare' if in_place else 'tap'}.{port.id}"
    return (first, *(f"{first}/{number}" for number in range(1, port.queues)))


def server_arguments(shape: VmmShape) -> tuple[str, ...]:
    """To follow `Bundle.system()`; `{fd:tap.PORT}` stands for numbers only the supervisor knows."""
    server = shape.server.spec
    if len(server.ports) > NICS:
        raise Refused(f"a server has at most {NICS} ports", field="ports")
    check_hardware(server)
    return (
        *("-name", f"guest={server.id},debug-threads=on"),
        *("-uuid", str(uuid.uuid5(SERVERS, server.id))),
        "-no-shutdown",  # a guest that switches itself off can be told from a process that died
        *_machine(
            f"{server.machine},memory-backend={RAM},{WITHOUT}",
            shape.accelerator,
            server.cpu_model,
            _topology(server),
        ),
        *("-global", WITHOUT_VAPIC),
        *_vcpus(server),
        *_memory(shape),
        *_monitors(shape.paths),
        *_console(shape.paths),
        *(_display(shape.paths) if server.display else ()),
        *(_agent(shape.paths) if server.guest_agent else ()),
        *_root_ports(server.data_places),
        *_held_until_stopped(shape.version),
        *_credentials(shape.pki_dir),
        *disk_arguments(shape.server),
        *(part for i, port in enumerate(server.ports) for part in _nic(i, port, shape.in_place)),
        *(("-incoming", "defer", "-S") if shape.incoming else ()),
    )


class ProbeShape(msgspec.Struct, frozen=True, kw_only=True):
    kernel: Path
    initrd: Path
    console: Path
    qmp: Path
    accelerator: str
    version: tuple[int, ...]
    incoming: bool


def probe_arguments(shape: ProbeShape) -> tuple[str, ...]:
    """A guest that says so when it has booted, and then does nothing; or a machine that waits for it."""
    nic = {
        "driver": "virtio-net-pci",
        "id": PROBE_NIC,
        "netdev": f"{PROBE_NIC}-end",
        "romfile": "",
        "rx_queue_size": QUEUE_SIZE,
        "tx_queue_size": QUEUE_SIZE,
    }
    return (
        *_machine("q35", shape.accelerator, "qemu64", "1"),
        *("-m", "256M", "-no-reboot", "-serial", f"file:{shape.console}"),
        *("-qmp", f"unix:{shape.qmp},server=on,wait=off"),
        *("-kernel", str(shape.kernel), "-initrd", str(shape.initrd)),
        *("-append", "console=ttyS0 quiet panic=-1 nahtlos.probe=idle"),
        *("-netdev", f"hubport,id={PROBE_NIC}-end,hubid=0", "-device", _json(nic)),
        *_held_until_stopped(shape.version),
        *(("-incoming", "defer", "-S") if shape.incoming else ()),
    )


def object_argument(kind: str, name: str, **properties: object) -> tuple[str, str]:
    return "-object", _json({"qom-type": kind, "id": name, **properties})


def tls_object(name: str, endpoint: str, pki_dir: Path) -> tuple[str, str]:
    properties = {"endpoint": endpoint, "dir": str(pki_dir), "verify-peer": True}
    return object_argument("tls-creds-x509", name, **properties)


def hosts_only_object(name: str) -> tuple[str, str]:
    """Lets in hosts alone: an operator's certificate is of the same CA."""
    rules = [{"match": "CN=host/*", "policy": "allow", "format": "glob"}]
    return object_argument("authz-list", name, policy="deny", rules=rules)


def _machine(machine: str, accelerator: str, cpu: str, topology: str) -> tuple[str, ...]:
    return (
        *("-machine", machine),
        *("-accel", accelerator),
        *("-cpu", cpu),
        *("-smp", topology),
        *("-nodefaults", "-no-user-config", "-display", "none"),
    )


def _held_until_stopped(version: tuple[int, ...]) -> tuple[str, ...]:
    """Moves rely on a source that waits for a switchover-ack nobody sends. From 11.1 on it waits only for
    devices that ask for one, unless it is told to do as before (machine types before 11.1 do by default)."""
    return ("-global", "migration.switchover-ack-legacy=on") if version >= (11, 1) else ()


def check_hardware(server: ServerSpec) -> None:
    """Whether there can be a machine like this at all."""
    size = server.size
    if server.max_vcpus and not 1 <= size.vcpus <= server.max_vcpus <= MOST_VCPUS:
        raise Refused(
            f"{server.id} has {size.vcpus} vCPUs and places for {server.max_vcpus}",
            field="max_vcpus",
            remedy=f"as many as it has at least, {MOST_VCPUS} at most",
        )
    if not DATA_PLACES <= server.data_places <= MOST_DATA_PLACES:
        raise Refused(
            f"{server.id} has places for {server.data_places} data volumes",
            field="data_places",
            remedy=f"give {DATA_PLACES} to {MOST_DATA_PLACES}",
        )
    if not server.max_memory_mib:
        return
    boot = server.boot_memory_mib
    if not 0 < boot <= size.memory_mib <= server.max_memory_mib or boot == server.max_memory_mib:
        raise Refused(
            f"{server.id} has {size.memory_mib} MiB, {boot} from the start, {server.max_memory_mib} at most",
            field="max_memory_mib",
            remedy="at least what it has, and more than what it has from the start",
        )
    if (size.memory_mib - boot) % PLUGGED_STEP_MIB or (server.max_memory_mib - boot) % PLUGGED_STEP_MIB:
        raise Refused(
            f"memory beyond the {boot} MiB of {server.id} is plugged in steps of {PLUGGED_STEP_MIB} MiB",
            field="memory_mib",
            remedy=f"ask for {boot} MiB and a multiple of {PLUGGED_STEP_MIB}",
        )


def _topology(server: ServerSpec) -> str:
    """One vCPU a socket, so that each of them can be plugged; the first one is always there."""
    if not server.max_vcpus:
        return str(server.size.vcpus)
    return f"1,maxcpus={server.max_vcpus},sockets={server.max_vcpus},cores=1,threads=1"


def vcpu_device(driver: str, socket: int) -> dict[str, object]:
    return {"driver": driver, "id": f"vcpu{socket}", "socket-id": socket, "core-id": 0, "thread-id": 0}


def _vcpus(server: ServerSpec) -> tuple[str, ...]:
    if not server.max_vcpus:
        return ()
    driver = f"{server.cpu_model.partition(',')[0]}-x86_64-cpu"
    sockets = range(1, server.size.vcpus)
    return tuple(part for n in sockets for part in ("-device", _json(vcpu_device(driver, n))))


def _memory(shape: VmmShape) -> tuple[str, ...]:
    """Shared files, so that a VMM of another release can take them over in place."""
    server = shape.server.spec
    boot = server.boot_memory_mib if server.max_memory_mib else server.size.memory_mib
    backend = {"size": boot << 20, "mem-path": str(shape.paths.ram), "share": True}
    first = object_argument("memory-backend-file", RAM, **backend)
    if not server.max_memory_mib:
        return (*first, "-m", f"{boot}M")
    plugged = {
        "size": server.max_memory_mib - boot << 20,
        "mem-path": str(shape.paths.plugged_ram),
        "share": True,
        "reserve": False,
    }
    device = {
        "driver": "virtio-mem-pci",
        "id": PLUGGED_MEMORY,
        "memdev": PLUGGED_RAM,
        "bus": "pcie.0",
        "addr": f"{PLUGGED_MEMORY_ADDRESS:#x}",
        "block-size": PLUGGED_STEP_MIB << 19,
        # What is plugged in a server that arrives comes with it.
        "requested-size": 0 if shape.incoming else server.size.memory_mib - boot << 20,
    }
    return (
        *first,
        *object_argument("memory-backend-file", PLUGGED_RAM, **plugged),
        *("-m", f"{boot}M,maxmem={server.max_memory_mib}M"),
        *("-device", _json(device)),
    )


def _monitors(paths: VmmPaths) -> tuple[str, ...]:
    return (
        *("-qmp", f"unix:{paths.qmp},server=on,wait=off"),
        *("-qmp", f"unix:{paths.qmp_emergency},server=on,wait=off"),
    )


def _console(paths: VmmPaths) -> tuple[str, ...]:
    options = f"path={paths.console},server=on,wait=off,logfile={paths.console_log},logappend=on"
    return ("-chardev", f"socket,id=console,{options}", "-serial", "chardev:console")


def _display(paths: VmmPaths) -> tuple[str, ...]:
    """The card that every release since 1.0 has and knows how to move. Its memory travels with the server, in
    place too, where nothing else of that size does: as little as shows 1920x1080."""
    card = {
        "driver": "VGA",
        "id": "display0",
        "bus": "pcie.0",
        "addr": f"{DISPLAY_ADDRESS:#x}",
        "vgamem_mb": DISPLAY_MIB,
    }
    return ("-vnc", f"unix:{paths.display}", "-k", str(paths.keymap), "-device", _json(card))


def _agent(paths: VmmPaths) -> tuple[str, ...]:
    """Port 0 of the bus would be for consoles."""
    bus = {
        "driver": "virtio-serial-pci",
        "id": AGENT_BUS,
        "bus": "pcie.0",
        "addr": f"{AGENT_ADDRESS:#x}",
        "max_ports": 2,
    }
    port = {
        "driver": "virtserialport",
        "id": "agent0",
        "bus": f"{AGENT_BUS}.0",
        "nr": 1,
        "chardev": AGENT_CHARDEV,
        "name": AGENT_PORT,
    }
    return (
        *("-chardev", f"socket,id={AGENT_CHARDEV},path={paths.agent},server=on,wait=off"),
        *("-device", _json(bus), "-device", _json(port)),
    )


def _root_ports(places: int) -> tuple[str, ...]:
    """Places for devices that are plugged later; the number is part of the guest's hardware."""
    devices = (
        {
            "driver": "pcie-root-port",
            "id": f"slot{i}",
            "bus": "pcie.0",
            "chassis": i + 1,
            "addr": f"{ROOT_PORTS_ADDRESS:#x}.{i:#x}",
            "multifunction": i == 0,
        }
        for i in range(places)
    )
    return tuple(part for device in devices for part in ("-device", _json(device)))


def _credentials(pki_dir: Path) -> tuple[str, ...]:
    return (
        *tls_object(TLS_SERVER, "server", pki_dir),
        *tls_object(TLS_CLIENT, "client", pki_dir),
        *hosts_only_object(HOSTS_ONLY),
    )


def _nic(index: int, port: PortSpec, in_place: bool) -> tuple[str, ...]:
    device: dict[str, object] = {
        "driver": "virtio-net-pci",
        "id": f"nic{index}",
        "netdev": f"net{index}",
        "mac": port.mac,
        "bus": "pcie.0",
        "addr": f"{FIRST_NIC_ADDRESS + index:#x}",
        "romfile": "",
        "rx_queue_size": QUEUE_SIZE,
        "tx_queue_size": QUEUE_SIZE,
    }
    fds = [f"{{fd:{name}}}" for name in tap_fds(port, in_place=in_place)]
    if len(fds) == 1:
        return ("-netdev", f"tap,id=net{index},fd={fds[0]}", "-device", _json(device))
    # An interrupt for each queue in both directions, one for the control queue, one for changes.
    device |= {"mq": True, "vectors": 2 * len(fds) + 2}
    return ("-netdev", f"tap,id=net{index},fds={':'.join(fds)}", "-device", _json(device))


def _json(value: Mapping[str, object]) -> str:
    return msgspec.json.encode(value).decode()
