"""A broken wire to MLflow while an adapter is ingested: a clear failure or a registration; repeated, it ends well."""

from __future__ import annotations

import pytest
from tcp_proxy import FAULTS, TcpProxy

from infra.adapter_registry import AdapterRegistry
from infra.adapter_store import find_adapter_version
from infra.settings import Settings

pytestmark = pytest.mark.integration


def test_ingest(office, chance, long_form):
    """What is registered is stored, and no digest is registered twice."""
    settings = Settings.load(office.home)
    base = str(office.pipeline.encoder)
    with TcpProxy(settings.mlflow_uri, rename_host=True) as proxy:
        variables = {
            "HYDRAOPT_MLFLOW_URI": proxy.address,
            "HYDRAOPT_MLFLOW_USERNAME": settings.mlflow_username,
            "HYDRAOPT_MLFLOW_PASSWORD": settings.mlflow_password.get_secret_value(),
        }
        child = office.pipeline.start(**variables)
        for fault in FAULTS if long_form else chance.sample(FAULTS, 2):
            first = chance.randint(1, 8)
            for pattern, choose in (
                (
                    f"number {first}",
                    lambda number, _, first=first, fault=fault: fault if number == first else None,
                ),
                ("always", lambda _, __, fault=fault: fault),
            ):
                adapter = office.next_adapter()
                command = [
                    "ingest",
                    adapter,
                    "--task",
                    "topic",
                    "--task-file",
                    office.pipeline.task("topic"),
                    "--json",
                ]
                before = AdapterRegistry(settings).serving()
                with proxy.breaking(choose) as broken:
                    result = office.pipeline.ask(child, command)
                case = f"{fault}, {pattern}: {result}"
                print(f"{fault}, {pattern}: exit {result.code}, {len(broken)} requests broken")
                assert broken, case
                assert result.code in {0, 2}, case
                serving = AdapterRegistry(settings).serving()
                if result.code == 0:
                    assert serving[base, "topic"] == result.json["digest"], case
                else:
                    assert result.json["kind"] == "ServiceError", case
                    assert proxy.address in result.json["error"], case
                    assert "run this again" in result.json["error"], case
                    if serving != before:  # the answer was lost, not the work
                        assert find_adapter_version(office.store(), base, "topic", serving[base, "topic"]), (
                            case
                        )
                again = office.pipeline.ask(child, command)
                assert again.code == 0, again
                assert AdapterRegistry(settings).serving()[base, "topic"] == again.json["digest"]
                assert registered(settings, again.json["digest"]) == 1
        child.stdin.close()
        child.wait(60)


def registered(settings: Settings, digest: str) -> int:
    """How many versions in MLflow have this digest."""
    from infra.mlflow_access import client

    found = client(settings).search_model_versions(f"tags.digest = '{digest}'")
    return len(found)
