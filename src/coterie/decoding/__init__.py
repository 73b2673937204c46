"""Change how a model decodes, at run time and without touching its weights."""
