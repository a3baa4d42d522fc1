"""Parsing-guided attention: HPFA (source tokens in self-attention) and CAA (region-wise CLIP tokens)."""
