"""A release manager whose small real bundles are measured, judged and approved as far as a test wants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hydraopt.evaluation.gates import GateReport, GateRules
from hydraopt.evaluation.result import Evaluation
from infra.approvals import approve
from infra.approvers import Approvers
from infra.bundle_store import upload_bundle
from infra.evidence import write_evidence, write_gate_report
from infra.object_store import ObjectStore
from infra.supply_chain.describe import describe_bundle

RULES = GateRules(max_storage_ratio=1, max_task_drop_percent=5, max_mean_drop_percent=5, min_samples=50)


def measured(task: str, value: float = 0.8, samples: int = 100) -> Evaluation:
    """An evaluation as ``hydraopt.evaluation`` makes them."""
    return Evaluation(
        task=task,
        metric="accuracy",
        value=value,
        low=value,
        high=value,
        samples=samples,
        metrics={"accuracy": value},
        data_digest="ab" * 32,
    )


@dataclass(frozen=True)
class Manager:
    """A release manager, and a store where bundles of one name come to be."""

    store: ObjectStore
    name: str
    who: str
    key: Ed25519PrivateKey
    service: Ed25519PrivateKey
    bundle_folder: Callable[[int], Path]

    @property
    def trusted(self) -> Approvers:
        return Approvers({self.who: self.key.public_key()}, {"pipeline": self.service.public_key()})

    def merged(self, seed: int) -> str:
        return upload_bundle(self.store, self.name, self.bundle_folder(seed))

    def judged(self, seed: int, value: float = 0.8) -> tuple[str, GateReport]:
        """A stored bundle with evidence and gate report; ``value``: the score of task b with the bundle."""
        bundle_id = self.merged(seed)
        return bundle_id, self.judge(bundle_id, value)

    def judge(self, bundle_id: str, value: float = 0.8) -> GateReport:
        """Describe, measure and judge a stored bundle of the tasks a and b."""
        describe_bundle(self.store, self.name, bundle_id, fingerprint="f" * 64, key=self.service)
        own = {task: measured(task) for task in ("a", "b")}
        write_evidence(
            self.store, self.name, bundle_id, own=own, merged={"a": measured("a"), "b": measured("b", value)}
        )
        return write_gate_report(self.store, self.name, bundle_id, RULES)

    def approved(self, seed: int) -> str:
        bundle_id, _ = self.judged(seed)
        approve(self.store, self.name, bundle_id, self.who, self.key, self.trusted)
        return bundle_id
