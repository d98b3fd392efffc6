"""Closed-form calibration of a changed form."""
