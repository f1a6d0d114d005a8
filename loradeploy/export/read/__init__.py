"""Read graphs of other exporters: choose, complete and normalize them before other changes."""
