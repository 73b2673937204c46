"""Expert banks and the functions that run them."""
