"""A trained model to a bundle, and a bundle to the layouts of other tools."""
