"""The laboratory: grids of SAEs, their records, and the tables and figures made of them."""
