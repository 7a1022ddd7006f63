"""Calibration: train the rewritten attention against the model that it came from."""
