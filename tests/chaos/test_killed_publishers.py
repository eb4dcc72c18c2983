"""A publisher may be killed at any request, before it is sent or after the store has done it, and in between."""

from __future__ import annotations

import random
import time

import pytest
from invariants import check_store, versions

import hydraopt
from infra.blobs import MULTIPART_FROM, measure

pytestmark = pytest.mark.integration

SAMPLE = 9
MOMENTS = 3
LONG_MOMENTS = 30


def kills(requests: int, seconds: float, chance: random.Random, *, everything: bool) -> list[str]:
    """Where to kill: at requests, on either side of each, and at moments that no request names."""
    points = [f"{side} {number}" for number in range(1, requests + 1) for side in ("unsent", "sent")]
    moments = [f"after {chance.uniform(0, seconds):.3f}" for _ in range(LONG_MOMENTS)]
    if everything:
        return points + moments
    return chance.sample(points, SAMPLE) + moments[:MOMENTS]


def empty(store) -> None:
    """Remove everything, so that the next publisher does every step again."""
    keys = [{"Key": key} for key in store.keys("")]
    if keys:
        store._client.delete_objects(Bucket=store.bucket, Delete={"Objects": keys})
    assert list(store.keys("")) == []


def test_killed_at_any_step(alone, publishers, chance, long_form):
    """Two bundles are released one after the other; whatever kills that, the store is valid and a rerun ends it."""
    folders = [alone.bundle_folder(seed) for seed in (1, 2)]
    ids = [hydraopt.Bundle.load(folder).id for folder in folders]
    publisher = publishers(*folders)
    started = time.monotonic()
    outcome, requests = publisher.ask("count 0").split()
    assert outcome == "done"
    points = kills(int(requests), time.monotonic() - started, chance, everything=long_form)

    killed = 0
    for point in points:
        empty(alone.store)
        killed += publisher.ask(point) == "killed"
        shown = check_store(alone.store, alone.name, alone.trusted)
        assert shown is None or shown.bundle_id == ids[shown.version - 1], point

        assert publisher.ask("never 0") == "done", point
        assert versions(alone.store, alone.name) == {1: ids[0], 2: ids[1]}, point
        assert check_store(alone.store, alone.name, alone.trusted).bundle_id == ids[1], point
    print(f"{killed} publishers killed in {len(points)} tries, {requests} requests each")
    assert killed >= (100 if long_form else SAMPLE)


def test_killed_while_a_big_file_is_sent_in_parts(alone, publishers, chance, long_form, tmp_path):
    """Nothing is there before the last part is, and all of it afterwards."""
    big = tmp_path / "big.safetensors"
    big.write_bytes(random.Random(1).randbytes(MULTIPART_FROM + 1))
    ref = measure(big).ref
    publisher = publishers(big)
    outcome, requests = publisher.ask("count 0").split()
    assert outcome == "done"
    points = [f"{side} {number}" for number in range(1, int(requests) + 1) for side in ("unsent", "sent")]
    for point in points if long_form else chance.sample(points, 2):
        empty(alone.store)
        assert publisher.ask(point) == "killed", point
        assert set(alone.store.keys("")) <= {ref.key}
        if alone.store.exists_blob(ref):
            alone.store.fetch_blob(ref, tmp_path / "fetched")
        assert publisher.ask("never 0") == "done", point
        alone.store.fetch_blob(ref, tmp_path / "fetched")
        assert measure(tmp_path / "fetched").ref == ref
