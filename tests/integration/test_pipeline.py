"""The whole line on real servers, with tasks so small that they train in a second."""

from __future__ import annotations

import json
import os
import shutil
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml

import hydraopt
from infra import local_services
from infra.object_store import ObjectStore
from infra.settings import Settings
from infra.signatures import generate_key

pytest.importorskip("prefect")

import tiny_tasks
from pipeline_home import Pipeline

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """Everything running, and the tasks' adapters registered: two fine-tuned, one ingested."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("HYDRAOPT_")]:
            patch.delenv(name)
        folder = tmp_path_factory.mktemp("pipeline")
        made = Pipeline(folder)
        try:
            local_services.up(made.home)
            yield made
        finally:
            made.stop()
            local_services.down(made.home)


@pytest.fixture(scope="module")
def registered(pipeline):
    """The three tasks' adapters in the registry, and a bundle file that names them."""
    tiny_tasks.write_bundle_file(pipeline.home, pipeline.encoder, list(tiny_tasks.TASKS))
    first, waiting = pipeline.good(["finetune", pipeline.task("topic")], ["reconcile"])
    assert first["trained"]
    assert waiting["bundles"]["tiny"] == {"state": "waiting", "waiting_for": ["first", "second"]}

    second, again = pipeline.good(["finetune", pipeline.task("first")], ["finetune", pipeline.task("first")])
    assert second["trained"]
    assert not again["trained"]
    assert again["digest"] == second["digest"]
    assert again["version"] == second["version"]

    elsewhere = next(
        folder
        for folder in (pipeline.home / "work" / "trained").iterdir()
        if _digest(folder) == second["digest"]
    )
    shutil.copytree(elsewhere, pipeline.folder / "elsewhere")
    (third,) = pipeline.good(
        ["ingest", pipeline.folder / "elsewhere", "--task", "second", "--task-file", pipeline.task("second")]
    )
    assert third["samples"] == 120
    return pipeline


def _digest(folder: Path) -> str:
    from hydraopt import read_adapter

    return read_adapter(folder).digest


@pytest.fixture(scope="module")
def candidate(registered):
    """The set merged, measured and judged."""
    first, again = registered.good(["reconcile"], ["reconcile"])
    assert first["bundles"]["tiny"]["state"] == "merged"
    assert first["bundles"]["tiny"]["passed"]
    assert again["bundles"]["tiny"] == {**first["bundles"]["tiny"], "state": "unchanged"}
    return first["bundles"]["tiny"]["bundle_id"]


@pytest.fixture(scope="module")
def released(registered, candidate):
    """The candidate signed and live as version 1."""
    key = registered.folder / "ana.pem"
    made, approved = registered.good(
        ["keygen", "ana", "--key", key],
        ["approve", candidate[:10], "--as", "ana", "--key", key],
    )
    assert (key.stat().st_mode & 0o777, made["who"]) == (0o600, "ana")
    assert approved["released"]["live_version"] == 1
    return key


def test_a_candidate_waits_for_a_signature(registered, candidate):
    """It is measured and judged, and nothing is live."""
    (listed,) = registered.good(["candidates"])
    found = next(one for one in listed["candidates"] if one["bundle_id"] == candidate)
    assert found["tasks"] == sorted(tiny_tasks.TASKS)
    assert found["storage_ratio"] <= 0.8


def ask_prefect(home: Path, path: str, body: dict[str, Any]) -> Any:
    """What Prefect's server answers."""
    address = f"{Settings.load(home).prefect_api_url}/{path}"
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.load(answer)


def test_a_command_leaves_no_unsent_log_behind(registered, candidate):
    """The server may be stopped as soon as the command is done; the last line of its flow is there by then."""
    registered.good(["reconcile"])
    (run,) = ask_prefect(
        registered.home,
        "flow_runs/filter",
        {
            "flows": {"name": {"any_": ["reconcile"]}},
            "flow_runs": {"deployment_id": {"is_null_": True}, "state": {"type": {"any_": ["COMPLETED"]}}},
            "sort": "START_TIME_DESC",
            "limit": 1,
        },
    )
    logs = ask_prefect(registered.home, "logs/filter", {"logs": {"flow_run_id": {"any_": [run["id"]]}}})
    assert any("Finished in state Completed()" in line["message"] for line in logs), logs


