"""What a user runs around a model: check, init, doctor, demo, bench."""
