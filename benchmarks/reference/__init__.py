"""The parts of vs_reference.py: one module each, with what it measures and the table that shows it."""
