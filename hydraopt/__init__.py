"""Many task adapters of one language model, kept as one small bundle."""

from hydraopt.adapters import Adapter, read_adapter
from hydraopt.bundle import Bundle, verify
from hydraopt.errors import HydraoptError
from hydraopt.merging.merge import merge

__all__ = ["Adapter", "Bundle", "HydraoptError", "merge", "read_adapter", "verify"]
