"""Whole models composed of the parts: a small configurable decoder that transformers loads by its model type."""
