"""The adapters of an export: read them, check them, and choose the side inputs they need."""
