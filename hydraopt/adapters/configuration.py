"""``adapter_config.json``: read, and every setting known before a tensor is looked at."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydraopt.adapters.name_patterns import matches
from hydraopt.errors import AdapterFormatError
from hydraopt.json_text import parse_object
from hydraopt.own_files import own_file

CONFIG_FILE = "adapter_config.json"
_MAX_CONFIG_BYTES = 10_000_000
_MOST_SHOWN = 200  # characters of a value in a message

COMMON = frozenset({
    "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_type",
    "peft_version", "modules_to_save", "library_name",
})  # fmt: skip
"""Settings every kind may have; none changes what is computed from the tensors."""


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed configuration of an adapter folder.

    Raises:
        AdapterFormatError: If there is none, it names no base model, or it is a link that leads out of the folder.
    """
    if not folder.is_dir():
        raise AdapterFormatError(f"{folder}: no such folder")
    path = own_file(folder, CONFIG_FILE, AdapterFormatError)
    if not path.is_file():
        raise AdapterFormatError(f"{folder}: not a PEFT adapter folder: {CONFIG_FILE} is missing")
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise AdapterFormatError(f"{path}: {path.stat().st_size} bytes is no adapter configuration")
    config = parse_object(path.read_bytes(), str(path), AdapterFormatError)
    if not isinstance(config.get("base_model_name_or_path"), str) or not config["base_model_name_or_path"]:
        raise AdapterFormatError(
            f"{path}: base_model_name_or_path is {config.get('base_model_name_or_path')!r}; "
            "write the name of the base model the adapter was trained on"
        )
    revision = config.get("revision")
    if revision is not None and not isinstance(revision, str):
        raise AdapterFormatError(f"{path}: revision is {_short(revision)}; expected text")
    return config


def check_settings(
    where: str, config: Mapping[str, Any], refused: Mapping[str, str], known: frozenset[str]
) -> None:
    """Refuse, by name and with the reason, every setting that could not be merged exactly.

    Raises:
        AdapterFormatError: For the first such setting.
    """
    for setting, reason in refused.items():
        if config.get(setting):
            raise AdapterFormatError(
                f"{where}: {setting}={_short(config[setting])} is not supported: {reason}"
            )
    for setting, value in config.items():
        if setting not in refused and setting not in known and setting not in COMMON and value:
            raise AdapterFormatError(
                f"{where}: unknown setting {_short(setting)}={_short(value)}; it may change what the adapter computes, "
                "so it is refused rather than guessed"
            )
    if config.get("bias", "none") != "none":
        raise AdapterFormatError(
            f"{where}: bias={config['bias']!r} is not supported: trained biases are not low-rank"
        )


def _short(value: object) -> str:
    """A value as a message shows it: a stranger's may be megabytes long."""
    text = repr(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[: _MOST_SHOWN - 1]}…"


def number(where: str, config: Mapping[str, Any], key: str) -> float:
    """A setting that must be a number.

    Raises:
        AdapterFormatError: If it is missing or something else.
    """
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise AdapterFormatError(f"{where}: {key} is {value!r}; expected a number")
    return value


def whole_number(where: str, config: Mapping[str, Any], key: str, least: int = 1) -> int:
    """A setting that must be a whole number of at least ``least``.

    Raises:
        AdapterFormatError: If it is missing or something else.
    """
    value = number(where, config, key)
    if value != int(value) or value < least:
        raise AdapterFormatError(f"{where}: {key} is {value!r}; expected a whole number from {least} on")
    return int(value)


def is_target(name: str, targets: object) -> bool:
    """PEFT's rule: a string is "all-linear" or a regular expression, a list holds names or suffixes."""
    if isinstance(targets, str):
        return targets == "all-linear" or matches(targets, name)
    if not isinstance(targets, list):
        return False
    return any(name == target or name.endswith(f".{target}") for target in targets)
