"""Speech: timestamps, and sounds transcribed window by window."""
