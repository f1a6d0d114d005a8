"""What a check found, and the files and tables that show it."""
