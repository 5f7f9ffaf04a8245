"""Betons (FFCV's dataset files): layout, manifest, opening and verifying."""
