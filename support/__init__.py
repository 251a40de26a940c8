"""What a run needs around the method; it knows no model and no reward."""
