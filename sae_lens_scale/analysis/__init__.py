"""What trained SAEs have learned: measurements on tensors and SAEs, and pictures."""
