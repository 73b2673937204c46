"""Methods that store weights in few bits: which matrix gets how many, and why."""
