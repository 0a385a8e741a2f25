"""A budget of memory that is kept: measured, planned, capped, and followed."""
