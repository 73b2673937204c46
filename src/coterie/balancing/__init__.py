"""Balancing: losses and controllers that keep the experts of a layer equally busy."""
