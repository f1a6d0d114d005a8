"""Speech: timestamps, and long audio in windows."""
