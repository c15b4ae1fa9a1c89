"""Anonymizers: the paper's, ours, and the rivals."""
