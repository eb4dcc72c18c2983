"""Whose approval counts here."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from flows.command_line import main
from hydraopt.errors import HydraoptError, RecordError
from infra.approvers import trust, trusted
from infra.signatures import generate_key, key_id, load_public_key


@pytest.fixture
def public(tmp_path):
    return lambda who: generate_key(tmp_path / f"{who}.pem")


def test_nobody_is_trusted_at_first(tmp_path):
    assert trusted(tmp_path / "home") == {}


def test_trusting_again_changes_nothing(tmp_path, public):
    pem = public("alice")
    path = trust(tmp_path / "home", "alice", pem)
    assert trust(tmp_path / "home", "alice", pem) == path
    assert {who: key_id(key) for who, key in trusted(tmp_path / "home").items()} == {
        "alice": key_id(load_public_key(pem, "alice"))
    }


def test_another_key_for_the_same_person_is_refused(tmp_path, public):
    path = trust(tmp_path / "home", "alice", public("alice"))
    with pytest.raises(RecordError, match=f"remove {path}"):
        trust(tmp_path / "home", "alice", public("new"))


def test_a_key_that_could_not_be_trusted_is_not_left_in_the_way(tmp_path, monkeypatch):
    monkeypatch.setenv("HYDRAOPT_HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "approvers").write_text("no folder")
    words = ["keygen", "ana", "--key", str(tmp_path / "ana.pem")]
    assert CliRunner().invoke(main, words).exit_code == 2
    assert not (tmp_path / "ana.pem").exists()
    (tmp_path / "home" / "approvers").unlink()
    assert CliRunner().invoke(main, words).exit_code == 0
    assert (tmp_path / "ana.pem").exists()


def test_one_key_cannot_be_two_people(tmp_path, public):
    pem = public("alice")
    trust(tmp_path / "home", "alice", pem)
    with pytest.raises(RecordError, match="already the key of 'alice'"):
        trust(tmp_path / "home", "bob", pem)


@pytest.mark.parametrize("who", ["", "../alice", "a/b", "a\nb"])
def test_name_cannot_leave_the_folder(tmp_path, public, who):
    with pytest.raises(HydraoptError, match="approver name"):
        trust(tmp_path / "home", who, public("alice"))


def test_damaged_key_file_is_not_skipped(tmp_path, public):
    trust(tmp_path / "home", "alice", public("alice"))
    (tmp_path / "home" / "approvers" / "bob.pem").write_text("rubbish")
    with pytest.raises(RecordError, match=r"bob\.pem"):
        trusted(tmp_path / "home")
