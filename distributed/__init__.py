"""The process group of torchrun and its collectives; imports the root's leaf modules only."""
