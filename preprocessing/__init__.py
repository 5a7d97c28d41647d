"""From archives to aligned records; begin with prepare.py. Imports fileio and distributed only."""
