"""The files beside a bundle's graph: the base's, an adapter's texts, and the config of genai."""
