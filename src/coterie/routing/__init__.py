"""Routers: which experts a token runs, and with what weights. One file each; any of them fits any MoE model."""
