"""Methods that change what a layer computes and keep all of its experts."""
