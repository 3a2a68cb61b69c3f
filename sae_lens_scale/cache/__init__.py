"""Activations of a language model, computed once for all the SAEs that train on them."""
