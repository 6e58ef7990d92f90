"""Training of picture-world: autoencoder, then text encoder and denoiser together, then the judge."""
