"""Training of the embedded model: autoencoder, then text encoder and denoiser together, then the judge."""
