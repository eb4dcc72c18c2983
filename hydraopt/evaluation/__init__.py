"""Measuring a task, and the gates a candidate must pass."""
