"""Auxiliary terms, one class each."""
