"""The 12 classification tasks of the quality benchmark: which rows, which labels, and a task file for each.

Ten are the intents of one domain each, one is the domain itself, and one the topic of a sentence. No row belongs to two
tasks, so no two adapters are alike because their rows are.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hydraopt.evaluation.task_file import TaskFile

BASE_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
SPLITS = ("train", "validation", "test")
LORA = {"r": 16, "alpha": 64, "dropout": 0.0, "target_modules": ["query", "key", "value", "dense"]}
"""Every linear layer of the encoder."""
TRAINING = {"batch_size": 8, "learning_rate": 0.0005}
"""Of 2e-3, 1e-3 and 5e-4 this rate was the best on the validation rows of the two tasks tried."""
RATE_OF_B_ALONE = 0.001
"""For adapters whose A stays where it started."""
RATE_WITH_DECAY = 0.002
"""For those whose singular values decay, too, which slows them down."""


@dataclass(frozen=True)
class Source:
    """The rows of one task: a folder of the data, and which of its labels count (all where none are named)."""

    folder: str
    labels: tuple[str, ...] = ()


TASKS = {
    "clinc-auto": Source("clinc_auto_and_commute"),
    "clinc-banking": Source("clinc_banking"),
    "clinc-cards": Source("clinc_credit_cards"),
    "clinc-home": Source("clinc_home"),
    "clinc-kitchen": Source("clinc_kitchen_and_dining"),
    # The domains that are no task of their own.
    "clinc-domain": Source("clinc_domain", ("meta", "small_talk", "travel", "utility", "work")),
    "sib200-topic": Source("sib200_topic_en"),
    # The 77 intents of Banking77, five subjects.
    "bank77-account": Source(
        "banking77",
        (
            "age_limit",
            "change_pin",
            "compromised_card",
            "country_support",
            "edit_personal_details",
            "fiat_currency_support",
            "lost_or_stolen_card",
            "lost_or_stolen_phone",
            "passcode_forgotten",
            "pin_blocked",
            "supported_cards_and_currencies",
            "terminate_account",
            "unable_to_verify_identity",
            "verify_my_identity",
            "verify_source_of_funds",
            "why_verify_identity",
        ),
    ),
    "bank77-cards": Source(
        "banking77",
        (
            "activate_my_card",
            "card_about_to_expire",
            "card_acceptance",
            "card_arrival",
            "card_delivery_estimate",
            "card_linking",
            "card_not_working",
            "contactless_not_working",
            "disposable_card_limits",
            "get_disposable_virtual_card",
            "get_physical_card",
            "getting_spare_card",
            "getting_virtual_card",
            "order_physical_card",
            "virtual_card_not_working",
            "visa_or_mastercard",
        ),
    ),
    "bank77-cash": Source(
        "banking77",
        (
            "atm_support",
            "automatic_top_up",
            "balance_not_updated_after_cheque_or_cash_deposit",
            "card_swallowed",
            "cash_withdrawal_charge",
            "cash_withdrawal_not_recognised",
            "declined_cash_withdrawal",
            "pending_cash_withdrawal",
            "pending_top_up",
            "top_up_by_bank_transfer_charge",
            "top_up_by_card_charge",
            "top_up_by_cash_or_cheque",
            "top_up_failed",
            "top_up_limits",
            "top_up_reverted",
            "topping_up_by_card",
            "verify_top_up",
            "wrong_amount_of_cash_received",
            "wrong_exchange_rate_for_cash_withdrawal",
        ),
    ),
    "bank77-payments": Source(
        "banking77",
        (
            "Refund_not_showing_up",
            "apple_pay_or_google_pay",
            "card_payment_fee_charged",
            "card_payment_not_recognised",
            "card_payment_wrong_exchange_rate",
            "declined_card_payment",
            "direct_debit_payment_not_recognised",
            "exchange_charge",
            "exchange_rate",
            "exchange_via_app",
            "extra_charge_on_statement",
            "pending_card_payment",
            "request_refund",
            "reverted_card_payment?",
            "transaction_charged_twice",
        ),
    ),
    "bank77-transfers": Source(
        "banking77",
        (
            "balance_not_updated_after_bank_transfer",
            "beneficiary_not_allowed",
            "cancel_transfer",
            "declined_transfer",
            "failed_transfer",
            "pending_transfer",
            "receiving_money",
            "transfer_fee_charged",
            "transfer_into_account",
            "transfer_not_received_by_recipient",
            "transfer_timing",
        ),
    ),
}


@dataclass(frozen=True)
class AdapterSet:
    """One adapter per task: the seed of their row orders, and whether all start from one A."""

    name: str
    seed: int
    common_init: bool

    def init_seed(self, task: str) -> int:
        """Seed of the task's A."""
        return 0 if self.common_init else 1000 + sorted(TASKS).index(task)


