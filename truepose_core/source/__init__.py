"""The person to show again: what was read of the source, and several sources in one."""
