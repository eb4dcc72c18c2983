"""The merged set on disk and in memory: write, read, verify, export, attach."""
