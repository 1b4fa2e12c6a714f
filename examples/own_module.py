"""Export a module of your own, and run it.

    python examples/own_module.py

Needs the extras of `pip install '.[cpu,export]'`, run in the checkout.
"""

from pathlib import Path

import numpy as np
import torch

import vae_export


class MyVAE(torch.nn.Module):
    """`encode` returns a distribution, `decode` logits of pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Linear(64, 32)
        self.mean, self.scale = torch.nn.Linear(32, 4), torch.nn.Linear(32, 4)
        self.back = torch.nn.Sequential(torch.nn.Linear(4, 32), torch.nn.ReLU(), torch.nn.Linear(32, 64))

    def encode(self, x: torch.Tensor) -> torch.distributions.Normal:
        """(B, 1, 8, 8) → q(z|x)."""
        h = torch.tanh(self.body(x.flatten(1)))
        return torch.distributions.Normal(self.mean(h), torch.nn.functional.softplus(self.scale(h)) + 1e-3)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """(B, 4) → (B, 1, 8, 8)."""
        return self.back(z).unflatten(1, (1, 8, 8))


def main(bundle: Path) -> None:
    """Export, load without PyTorch's help, score."""
    torch.manual_seed(0)
    x = np.random.default_rng(0).random((4, 1, 8, 8), np.float32)
    certificate = vae_export.export(
        MyVAE(), bundle, example=x, likelihood="bernoulli", data_range=(0, 1), outputs="logits", overwrite=True
    )
    assert certificate.passed
    with vae_export.load(bundle) as vae:
        print(vae.elbo(x, seed=0).elbo)


if __name__ == "__main__":
    main(Path("out/own.bundle"))
