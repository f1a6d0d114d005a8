"""Audio inputs of speech models: files, features, languages. Needs numpy only."""
