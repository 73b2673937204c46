"""Patterns: which experts each task needs, stored, found for a query, and loaded alone (PreMoe, arXiv:2505.17639)."""
