"""Bundles and builds on disk: their records, folders and graphs."""
