"""The fastest way to run a bundle on this processor."""
