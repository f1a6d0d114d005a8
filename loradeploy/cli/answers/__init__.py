"""The results that `loradeploy run` prints, by task."""
