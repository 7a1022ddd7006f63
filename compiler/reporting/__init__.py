"""What a compilation has to say: table, JSON, page, drawings."""
