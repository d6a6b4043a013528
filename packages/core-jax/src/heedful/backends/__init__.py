"""The backends of core, one file each."""
