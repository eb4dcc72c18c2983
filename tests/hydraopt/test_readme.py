"""What README shows of the library runs as it stands there."""

from __future__ import annotations

import re
import shlex
import shutil
from itertools import groupby
from pathlib import Path

import pytest
from click.testing import CliRunner

from flows.command_line import main
from hydraopt.base_models import load_base
from hydraopt.training.finetune import finetune

README = Path(__file__).parents[2] / "README.md"


@pytest.fixture
def blocks(echo_task, tiny_decoder, tmp_path, monkeypatch):
    """The commands and the Python of the section, in a folder that holds what they name: two adapters and a task."""
    for name in ("mood", "topic"):
        task = echo_task(tiny_decoder, name=name, training={"epochs": 1, "batch_size": 8, "seed": len(name)})
        finetune(task, tmp_path / "adapters" / name, work=tmp_path / "work", device="cpu")
        shutil.copy(tmp_path / "echo.yaml", tmp_path / f"{name}.yaml")
    (tmp_path / "runs").mkdir()
    shutil.copytree(tmp_path / "adapters" / "topic", tmp_path / "runs" / "17")
    monkeypatch.chdir(tmp_path)
    section = README.read_text(encoding="utf-8").split("\n## Your own adapters")[1].split("\n## ")[0]
    found = re.findall(r"```(\w*)\n(.*?)```", section, re.DOTALL)
    return dict(found)


def commands(text: str) -> list[list[str]]:
    """The arguments of every command, its patterns of file names expanded as a shell does."""
    found = []
    for line in text.splitlines():
        for is_and, words in groupby(shlex.split(line, comments=True), "&&".__eq__):
            if not is_and:
                found.append([path for word in words for path in expanded(word)])
    return found


def expanded(word: str) -> list[str]:
    return sorted(map(str, Path().glob(word))) if "*" in word else [word]


def test_the_commands_of_the_library_run(blocks):
    """One after the other; what they say of a tiny budget is no matter of theirs."""
    ran = []
    for program, *arguments in commands(blocks[""]):
        assert program == "hydraopt"
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, (arguments, result.output)
        ran.append(arguments[0])
    assert ran == ["merge", "merge", "merge", "frontier", "verify", "inspect", "export", "evaluate"]
    assert Path("frontier.html").stat().st_size > 1000
    assert sorted(path.name for path in Path("exported").iterdir()) == ["mood", "topic"]


def test_the_python_of_the_library_runs(blocks, tiny_decoder):
    names = {"base_model": load_base(str(tiny_decoder), None, "CAUSAL_LM").model}
    exec(blocks["python"], names)
    assert names["model"].active_adapter == "mood"
    assert Path("bundle/manifest.json").is_file()
