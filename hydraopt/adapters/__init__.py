"""PEFT adapter folders, read lazily into factors per module."""

from hydraopt.adapters.peft_folder import Adapter, read_adapter

__all__ = ["Adapter", "read_adapter"]
