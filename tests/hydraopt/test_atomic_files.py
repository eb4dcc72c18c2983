"""Files are either whole or not there."""

from __future__ import annotations

import pytest

from hydraopt.atomic_files import atomic_file, write_atomically


@pytest.mark.parametrize("on_disk", [True, False])
def test_the_folder_is_made_and_the_permissions_are_those_asked_for(tmp_path, on_disk):
    target = tmp_path / "new" / "file"
    assert write_atomically(target, b"content", mode=0o600, on_disk=on_disk) == target
    assert target.read_bytes() == b"content"
    assert target.stat().st_mode & 0o777 == 0o600


def test_failed_write_leaves_the_old_file_and_no_trace(tmp_path):
    target = tmp_path / "file"
    write_atomically(target, b"old")

    def write_half():
        with atomic_file(target) as handle:
            handle.write(b"new")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_half()
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]
