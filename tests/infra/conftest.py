"""What tests of settings, files and services stand on: an environment without settings of ours, and an empty home."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is set where the tests run does not reach them."""
    for name in [name for name in os.environ if name.startswith("HYDRAOPT_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """An empty home folder."""
    folder = tmp_path / "home"
    folder.mkdir()
    return folder
