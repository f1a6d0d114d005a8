"""What an export writes and the runtime reads: manifest, names, side-input factors. numpy only."""
