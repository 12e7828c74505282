"""What a model is: the VQVAE, the prior, and both with what they were trained on."""
