"""Generated and published data sets."""
