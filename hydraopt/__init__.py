"""Many task adapters of one language model, kept as one small bundle."""
