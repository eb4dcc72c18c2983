"""The frame of every command: what goes to stdout, which exit code, what an error says."""

import json
import os
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner
from tiny_adapters import write_adapter

import hydraopt
from flows.command_line import COMMANDS, main
from flows.command_line.output import Output, command
from hydraopt.errors import AdapterFormatError, RefusedError


@command("count")
@click.argument("upto", type=int)
@click.option("--error", default=None)
def count(output: Output, upto: int, error: str | None) -> dict:
    """Count. Example: hydraopt count 3"""
    print("noise of a library")
    with output.progress() as progress:
        for i in range(upto):
            progress(i + 1, upto, "counting")
    if error == "refused":
        raise RefusedError("the gate said no")
    if error == "input":
        raise AdapterFormatError("not an adapter")
    if error == "pipe":
        raise BrokenPipeError
    if error == "bug":
        raise ZeroDivisionError("oops")
    if error == "extra":
        raise ModuleNotFoundError("No module named 'mlflow'", name="mlflow")
    if error == "module":
        raise ModuleNotFoundError("No module named 'nonsense'", name="nonsense")
    output.show("counted [all] of them")
    return {"counted": upto}


def test_json_is_the_only_thing_on_stdout():
    result = CliRunner().invoke(count, ["3", "--json"])
    assert result.exit_code == 0
    assert json.loads(result.stdout) == {"counted": 3}
    assert "noise" in result.stderr
    assert "counting: 3/3" in result.stderr


def test_json_stays_alone_when_c_code_and_children_print(tmp_path):
    script = tmp_path / "noisy.py"
    script.write_text(
        "import os\n"
        "from flows.command_line.output import command\n"
        "@command('noisy')\n"
        "def noisy(output):\n"
        "    os.write(1, b'from C')\n"
        "    os.system('echo from a child')\n"
        "    return {'ok': True}\n"
        "noisy()\n"
    )
    done = subprocess.run(
        [sys.executable, str(script), "--json"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert json.loads(done.stdout) == {"ok": True}
    assert "from C" in done.stderr
    assert "from a child" in done.stderr


HYDRAOPT = f"{sys.executable} -m flows.command_line"


@pytest.mark.parametrize(
    ("ending", "code", "printed"),
    [
        ("inspect {b} --json", 0, {"bundle_id"}),
        ("inspect {b} --json 2>&-", 0, {"bundle_id"}),
        ("inspect {b} >&-", 0, None),
        ("inspect nothing --json 2>&-", 2, {"error", "kind", "exit_code"}),
        ("inspect {b} --json >/dev/full", 2, None),
        ("inspect {b} >/dev/full", 2, None),
        ("inspect nothing --json 2>/dev/full", 2, {"error", "kind", "exit_code"}),
        ("inspect --json >/dev/full", 2, None),
        ("--help >/dev/full", 1, None),
        ("merge {a} --budget 1 --out {o} --json 2>/dev/full", 0, {"bundle_id"}),
        ("merge {a} --budget 1 --out {o} --json <&- 2>&-", 0, {"bundle_id"}),
        ("merge {a} --budget 1 --out {o} <&- >&- 2>&-", 0, None),
        ("merge {a} --budget 1 --out {o} --json 2>&-", 0, {"bundle_id"}),
    ],
)
def test_streams_that_are_closed_or_full_break_nothing(tmp_path, ending, code, printed):
    adapter = write_adapter(tmp_path / "a", 1)
    hydraopt.merge({"a": adapter}, budget=1).save(tmp_path / "b")
    words = ending.format(a=adapter, b=tmp_path / "b", o=tmp_path / "o")
    done = shell(f"{HYDRAOPT} {words}")
    assert (done.returncode, "Traceback" in done.stderr) == (code, False), done
    if printed is not None:
        assert printed <= json.loads(done.stdout).keys()
    assert (tmp_path / "o").exists() == words.startswith("merge")


@pytest.mark.parametrize("words", ["inspect {a}", "inspect {a} --json"])
def test_a_reader_that_leaves_is_no_error_of_ours(tmp_path, words):
    """The pipe is closed before anything is written: as `head` may, when it has seen enough."""
    adapter = write_adapter(tmp_path / "a", 1)
    done = shell(f"({HYDRAOPT} {words.format(a=adapter)}; echo $? >{tmp_path}/code) | true")
    assert "unexpected" not in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "code").read_text().strip() == "141"


def test_a_pipe_that_broke_elsewhere_is_an_error():
    result = CliRunner().invoke(count, ["1", "--json", "--error", "pipe"])
    assert result.exit_code == 1
    assert json.loads(result.stdout)["kind"] == "BrokenPipeError"


def shell(line):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        ["sh", "-c", line], capture_output=True, text=True, check=False, env=environment, timeout=120
    )


