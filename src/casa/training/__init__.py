"""Training: recipes; samples, packs and a trainer for your own data."""
