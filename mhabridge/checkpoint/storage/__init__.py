"""Bytes: where stored tensors lie, how they are read and written in pieces, and files that appear whole."""
