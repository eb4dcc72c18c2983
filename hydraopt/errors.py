"""Every error hydraopt raises on purpose.

HydraoptError                 anything hydraopt rejects; exit code 2 on the command line
├── AdapterFormatError        a folder that is not an adapter we can read exactly
├── AdapterMismatchError      adapters that cannot be merged with one another
├── BudgetError               a byte budget or error bound nothing can meet
├── DeviceError               a device to compute on that is not here
├── BundleError               a bundle that is damaged, tampered with or incomplete
├── TaskFileError             a task file, its data or its base model cannot be used
├── ServiceError              a server we need is down, wrong, or answers nonsense
│   └── DeniedError           a server that works refuses our key
├── RecordError               a record, signature or pointer in the store is not what it should be
└── RefusedError              a gate or an approval said no; exit code 3

A message names the thing, the value found, and the way out. It never holds a secret.
"""

from __future__ import annotations


def first_line(reason: BaseException) -> str:
    """What another library's error says first; the name of its class if it says nothing."""
    return (str(reason).strip() or type(reason).__name__).splitlines()[0]


class HydraoptError(Exception):
    """Base class: catch this to handle anything hydraopt rejects."""

    exit_code = 2


class AdapterFormatError(HydraoptError, ValueError):
    """A folder is not an adapter, or of a kind that cannot be read exactly."""


class AdapterMismatchError(HydraoptError, ValueError):
    """Adapters disagree about the base model, a module or a name."""


class BudgetError(HydraoptError, ValueError):
    """No bundle meets the asked byte budget or error bound."""


class DeviceError(HydraoptError, ValueError):
    """There is no such device to compute on."""


class BundleError(HydraoptError, ValueError):
    """A bundle directory is damaged, incomplete, tampered with or too new."""


class TaskFileError(HydraoptError, ValueError):
    """A task file, its data or its base model cannot be used."""


class ServiceError(HydraoptError, RuntimeError):
    """A server cannot be reached, refuses us, or lacks what we rely on."""


class DeniedError(ServiceError):
    """A server refuses what we asked with this key, and will again."""


class RecordError(HydraoptError, ValueError):
    """A record, signature, version or channel pointer is not what it should be."""


class RefusedError(HydraoptError, RuntimeError):
    """A gate or an approval said no."""

    exit_code = 3
