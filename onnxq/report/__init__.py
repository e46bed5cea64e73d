"""What a compile did and why: the report as data, as JSON, and as a table for the terminal."""
