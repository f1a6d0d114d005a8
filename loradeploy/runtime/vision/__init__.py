"""Prompts with images for a decoder and its vision tower: tokens, adapters, features."""
