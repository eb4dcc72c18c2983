"""Many processes release the same bundles at the same moment: each bundle gets one version."""

from __future__ import annotations

import pytest
from invariants import check_store, versions

import hydraopt

pytestmark = pytest.mark.integration

PUBLISHERS, FEWER = 32, 14


@pytest.mark.parametrize("bundles", [1, 7])
def test_one_version_per_bundle(alone, publishers, long_form, bundles):
    folders = [alone.bundle_folder(seed) for seed in range(bundles)]
    count = PUBLISHERS if long_form else FEWER
    assert publishers(*folders).ask(f"race {count}") == f"{count} 0 0"
    claimed = versions(alone.store, alone.name)
    assert set(claimed.values()) == {hydraopt.Bundle.load(folder).id for folder in folders}
    assert len(claimed) == bundles
    assert check_store(alone.store, alone.name, alone.trusted).version == bundles


def test_half_of_them_die(alone, publishers, chance, long_form):
    """Whoever lives publishes; afterwards one more call finds nothing left to do."""
    folders = [alone.bundle_folder(seed) for seed in range(7)]
    publisher, count = publishers(*folders), PUBLISHERS if long_form else FEWER
    for _ in range(5 if long_form else 1):
        done, killed, failed = map(int, publisher.ask(f"war {count} {chance.randrange(2**31)}").split())
        assert failed == 0
        assert done >= count // 2
        assert done + killed == count
        assert check_store(alone.store, alone.name, alone.trusted) is not None
        assert publisher.ask("never 0") == "done"
    assert publisher.ask("never 0") == "done"
    claimed = versions(alone.store, alone.name)
    assert set(claimed.values()) == {hydraopt.Bundle.load(folder).id for folder in folders}
    check_store(alone.store, alone.name, alone.trusted)
