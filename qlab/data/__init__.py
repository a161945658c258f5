"""Texts and images as calibration data."""
