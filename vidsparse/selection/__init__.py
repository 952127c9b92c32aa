"""Block selection from query and key, one file each."""
