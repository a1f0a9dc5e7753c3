"""Tensors in, tensors out: each fast path stands beside a slow twin in float64."""
