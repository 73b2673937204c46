"""A checkpoint through memory one layer at a time: reading, running in lockstep, writing, resuming."""
