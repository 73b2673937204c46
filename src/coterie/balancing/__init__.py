"""Load balancing: how evenly the experts of a layer are used, and the rules and losses that even it out."""
