"""From archives to aligned records; imports nothing above fileio and distributed."""
