"""What passes between sender and receiver: pixels, header, key, nonce."""
