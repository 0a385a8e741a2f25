"""A prediction, and how it is shown: tables, GeoJSON, contact sheets."""
