"""Numbers before speed: what a kernel must show on a device before it is timed."""
