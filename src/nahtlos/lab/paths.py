"""Where a lab keeps what: one table, so that opening, using and cleaning up agree."""

from dataclasses import dataclass
from pathlib import Path

from nahtlos.model.ids import checked_name
from nahtlos.model.nouns import Release
from nahtlos.model.version_pairs import moves
from nahtlos.runtime.releases import list_releases

RUN = Path("/run/nahtlos")
STATE = Path("/var/lib/nahtlos/labs")
RAM = Path("/dev/shm")

LAB_VARIABLE = "NAHTLOS_LAB"
"""In the environment of every process of a lab, so that a later run can find it."""


@dataclass(frozen=True)
class NodePaths:
    """Of one host, or of the orchestrator's node `ctl`."""

    run: Path
    state: Path
    ram: Path

    @property
    def supervisor(self) -> Path:
        return self.run / "supervisor.sock"

    @property
    def pki(self) -> Path:
        return self.state / "pki"

    @property
    def settings(self) -> Path:
        return self.state / "settings.json"


@dataclass(frozen=True)
class LabPaths:
    name: str

    def __post_init__(self) -> None:
        checked_name(self.name, "lab")

    @property
    def run(self) -> Path:
        return RUN / self.name

    @property
    def state(self) -> Path:
        return STATE / self.name

    @property
    def ram(self) -> Path:
        return RAM / f"nahtlos-{self.name}"

    @property
    def operator_socket(self) -> Path:
        return self.node("ctl").run / "operator.sock"

    def node(self, node: str) -> NodePaths:
        return NodePaths(run=self.run / node, state=self.state / node, ram=self.ram / node)


@dataclass(frozen=True)
class BuildPaths:
    """What is built once and used by every lab: in the checkout's `build/`."""

    root: Path

    def movable_releases(self) -> tuple[Release, ...]:
        """Hypervisors that are built and that servers can be moved by, oldest first."""
        return tuple(release for release in list_releases(self.releases) if moves(release.version))

    @property
    def releases(self) -> Path:
        return self.root / "releases"

    @property
    def images(self) -> Path:
        return self.root / "images"

    @property
    def downloads(self) -> Path:
        return self.root / "downloads"

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    @classmethod
    def default(cls) -> "BuildPaths":
        """`build/` in the checkout this package is installed from."""
        return cls(Path(__file__).resolve().parents[3] / "build")
