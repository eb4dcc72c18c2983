"""Adapters as PEFT saves them: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hydraopt.adapters.lora import LoraModule, check_config, read_modules, saved_modules
from hydraopt.adapters.tensor_file import TensorFile
from hydraopt.errors import AdapterFormatError

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
_MAX_CONFIG_BYTES = 10_000_000


@dataclass(frozen=True)
class Adapter:
    """One task's adapter, read lazily: the header is in memory, tensors stay on disk.

    Made by :func:`read_adapter`; what it holds was checked there, but for the values themselves, which
    are checked to be finite when they are read.
    """

    folder: Path
    config: dict[str, Any]
    file: TensorFile
    modules: dict[str, LoraModule]
    extras: tuple[str, ...]

    @property
    def base_model(self) -> str:
        """Name of the frozen base model: a hub id or a local folder."""
        return str(self.config["base_model_name_or_path"])

    @property
    def revision(self) -> str | None:
        """Revision of the base model, if the adapter names one."""
        return self.config.get("revision") or None

    @property
    def task_type(self) -> str | None:
        """PEFT's task type, such as ``CAUSAL_LM``."""
        return self.config.get("task_type")

    @property
    def saved_modules(self) -> tuple[str, ...]:
        """Layers the adapter replaces whole, sorted."""
        present = {part for tensor in self.extras for part in tensor.split(".")}
        return tuple(sorted(saved_modules(self.config) & present))

    @cached_property
    def reference_bytes(self) -> int:
        """Bytes of the tensors at two bytes a number, plus those of the configuration.

        What storage ratios are measured against: a float32 file does not flatter the bundle.
        """
        numbers = sum(entry.numbers for entry in self.file.entries.values())
        return 2 * numbers + (self.folder / CONFIG_FILE).stat().st_size

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of what the adapter computes: base model, scalings and tensors.

        It does not depend on the folder, the order of tensors in the file, or settings of the training.
        """
        digest = hashlib.sha256()
        meaning = {
            "base_model": self.base_model,
            "revision": self.revision,
            "task_type": self.task_type,
            "fan_in_fan_out": bool(self.config.get("fan_in_fan_out")),
            "scalings": {name: module.scaling for name, module in self.modules.items()},
            "tensors": {name: [str(e.dtype), list(e.shape)] for name, e in self.file.entries.items()},
        }
        digest.update(json.dumps(meaning, sort_keys=True, separators=(",", ":")).encode())
        with self.file.path.open("rb") as file:
            for entry in self.file.entries.values():  # sorted by name
                file.seek(entry.begin)
                left = entry.size
                while left:
                    block = file.read(min(left, 1 << 22))
                    if not block:
                        raise AdapterFormatError(
                            f"{self.file.path}: the file was cut short while it was read"
                        )
                    digest.update(block)
                    left -= len(block)
        return digest.hexdigest()

    def factors(self, module: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """``(up, down)`` of one module with the scaling folded into ``up``: ``dW = up @ down``.

        Args:
            module: One of ``self.modules``.
            dtype: What to convert to before the scaling is applied.

        Returns:
            ``up`` (d_out, rank) and ``down`` (rank, d_in).

        Raises:
            AdapterFormatError: If a value is NaN or infinite.
        """
        spec = self.modules[module]
        up, down = self._finite(spec.up), self._finite(spec.down)
        return up.to(dtype) * spec.scaling, down.to(dtype)

    def parts(self, module: str) -> tuple[Tensor, Tensor, float]:
        """``(up, down, scaling)`` of one module as the file stores them: ``dW = scaling * up @ down``.

        For repeated reading of what :meth:`factors` checked once: values are not looked at, no number is converted.

        Args:
            module: One of ``self.modules``.

        Returns:
            ``up`` (d_out, rank) and ``down`` (rank, d_in) in the file's dtype, and the scaling.
        """
        spec = self.modules[module]
        return self.file.read(spec.up), self.file.read(spec.down), spec.scaling

    def extra(self, tensor: str) -> Tensor:
        """One ``modules_to_save`` tensor, exactly as stored."""
        return self._finite(tensor)

    def check_finite(self) -> None:
        """Read every tensor once.

        Raises:
            AdapterFormatError: If a value is NaN or infinite.
        """
        for name in self.file.entries:
            self._finite(name)

    def _finite(self, name: str) -> Tensor:
        tensor = self.file.read(name)
        if tensor.dtype.is_floating_point and not _all_finite(tensor):
            raise AdapterFormatError(
                f"{self.file.path}: tensor {name!r} holds NaN or infinite values; the training went wrong, "
                "so there is nothing to merge"
            )
        return tensor


def _all_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite, without a mask the size of the tensor."""
    if tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor)  # NaN propagates
    return bool(torch.isfinite(low) and torch.isfinite(high))


def read_adapter(folder: str | Path) -> Adapter:
    """Open a PEFT folder: check its configuration and header, read no tensor yet.

    Args:
        folder: Holds ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
        AdapterFormatError: If it is not such a folder, holds pickled weights, is of a kind that cannot be
            merged exactly, or a tensor contradicts the configuration.
    """
    folder = Path(folder)
    config = _read_config(folder)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise AdapterFormatError(
            f"{folder}: adapters of kind {kind!r} are not supported; supported is 'LORA'"
        )
    check_config(str(folder), config)
    if not (folder / TENSOR_FILE).is_file():
        pickles = sorted(path.name for path in folder.glob("*.bin")) + sorted(
            path.name for path in folder.glob("*.pt")
        )
        if pickles:
            raise AdapterFormatError(
                f"{folder}: {pickles[0]} holds pickled weights, which can run code when loaded; it was not opened. "
                "Save the adapter again with `save_pretrained(..., safe_serialization=True)`."
            )
        raise AdapterFormatError(f"{folder}: not a PEFT adapter folder: {TENSOR_FILE} is missing")
    file = TensorFile(folder / TENSOR_FILE, AdapterFormatError)
    modules, extras = read_modules(str(folder), config, file.entries)
    return Adapter(folder, config, file, modules, extras)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if not folder.is_dir():
        raise AdapterFormatError(f"{folder}: no such folder")
    if not path.is_file():
        raise AdapterFormatError(f"{folder}: not a PEFT adapter folder: {CONFIG_FILE} is missing")
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise AdapterFormatError(f"{path}: {path.stat().st_size} bytes is no adapter configuration")
    try:
        config = json.loads(path.read_bytes())
    except ValueError as reason:
        raise AdapterFormatError(f"{path}: not JSON ({reason})") from reason
    if not isinstance(config, dict):
        raise AdapterFormatError(f"{path}: expected a JSON object, found {type(config).__name__}")
    if not isinstance(config.get("base_model_name_or_path"), str) or not config["base_model_name_or_path"]:
        raise AdapterFormatError(
            f"{path}: base_model_name_or_path is {config.get('base_model_name_or_path')!r}; "
            "write the name of the base model the adapter was trained on"
        )
    if config.get("peft_type") == "LORA":
        _check_numbers(path, config)
    return config


def _check_numbers(path: Path, config: dict[str, Any]) -> None:
    for key in ("r", "lora_alpha"):
        value = config.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise AdapterFormatError(f"{path}: {key} is {value!r}; expected a number")
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(key) or {}, dict):
            raise AdapterFormatError(f"{path}: {key} is {config[key]!r}; expected an object")
