"""Record runs on a device and replay them, with inputs and outputs at constant addresses."""
