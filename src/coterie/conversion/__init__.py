"""Models made of other models: experts cut into finer ones, spawned from one, or gathered from several."""
