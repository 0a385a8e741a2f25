"""Memory budget: measured bytes, the plan made of them, and what happens when it is not enough."""
