"""The two registries against a real MLflow: on SQLite directly, and what happens when its server is away."""

from __future__ import annotations

import hashlib
import secrets
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from hydraopt.bundle.layout import SCHEMA, BaseModelEntry, FileEntry, Manifest, TaskEntry
from hydraopt.errors import HydraoptError, RecordError, ServiceError
from hydraopt.evaluation.gates import GateReport, GateRules, judge
from hydraopt.evaluation.result import Evaluation
from hydraopt.recipe import Recipe
from infra import mlflow_access
from infra.adapter_registry import AdapterRegistry, model_name
from infra.adapter_store import AdapterVersion
from infra.bundle_registry import BundleRegistry
from infra.mlflow_access import MlflowClient
from infra.settings import Settings

pytestmark = pytest.mark.integration

MODEL = "sentence-transformers/all-MiniLM-L6-v2"


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    home = tmp_path_factory.mktemp("registry")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)  # without a server, MLflow puts artifacts below the current folder
        yield Settings(home=home, mlflow_uri=f"sqlite:///{home}/mlflow.db")


@pytest.fixture(scope="module")
def adapters(settings):
    return AdapterRegistry(settings)


@pytest.fixture(scope="module")
def bundles(settings):
    return BundleRegistry(settings)


@pytest.fixture
def mlflow(settings):
    return MlflowClient(settings.mlflow_uri, settings.mlflow_uri)


@pytest.fixture
def base_model():
    """A base model no other test uses."""
    return f"org/Model-{secrets.token_hex(4)}"


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def adapter(
    base_model: str, task: str = "intent", *, state: str = "a", score: float | None = 0.9
) -> AdapterVersion:
    own = None if score is None else {"metric": "accuracy", "value": score, "samples": 100}
    return AdapterVersion(
        task=task, base_model=base_model, digest=digest(state), files={}, reference_bytes=10, own_evaluation=own,
        source="a test",
    )  # fmt: skip


def uri(version: AdapterVersion) -> str:
    return f"s3://hydraopt/{version.key}"


def evaluation(task: str, value: float) -> Evaluation:
    return Evaluation(
        task=task, metric="accuracy", value=value, low=0.0, high=1.0, samples=100, metrics={"accuracy": value},
        data_digest=digest("rows"),
    )  # fmt: skip


def manifest(*tasks: str) -> Manifest:
    file = FileEntry(sha256=digest("file"), bytes=10)
    return Manifest(
        schema_version=SCHEMA,
        base_model=BaseModelEntry(name=MODEL),
        recipe=Recipe(budget=0.25),
        solver="1",
        relative_error=0.1,
        precisions=(16,),
        modules=(),
        shared=file,
        tasks={task: TaskEntry(adapter=digest(task), bytes=10_000, file=file, relative_error=0.1) for task in tasks},
    )  # fmt: skip


def report(bundle_id: str, *tasks: str, merged: float | None = 0.89) -> GateReport:
    return judge(
        GateRules(),
        bundle_id=bundle_id,
        storage_ratio=0.2,
        own={task: evaluation(task, 0.9) for task in tasks},
        merged={task: None if merged is None else evaluation(task, merged) for task in tasks},
    )


def test_registering_puts_the_adapter_into_the_set(adapters, base_model):
    version = adapter(base_model)
    assert adapters.register(version, uri(version)) == 1
    assert adapters.serving(base_model) == {(base_model, "intent"): version.digest}
    assert base_model in adapters.base_models()


def test_registering_again_changes_nothing(adapters, base_model):
    version = adapter(base_model)
    numbers = {adapters.register(version, uri(version)) for _ in range(3)}
    assert numbers == {1}


def test_the_newest_registered_one_serves_even_if_it_is_an_old_one(adapters, base_model):
    first, second = adapter(base_model, state="a"), adapter(base_model, state="b")
    assert [adapters.register(version, uri(version)) for version in (first, second, first)] == [1, 2, 1]
    assert adapters.serving(base_model) == {(base_model, "intent"): first.digest}


def test_a_new_measurement_shows_in_the_tags(adapters, base_model, mlflow):
    adapters.register(adapter(base_model, score=None), "s3://b/k")
    adapters.register(adapter(base_model, score=0.75), "s3://b/k")
    tags = mlflow.get_model_version(model_name(base_model, "intent"), "1").tags
    assert tags["evaluation.value"] == "0.75"
    assert tags["base_model"] == base_model


