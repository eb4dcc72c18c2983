"""PEFT adapter folders, read lazily into factors per module."""
