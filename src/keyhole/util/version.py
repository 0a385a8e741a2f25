"""The version of the package, also written into the files that it makes."""

VERSION = "0.1.0"
