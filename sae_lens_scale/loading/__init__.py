"""Loading language models to train autoencoders on."""
