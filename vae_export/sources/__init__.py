"""Trained models from somewhere, under one protocol."""
