"""Every line of a run names what it is about, at Prefect and in the log of JSON lines."""

from __future__ import annotations

import json
import logging

import pytest

pytest.importorskip("prefect")

from infra.settings import Settings
from tasks import log_lines
from tasks.log_lines import on_every_line, say

LOGGER = logging.getLogger("prefect.task_runs")


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """A home of its own; the logger as it was before."""
    handlers, filters, propagate = list(LOGGER.handlers), list(LOGGER.filters), LOGGER.propagate
    LOGGER.handlers[:] = []
    monkeypatch.setattr(LOGGER, "level", logging.INFO)
    yield Settings(home=tmp_path / "home")
    LOGGER.handlers[:], LOGGER.filters[:], LOGGER.propagate = handlers, filters, propagate


def lines(settings):
    path = settings.home / "logs" / "flows.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_names_bundle_set_and_id(settings, caplog):
    fingerprint, bundle_id = "ab" * 32, "cd" * 32
    with on_every_line(settings, bundle="demo", fingerprint=fingerprint):
        LOGGER.info("merging %s", 8, extra={"flow_run_id": "r1", "flow_name": "merge-set"})
        with on_every_line(settings, bundle_id=bundle_id):
            LOGGER.info("judging")
        LOGGER.info("done")
    LOGGER.info("something else")
    first, second, third, last = lines(settings)
    assert first["message"] == f"[bundle=demo fingerprint={'ab' * 6}] merging 8"
    assert (first["bundle"], first["fingerprint"]) == ("demo", fingerprint)
    assert (first["run_id"], first["flow"], first["level"]) == ("r1", "merge-set", "INFO")
    assert second["bundle_id"] == bundle_id
    assert second["message"].startswith(f"[bundle=demo fingerprint={'ab' * 6} bundle_id={'cd' * 6}]")
    assert "bundle_id" not in third
    assert "bundle" not in last
    assert last["message"] == "something else"


def test_how_a_run_ended_is_said_about_what_all_of_it_was_about(settings, monkeypatch):
    """Prefect logs it when the flow's own code has been left."""
    monkeypatch.setenv("PREFECT__RUNTIME__FLOW_RUN__ID", "r7")
    with on_every_line(settings, whole_run=True, bundle="demo", fingerprint="ab" * 32):
        pass
    monkeypatch.setenv("PREFECT__RUNTIME__FLOW_RUN__ID", "r8")
    with on_every_line(settings, bundle="one of several"):
        pass
    for run in ("r7", "r8"):
        LOGGER.info("Finished in state Failed", extra={"flow_run_id": run})
    LOGGER.info("no run")
    failed, several, none = lines(settings)
    assert (failed["bundle"], failed["fingerprint"]) == ("demo", "ab" * 32)
    assert "bundle" not in several
    assert "bundle" not in none


def test_what_is_not_known_yet_is_left_out(settings):
    with on_every_line(settings, bundle="demo", fingerprint=None):
        LOGGER.info("waiting")
    assert lines(settings)[0]["message"] == "[bundle=demo] waiting"


def test_a_line_is_written_once_however_often_it_is_asked_for(settings):
    for _ in range(3):
        with on_every_line(settings, bundle="demo"), on_every_line(settings, bundle="demo"):
            pass
    LOGGER.info("once")
    assert len(lines(settings)) == 1


def test_a_full_disk_does_not_end_a_run(settings, monkeypatch, capsys):
    with on_every_line(settings, bundle="demo"):
        (settings.home / "logs" / "flows.jsonl").mkdir()  # cannot be appended to
        LOGGER.info("still here")
    assert "IsADirectoryError" in capsys.readouterr().err


def test_a_long_log_is_put_aside(settings, monkeypatch):
    monkeypatch.setattr(log_lines, "_LARGEST_LOG", 10)
    path = settings.home / "logs" / "flows.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("x" * 11)
    with on_every_line(settings, bundle="demo"):
        LOGGER.info("fresh")
    assert path.with_suffix(".jsonl.1").read_text() == "x" * 11
    assert len(lines(settings)) == 1


def test_outside_a_run_nothing_is_said():
    say("to nobody")
