"""The demo is killed again and again; then it finishes, and nothing was published twice."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from infra import local_services
from infra.local_services import processes
from infra.local_services.profiles import SERVICES
from infra.object_store import ObjectStore
from infra.settings import Settings

pytest.importorskip("prefect")

import tiny_tasks

pytestmark = pytest.mark.integration

CHILD = Path(__file__).with_name("demo_child.py")


class Demo:
    """The demo on tiny tasks, in processes that can be killed."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "home"
        self.tasks = folder / "tasks"
        self.errors = folder / "stderr.txt"
        encoder = tiny_tasks.make_encoder(folder / "encoder")
        for name in tiny_tasks.TASKS:
            tiny_tasks.write_task(self.tasks, name, encoder)

    def start(self, *options: str) -> subprocess.Popen[str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("HYDRAOPT_")}
        return subprocess.Popen(
            [sys.executable, str(CHILD), str(self.tasks), "demo", "--json", *options],
            env={**clean, "HYDRAOPT_HOME": str(self.home), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=self.errors.open("w"),
            text=True,
            start_new_session=True,  # a process group of its own, its second process included
        )

    def kill_after(self, line: str, delay_s: float, *, services: bool = True) -> None:
        """Start it, and kill it ``delay_s`` after it said ``line``; with ``services`` every server as well."""
        child = self.start()
        end = time.monotonic() + 300
        while line not in self.errors.read_text():
            assert child.poll() is None, self.errors.read_text()[-4000:]
            assert time.monotonic() < end, self.errors.read_text()[-4000:]
            time.sleep(0.1)
        time.sleep(delay_s)
        assert self.of_services(), "no service is found: this test would kill none"
        os.killpg(child.pid, signal.SIGKILL)
        while services and (alive := self.of_services()):  # again: one may just have started another
            for process in alive:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        child.wait()

    def of_services(self) -> set[psutil.Process]:
        """Every process of the store, MLflow, Prefect and the runner, with what the runner started."""
        return {
            process
            for name in SERVICES["local"]
            for process in processes.family(processes.mark(self.home, name))
        }

    def finish(self, *options: str) -> dict:
        child = self.start(*options)
        out, _ = child.communicate(timeout=500)
        assert child.returncode == 0, self.errors.read_text()[-4000:]
        return json.loads(out)

    def made(self) -> dict[str, int]:
        """When each trained and merged file was written: what changes here was done again."""
        folders = [self.home / "work" / name for name in ("trained", "merged")]
        return {
            str(path): path.stat().st_mtime_ns
            for folder in folders
            for path in folder.rglob("*")
            if path.is_file()
        }


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("HYDRAOPT_")]:
            patch.delenv(name)
        made = Demo(tmp_path_factory.mktemp("demo"))
        try:
            yield made
        finally:
            local_services.down(made.home)


def test_a_killed_demo_goes_on_and_publishes_nothing_twice(demo):
    """Killed while it trains, first alone and then with every server, while it merges, and while it publishes."""
    seed = random.SystemRandom().randrange(10_000)
    print(f"delays drawn with seed {seed}")
    draw = random.Random(seed)
    demo.kill_after("Fine-tune adapters", draw.uniform(0, 10), services=False)
    demo.kill_after("Fine-tune adapters", draw.uniform(0, 10))
    demo.kill_after("Reconcile notices the new", draw.uniform(0, 10))
    demo.kill_after("publishes", draw.uniform(0, 2))

    first = demo.finish()
    told = demo.errors.read_text()
    assert not demo.of_services(), "the demo leaves its servers running"
    made = demo.made()
    second = demo.finish("--keep")

    print(f"finished in {first['seconds']} s, again in {second['seconds']} s")
    assert "Stopping the services" in told
    assert "Error logging" not in told
    assert "attempts failed" not in told
    assert demo.made() == made, "what did not change was trained or merged again"
    assert first["live_version"] == second["live_version"] == 1
    assert set(first["versions"]) == {"1", "2"}
    assert len(set(first["versions"].values())) == 2
    assert first["versions"] == second["versions"]
    store = ObjectStore(Settings.load(demo.home))
    assert list(store.keys("bundles/demo/versions/")) == [
        "bundles/demo/versions/000001.json",
        "bundles/demo/versions/000002.json",
    ]
    moves = [json.loads(store.read(key)[0]) for key in sorted(store.keys("channels/demo/stable/log/"))]
    assert [(move["action"], move["version"]) for move in moves] == [
        ("publish", 1),
        ("publish", 2),
        ("rollback", 1),
    ]
