"""Static block masks: one file each."""
