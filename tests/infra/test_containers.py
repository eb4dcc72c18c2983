"""The container files say what the process profile does. No engine runs here: what can be held to it is."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib import resources
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

from infra import secret_values
from infra.local_services import containers, database, production, store_certificate
from infra.local_services.profiles import SERVICES
from infra.secret_values import store_identities, write_env_file

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
KUBERNETES = list(yaml.safe_load_all((ROOT / "infra/kubernetes/gpu-worker.yaml").read_text()))
DOCKERFILES = [ROOT / "infra/docker/Dockerfile.cpu", ROOT / "infra/docker/Dockerfile.gpu"]
ALL_SERVICES = sorted(COMPOSE["services"])
OWN_SERVICES = [name for name in ALL_SERVICES if "build" in COMPOSE["services"][name]]

# What a container has beyond the process: the image's own way to make a cluster, and to get a file's content.
BEYOND = {"postgres": {"POSTGRES_PASSWORD", "POSTGRES_INITDB_ARGS"}, "store": {"STORE_IDENTITIES"}}


def blueprints():
    place = containers.place()
    settings = containers.worker_settings(place, place.secrets)
    made = {
        "postgres": production.postgres(place),
        "store": production.store(place, "hydraopt"),
        "mlflow": production.mlflow(place),
        "prefect": production.prefect(place),
        "worker-cpu": production.worker(place, settings, "cpu"),
        "worker-gpu": production.worker(place, settings, "gpu"),
    }
    assert made.keys() == set(SERVICES["production"])
    return {**made, "worker-gpu-without-card": made["worker-gpu"]}


@pytest.mark.parametrize("name", sorted(blueprints()))
def test_a_container_runs_what_the_process_runs(name):
    """Command, variables and health check; what differs between the two is a place, and nothing else."""
    blueprint, service = blueprints()[name], COMPOSE["services"][name]
    wanted = dict(blueprint.variables)
    if name == "postgres":
        wanted |= production.database_variables(containers.place())
    given = {key: value for key, value in service["environment"].items() if key not in BEYOND.get(name, ())}
    assert service["command"] == list(blueprint.command)
    assert given == wanted
    assert service["healthcheck"]["test"] == ["CMD", *blueprint.probe]


def validate_compose(content):
    """Against the compose specification's own schema."""
    schema = resources.files("check_jsonschema").joinpath("builtin_schemas/vendor/compose-spec.json")
    jsonschema.Draft202012Validator(json.loads(schema.read_text())).validate(content)


def test_compose_follows_the_specification():
    validate_compose(COMPOSE)


@pytest.mark.parametrize("wrong", [{"comand": ["weed"]}, {"healthcheck": {"tst": []}}, {"restart": 3}])
def test_the_schema_refuses_a_wrong_file(wrong):
    """Or the test above could not fail."""
    with pytest.raises(jsonschema.ValidationError):
        validate_compose({**COMPOSE, "services": {"store": {"image": "x", **wrong}}})


def test_the_certificate_is_made_where_the_store_looks():
    """By our image, for the user that the store has, too."""
    maker, store = COMPOSE["services"]["store-tls"], COMPOSE["services"]["store"]
    folder = str(containers.place().store_tls)
    assert maker["command"] == ["python", "-m", store_certificate.__name__, folder]
    assert f"store-tls:{folder}" in maker["volumes"]
    assert f"store-tls:{folder}:ro" in store["volumes"]
    assert maker["user"] == store["user"]


def test_postgres_makes_its_cluster_the_same_way():
    environment = COMPOSE["services"]["postgres"]["environment"]
    assert environment["POSTGRES_INITDB_ARGS"].split() == list(database.INITDB_OPTIONS)
    mounted = [mount for mount in COMPOSE["services"]["postgres"]["volumes"] if mount.startswith("./")]
    assert mounted == ["./infra/local_services/databases.sql:/docker-entrypoint-initdb.d/databases.sql:ro"]
    assert (ROOT / "infra/local_services/databases.sql").exists()


def test_the_stores_identities_reach_its_command():
    """The entry point as a shell runs it: the file has what the variable had, only its owner may read it."""
    shell, dash_c, script, name = COMPOSE["services"]["store"]["entrypoint"]
    assert (shell, dash_c, name) == ("/bin/sh", "-c", "store")
    identities = str(containers.place().identities)
    assert identities in script
    assert any(str(Path(identities).parent) in mount for mount in COMPOSE["services"]["store"]["tmpfs"])


