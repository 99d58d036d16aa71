"""Checkpoint formats. They say what is stored, and know no method and no step."""
