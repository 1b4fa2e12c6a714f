"""Graphs on the CPU."""
