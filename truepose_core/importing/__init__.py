"""Weights of other systems: recognised and converted to one file of ours."""
