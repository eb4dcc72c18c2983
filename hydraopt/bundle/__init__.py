"""The merged set on disk and in memory: write, read, verify, export, attach."""

from hydraopt.bundle.contents import Bundle, read_manifest, verify
from hydraopt.bundle.layout import Manifest

__all__ = ["Bundle", "Manifest", "read_manifest", "verify"]
