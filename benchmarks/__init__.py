"""Experiments on Keel that are no part of it; run them from the repository's root."""
