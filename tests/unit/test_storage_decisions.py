"""Volume files and the storage daemon's command line, without a daemon."""

from itertools import pairwise
from pathlib import Path

import msgspec
import pytest

from nahtlos.model.errors import Refused
from nahtlos.model.ids import HostId, ImageId, VolumeId
from nahtlos.model.storage import VolumeSpec
from nahtlos.physical.storage import daemon
from nahtlos.physical.storage.daemon import Served, node_name, parse_export
from nahtlos.physical.storage.volumes import VolumeFolder, copy_sparse


def spec(name: str, size_mib: int, image: str | None = None) -> VolumeSpec:
    chosen = ImageId(image) if image else None
    return VolumeSpec(id=VolumeId(name), size_mib=size_mib, image=chosen, host=HostId("h"))


def sparse_file(path: Path) -> Path:
    with path.open("wb") as file:
        file.write(b"head")
        file.seek(4 << 20)
        file.write(b"tail")
        file.truncate(6 << 20)
    return path


def test_copies_are_equal_and_as_sparse(tmp_path: Path) -> None:
    source = sparse_file(tmp_path / "a")
    target = tmp_path / "b"
    with source.open("rb") as reading, target.open("w+b") as writing:
        copy_sparse(reading.fileno(), writing.fileno())
    assert target.read_bytes() == source.read_bytes()
    assert target.stat().st_blocks <= source.stat().st_blocks + 16


def test_volume_is_its_image_grown(tmp_path: Path) -> None:
    sparse_file(tmp_path / "img.raw")
    folder = VolumeFolder(tmp_path / "volumes", tmp_path)
    folder.create(spec("v", 8, "img"))
    content = folder.path(VolumeId("v")).read_bytes()
    assert content[: 6 << 20] == (tmp_path / "img.raw").read_bytes()
    assert content[6 << 20 :] == bytes(2 << 20)
    assert folder.present() == {VolumeId("v"): 8}
    assert folder.path(VolumeId("v")).stat().st_mode & 0o777 == 0o600


def test_half_made_volume_is_no_volume_and_is_swept(tmp_path: Path) -> None:
    folder = VolumeFolder(tmp_path / "volumes", tmp_path)
    folder.create(spec("whole", 1))
    left = tmp_path / "volumes" / ".unfinished-half"
    left.write_bytes(b"half")
    assert folder.present() == {VolumeId("whole"): 1}
    folder.sweep()
    assert [path.name for path in (tmp_path / "volumes").iterdir()] == ["whole.raw"]


def test_refused_volume_leaves_nothing(tmp_path: Path) -> None:
    sparse_file(tmp_path / "img.raw")
    folder = VolumeFolder(tmp_path / "volumes", tmp_path)
    with pytest.raises(Refused, match="needs 6 MiB, 'v' has 5"):
        folder.create(spec("v", 5, "img"))
    with pytest.raises(Refused, match="'other' is not on this host"):
        folder.create(spec("v", 5, "other"))
    assert folder.present() == {}


def test_deleting_twice_is_fine(tmp_path: Path) -> None:
    folder = VolumeFolder(tmp_path / "volumes", tmp_path)
    folder.create(spec("v", 1))
    folder.delete(VolumeId("v"))
    folder.delete(VolumeId("v"))
    assert folder.present() == {}


@pytest.mark.parametrize(
    ("name", "parsed"), [("v.e1", ("v", 1)), ("a-b.e12", ("a-b", 12)), ("v", None), ("v.ex", None)]
)
def test_export_names(name: str, parsed: tuple[str, int] | None) -> None:
    assert parse_export(name) == parsed
    if parsed:
        assert Served(volume=VolumeId(parsed[0]), epoch=parsed[1], file="").export == name


def test_node_names_fit_and_stay_apart() -> None:
    long, longer = VolumeId("v" * 31 + "a"), VolumeId("v" * 31 + "b")
    assert node_name("top", VolumeId("short")) == "top-short"
    assert len(node_name("limits", long)) <= daemon.NODE_NAME_LIMIT
    assert node_name("top", long) != node_name("top", longer)


def test_everything_served_is_on_the_command_line_behind_tls() -> None:
    served = [Served(volume=VolumeId(name), epoch=2, file=f"/v/{name}.raw") for name in ("b", "a")]
    arguments = daemon.arguments(Path("/run/q"), Path("/pki"), served)
    exports = [msgspec.json.decode(value) for option, value in pairwise(arguments) if option == "--export"]
    assert [export["name"] for export in exports] == ["a.e2", "b.e2"]
    assert [export["node-name"] for export in exports] == ["top-a", "top-b"]
    server = arguments[arguments.index("--nbd-server") + 1]
    assert "addr.str={fd:nbd}" in server
    assert "tls-creds=" in server
    assert "tls-authz=" in server
    assert arguments.index("--nbd-server") < arguments.index("--export")


def test_definition_does_not_depend_on_the_order_of_volumes() -> None:
    served = [Served(volume=VolumeId(name), epoch=1, file=name) for name in ("a", "b", "c")]
    forwards = daemon.arguments(Path("/q"), Path("/p"), served)
    assert forwards == daemon.arguments(Path("/q"), Path("/p"), reversed(served))
