"""What torch programs really run between the start and the wait of a reduce."""
