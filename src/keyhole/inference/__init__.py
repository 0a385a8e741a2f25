"""Predictions of a trained model: predict, evaluate, lesions, embed."""
