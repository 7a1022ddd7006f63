"""What an author writes, how it is matched and put in place, and the contracts it is held to."""
