"""Atomic saving: permissions, links, what is left after a failure."""

import os
from pathlib import Path

import pytest

from ppsd_cli.errors import AssetError, ResourceError
from ppsd_cli.files import append_line, check_writable, make_folder, replace_bytes, replacing


@pytest.fixture(params=[0o022, 0o077], ids=["022", "077"])
def umask(request: pytest.FixtureRequest):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_a_new_file_has_the_usual_permissions(tmp_path: Path, umask: int) -> None:
    replace_bytes(tmp_path / "new", b"1")
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o666 & ~umask


def test_an_old_file_keeps_its_permissions_and_its_link(tmp_path: Path) -> None:
    path, link = tmp_path / "old", tmp_path / "link"
    path.write_bytes(b"old")
    path.chmod(0o640)
    link.symlink_to(path)
    replace_bytes(link, b"new")
    assert link.is_symlink()
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o640
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "old"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("bug")])
def test_after_a_failure_the_old_file_is_intact(tmp_path: Path, error: Exception) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    kind = ResourceError if isinstance(error, OSError) else ValueError

    def write() -> None:
        with replacing(path) as temporary:
            temporary.write_bytes(b"half")
            raise error

    with pytest.raises(kind):
        write()
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_device_is_written_in_place() -> None:
    check_writable(Path(os.devnull))
    replace_bytes(Path(os.devnull), b"x")
    assert not Path(os.devnull).is_file()


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for write in (
        lambda: make_folder(tmp_path / "file" / "below"),
        lambda: append_line(tmp_path, "x"),
        lambda: replace_bytes(tmp_path / "none" / "x", b""),
    ):
        with pytest.raises(AssetError, match=r"cannot write .*; choose another place"):
            write()
