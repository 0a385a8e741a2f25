"""`keyhole check`: what is wrong with the data, before training."""
