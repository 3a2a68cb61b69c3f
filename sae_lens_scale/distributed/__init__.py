"""Training of one SAE by several processes, which share out its tokens and its experts."""
