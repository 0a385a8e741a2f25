"""A prediction, and one file for each way to show it: tables, GeoJSON, contact sheets. None reads the image again."""
