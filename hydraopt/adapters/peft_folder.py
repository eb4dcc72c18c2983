"""Adapters as PEFT saves them: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hydraopt.adapters.configuration import CONFIG_FILE, check_settings, read_config
from hydraopt.adapters.kinds import KINDS, find_kind
from hydraopt.adapters.module import AdapterModule, Source
from hydraopt.adapters.tensor_file import TensorEntry, TensorFile
from hydraopt.adapters.whole_tensors import MAGNITUDE, copied_module, is_saved, saved_modules
from hydraopt.errors import AdapterFormatError, HydraoptError
from hydraopt.finite import all_finite
from hydraopt.own_files import own_file

TENSOR_FILE = "adapter_model.safetensors"

__all__ = ["CONFIG_FILE", "TENSOR_FILE", "Adapter", "read_adapter"]


@dataclass(frozen=True)
class Adapter:
    """One task's adapter, read lazily: the header is in memory, tensors stay on disk.

    Made by :func:`read_adapter`; what it holds was checked there, but for the values themselves, which
    are checked to be finite when they are read.
    """

    folder: Path
    config: dict[str, Any]
    file: TensorFile
    modules: dict[str, AdapterModule]
    extras: tuple[str, ...]
    settings: dict[str, bool | int | float | str]

    @property
    def kind(self) -> str:
        """PEFT's name of the kind, such as ``LORA``."""
        return str(self.config["peft_type"])

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
        """Names of the layers the adapter replaces whole, as its configuration gives them, sorted."""
        whole = [name for name in self.extras if not name.endswith(MAGNITUDE) and copied_module(name) is None]
        names = saved_modules(self.config)
        return tuple(sorted(name for name in names if any(is_saved(tensor, name) for tensor in whole)))

    @property
    def tensors(self) -> dict[str, TensorEntry]:
        """The tensors the adapter is made of, sorted by name: not VeRA's projections, which follow from their key."""
        own = {name for module in self.modules.values() for name in module.tensors} | set(self.extras)
        return {name: entry for name, entry in self.file.entries.items() if name in own}

    @cached_property
    def reference_bytes(self) -> int:
        """Bytes of :attr:`tensors` at two bytes a number, plus those of the configuration.

        What storage ratios are measured against: a float32 file does not flatter the bundle.
        """
        numbers = sum(entry.numbers for entry in self.tensors.values())
        return 2 * numbers + (self.folder / CONFIG_FILE).stat().st_size

    @cached_property
    def meaning(self) -> bytes:
        """What the adapter computes but for its numbers, as canonical JSON: base model, scalings, names and shapes."""
        value = {
            "base_model": self.base_model,
            "revision": self.revision,
            "task_type": self.task_type,
            "kind": self.kind,
            "settings": self.settings,
            "modules": {name: vars(module) for name, module in self.modules.items()},
            "tensors": {name: [str(e.dtype), list(e.shape)] for name, e in self.tensors.items()},
        }
        return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of what the adapter computes: base model, scalings and tensors.

        It does not depend on the folder, the order of tensors in the file, or settings of the training.
        """
        digest = hashlib.sha256(self.meaning)
        with self.file.path.open("rb") as file:
            for entry in self.tensors.values():
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
        up, down, scaling = KINDS[self.kind].parts(self.modules[module], self._finite)
        return up.to(dtype) * scaling, down.to(dtype)

    def parts(self, module: str) -> tuple[Tensor, Tensor, float]:
        """``(up, down, scaling)`` of one module: ``dW = scaling * up @ down``.

        For repeated reading of what :meth:`factors` checked once: values are not looked at.

        Args:
            module: One of ``self.modules``.

        Returns:
            ``up`` (d_out, rank) and ``down`` (rank, d_in), in the file's dtype where its kind stores factors and in
            float32 where it computes them, and the scaling.
        """
        entry = self.modules[module]
        return KINDS[self.kind].parts(entry, self.file.read_all(entry.tensors).__getitem__)

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
        if tensor.dtype.is_floating_point and not all_finite(tensor):
            raise AdapterFormatError(
                f"{self.file.path}: tensor {name!r} holds NaN or infinite values; the training went wrong, "
                "so there is nothing to merge"
            )
        return tensor


def read_adapter(folder: str | Path) -> Adapter:
    """Open a PEFT folder: check its configuration and header, read no tensor yet.

    Args:
        folder: Holds ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
        AdapterFormatError: If it is not such a folder, holds pickled weights, is of a kind that cannot be
            merged exactly, or a tensor contradicts the configuration.
    """
    folder = Path(folder)
    config = read_config(folder)
    kind = find_kind(str(folder), config.get("peft_type"))
    check_settings(str(folder), config, kind.refused, kind.ignored)
    tensors = own_file(folder, TENSOR_FILE, AdapterFormatError)
    if not tensors.is_file():
        pickles = sorted(path.name for path in folder.glob("*.bin")) + sorted(
            path.name for path in folder.glob("*.pt")
        )
        if pickles:
            raise AdapterFormatError(
                f"{folder}: {pickles[0]} holds pickled weights, which can run code when loaded; it was not opened. "
                "Save the adapter again with `save_pretrained(..., safe_serialization=True)`."
            )
        raise AdapterFormatError(f"{folder}: not a PEFT adapter folder: {TENSOR_FILE} is missing")
    file = TensorFile(tensors, AdapterFormatError)
    try:
        contents = kind.read(Source(str(folder), config, file.entries, file.read))
    except HydraoptError:
        raise
    except (TypeError, ValueError, OverflowError, AttributeError, re.error) as reason:
        raise AdapterFormatError(
            f"{folder / CONFIG_FILE}: a setting has a value of another kind than PEFT writes ({reason}); "
            "save the adapter again"
        ) from reason
    return Adapter(folder, config, file, contents.modules, contents.extras, contents.settings)
