"""The latent diffusion model: networks, mathematics, training. Knows no data pipeline."""
