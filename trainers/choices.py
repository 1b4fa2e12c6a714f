"""The choices of a training run by name. Imports nothing else, so that `vae-export --help` starts fast."""

from typing import Literal

ModelName = Literal["linear", "mlp", "conv", "resnet"]
PosteriorName = Literal["diagonal_gaussian", "deterministic"]
LikelihoodName = Literal["bernoulli", "gaussian", "gaussian_fixed", "discretized_logistic", "none"]
Binarization = Literal["none", "static", "dynamic"]
ObjectiveName = Literal["elbo", "elbo_monte_carlo", "importance_weighted", "autoencoder"]
Kept = Literal["best", "last"]
Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["32-true", "bf16-mixed", "16-mixed"]
