"""Pieces that the experiments share: text to train on, and what is measured on it."""
