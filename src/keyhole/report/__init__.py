"""Pictures of what a prediction rests on."""
