"""Corrections for what a selection drops, one file each."""
