"""How alike, whose, how Gaussian: numbers from pictures."""
