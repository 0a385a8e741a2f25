"""Settings with their defaults and reasons, where they are read from, and the recipes."""
