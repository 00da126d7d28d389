"""Exports for hardware and runtimes, and the integer reference that they are compared with."""
