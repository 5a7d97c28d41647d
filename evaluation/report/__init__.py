"""The HTML report of an evaluation; may import what evaluation may."""
