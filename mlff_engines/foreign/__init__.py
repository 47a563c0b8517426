"""Other packages' models: their environments, and their weights in our architectures."""
