"""What `loradeploy run` prints of each task."""
