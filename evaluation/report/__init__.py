"""The HTML report of an evaluation; imports what evaluation may."""