def test_set_serving_goes_back_and_refuses_the_unknown(adapters, base_model):
    first, second = adapter(base_model, state="a"), adapter(base_model, state="b")
    for version in (first, second):
        adapters.register(version, uri(version))
    assert adapters.set_serving(base_model, "intent", first.digest) == 1
    assert adapters.serving(base_model)[base_model, "intent"] == first.digest
    with pytest.raises(RecordError, match="ingest"):
        adapters.set_serving(base_model, "intent", digest("never seen"))
    with pytest.raises(HydraoptError):
        adapters.set_serving(base_model, "intent", "' or name like '%")


def test_removing_takes_the_task_out_and_keeps_its_versions(adapters, base_model):
    version = adapter(base_model)
    adapters.register(version, uri(version))
    assert adapters.remove(base_model, "intent") is True
    assert adapters.remove(base_model, "intent") is False
    assert adapters.serving(base_model) == {}
    assert base_model not in adapters.base_models()
    assert adapters.register(version, uri(version)) == 1


def test_the_set_is_read_across_pages(adapters, base_model, monkeypatch):
    monkeypatch.setattr(mlflow_access, "_PAGE", 2)
    versions = [adapter(base_model, f"task-{i}") for i in range(5)]
    for version in versions:
        adapters.register(version, uri(version))
    assert set(adapters.serving(base_model)) == {(base_model, version.task) for version in versions}


def test_two_tasks_never_share_a_registered_model(adapters, base_model):
    adapters.register(adapter(base_model, "1.chat"), "s3://b/k")
    with pytest.raises(RecordError, match=r"belongs to task '1\.chat'.*rename"):
        adapters.register(adapter(f"{base_model}.1", "chat"), "s3://b/k")


def test_models_of_others_are_left_alone(adapters, mlflow, base_model):
    name = f"adapter.somebody-elses-{secrets.token_hex(4)}"
    mlflow.create_registered_model(name)
    mlflow.create_model_version(name, "s3://b/k")
    mlflow.set_registered_model_alias(name, "serving", "1")
    assert adapters.serving(base_model) == {}


def test_a_hand_made_serving_version_is_refused(adapters, mlflow, base_model):
    adapters.register(adapter(base_model), "s3://b/k")
    name = model_name(base_model, "intent")
    mlflow.create_model_version(name, "s3://b/k")
    mlflow.set_registered_model_alias(name, "serving", "2")
    with pytest.raises(RecordError, match="move the alias back"):
        adapters.serving(base_model)


def test_a_long_base_model_name_still_has_a_name_of_its_own():
    long = "/data/" + "x" * 400
    assert len(model_name(long, "intent")) < 256
    assert model_name(long + "1", "intent") != model_name(long + "2", "intent")


def test_registering_at_once_ends_with_one_serving(adapters, base_model):
    version = adapter(base_model)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: adapters.register(version, uri(version)), range(4)))
    assert adapters.serving(base_model) == {(base_model, "intent"): version.digest}
    assert adapters.register(version, uri(version)) == 1


def test_a_candidate_is_shown_with_its_scores_and_gates(bundles, mlflow, unique_name, tmp_path):
    verdict = report(digest("one"), "a", "b")
    number = bundles.record_candidate(unique_name, digest("one"), manifest("a", "b"), verdict)
    shown = mlflow.get_model_version_by_alias(f"bundle.{unique_name}", "candidate")
    assert int(shown.version) == number
    assert shown.tags["gate"] == "fail"  # 1.1 % lost on average, 1 % allowed
    assert shown.tags["gate_report_sha256"] == verdict.digest
    run = mlflow.get_run(shown.run_id)
    assert run.data.metrics["merged/a"] == 0.89
    assert run.data.metrics["storage_ratio"] == 0.2
    assert run.data.params["recipe.budget"] == "0.25"
    table = (tmp_path / mlflow.download_artifacts(shown.run_id, "gates.md", str(tmp_path))).read_text()
    assert "| max_mean_drop_percent |" in table
    assert "**no**" in table


