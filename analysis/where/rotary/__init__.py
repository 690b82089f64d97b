"""Rotary attention of the vision tower by axis and frequency."""
