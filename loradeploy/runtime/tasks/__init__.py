"""What a bundle is for: text to text, to labels and to vectors, each row with its own adapter."""
