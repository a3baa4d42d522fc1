"""What the body's nodes need of the host's inside: an output that has nothing to give."""

from __future__ import annotations

from comfy_execution.graph import ExecutionBlocker


def blocked(message: str) -> ExecutionBlocker:
    """In place of an output's value: who uses it does not run, and the page shows the message."""
    return ExecutionBlocker(message)
