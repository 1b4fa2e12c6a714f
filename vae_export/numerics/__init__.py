"""Noise, likelihoods, ELBO and pixels, in NumPy."""
