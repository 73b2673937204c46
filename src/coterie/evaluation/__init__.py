"""What did it cost? Checkpoints compared on text, streamed."""