def test_text_is_shown_as_it_is():
    result = CliRunner().invoke(count, ["1"])
    assert "counted [all] of them\n" in result.stdout
    assert "{" not in result.stdout


@pytest.mark.parametrize(
    ("error", "code", "kind"),
    [
        ("input", 2, "AdapterFormatError"),
        ("refused", 3, "RefusedError"),
        ("bug", 1, "ZeroDivisionError"),
        ("extra", 2, "MissingExtraError"),
        ("module", 1, "ModuleNotFoundError"),
    ],
)
def test_an_error_becomes_its_exit_code_and_one_object(error, code, kind):
    result = CliRunner().invoke(count, ["0", "--json", "--error", error])
    assert result.exit_code == code
    failure = json.loads(result.stdout)
    assert failure["kind"] == kind
    assert failure["exit_code"] == code
    assert "Traceback" not in result.stderr


def test_a_missing_extra_says_what_to_install():
    result = CliRunner().invoke(count, ["0", "--error", "extra"])
    assert "pip install 'hydraopt[pipeline]'" in result.stderr


def test_debug_shows_the_traceback():
    result = CliRunner().invoke(count, ["0", "--error", "bug", "--debug"])
    assert "Traceback" in result.stderr


def test_lines_are_sparse_when_nobody_watches():
    result = CliRunner().invoke(count, ["5000"])
    assert result.stderr.count("counting") == 2


def test_usage_errors_leave_with_2_and_an_object():
    result = CliRunner().invoke(main, ["no-such-command", "--json"])
    assert result.exit_code == 2
    assert json.loads(result.stdout)["kind"] == "usage"


def test_help_needs_no_heavy_import():
    code = (
        "import sys\n"
        "from flows.command_line import main\n"
        "main(['--help'], standalone_mode=False)\n"
        "heavy = {'torch', 'prefect', 'mlflow', 'boto3', 'pydantic_settings'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for name in COMMANDS:
        assert name in done.stdout


def test_looking_at_candidates_loads_no_model_library(tmp_path):
    """They take seconds to load; the command gets as far as the store, which does not run here."""
    code = (
        "import sys\n"
        "from click.testing import CliRunner\n"
        "from flows.command_line import main\n"
        "result = CliRunner().invoke(main, ['candidates'])\n"
        "assert (result.exit_code, 'store' in result.stderr) == (2, True), result.stderr\n"
        "heavy = {'peft', 'transformers', 'datasets', 'sklearn', 'mlflow', 'prefect'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HYDRAOPT_")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**clean, "HYDRAOPT_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(name):
    result = CliRunner().invoke(main, [name, "--help"])
    assert result.exit_code == 0, result.output
    assert f"hydraopt {name}" in result.stdout.partition("Options:")[0].partition("Example")[2]
    group = main.get_command(click.Context(main), name)
    if not isinstance(group, click.Group):
        assert "--json" in result.stdout
        return
    for inner in group.commands:
        told = CliRunner().invoke(main, [name, inner, "--help"]).stdout
        assert f"hydraopt {name} {inner}" in told.partition("Options:")[0].partition("Example")[2]
        assert "--json" in told
