"""Where settings come from, what they refuse, and that they never show a key."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from hydraopt.errors import HydraoptError, ServiceError
from infra.settings import Settings

KEY = "a-secret-nobody-may-see"


@pytest.fixture(autouse=True)
def empty_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def write_home(home: Path, *, pid: int | None = 1, mode: int = 0o600) -> Path:
    home.mkdir(parents=True, exist_ok=True)
    services = {
        "store": {"address": "http://127.0.0.1:8333", "pid": pid},
        "mlflow": {"address": "http://127.0.0.1:5000", "pid": pid},
        "prefect": {"address": "http://127.0.0.1:4200", "pid": pid},
    }
    (home / "services.json").write_text(json.dumps({"schema": 1, "services": services}))
    credentials = home / "credentials.json"
    credentials.write_text(json.dumps({"s3_access_key": "local", "s3_secret_key": KEY}))
    credentials.chmod(mode)
    return home


def test_defaults_name_no_server(tmp_path):
    settings = Settings.load()
    assert settings.home == tmp_path / ".hydraopt"
    assert (settings.s3_endpoint, settings.mlflow_uri, settings.prefect_api_url) == (None, None, None)


def test_home_files_give_addresses_and_keys(tmp_path, monkeypatch):
    monkeypatch.setenv("HYDRAOPT_HOME", str(write_home(tmp_path / "state")))
    settings = Settings.load().require_services()
    assert settings.s3_endpoint == "http://127.0.0.1:8333"
    assert settings.mlflow_uri == "http://127.0.0.1:5000"
    assert settings.prefect_api_url == "http://127.0.0.1:4200/api"
    assert settings.s3_access_key == "local"
    assert settings.s3_secret_key is not None
    assert settings.s3_secret_key.get_secret_value() == KEY


def test_the_home_given_as_an_argument_is_the_one_read(tmp_path, monkeypatch):
    monkeypatch.setenv("HYDRAOPT_HOME", str(tmp_path / "elsewhere"))
    assert Settings.load(write_home(tmp_path / "state")).s3_access_key == "local"


def test_a_relative_home_is_made_absolute(tmp_path):
    write_home(tmp_path / "state")
    settings = Settings.load(Path("state"))
    assert settings.home == tmp_path / "state"
    assert settings.s3_access_key == "local"


def test_variables_win_over_home_files(tmp_path, monkeypatch):
    monkeypatch.setenv("HYDRAOPT_MLFLOW_URI", "https://mlflow.example/")
    settings = Settings.load(write_home(tmp_path / "state"))
    assert settings.mlflow_uri == "https://mlflow.example"
    assert settings.prefect_api_url == "http://127.0.0.1:4200/api"


def test_an_empty_variable_counts_as_unset(tmp_path, monkeypatch):
    monkeypatch.setenv("HYDRAOPT_MLFLOW_URI", "")
    assert Settings.load(write_home(tmp_path / "state")).mlflow_uri == "http://127.0.0.1:5000"


def test_the_local_key_never_goes_to_another_endpoint(tmp_path, monkeypatch):
    monkeypatch.setenv("HYDRAOPT_S3_ENDPOINT", "https://s3.example")
    settings = Settings.load(write_home(tmp_path / "state"))
    assert settings.s3_access_key is None
    assert settings.s3_secret_key is None


def test_stopped_services_have_no_address(tmp_path):
    settings = Settings.load(write_home(tmp_path / "state", pid=None))
    assert settings.s3_endpoint is None
    with pytest.raises(ServiceError, match=r"not running.*hydraopt up.*HYDRAOPT_S3_ENDPOINT"):
        settings.require_services()


def test_only_missing_servers_are_named():
    settings = Settings(s3_endpoint="http://127.0.0.1:1", prefect_api_url="http://127.0.0.1:2/api")
    with pytest.raises(ServiceError, match=r"^MLflow not running") as caught:
        settings.require_services()
    assert "HYDRAOPT_S3_ENDPOINT" not in str(caught.value)


def test_a_misspelt_variable_is_refused_by_name(monkeypatch):
    monkeypatch.setenv("HYDRAOPT_S3_ENDPIONT", "http://127.0.0.1:8333")
    with pytest.raises(HydraoptError, match="HYDRAOPT_S3_ENDPIONT"):
        Settings.load()


@pytest.mark.parametrize(
    ("name", "value", "hint"),
    [
        ("S3_ENDPOINT", "127.0.0.1:8333", "http://127"),
        ("S3_ENDPOINT", f"http://me:{KEY}@127.0.0.1:8333", "password"),
        ("MLFLOW_URI", f"postgresql://me:{KEY}@host/db", "password"),
        ("S3_BUCKET", "No_Such.Bucket", "bucket name"),
        ("S3_BUCKET", "a..b", "bucket name"),
        ("SERVICE_TIMEOUT_S", "0", "greater than 0"),
        ("SERVICE_TIMEOUT_S", "nan", "finite"),
        ("S3_CHECKSUMS", "never", "when_required"),
        ("S3_SECRET_KEY", KEY, "together"),
    ],
)
def test_a_bad_value_names_the_variable_and_hides_the_value(monkeypatch, name, value, hint):
    monkeypatch.setenv(f"HYDRAOPT_{name}", value)
    with pytest.raises(HydraoptError, match=hint) as caught:
        Settings.load()
    assert f"HYDRAOPT_{name}" in str(caught.value)
    assert KEY not in str(caught.value)


def test_no_key_in_repr_or_dump(tmp_path):
    settings = Settings.load(write_home(tmp_path / "state"))
    assert KEY not in repr(settings)
    assert KEY not in settings.model_dump_json()
    assert KEY not in str(settings.environment())


def test_readable_credentials_are_refused(tmp_path):
    with pytest.raises(HydraoptError, match="chmod 600"):
        Settings.load(write_home(tmp_path / "state", mode=0o640))


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"services": {"store": 1}}', '{"services": {"store": {"pid": 1}}}']
)
def test_a_damaged_file_is_named(tmp_path, content):
    home = write_home(tmp_path / "state")
    (home / "services.json").write_text(content)
    with pytest.raises(HydraoptError, match=r"services\.json is damaged"):
        Settings.load(home)


def test_settings_cannot_be_changed():
    with pytest.raises(ValidationError):
        Settings.load().s3_bucket = "other"


def test_children_see_the_same_servers_and_no_telemetry(tmp_path):
    settings = Settings.load(write_home(tmp_path / "state"))
    variables = settings.environment()
    assert variables["HYDRAOPT_HOME"] == str(tmp_path / "state")
    assert variables["PREFECT_API_URL"] == settings.prefect_api_url
    assert variables["MLFLOW_TRACKING_URI"] == settings.mlflow_uri
    assert variables["PREFECT_SERVER_ALLOW_EPHEMERAL_MODE"] == "false"
    assert variables["DO_NOT_TRACK"] == "1"
    assert variables["MLFLOW_DISABLE_TELEMETRY"] == "true"