def test_showing_a_candidate_again_makes_no_second_version_or_run(bundles, mlflow, unique_name):
    for _ in range(3):
        bundles.record_candidate(unique_name, digest("one"), manifest("a"), report(digest("one"), "a"))
    assert len(mlflow.search_model_versions(f"name = 'bundle.{unique_name}'")) == 1
    experiment = mlflow.get_experiment_by_name(f"bundle.{unique_name}").experiment_id
    assert len(mlflow.search_runs([experiment])) == 1


def test_a_new_verdict_replaces_the_shown_scores(bundles, mlflow, unique_name):
    for merged in (None, 0.9):
        bundles.record_candidate(
            unique_name, digest("one"), manifest("a"), report(digest("one"), "a", merged=merged)
        )
    shown = mlflow.get_model_version_by_alias(f"bundle.{unique_name}", "candidate")
    assert shown.tags["gate"] == "pass"
    metrics = mlflow.get_run(shown.run_id).data.metrics
    assert (metrics["merged/a"], metrics["passed"]) == (0.9, 1.0)


def test_a_deleted_experiment_comes_back(bundles, mlflow, unique_name):
    bundles.record_candidate(unique_name, digest("one"), manifest("a"), report(digest("one"), "a"))
    mlflow.delete_experiment(mlflow.get_experiment_by_name(f"bundle.{unique_name}").experiment_id)
    assert (
        bundles.record_candidate(unique_name, digest("two"), manifest("a"), report(digest("two"), "a")) == 2
    )


def test_aliases_follow_releases_and_rollbacks(bundles, mlflow, unique_name):
    def aliases():
        return {k: int(v) for k, v in mlflow.get_registered_model(f"bundle.{unique_name}").aliases.items()}

    for state in ("one", "two"):
        bundles.record_candidate(unique_name, digest(state), manifest("a"), report(digest(state), "a"))
    bundles.record_release(unique_name, digest("one"), 1)
    assert aliases() == {"candidate": 2, "champion": 1}
    for _ in range(2):
        bundles.record_release(unique_name, digest("two"), 2, before=digest("one"))
        assert aliases() == {"candidate": 2, "champion": 2, "previous": 1}
    assert bundles.shown(unique_name) == digest("two")
    assert bundles.shown(unique_name, "canary") is None
    mlflow.set_registered_model_alias(f"bundle.{unique_name}", "champion", "1")  # by hand
    assert bundles.shown(unique_name) == digest("one")
    bundles.record_release(unique_name, digest("two"), 2, before=digest("one"))
    assert aliases() == {"candidate": 2, "champion": 2, "previous": 1}
    bundles.record_release(unique_name, digest("one"), 1, before=digest("two"))
    assert aliases() == {"candidate": 2, "champion": 1, "previous": 2}
    assert bundles.shown("nobody-" + unique_name) is None


def test_a_lost_version_is_made_again_on_release(bundles, mlflow, unique_name):
    bundles.record_candidate(unique_name, digest("one"), manifest("a"), report(digest("one"), "a"))
    mlflow.delete_registered_model(f"bundle.{unique_name}")
    bundles.record_release(unique_name, digest("one"), 7)
    shown = mlflow.get_model_version_by_alias(f"bundle.{unique_name}", "champion")
    assert shown.tags["bundle_digest"] == digest("one")
    assert shown.tags["release"] == "7"


def test_mlflow_that_is_not_there_is_named_at_once(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{probe.getsockname()[1]}"
    with pytest.raises(ServiceError, match=rf"{address}.*hydraopt up"):
        AdapterRegistry(Settings(home=tmp_path, mlflow_uri=address))
    with pytest.raises(ServiceError, match="HYDRAOPT_MLFLOW_URI"):
        BundleRegistry(Settings(home=tmp_path))


def test_mlflow_that_never_answers_is_named_in_half_a_minute(tmp_path, monkeypatch):
    """The slowest way to fail: it takes the connection and then says nothing."""
    for name in ("TIMEOUT", "MAX_RETRIES", "BACKOFF_FACTOR"):
        monkeypatch.delenv(f"MLFLOW_HTTP_REQUEST_{name}", raising=False)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(16)
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        settings = Settings(home=tmp_path, mlflow_uri=address, service_timeout_s=2)
        start = time.monotonic()
        with pytest.raises(ServiceError, match=address):
            AdapterRegistry(settings).serving()
        assert time.monotonic() - start < 30
