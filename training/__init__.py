"""One training run; imports everything below but preprocessing."""
