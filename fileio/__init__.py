"""Every file format, none of it trusted; imports the root's leaf modules only."""
