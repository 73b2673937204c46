"""Methods that let a token run fewer of the experts its router picked: one file each."""
