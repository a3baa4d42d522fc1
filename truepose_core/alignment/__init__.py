"""Where a target position lies on the source person: the skeleton prior (no weights)."""
