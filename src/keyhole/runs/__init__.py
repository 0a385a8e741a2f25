"""The folder of a run: what training writes there, and how it is read again and checked."""
