"""How good is a clip? Measures that need a file, a flow or a learned network; the plain ones are in ``metrics``."""
