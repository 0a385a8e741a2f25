"""Which patches an image has, and where their pixels or features come from."""