def test_the_schedule_of_reconcile_is_kept(registered, candidate):
    """Prefect plans its next runs; a server that cannot write them leaves the schedule dead without a word."""
    wanted = {"flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}}}
    end = time.monotonic() + 90
    while not any(run["auto_scheduled"] for run in ask_prefect(registered.home, "flow_runs/filter", wanted)):
        assert time.monotonic() < end, "no run of reconcile is planned: see the log of Prefect's server"
        time.sleep(1)


def test_nothing_is_signed_with_a_strangers_key(registered, candidate, released):
    """A key nobody trusts is refused (3), a file that is no key is bad input (2)."""
    stranger = registered.folder / "stranger.pem"
    generate_key(stranger)
    broken = registered.folder / "broken.pem"
    broken.write_text("no key")
    broken.chmod(0o600)
    refused, unread, unknown, usage = registered.run(
        ["approve", candidate, "--as", "ana", "--key", stranger],
        ["approve", candidate, "--as", "ana", "--key", broken],
        ["approve", "0123456789", "--as", "ana", "--key", released],
        ["approve", candidate],
    )
    assert (refused.code, unread.code, unknown.code, usage.code) == (3, 2, 2, 2)
    assert "trusted" in refused.stderr


def test_a_device_pulls_what_is_live_and_a_live_bundle_cannot_be_rejected(registered, candidate, released):
    """The second pull fetches nothing; a decision is final."""
    out = registered.folder / "device"
    first, second = registered.good(["pull", "tiny", "--out", out], ["pull", "tiny", "--out", out])
    assert first["bundle_id"] == candidate
    assert first["fetched_files"] == len(tiny_tasks.TASKS) + 1
    assert (second["fetched_files"], second["changed"]) == (0, False)
    rejected, rolled = registered.run(
        ["reject", candidate, "--as", "ana", "--reason", "no"], ["rollback", "tiny"]
    )
    assert (rejected.code, rolled.code) == (3, 2)


def test_one_new_adapter_makes_a_second_version_and_rollback_undoes_it(registered, candidate, released):
    """Only what changed is measured again; the first version's number and bundle stay as they are."""
    task = registered.task("first", seed=1)
    update, merged = registered.good(["finetune", task], ["reconcile"])
    second = merged["bundles"]["tiny"]["bundle_id"]
    assert update["trained"]
    assert second != candidate
    # Killed between signature and release: the next reconcile releases it, whoever runs it.
    signed, reconciled, again, stand, back, forward, after = registered.good(
        ["approve", second, "--as", "ana", "--key", released, "--no-release"],
        ["reconcile"],
        ["reconcile"],
        ["status"],
        ["rollback", "tiny"],
        ["approve", second, "--as", "ana", "--key", released],
        ["status"],
    )
    assert signed["released"] is None
    assert [(one["live_bundle_id"], one["live_version"]) for one in reconciled["released"]] == [(second, 2)]
    assert again["released"] == []
    assert stand["bundles"]["tiny"]["up_to_date"]
    assert back["live_version"] == 1
    assert forward["released"]["live_version"] == 1, "a repeated approval must not undo a rollback"
    assert not after["bundles"]["tiny"]["up_to_date"]

    # The former adapter again: its set was merged, judged and published before.
    (old,) = registered.good(["finetune", registered.task("first")])
    (known,) = registered.good(["reconcile"])
    assert not old["trained"]
    assert known["bundles"]["tiny"] == {
        **known["bundles"]["tiny"],
        "state": "unchanged",
        "bundle_id": candidate,
    }


def test_a_bundle_that_keeps_its_shared_part_sends_devices_the_changed_task_alone(registered, released):
    """The first bundle of a name has nothing to keep; a set with another recipe is merged afresh."""
    spec = registered.home / "bundles" / "kept.yaml"
    content = yaml.safe_load((registered.home / "bundles" / "tiny.yaml").read_text())
    content |= {"name": "kept", "keep_shared": True, "recipe": {"budget": 0.8, "method": "separate"}}
    content["gates"] |= {"max_storage_ratio": 1.0}
    spec.write_text(yaml.safe_dump(content))
    out = registered.folder / "kept-device"

    def release() -> dict[str, Any]:
        (merged,) = registered.good(["reconcile"])
        found = merged["bundles"]["kept"]["bundle_id"]
        *_, pulled = registered.good(
            ["approve", found, "--as", "ana", "--key", released], ["pull", "kept", "--out", out]
        )
        assert pulled["bundle_id"] == found
        return pulled

    def made_onto() -> str | None:
        return hydraopt.Bundle.load(out).manifest.recipe.shared_from

    try:
        first = release()
        assert first["fetched_files"] == len(tiny_tasks.TASKS) + 1
        registered.good(["finetune", registered.task("first", seed=1)])
        second = release()
        assert second["fetched_files"] == 1
        assert made_onto() == first["bundle_id"]

        spec.write_text(yaml.safe_dump({**content, "recipe": {"max_error": 0.2, "method": "paper"}}))
        third = release()
        assert third["bundle_id"] not in {first["bundle_id"], second["bundle_id"]}
        assert made_onto() is None
    finally:
        spec.unlink()
        registered.good(["finetune", registered.task("first")])


def test_a_task_without_test_rows_fails_the_gates(registered, released):
    """Never skipped: what cannot be measured is not good enough, and the approval says so (3)."""
    bare = registered.home / "bundles" / "bare.yaml"
    folder = registered.folder / "elsewhere"
    content = yaml.safe_load((registered.home / "bundles" / "tiny.yaml").read_text())
    bare.write_text(yaml.safe_dump({**content, "name": "bare", "tasks": ["topic", "unmeasured"]}))
    try:
        ingested, merged = registered.good(["ingest", folder, "--task", "unmeasured"], ["reconcile"])
        assert ingested["value"] is None
        bundle = merged["bundles"]["bare"]
        assert not bundle["passed"]
        (refused,) = registered.run(
            ["approve", bundle["bundle_id"], "--as", "ana", "--key", str(released), "--json"]
        )
        assert refused.code == 3
        assert refused.json["kind"] == "RefusedError"

        # With rows the same bundle is measured, without another merge.
        task = registered.task("second")
        given = yaml.safe_load(task.read_text())
        named = task.with_name("unmeasured.yaml")
        named.write_text(yaml.safe_dump({**given, "name": "unmeasured"}))
        _, measured = registered.good(
            ["ingest", folder, "--task", "unmeasured", "--task-file", named], ["reconcile"]
        )
        assert measured["bundles"]["bare"]["bundle_id"] == bundle["bundle_id"]
        assert measured["bundles"]["bare"]["passed"]
    finally:
        bare.unlink()


def test_bad_adapters_and_names_are_refused_and_leave_nothing(registered, released, tmp_path):
    """Exit code 2, and the set is what it was."""
    pickled = shutil.copytree(registered.folder / "elsewhere", tmp_path / "pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    broken = shutil.copytree(registered.folder / "elsewhere", tmp_path / "nan")
    tensors = safetensors.torch.load_file(broken / "adapter_model.safetensors")
    first = min(tensors)
    safetensors.torch.save_file(
        {**tensors, first: torch.full_like(tensors[first], float("nan"))},
        broken / "adapter_model.safetensors",
    )
    good = registered.folder / "elsewhere"
    before, *results, after = registered.run(
        ["status", "--json"],
        ["ingest", tmp_path / "nowhere", "--task", "first"],
        ["ingest", pickled, "--task", "first"],
        ["ingest", broken, "--task", "first"],
        ["ingest", good, "--task", "../first"],
        ["ingest", good, "--task", "first", "--task-file", registered.task("second")],
        ["ingest", "s3://hydraopt/nowhere", "--task", "first"],
        ["finetune", tmp_path / "missing.yaml"],
        ["pull", "nobody", "--out", tmp_path / "device"],
        ["rollback", "nobody"],
        ["status", "--json"],
    )
    assert [result.code for result in results] == [2] * len(results), [one.stderr[-300:] for one in results]
    assert before.json["bundles"] == after.json["bundles"]


def test_an_adapter_comes_from_s3(registered, released):
    """The same adapter from a bucket is the same version."""
    store = ObjectStore(Settings.load(registered.home))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        store.create(f"incoming/second/{name}", (registered.folder / "elsewhere" / name).read_bytes())
    (result,) = registered.good(["ingest", "s3://hydraopt/incoming/second", "--task", "second"])
    assert result["known"]
    assert result["samples"] == 120


def test_a_dead_server_is_named_within_half_a_minute(registered, released):
    """Each address in turn leads nowhere."""
    nowhere = "http://127.0.0.1:9"
    keys = {"HYDRAOPT_S3_ACCESS_KEY": "a", "HYDRAOPT_S3_SECRET_KEY": "b"}
    for variables in (
        {"HYDRAOPT_S3_ENDPOINT": nowhere, **keys},
        {"HYDRAOPT_MLFLOW_URI": nowhere},
        {"HYDRAOPT_PREFECT_API_URL": f"{nowhere}/api"},
    ):
        started = time.monotonic()
        result = registered.run_with(variables, ["reconcile"])
        assert result.code == 2
        assert (
            time.monotonic() - started < 60
        )  # it gives up within 30 s; a busy machine takes its time to start
        assert nowhere in result.stderr
