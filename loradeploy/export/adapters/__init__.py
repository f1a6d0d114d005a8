"""The adapters of an export: read and held against the base, and the side inputs they need."""
