"""The model tower: pure functions of params; knows nothing of training."""
