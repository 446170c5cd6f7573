"""Many clips by many workers: a jobs file in, videos out, whatever dies meanwhile."""
