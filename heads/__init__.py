"""Every margin by its paper's name, and Partial FC; imports nothing above distributed."""
