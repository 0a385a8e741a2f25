"""Model, memory plan and data in one place: both passes of Iterative Patch Selection."""
