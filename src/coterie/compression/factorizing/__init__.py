"""Methods that store the matrices of experts as low-rank factors: one system per file."""
