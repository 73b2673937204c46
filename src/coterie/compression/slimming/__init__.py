"""Methods that make experts narrower; importing this package's modules registers them."""
