"""The compact PyTorch trainer. `config` reads without PyTorch; everything else needs the `train` extra."""
