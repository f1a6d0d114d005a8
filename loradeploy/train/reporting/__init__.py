"""What a run shows while it lasts, and what it leaves beside the adapter to be read."""
