"""The demo is killed again and again; then it finishes, and nothing was published twice."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from infra import local_services
from infra.object_store import ObjectStore
from infra.settings import Settings

pytest.importorskip("prefect")
sys.path.insert(0, str(Path(__file__).parent))  # importlib mode adds no folder by itself

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
        )

    def kill_after(self, line: str, delay_s: float, *, runner: bool = False) -> None:
        """Start it, and kill it ``delay_s`` after it said ``line``; with ``runner`` what runs the flows, too."""
        child = self.start()
        end = time.monotonic() + 300
        while line not in self.errors.read_text():
            assert child.poll() is None, self.errors.read_text()[-4000:]
            assert time.monotonic() < end, self.errors.read_text()[-4000:]
            time.sleep(0.1)
        time.sleep(delay_s)
        child.kill()
        child.wait()
        if runner:
            top = psutil.Process(local_services.status(self.home)["runner"].pid)
            for process in [*top.children(recursive=True), top]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()

    def finish(self) -> dict:
        child = self.start("--keep")
        out, _ = child.communicate(timeout=500)
        assert child.returncode == 0, self.errors.read_text()[-4000:]
        return json.loads(out)


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
    """Killed while it trains, merges (with the runner), and publishes."""
    seed = random.SystemRandom().randrange(10_000)
    print(f"delays drawn with seed {seed}")
    draw = random.Random(seed)
    demo.kill_after("Fine-tune adapters", draw.uniform(0, 10))
    demo.kill_after("Reconcile notices the new", draw.uniform(0, 10), runner=True)
    demo.kill_after("publishes", draw.uniform(0, 2))

    first, second = demo.finish(), demo.finish()

    print(f"finished in {first['seconds']} s, again in {second['seconds']} s")
    assert first["live_version"] == second["live_version"] == 1
    assert set(first["versions"]) == {"1", "2"}
    assert len(set(first["versions"].values())) == 2
    assert first["versions"] == second["versions"]
    assert second["seconds"] < first["seconds"]
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
