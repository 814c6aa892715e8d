"""Looks at a machine and its network before a run: one function a check, no file written."""
