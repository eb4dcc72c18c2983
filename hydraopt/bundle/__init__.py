"""The merged set on disk and in memory: write, read, verify, export, attach."""

from hydraopt.bundle.contents import Bundle, verify
from hydraopt.bundle.layout import Manifest
from hydraopt.bundle.manifest_file import read_manifest

__all__ = ["Bundle", "Manifest", "read_manifest", "verify"]
