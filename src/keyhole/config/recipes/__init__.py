"""Settings for known data sets and domains, as YAML."""