def adapter_sets(seeds: int, own_init_seeds: int) -> list[AdapterSet]:
    """Sets from one A for every data order, then sets in which every task has an A of its own."""
    common = [AdapterSet(f"common-{seed}", seed, common_init=True) for seed in range(seeds)]
    return common + [AdapterSet(f"own-{seed}", seed, common_init=False) for seed in range(own_init_seeds)]


def write_rows(data: Path, work: Path, train_rows: int | None) -> None:
    """Write every task's rows below ``work/rows``; of the training rows at most ``train_rows``, spread evenly."""
    for name, source in TASKS.items():
        for split in SPLITS:
            rows = [row for row in _rows(data, source, split) if _wanted(source, row)]
            if split == "train":
                rows = spread(rows, train_rows)
            target = work / "rows" / name / f"{split}.jsonl"
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_suffix(".partial")
            partial.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
            partial.rename(target)


def spread(rows: list[Any], limit: int | None) -> list[Any]:
    """At most ``limit`` of the rows, evenly over all, as :mod:`hydraopt.evaluation.evaluate` picks them."""
    if limit is None or limit >= len(rows):
        return rows
    return [rows[index * len(rows) // limit] for index in range(limit)]


def write_task_files(
    work: Path, adapters: AdapterSet, examples: int, *, freeze_a: bool, nuclear_decay: float
) -> dict[str, TaskFile]:
    """Write the task files of one set below ``work/<set>/tasks`` and load them.

    A task passes over its training rows until it has seen about ``examples`` of them.
    """
    folder = work / adapters.name / "tasks"
    lora = {**LORA, "freeze_a": freeze_a}
    training = {**TRAINING, "nuclear_decay": nuclear_decay}
    if freeze_a:
        training["learning_rate"] = RATE_WITH_DECAY if nuclear_decay else RATE_OF_B_ALONE
    folder.mkdir(parents=True, exist_ok=True)
    for name in TASKS:
        rows = work / "rows" / name
        lines = {split: (rows / f"{split}.jsonl").read_text("utf-8").splitlines() for split in SPLITS}
        labels = {json.loads(line)["label"] for split in SPLITS for line in lines[split]}
        train = len(lines["train"])
        content = {
            "name": name,
            "application": "topic classification" if name == "sib200-topic" else "intent classification",
            "language": "en",
            "base_model": BASE_MODEL,
            "kind": "classification",
            "labels": sorted(labels),
            "data": {split: f"../../rows/{name}/{split}.jsonl" for split in SPLITS},
            "metric": "accuracy",
            "max_length": 128,
            "lora": {**lora, "init_seed": adapters.init_seed(name)},
            "training": {**training, "epochs": max(1, round(examples / train)), "seed": adapters.seed},
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return {name: TaskFile.load(folder / f"{name}.yaml") for name in sorted(TASKS)}


def _rows(data: Path, source: Source, split: str) -> Iterator[dict[str, str]]:
    packed = data / source.folder / f"{split}.jsonl.gz"
    if packed.is_file():
        with gzip.open(packed, "rt", encoding="utf-8") as lines:
            yield from map(json.loads, lines)
        return
    with (data / source.folder / f"{split}.jsonl").open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def _wanted(source: Source, row: dict[str, str]) -> bool:
    return not source.labels or row["label"] in source.labels
