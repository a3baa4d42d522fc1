"""CFLD (arXiv 2402.18078)."""
