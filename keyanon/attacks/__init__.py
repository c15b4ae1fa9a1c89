"""What others make of published files."""
