"""Train sparse models with the Hugging Face Trainer."""
