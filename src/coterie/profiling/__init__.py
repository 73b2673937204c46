"""What a model's experts do on given text: observers, one per statistic, and the profile they fill."""
