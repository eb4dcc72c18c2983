"""Look for a home's secrets wherever a pipeline leaves words: in files, in the store, on servers, with processes."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import psutil
from production_home import api, everyone

from infra.local_services import processes
from infra.local_services.credentials import ensure_credentials
from infra.mlflow_access import client
from infra.object_store import ObjectStore
from infra.settings import ADMIN, Settings

KEY_FILES = (
    "credentials.json",
    "keys/service.pem",
    "roles/publisher.env",
    "roles/reader.env",
    "roles/trainer.env",
    "store-identities.json",
    "store-tls/store.key",
)
"""What is made to hold keys, below the home."""

NEEDED = {
    "store": {f"store_{name}_key" for name in ("volume_write", "volume_read", "filer_write", "filer_read")},
    "postgres": set(),
    "mlflow": {"mlflow_database_password", "mlflow_admin_password", "mlflow_secret_key"},
    "prefect": {"prefect_database_password", "prefect_password"},
    "worker-cpu": {"s3_secret_key", "mlflow_admin_password", "prefect_password"},
    "worker-gpu": {"s3_secret_key", "mlflow_admin_password", "prefect_password"},
}
"""Which secrets a service is given in its variables; what it starts has them too."""

_PAGE = 200
_PREFECT = (
    "flow_runs", "task_runs", "logs", "artifacts", "block_documents", "variables",
    "deployments", "flows", "work_pools", "automations",
)  # fmt: skip


class Secrets:
    """The secret values of a home in the production profile, by name: as they are, and as a login is sent."""

    def __init__(self, home: Path) -> None:
        values = ensure_credentials(home, production=True)
        self.values = {name: value for name, value in values.items() if not name.endswith("_access_key")}
        for server, name in (("MLflow", "mlflow_admin_password"), ("Prefect", "prefect_password")):
            login = base64.b64encode(f"{ADMIN}:{values[name]}".encode()).decode()
            self.values[f"login at {server}"] = login
        for file in ("keys/service.pem", "store-tls/store.key"):
            self.values[file] = (home / file).read_text().splitlines()[1]
        self._names = {value.encode(): name for name, value in self.values.items()}
        self._pattern = re.compile(b"|".join(map(re.escape, self._names)))

    def within(self, data: bytes | str) -> set[str]:
        """Names of the secrets that ``data`` holds."""
        data = data.encode(errors="replace") if isinstance(data, str) else data
        return {self._names[found] for found in self._pattern.findall(data)}


def in_files(home: Path) -> Iterator[tuple[str, bytes]]:
    """Every file of a home but those that are made to hold keys: logs, databases, the store's volumes, caches."""
    for folder, _, files in os.walk(home):  # it passes over folders that go while it looks
        for path in (Path(folder, file) for file in files):
            name = str(path.relative_to(home))
            if path.is_file() and name not in KEY_FILES:
                try:
                    if not _is_of_a_run(home, path):
                        yield name, path.read_bytes()
                except FileNotFoundError:  # a database drops files while it works
                    continue


def _is_of_a_run(home: Path, path: Path) -> bool:
    """Prefect hands a run its runner's variables in a file, and removes it with the run; a killed runner cannot.

    Its folder is for its owner alone, who may read the variables in `credentials.json` as well, and is emptied when
    the executor is started again.
    """
    folder = path.parent
    is_one = folder.parent.parent == home / "tmp" and folder.name.startswith("prefect-workspace-attempt-")
    return is_one and folder.stat().st_mode & 0o077 == 0


def in_store(store: ObjectStore) -> Iterator[tuple[str, bytes]]:
    """Every object: a volume may keep it packed."""
    for key in store.keys(""):
        stored = store.read(key)
        yield f"object {key}", stored[0] if stored else b""


def in_prefect(home: Path) -> Iterator[tuple[str, str]]:
    """All that Prefect's server tells, page by page."""
    for kind in _PREFECT:
        offset = 0
        while page := api(home, f"{kind}/filter", {"limit": _PAGE, "offset": offset}):
            yield f"Prefect's {kind}", json.dumps(page)
            offset += _PAGE
    yield "Prefect's events", json.dumps(api(home, "events/filter", {"limit": 50}))


def in_mlflow(settings: Settings) -> Iterator[tuple[str, str]]:
    """Runs with params, tags and metrics, models and their versions."""
    mlflow = client(settings)
    experiments = mlflow.search_experiments()
    yield "MLflow's experiments", " ".join(str(dict(one)) for one in experiments)
    for run in mlflow.search_runs([one.experiment_id for one in experiments], max_results=1000):
        yield f"MLflow's run {run.info.run_name}", str(run.to_dictionary())
    for model in mlflow.search_registered_models():
        yield f"MLflow's model {model.name}", str(dict(model))
        for version in mlflow.search_model_versions(f"name = '{model.name}'"):
            yield f"MLflow's model {model.name} {version.version}", str(dict(version))


def in_commands(home: Path) -> Iterator[tuple[str, str]]:
    """Every process's command line, which each user of the machine may read."""
    for process in everyone(home):
        with contextlib.suppress(psutil.NoSuchProcess):  # databases and runners start short ones
            yield f"command of process {process.pid}", " ".join(process.cmdline())


def needless(home: Path, secrets: Secrets) -> Iterator[tuple[str, set[str]]]:
    """Secrets in the variables of a service, or of what it started, that it has no use for."""
    for service, needed in NEEDED.items():
        for process in processes.family(processes.mark(home, service)):
            with contextlib.suppress(psutil.NoSuchProcess):
                held = secrets.within("\n".join(process.environ().values()))
                if held - needed:
                    yield service, held - needed
