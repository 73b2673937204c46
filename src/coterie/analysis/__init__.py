"""What a model's experts do, and what a change did to them: analyses over profiles, and the report of a run."""
