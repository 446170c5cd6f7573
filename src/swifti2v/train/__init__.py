"""Training: synthetic clips now; objectives, loops and recipes later. Imported by nothing at run time."""
