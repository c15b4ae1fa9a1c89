"""The diffusion model, and its flow in both directions."""
