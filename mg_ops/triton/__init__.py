"""Mutual matching in Triton; the files have the names of those in csrc/ that they repeat."""