def test_the_stores_entry_point_runs(tmp_path):
    script = COMPOSE["services"]["store"]["entrypoint"][2].replace("$$", "$")
    file = tmp_path / "identities.json"
    script = script.replace(str(containers.place().identities), str(file))
    said = store_identities(secret_values.fresh_production_secrets(), "hydraopt")
    done = subprocess.run(
        ["/bin/sh", "-c", script, "store", "sh", "-c", 'echo "$1/${STORE_IDENTITIES-unset}"', "weed", "mini"],
        env={"STORE_IDENTITIES": said}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "mini/unset"
    assert (file.read_text(), file.stat().st_mode & 0o777) == (said, 0o600)


@pytest.mark.parametrize("name", ALL_SERVICES)
def test_a_container_may_do_little(name):
    service = COMPOSE["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    if name == "store-folder":  # once, before the store: root, without a network, with one capability
        assert (service["network_mode"], service["cap_add"]) == ("none", ["CHOWN"])
    else:
        assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", service["user"])
        assert "cap_add" not in service


@pytest.mark.parametrize("name", ALL_SERVICES)
def test_images_are_pinned_and_services_come_back(name):
    service = COMPOSE["services"][name]
    assert re.search(r":\d+\.\d+", service["image"]), service["image"]
    once = name in {"store-folder", "store-tls", "cli"}
    assert service["restart"] == ("no" if once else "unless-stopped")
    assert once or service["healthcheck"]["start_period"]


def test_ports_are_few_and_on_loopback():
    published = [port for service in COMPOSE["services"].values() for port in service.get("ports", [])]
    assert sorted(published) == ["127.0.0.1:4200:4200", "127.0.0.1:5000:5000", "127.0.0.1:8333:8333"]
    assert COMPOSE["networks"]["database"]["internal"] is True
    assert COMPOSE["services"]["postgres"]["networks"] == ["database"]


def test_data_is_in_named_volumes():
    """Every data folder of the process profile is a volume of its own."""
    place = containers.place()
    for name, folder in {**place.folders, "worker-cpu": place.home, "worker-gpu": place.home}.items():
        volumes = dict(reversed(mount.split(":")[:2]) for mount in COMPOSE["services"][name]["volumes"])
        assert volumes[str(folder)] in COMPOSE["volumes"]


def test_services_wait_for_what_they_need():
    conditions = {
        name: {other: how["condition"] for other, how in service.get("depends_on", {}).items()}
        for name, service in COMPOSE["services"].items()
    }
    assert conditions["mlflow"] == conditions["prefect"] == {"postgres": "service_healthy"}
    assert conditions["store"] == dict.fromkeys(
        ("store-folder", "store-tls"), "service_completed_successfully"
    )
    for worker in ("worker-cpu", "worker-gpu", "worker-gpu-without-card"):
        assert conditions[worker] == dict.fromkeys(("store", "mlflow", "prefect"), "service_healthy")


def test_one_gpu_worker_runs_with_a_card_and_one_without():
    services = COMPOSE["services"]
    assert services["worker-gpu"]["profiles"] == ["gpu"]
    assert services["worker-gpu-without-card"]["profiles"] == ["no-gpu"]
    (device,) = services["worker-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    assert "deploy" not in services["worker-gpu-without-card"]


def test_every_secret_comes_from_the_env_file(tmp_path):
    """Each variable compose asks for is written, none has a default, and none is a constant."""
    write_env_file(tmp_path / ".env")
    written = dict(line.split("=", 1) for line in (tmp_path / ".env").read_text().splitlines())
    asked = re.findall(r"\$\{(\w+)([^}]*)\}", (ROOT / "docker-compose.yml").read_text())
    assert {rest for _, rest in asked} == {":?run make secrets"}
    assert {name for name, _ in asked} <= written.keys()
    named = r"PASSWORD|SECRET|_KEY$|AUTH_STRING|_AUTH$|IDENTITIES"
    for service in COMPOSE["services"].values():
        for name, value in service.get("environment", {}).items():
            in_volume = value.startswith(str(containers.place().store_tls))
            assert not re.search(named, name) or "${STACK_" in value or in_volume, name


def test_secrets_are_made_once_for_their_owner_alone(tmp_path):
    """As `make secrets` does, with nothing but the standard library."""
    command = [sys.executable, "-S", "-m", "infra.secret_values", str(tmp_path / ".env")]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    content = (tmp_path / ".env").read_text()
    assert (tmp_path / ".env").stat().st_mode & 0o777 == 0o600
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert again.returncode == 1
    assert "is kept" in again.stderr
    assert (tmp_path / ".env").read_text() == content
    values = [line.split("=", 1)[1] for line in content.splitlines() if line.startswith("STACK_")]
    assert len(set(values)) == len(values)
    assert not any(value in first.stdout for value in values)


def test_two_env_files_share_no_secret(tmp_path):
    for name in "ab":
        write_env_file(tmp_path / name)
    a, b = (set((tmp_path / name).read_text().splitlines()) for name in "ab")
    assert {line.split("=")[0] for line in a & b} == {"COMPOSE_PROFILES"}


def test_roles_may_do_what_they_are_for():
    identities = json.loads(store_identities(secret_values.fresh_production_secrets(), "models"))[
        "identities"
    ]
    actions = {one["name"]: set(one["actions"]) for one in identities}
    assert actions["reader"] == {"Read:models", "List:models"}
    assert actions["publisher"] > actions["reader"]
    assert "Write:models" not in actions["trainer"]
    assert not any(action.startswith("Admin") for held in actions.values() for action in held)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_images_are_built_from_pinned_versions_for_an_ordinary_user(path):
    text = path.read_text()
    for base in re.findall(r"^FROM (\S+)", text, re.MULTILINE):
        assert re.search(r":\d+\.\d+\.\d+-", base), base
    assert "--constraint infra/constraints.txt '.[production]'" in text
    assert re.findall(r"^USER (\S+)", text, re.MULTILINE) == ["10001:10001"]
    for source in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE):
        assert all((ROOT / part).exists() for part in source.split())


def test_images_hold_the_folders_their_volumes_start_from():
    """A named volume takes its owner from the image; without that an ordinary user could not write."""
    made = DOCKERFILES[0].read_text()
    for name in OWN_SERVICES:
        mounts = [
            mount for mount in COMPOSE["services"][name].get("volumes", []) if not mount.startswith("./")
        ]
        for mount in mounts:
            assert re.search(
                rf"install --directory --owner=10001 .*{mount.split(':')[1]}( |$)", made, re.MULTILINE
            )


def test_every_worker_knows_the_same_bundles_and_approvers():
    """A recipe that one of them does not see would be another merge."""
    wanted = [
        f"./.hydraopt/{name}:{containers.HOME}/{name}:ro" for name in ("bundles", "approvers", "services")
    ]
    for worker in ("worker-cpu", "worker-gpu", "worker-gpu-without-card", "cli"):
        mounts = COMPOSE["services"][worker]["volumes"]
        assert [mount for mount in mounts if mount.startswith("./")] == wanted
    (container,) = KUBERNETES[2]["spec"]["template"]["spec"]["containers"]
    paths = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert f"{containers.HOME}/bundles" in paths


def test_no_secret_reaches_the_image():
    allowed = (ROOT / ".dockerignore").read_text().split()
    assert allowed[0] == "*"
    assert not {"!.env", "!.", "!*"} & set(allowed)


@pytest.mark.parametrize("document", KUBERNETES, ids=lambda document: document["kind"])
def test_kubernetes_objects_are_valid(document):
    kubernetes_validate.validate(document, "1.34", strict=True)


def test_the_pod_runs_what_the_process_runs():
    """With the ConfigMap's values and the Secret's in place, variable by variable."""
    servers, _, deployment = KUBERNETES
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    blueprint = blueprints()["worker-gpu"]
    assert container["command"] == list(blueprint.command)
    assert container["readinessProbe"]["exec"]["command"] == list(blueprint.probe)
    assert container["startupProbe"]["exec"]["command"] == list(blueprint.probe)

    given = dict(servers["data"])
    for entry in container["env"]:
        if "valueFrom" in entry:
            key = entry["valueFrom"]["secretKeyRef"]["key"]
            given[entry["name"]] = f"${{{key}:?run make secrets}}"
        else:
            given[entry["name"]] = re.sub(r"\$\((\w+)\)", lambda found: given[found[1]], entry["value"])
    helpers = {name for name in given if name.startswith("STACK_")}
    assert {name: value for name, value in given.items() if name not in helpers} == dict(blueprint.variables)


def test_the_pod_has_one_card_and_no_privileges():
    pod = KUBERNETES[2]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert (KUBERNETES[2]["spec"]["replicas"], KUBERNETES[2]["spec"]["strategy"]["type"]) == (1, "Recreate")
