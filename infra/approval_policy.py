"""Who must approve a bundle: the ``approval:`` section of its file, and the terms that every approval signs.

::

    approval:
      needed: 2                  # different people
      approvers: [ana, bo, cy]   # without it everybody whose key is trusted here
      keys: {ana: "-----BEGIN PUBLIC KEY-----..."}   # pins a key; the others' lie in <home>/approvers
      self_approval: false       # nobody approves an adapter he or she trained or brought in
      expires_days: 14           # an approval that is not used for a release by then counts nothing
      asserted: 1                # how many may come from the form in Prefect's pages, where nobody proves a name
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from hydraopt.errors import RecordError
from hydraopt.names import check_name
from hydraopt.strict_settings import StrictSettings
from infra.records import canonical
from infra.signatures import key_id, load_public_key

_MOST = 16  # approvals one release can ask for


class ApprovalTerms(BaseModel):
    """A policy with every name bound to a key. It is signed along with each approval."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    needed: int = Field(ge=1, le=_MOST)
    approvers: dict[str, str] | None = Field(description="Key id by name; None: everybody trusted.")
    self_approval: bool
    expires_days: float | None = Field(gt=0, allow_inf_nan=False)
    asserted: int = Field(ge=0, le=_MOST)

    @property
    def sha256(self) -> str:
        """The policy's digest (hex)."""
        return hashlib.sha256(canonical(self.model_dump(mode="json"))).hexdigest()


class ApprovalPolicy(StrictSettings):
    """Who may approve a bundle, how many must, and how long their word holds."""

    needed: int = Field(1, ge=1, le=_MOST, description="Different people who must approve.")
    approvers: tuple[str, ...] | None = Field(
        None, description="Their names; None: everybody whose key is trusted."
    )
    # Not called `keys`: Prefect walks through a task's arguments with dict(), which calls that a mapping's method.
    pinned: dict[str, str] = Field(
        default_factory=dict, alias="keys", description="Public keys (PEM) by name, pinned."
    )
    self_approval: bool = Field(False, description="Whether one may approve an adapter of one's own.")
    expires_days: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="Days an approval may wait for the release."
    )
    asserted: int = Field(0, ge=0, le=_MOST, description="How many may come from Prefect's form.")

    @field_validator("approvers")
    @classmethod
    def _safe_names(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if names is None:
            return None
        if len({name.casefold() for name in names}) != len(names):
            raise ValueError("names somebody twice")
        return tuple(check_name(name, "approver name") for name in names)

    @model_validator(mode="after")
    def _can_be_met(self) -> Self:
        if self.approvers is not None and len(self.approvers) < self.needed:
            raise ValueError(
                f"{self.needed} approvals are needed and only {len(self.approvers)} may give one"
            )
        if self.approvers is not None and (strangers := self.pinned.keys() - set(self.approvers)):
            raise ValueError(f"keys of people who are no approvers: {', '.join(sorted(strangers))}")
        for who, pem in self.pinned.items():
            check_name(who, "approver name")
            load_public_key(pem, f"the key of {who!r}")
        return self

    def keyring(self, trusted: Mapping[str, Ed25519PublicKey]) -> dict[str, Ed25519PublicKey]:
        """Public key by name of everybody who may approve.

        Args:
            trusted: The keys trusted on this machine.

        Raises:
            RecordError: If a pinned key is not the one trusted under that name.
        """
        keys = dict(trusted)
        for who, pem in self.pinned.items():
            key = load_public_key(pem, f"the key of {who!r}")
            if who in keys and key_id(keys[who]) != key_id(key):
                raise RecordError(
                    f"the policy pins another key for {who!r} than the one trusted here: correct one of them"
                )
            keys[who] = key
        if self.approvers is None:
            return keys
        return {who: keys[who] for who in self.approvers if who in keys}

    def terms(self, trusted: Mapping[str, Ed25519PublicKey]) -> ApprovalTerms:
        """The policy with its names bound to keys; a name without a key is bound to none."""
        keys = self.keyring(trusted)
        names = None if self.approvers is None else sorted(self.approvers)
        return ApprovalTerms(
            needed=self.needed,
            approvers=None
            if names is None
            else {who: key_id(keys[who]) if who in keys else "" for who in names},
            self_approval=self.self_approval,
            expires_days=self.expires_days,
            asserted=self.asserted,
        )


ANYBODY = ApprovalPolicy(self_approval=True)
"""Where no policy is written: one person whose key is trusted, whoever trained."""
