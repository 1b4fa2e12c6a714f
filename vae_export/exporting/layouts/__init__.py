"""Layouts of other tools, one module each: a function that writes a bundle in it, and a check of the target folder."""
