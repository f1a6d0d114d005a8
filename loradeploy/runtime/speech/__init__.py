"""Speech: what a transcript begins with, its timestamps, and sounds heard window by window."""
