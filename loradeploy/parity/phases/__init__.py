"""What every backend is led through: rows in phases, and what it shows of them."""
