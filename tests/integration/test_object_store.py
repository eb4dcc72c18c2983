"""The object store's promises, on a real server."""

from __future__ import annotations

import secrets
from concurrent.futures import ThreadPoolExecutor

import pytest

from infra.object_store import ObjectStore

pytestmark = pytest.mark.integration


def test_server_keeps_its_promises(object_store):
    object_store.self_test()
    assert list(object_store.keys("self-test/")) == []


def test_exactly_one_of_sixteen_racing_creators_wins(object_store):
    key = f"race/{secrets.token_hex(8)}"
    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(lambda i: object_store.create(key, str(i).encode()), range(16)))
    assert won.count(True) == 1
    assert object_store.read(key)[0] == str(won.index(True)).encode()
