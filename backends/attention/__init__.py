"""Attention: which kernel answers which call, and the report of it."""
