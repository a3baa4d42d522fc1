"""Guidance while sampling: scales for pose and source, and the pose field."""
