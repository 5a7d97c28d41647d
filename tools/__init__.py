"""Further commands, python -m tools.NAME; they parse, wire and print."""
