"""Tensors to ring vectors and back: schema, clipping, fixed point, weights and metrics."""
