"""Calibration: where weights and text come from, and where activations live."""
