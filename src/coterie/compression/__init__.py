"""Make a model smaller: profile, plan, apply; and the methods that decide."""
