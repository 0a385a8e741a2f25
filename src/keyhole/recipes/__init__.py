"""Settings that belong together, as YAML: `keyhole train DATA --recipe NAME`."""
