"""How far two arrays are from each other, and how far they may be."""
