"""Speech: timestamps, and sounds heard window by window."""
