"""What people are told, from the state of things alone."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from hydraopt.errors import TaskFileError
from infra.candidates import CandidateStatus
from infra.channels import Move
from infra.notices import NoticeRules, candidate_notices, drift_notice, release_notices, silence_notice

NOW = datetime(2026, 1, 10, 12, tzinfo=UTC)
RULES = NoticeRules(tell=("slack-webhook/ops",))
STAND = {
    "desired_bundle_id": "a" * 64,
    "desired_state": "gated-failed",
    "live_bundle_id": None,
    "channel": "stable",
}


def candidate(state: str, hours: float, **more) -> CandidateStatus:
    merged = (NOW - timedelta(hours=hours)).isoformat()
    values = {"name": "assist", "bundle_id": "b" * 64, "tasks": ("mood",), "storage_ratio": 0.25}
    return CandidateStatus(state=state, merged_at=merged, approvals=0, approvals_needed=2, **(values | more))


@pytest.mark.parametrize(
    ("state", "hours", "events"),
    [
        ("awaiting-approval", 47, ["candidate-ready"]),
        ("awaiting-approval", 49, ["candidate-ready", "approval-old"]),
        ("rejected", 1, ["rejected"]),
        ("merged", 999, []),
        ("gated-failed", 999, []),
        ("approved", 999, []),
        ("published", 999, []),
    ],
)
def test_candidates_that_wait_or_were_rejected_are_told(state, hours, events):
    assert [one.event for one in candidate_notices(RULES, [candidate(state, hours)], NOW)] == events


def test_a_rejection_is_told_with_its_reason():
    one = candidate("rejected", 1, reason="answers in the wrong language", decided_by="bo")
    (notice,) = candidate_notices(RULES, [one], NOW)
    assert "bo" in notice.subject
    assert notice.body == "answers in the wrong language"


def test_each_move_of_a_channel_is_one_notice():
    def move(sequence):
        fields = {
            "action": "publish",
            "version": 3,
            "bundle_id": "c" * 64,
            "previous": 2,
            "published": (1, 2, 3),
        }
        return Move(sequence=sequence, time="2026-01-01T00:00:00+00:00", by="ana", **fields)

    first, again, later = (release_notices({("assist", "stable"): move(n)})[0] for n in (4, 4, 5))
    assert first == again
    assert first.about != later.about
    assert "version 3 is live" in first.subject


@pytest.mark.parametrize(("hours", "told"), [(24, False), (24.1, True)])
def test_drift_is_told_after_its_time(hours, told):
    notice = drift_notice(RULES, "assist", STAND, NOW - timedelta(hours=hours), NOW)
    assert (notice is not None) is told


@pytest.mark.parametrize(("minutes", "told"), [(30, False), (31, True)])
def test_silence_is_told_once_per_silence(minutes, told):
    last = NOW - timedelta(minutes=minutes)
    notice = silence_notice(RULES, last, NOW)
    assert (notice is not None) is told
    assert notice is None or notice == silence_notice(RULES, last, NOW + timedelta(hours=5))


def test_without_a_file_nobody_is_told(tmp_path):
    assert NoticeRules.load(tmp_path).tell == ()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tell: [ops]", "TYPE/NAME"),
        ("tell: [a/b]\nevents: [everything]", "events"),
        ("tell: [a/b]\ndrift_hours: 0", "drift_hours"),
        ("url: https://x", "not a known key"),
    ],
)
def test_a_file_that_says_nothing_useful_is_refused(tmp_path, text, said):
    (tmp_path / "notifications.yaml").write_text(text)
    with pytest.raises(TaskFileError, match=said):
        NoticeRules.load(tmp_path)
