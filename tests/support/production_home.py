"""Questions to the servers of a home in the production profile, and its processes."""

from __future__ import annotations

import base64
import json
import urllib.request
from pathlib import Path
from typing import Any

import psutil

from infra.local_services import processes
from infra.settings import Settings

SERVICES = ("postgres", "store", "mlflow", "prefect", "worker-cpu", "worker-gpu")


def api(home: Path, path: str, body: Any = None, login: str | None = None) -> Any:
    """Prefect's answer to our login, or to another one."""
    settings = Settings.load(home)
    login = settings.prefect_auth.get_secret_value() if login is None else login
    return ask(f"{settings.prefect_api_url}/{path}", body, login)


def ask(url: str, body: Any = None, login: str = "") -> Any:
    request = urllib.request.Request(url, None if body is None else json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    if login:
        request.add_header("Authorization", f"Basic {base64.b64encode(login.encode()).decode()}")
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.load(answer)


def everyone(home: Path) -> list[psutil.Process]:
    """Every process of the stack; PostgreSQL's children hide their variables and are found as children."""
    leaders = [process for name in SERVICES for process in processes.family(processes.mark(home, name))]
    return list({*leaders, *(child for leader in leaders for child in leader.children(recursive=True))})


def role_variables(home: Path, role: str) -> dict[str, str]:
    """What stands in a role's file of variables."""
    file = home / "roles" / f"{role}.env"
    assert file.stat().st_mode & 0o777 == 0o600
    return dict(line.split("=", 1) for line in file.read_text().splitlines())
