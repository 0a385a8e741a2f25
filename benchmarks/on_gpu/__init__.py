"""keyhole's first checks on a machine with an NVIDIA GPU and without a network; see README.md beside this file."""
