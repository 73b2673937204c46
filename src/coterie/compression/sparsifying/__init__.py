"""Methods that zero single weights, one file each. They remove no expert and change no shape."""
