"""What a machine makes of a model and its data: the speed beside the encoder's own, the memory over the patches."""
