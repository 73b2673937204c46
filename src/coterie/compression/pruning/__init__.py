"""Methods that remove experts: each gives every expert a score; the selector and the applier do the rest."""
