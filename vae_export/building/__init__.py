"""A bundle to a build for a target."""
