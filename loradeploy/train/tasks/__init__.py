"""What each task trains: its examples, features and losses, in one table."""
