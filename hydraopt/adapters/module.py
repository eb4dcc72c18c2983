"""What every kind of adapter is read into: modules, each a product of two factors, and whole tensors beside them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor

from hydraopt.adapters.tensor_file import TensorEntry
from hydraopt.errors import AdapterFormatError

PREFIX = "base_model.model."
"""How PEFT starts the names of tensors that lie inside the base model's modules."""

Layer = Literal["linear", "embedding", "prompt", "vector"]
"""What an update is added to: a weight, an embedding table, the input (virtual tokens), or a VeRA vector."""

Parts = tuple[Tensor, Tensor, float]
"""``(up, down, scaling)``: the update is ``scaling * up @ down``."""


@dataclass(frozen=True)
class AdapterModule:
    """One update of shape (d_out, d_in): its size, its scaling and the names of the tensors it is made of."""

    name: str
    d_out: int
    d_in: int
    rank: int
    layer: Layer
    scaling: float
    tensors: tuple[str, ...]  # in the order its kind reads them

    @property
    def numbers(self) -> int:
        """How many the two factors hold."""
        return self.rank * (self.d_out + self.d_in)


@dataclass(frozen=True)
class Source:
    """A folder being read: its configuration and its tensors' headers; a tensor itself only when asked for."""

    where: str
    config: Mapping[str, Any]
    entries: Mapping[str, TensorEntry]
    read: Callable[[str], Tensor]

    def refuse(self, message: str) -> AdapterFormatError:
        """The error to raise, naming the folder."""
        return AdapterFormatError(f"{self.where}: {message}")

    def matrix(self, name: str) -> tuple[int, int]:
        """Shape of a tensor that must be a matrix of floats.

        Raises:
            AdapterFormatError: If it is not.
        """
        entry = self.entries[name]
        if len(entry.shape) != 2 or not entry.dtype.is_floating_point:
            raise self.refuse(
                f"{name!r} has shape {list(entry.shape)} and dtype {entry.dtype}; expected a matrix of floats "
                "(convolutions are not supported)"
            )
        return entry.shape[0], entry.shape[1]

    def vector(self, name: str) -> int:
        """Length of a tensor that must be a vector of floats.

        Raises:
            AdapterFormatError: If it is not.
        """
        entry = self.entries[name]
        if len(entry.shape) != 1 or not entry.dtype.is_floating_point:
            raise self.refuse(
                f"{name!r} has shape {list(entry.shape)} and dtype {entry.dtype}; expected a vector of floats"
            )
        return entry.shape[0]


@dataclass(frozen=True)
class Contents:
    """What a kind finds in a folder."""

    modules: dict[str, AdapterModule]
    extras: tuple[str, ...]  # tensors carried as they are
    settings: dict[str, bool | int | float | str] = field(default_factory=dict)  # what writing it back needs


class Kind(ABC):
    """One kind of adapter: the plug-in point. To add a kind, write one of these and list it in ``kinds.py``.

    ``parts`` may compute, but must stay lazy: it reads only the tensors of the module it is asked for.
    """

    name: ClassVar[str]  # PEFT's peft_type
    refused: ClassVar[
        Mapping[str, str]
    ]  # settings that change what is computed in ways not supported, with the reason
    ignored: ClassVar[frozenset[str]]  # settings that `read` handles, or that say only how it was trained

    @abstractmethod
    def read(self, source: Source) -> Contents:
        """Sort the folder's tensors into modules and extras; no tensor may be left over."""

    @abstractmethod
    def parts(self, module: AdapterModule, read: Callable[[str], Tensor]) -> Parts:
        """The factors of one module."""
